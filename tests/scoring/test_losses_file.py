"""The file that keeps a model's validation."""

import math
from dataclasses import replace

from c2r.scoring.losses_file import LossesFile
from c2r.scoring.run_datasets import ModelLosses
from c2r.scoring.statistics import Interval


def test_a_validation_is_read_only_if_it_was_made_from_the_same_key(tmp_path):
    file = LossesFile(tmp_path / "videos/m/.validation.json", "ab12")
    assert file.read() is None
    intervals = {"loss_cg": Interval(0.5, 0.4, 0.625), "control_gain_cg": Interval(1 / 3)}
    losses = ModelLosses({"loss": 0.1, "control_gain": 2.0}, intervals, {"cg": 2})
    file.write(losses)
    found = file.read()
    assert found.numbers == losses.numbers
    assert found.clips == losses.clips
    assert found.intervals["loss_cg"] == losses.intervals["loss_cg"]
    assert found.intervals["control_gain_cg"].mean == 1 / 3
    assert math.isnan(found.intervals["control_gain_cg"].low)
    assert replace(file, key="cd34").read() is None
    file.path.write_bytes(file.path.read_bytes()[:-10])  # as a copy that was interrupted
    assert file.read() is None
