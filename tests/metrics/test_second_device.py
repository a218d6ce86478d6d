"""Measures with networks on a device that is not the CPU (tests/helpers/simulated_device.py)."""

import json
import subprocess
import sys

import pytest

from tests.helpers.metrics_on_device import measure_all
from tests.helpers.source import ROOT


@pytest.mark.slow
def test_values_are_those_of_the_cpu(networks, tmp_path):
    (tmp_path / "networks.json").write_text(json.dumps(networks))
    script = ["tests/helpers/on_simulated_device.py", "tests/helpers/metrics_on_device.py"]
    done = subprocess.run(
        [sys.executable, *script, tmp_path / "networks.json"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    values = json.loads(done.stdout.splitlines()[-1])
    expected = measure_all(networks, "cpu")
    assert len(expected) == 13
    assert values == pytest.approx(expected, rel=1e-3, abs=1e-5)
