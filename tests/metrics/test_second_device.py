"""Measures with networks on a device that is not the CPU (tests/helpers/simulated_device.py)."""

import json

import pytest

from tests.helpers.commands import succeed
from tests.helpers.forks import fork
from tests.helpers.metrics_on_device import measure_all


@pytest.mark.slow
def test_values_are_those_of_the_cpu(networks, tmp_path):
    (tmp_path / "networks.json").write_text(json.dumps(networks))
    script = ["tests/helpers/on_simulated_device.py", "tests/helpers/metrics_on_device.py"]
    done = succeed(*script, tmp_path / "networks.json", by=fork)
    values = json.loads(done.stdout.splitlines()[-1])
    expected = measure_all(networks, "cpu")
    assert len(expected) == 13
    assert values == pytest.approx(expected, rel=1e-3, abs=1e-5)
