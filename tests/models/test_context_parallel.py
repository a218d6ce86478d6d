"""Context parallelism: processes that share a clip train as one process that has it alone."""

import json
import shutil
import socket

import pytest
import torch

from tests.helpers.commands import TORCHRUN, phase1, scalars, weights
from tests.helpers.context_parallel import BATCH, CASES, TOKENS, WIDTH
from tests.helpers.forks import fork, forked, forked_twice, start_warm, statuses

PROCESSES = 4
LAYERS = 4  # of the backbone, and two of the control branch


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return what four processes measure: as two groups of two, a clip each, and as one group with both clips."""
    folder = tmp_path_factory.mktemp("group")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        world = {"WORLD_SIZE": str(PROCESSES), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    processes = []
    for rank in map(str, range(PROCESSES)):
        (folder / rank).mkdir()
        world |= {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": str(PROCESSES)}
        command = ["-m", "tests.helpers.context_parallel", folder / "results.json"]
        processes.append(forked(command, folder / rank, ACCELERATE_USE_CPU="true", **world))
    assert statuses(processes) == [0] * PROCESSES, (folder / "0/stderr").read_text()[-3000:]
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_a_split_clip_has_the_prediction_and_gradients_of_a_whole_one(case, degree, results):
    """Measured: at most 5e-7 and 1.1e-6 of the largest number in a tensor."""
    found = results[f"{case}, degree {degree}"]
    assert found["prediction"] < 2e-6
    assert found["gradient"] < 5e-6


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_evaluation_runs_whole_clips_that_differ_among_processes(case, degree, results):
    assert results[f"{case}, degree {degree}"]["whole again"] < 2e-6


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize(("case", "passes"), [("phase 1", 2), ("phase 1, checkpointed", 3)])
def test_what_a_process_sends_is_what_the_docs_say(case, passes, degree, results):
    batch = BATCH * degree // PROCESSES
    of_a_pass = 4 * batch * TOKENS * WIDTH * 4 * (degree - 1) // degree**2  # fp32
    assert results[f"{case}, degree {degree}"]["sent"] == LAYERS * passes * of_a_pass


def assert_same_training(out, reference):
    logged, expected = scalars(out), scalars(reference)
    for name in ("train/loss", "train/grad_norm", "validation/loss"):
        found = torch.tensor(logged[name])
        torch.testing.assert_close(found, torch.tensor(expected[name])[-len(found) :], rtol=1e-5, atol=0)
    assert len(logged["train/loss"]) >= 2
    for name, tensor in weights(reference / "final").items():
        torch.testing.assert_close(weights(out / "final")[name], tensor, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_run_trains_and_resumes_with_shared_clips_as_without(first, tiny_models, small_datasets, tmp_path):
    """Two processes share a clip: from the start, and from step 2 of a run that shared none; and the reverse."""
    degree, resume = "--context_parallel_degree=2", "--resume_from_checkpoint=latest"

    def command(name, *more, launcher=()):
        return phase1(tiny_models, small_datasets, tmp_path / name, "--max_train_steps=4", *more, launcher=launcher)

    done = start_warm(*command("shared", degree, launcher=TORCHRUN))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 clips x 2 micro-steps x 1 groups of 2 processes = 4 clips a step" in done.stdout
    assert "Warning" not in done.stderr
    assert_same_training(tmp_path / "shared", first[0])

    shutil.copytree(first[0] / "checkpoint-2", tmp_path / "later shared/checkpoint-2")
    assert statuses(forked_twice(command("later shared", degree, resume), tmp_path)) == [0, 0]
    assert "resumed with --context_parallel_degree" in (tmp_path / "0/stdout").read_text()
    assert_same_training(tmp_path / "later shared", first[0])

    shutil.copytree(tmp_path / "shared/checkpoint-2", tmp_path / "later alone/checkpoint-2")
    assert fork(*command("later alone", resume)).returncode == 0
    assert_same_training(tmp_path / "later alone", first[0])
