import json
import math
import shutil
from argparse import Namespace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from c2r import InputError
from c2r.data.buckets import Bucket
from c2r.estimation.configs import ModelConfigs
from c2r.estimation.report import estimate_run
from c2r.files import existing_parent
from c2r.models.controlnet import SHARED_CONFIG, C2RControlNet
from c2r.models.parts import check_pipeline_parts
from c2r.training.preflight import (
    count_parameters,
    fingerprint_backbone,
    preflight,
    require_access,
    require_splittable,
    run_bytes,
)
from c2r.units import size_text
from tests.helpers.options import options
from tests.helpers.runs import run_of
from tests.helpers.tiny import FEATURE_DIM, tiny_transformer

CONFIG = dict(tiny_transformer().config)


def mixture(domain, count):
    return SimpleNamespace(domain=domain, train=[None] * count)


def check(out, *argv, cg_ratio=0.0, trainable=1000, planned=None):
    args = options([f"--output_dir={out}", "--height=32", "--width=48", *argv])
    args.cg_ratio = cg_ratio
    run = run_of(args, planned=planned or args)
    preflight(run, [mixture("real", 30), mixture("cg", 5)], ModelConfigs(CONFIG), trainable=trainable, frozen=500)


@pytest.mark.parametrize("warmup", [20, 100])
def test_preflight_prints_batches_parameters_memory_and_disk(warmup, tmp_path, capsys):
    steps = ["--max_train_steps=30", "--checkpointing_steps=10", f"--lr_warmup_steps={warmup}"]
    check(tmp_path / "out", *steps, cg_ratio=0.25)
    out = capsys.readouterr().out
    assert "2 clips x 2 micro-steps x 1 processes = 4 clips a step" in out
    assert "30 steps are 3.00 epochs of 30 real and 6.00 epochs of 5 cg clips" in out
    assert "1,000 parameters train, 500 are frozen" in out
    assert "GiB at the peak of a step, computed" in out
    assert "a checkpoint has 12.00 kB, the run up to 48.00 kB" in out
    assert not (tmp_path / "out").exists()
    assert ("--lr_warmup_steps 100: the learning rate is never reached" in out) == (warmup == 100)


def test_the_preflight_of_a_dry_run_describes_the_planned_run(tmp_path, capsys):
    planned = options([f"--output_dir={tmp_path}", "--max_train_steps=3000"])
    planned.cg_ratio = 0.0
    check(tmp_path, "--max_train_steps=3", "--dry_run", planned=planned)
    assert "3,000 steps are 400.00 epochs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "checkpoints", "bytes_each"),
    [
        (["--max_train_steps=100", "--checkpointing_steps=30"], 4, 12),
        (["--max_train_steps=100", "--checkpointing_steps=30", "--ema_decay=0.9"], 4, 16),
        (["--max_train_steps=100", "--checkpointing_steps=30", "--optimizer=adamw8bit"], 4, 6),
        # One more, until the oldest is deleted.
        (["--max_train_steps=100", "--checkpointing_steps=30", "--checkpoints_total_limit=2"], 3, 12),
        # --save_every_minutes may fill the limit.
        (["--checkpoints_total_limit=5", "--save_every_minutes=5"], 6, 12),
    ],
)
def test_the_disk_space_of_a_run_is_computed(argv, checkpoints, bytes_each):
    assert run_bytes(options(argv), 1000) == checkpoints * bytes_each * 1000 + 3 * 4 * 1000


def test_the_disk_space_has_no_bound_without_a_checkpoint_limit():
    assert run_bytes(options(["--save_every_minutes=5"]), 1000) is None


def test_a_run_that_does_not_fit_the_disk_is_refused(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(InputError, match=r"--output_dir .* needed .* free; make room, or keep fewer"):
        check(tmp_path, "--max_train_steps=10", "--checkpointing_steps=10", trainable=free // 20)
    # Space taken by earlier checkpoints is not needed again.
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5/weights").touch()
    with open(tmp_path / "checkpoint-5/weights", "wb") as file:
        file.truncate(free)  # sparse: takes no space
    check(tmp_path, "--max_train_steps=10", "--checkpointing_steps=10", trainable=free // 20)


@pytest.mark.parametrize(
    ("share", "more", "message"),
    [(0.9, 0, "refused"), (1, 2**30, "may not fit: try --dry_run"), (1, 4 * 2**30, None)],
)
def test_a_model_too_large_for_the_device_is_refused_and_a_tight_one_warned_about(
    share, more, message, tmp_path, monkeypatch, capsys
):
    args = options([f"--output_dir={tmp_path}", "--max_train_steps=10", "--checkpointing_steps=10"])
    configs = ModelConfigs(CONFIG)
    estimate = estimate_run(args, configs, Bucket(81, 480, 832), step_only=True)
    total = int(share * estimate.total(estimate.largest)) + more
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Namespace(total_memory=total))
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(type(accelerator), "device", torch.device("cuda"))
    run = run_of(args, accelerator)
    if message == "refused":
        with pytest.raises(InputError, match=r"but the device has .* GiB; shard the model .* --train_batch_size"):
            preflight(run, [mixture("real", 30)], configs, trainable=1000, frozen=0)
        return
    preflight(run, [mixture("real", 30)], configs, trainable=1000, frozen=0)
    printed = capsys.readouterr().out
    assert f"{estimate.total(estimate.largest) / 2**30:.1f} GiB at the peak of a step, computed, of" in printed
    assert ("may not fit" in printed) == (message is not None)


WAN = {"num_heads": 12, "patch_size": [1, 2, 2]}


def test_heads_and_tokens_that_do_not_divide_are_refused_with_what_does():
    require_splittable(1, **WAN, buckets=[Bucket(5, 16, 16)])
    require_splittable(4, **WAN, buckets=[Bucket(81, 480, 832), Bucket(1, 32, 32)])
    with pytest.raises(InputError, match="12 attention heads are split too; give one of 2, 3, 4, 6, 12"):
        require_splittable(5, **WAN, buckets=[])
    for bucket, fitting in {Bucket(17, 208, 336): (17, 208, 320), Bucket(1, 16, 48): (1, 16, 64)}.items():
        with pytest.raises(InputError, match=f"clips of {bucket} .* give clips of {Bucket(*fitting)}, say"):
            require_splittable(4, **WAN, buckets=[Bucket(*fitting), bucket])


def test_the_preflight_of_shared_clips_counts_them_once_and_refuses_no_memory(tmp_path, monkeypatch, capsys):
    args = options([f"--output_dir={tmp_path}", "--context_parallel_degree=2", "--checkpointing_steps=10"])
    accelerator = Accelerator(cpu=True)
    run = run_of(args, accelerator)
    monkeypatch.setattr(type(accelerator), "num_processes", 4)
    monkeypatch.setattr(type(accelerator), "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Namespace(total_memory=1))
    preflight(run, [mixture("real", 30)], ModelConfigs(CONFIG), trainable=1000, frozen=0)
    out = capsys.readouterr().out
    assert "2 clips x 2 micro-steps x 2 groups of 2 processes = 8 clips a step" in out
    assert "computed for whole clips: the 2 processes of a group need less" in out


def test_parameters_are_counted_without_creating_the_model():
    shared = {name: CONFIG[name] for name in SHARED_CONFIG}
    config = shared | {"injection_layers": [0, 2], "feature_dim": FEATURE_DIM}
    made = C2RControlNet(**config)
    assert count_parameters(C2RControlNet, config) == sum(p.numel() for p in made.parameters())


def test_a_model_that_cannot_be_fetched_is_named(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="no such model folder"):
        require_access(tmp_path / "missing")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="nobody/nothing: not a local folder, and it cannot be fetched"):
        require_access("nobody/nothing")


@pytest.mark.parametrize("part", ["vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"])
def test_an_incomplete_encoder_is_named_before_it_is_loaded(part, tiny_models, tmp_path):
    folder = shutil.copytree(tiny_models / "pipeline", tmp_path / "pipeline")
    check_pipeline_parts(folder)
    file = folder / part
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(InputError, match=file.name):
        check_pipeline_parts(folder)
    file.unlink()
    with pytest.raises(InputError, match="has no safetensors weights"):
        check_pipeline_parts(folder)


def test_the_backbone_must_be_what_phase_1_saved(first, tiny_models, tmp_path):
    fingerprinted = partial(fingerprint_backbone, Accelerator(cpu=True), "dit_path")
    base = tiny_models / "pipeline"
    folder = shutil.copytree(first[0] / "best", tmp_path / "best")
    contract = json.loads((folder / "c2r.json").read_text())
    assert fingerprinted(folder, base) == contract["weights_sha256"]
    # A folder without a contract is taken as it is.
    assert len(fingerprinted(base, base)) == 64
    tiny_transformer(seed=5).save_pretrained(folder)
    with pytest.raises(InputError, match=r"^--dit_path .*not those that its c2r.json names"):
        fingerprinted(folder, base)
    (folder / "c2r.json").write_text(
        json.dumps(contract | dict.fromkeys(("backbone", "dinov3"), "x") | {"phase": 2, "backbone_sha256": "0"})
    )
    with pytest.raises(InputError, match=r"^--dit_path .*a model of phase 2; give best/ or final/ of phase 1"):
        fingerprinted(folder, base)


def test_existing_parent_is_the_nearest_folder_that_exists(tmp_path):
    assert existing_parent(tmp_path / "a/b/c") == tmp_path
    assert existing_parent(tmp_path) == tmp_path


@pytest.mark.parametrize(("count", "text"), [(12_000, "12.00 kB"), (9.22e9, "9.22 GB"), (1.5e12, "1.50 TB")])
def test_sizes_are_printed_with_units(count, text):
    assert size_text(count) == text
    assert not math.isnan(count)
