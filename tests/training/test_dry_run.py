import re

import pytest

from c2r.data.buckets import Bucket
from c2r.training.dry_run import limit_to_dry_run, projection
from c2r.training.timings import Timings
from tests.helpers.clips import BUCKET, clip, clips_of
from tests.helpers.commands import ENGINES, phase1, phase2, succeed
from tests.helpers.forks import fork
from tests.helpers.options import options
from tests.helpers.runs import run_of


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_dry_run_of_phase_2_trains_resumes_and_leaves_no_files(first, tiny_models, small_datasets, tmp_path):
    command = phase2(tiny_models, small_datasets, first[0] / "final", tmp_path / "out")
    done = succeed(*command, "--dry_run", "--max_train_steps=1000", "--checkpoints_total_limit=1", by=fork)
    out = done.stdout
    assert "to step 1" in out
    assert re.search(r"resumed from \S+\.dry_run/checkpoint-1 at step 1", out)
    assert "step 3: validation loss" in out
    assert "final/ and best/" in out
    assert "dry run: passed" in out
    assert re.search(r"measured: \d+\.\d\d s a step, \d+\.\d\d s a validation, \d+\.\d\d s a checkpoint", out)
    assert re.search(r"projected: .* in all: 1,000 steps .*, 501 validations .*, 500 checkpoints", out)
    assert "GiB of the machine's memory at the peak" in out
    assert "1,000 steps are" in out  # the preflight describes the planned run
    assert not files(tmp_path)


@pytest.mark.slow
def test_a_dry_run_of_phase_1_works_on_split_weights(tiny_models, small_datasets, tmp_path):
    command = phase1(tiny_models, small_datasets, tmp_path / "out", "--dry_run", launcher=ENGINES["zero3"])
    # Not by `start_warm`: the one test that starts DeepSpeed as a user does.
    assert "dry run: passed" in succeed(*command).stdout
    assert not files(tmp_path)


def test_a_failed_dry_run_leaves_no_files_and_an_earlier_run_unchanged(first, tiny_models, small_datasets):
    before = files(first[0])
    done = fork(*phase1(tiny_models, small_datasets, first[0], "--dry_run", "--dit_path=missing.safetensors"))
    assert done.returncode != 0
    assert "error: missing.safetensors: no such .safetensors or .gguf file" in done.stderr
    assert files(first[0]) == before
    assert not list(first[0].parent.glob(".*"))


def test_a_dry_run_trains_on_no_more_clips_than_its_steps_draw():
    tall = Bucket(9, 48, 32)
    clips = clips_of(*(clip(str(i), bucket=tall if i % 2 else BUCKET) for i in range(1000)))
    assert limit_to_dry_run(clips, run_of(options())) is clips  # batch 2 x accumulation 2
    chosen = limit_to_dry_run(clips, run_of(options(["--dry_run"])))
    # Clips of the largest bucket: they need the most memory.
    assert [(c.name, c.bucket) for c in chosen] == [(str(2 * i + 1), tall) for i in range(3 * 2 * 2)]


def test_the_projection_adds_up_all_parts_of_a_run():
    args = options(["--max_train_steps=1000", "--checkpointing_steps=300", "--validation_steps=250"])
    first = Timings(to_encode={"latents": 600}, seconds_per_clip={"latents": 12.0}, last={"projection": 30.0})
    last = Timings(last={"validation": 10.0, "checkpoint": 5.0, "writing": 2.0}, samples_per_second=2.0)
    lines = "\n".join(projection(args, first, last, samples=8, num_trainable=10**9))
    assert "4.00 s a step, 10.00 s a validation, 5.00 s a checkpoint" in lines
    assert (
        "1,000 steps 66.7 min, 5 validations 50.0 s, 4 checkpoints 20.0 s, "
        "fit of the control's projection 30.0 s, encoding the latents of 600 clips 2.0 h" in lines
    )
    assert "3.1 h in all" in lines
    assert "up to 60.00 GB in out" in lines
