"""A phase 2 run whose CG monitor lowers the CG share."""

import json
import re
import shutil

import pytest

from tests.helpers.commands import phase2, same, scalars, succeed, weights
from tests.helpers.datasets import write_monitored_datasets
from tests.helpers.forks import fork, forked_twice, statuses
from tests.helpers.sample_videos import difference, row_of

# Every CG look is above this bound: the controller acts at every sampling.
ALWAYS = ["--monitor_bound=-9", "--monitor_patience=1", "--cg_ratio=0.5", "--cg_ratio_min=0.2"]
OPTIONS = ["--max_train_steps=4", "--sample_steps=1", "--dataloader_num_workers=2"]
OPTIONS += ["--num_samples=4", "--num_inference_steps=1"]


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """Real videos, and CG pairs with another look."""
    return write_monitored_datasets(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def lowered(first, tiny_models, datasets, tmp_path_factory):
    """A run whose controller has lowered the CG share."""
    out = tmp_path_factory.mktemp("run") / "lowered"
    done = succeed(*phase2(tiny_models, datasets, first[0] / "final", out, *OPTIONS, *ALWAYS), by=fork)
    return out, done


def test_the_cg_share_is_lowered_to_its_minimum_and_logged(lowered):
    out, done = lowered
    text = done.stdout + done.stderr
    assert len(re.findall(r"step \d: CG look .*: texture", text)) == 4
    assert "step 1: cg_ratio lowered from 0.5 to 0.25" in text
    assert "step 2: cg_ratio lowered from 0.25 to 0.2" in text
    assert text.count("cg_ratio lowered") == 2
    # At the minimum the controller can only advise.
    assert "consider --real_weight or --control_augmentation" in text
    logged = scalars(out)
    assert logged["monitor/cg_ratio"] == pytest.approx([0.25, 0.2, 0.2, 0.2])
    assert {"monitor/cg_look", "monitor/cg_look_low", "monitor/cg_dinov3_accuracy"} <= logged.keys()
    assert logged["monitor/cg_dinov3_accuracy"] == [1] * 4  # otherwise rounding could decide this test
    metrics = json.loads((out / "final/c2r.json").read_text())["metrics"]
    assert metrics["cg_look_low"] <= metrics["cg_look"] <= metrics["cg_look_high"]
    # A change takes effect after the four batches in flight: six of the run's eight have 0.5, two have 0.25.
    assert metrics["cg_share"] == 7 / 16


def test_a_run_resumed_after_the_first_change_ends_identically(lowered, first, tiny_models, datasets, tmp_path):
    shutil.copytree(lowered[0] / "checkpoint-2", tmp_path / "checkpoint-2")
    options = [*OPTIONS, *ALWAYS, "--resume_from_checkpoint=latest"]
    succeed(*phase2(tiny_models, datasets, first[0] / "final", tmp_path, *options), by=fork)
    assert same(weights(tmp_path / "final"), weights(lowered[0] / "final"))
    states = [json.loads((out / "checkpoint-4/state.json").read_text()) for out in (tmp_path, lowered[0])]
    for state in states:
        del state["progress"]["logs"]["train/samples_per_second"]
    assert states[0] == states[1]


def test_two_processes_make_the_same_videos_and_lower_the_share_alike(lowered, first, tiny_models, datasets, tmp_path):
    options = [*OPTIONS, *ALWAYS, "--train_batch_size=1"]
    out = tmp_path / "out"
    processes = forked_twice(phase2(tiny_models, datasets, first[0] / "final", out, *options), tmp_path)
    assert statuses(processes) == [0, 0], (tmp_path / "0/stderr").read_text()[-3000:]
    assert scalars(out)["monitor/cg_ratio"] == pytest.approx([0.25, 0.2, 0.2, 0.2])
    for number in range(4):
        ours, theirs = (row_of(run / f"samples/step-2/{number}.mp4") for run in (out, lowered[0]))
        assert difference(ours, theirs) < 1  # sums are computed in another order
