import json
import time
from argparse import Namespace
from multiprocessing import get_context
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from c2r import InputError, __version__
from c2r.models.controlnet import C2RControlNet
from c2r.training.checkpoint import checkpoint_bytes
from c2r.training.resume import (
    STATE,
    find_checkpoint,
    find_damage,
    list_checkpoints,
    lock_output_dir,
    require_resumable,
)
from c2r.training.shards import optimizer_shard
from tests.helpers.runs import build_run, load, save, train_one_step


def same_files(a, b):
    names = sorted(path.relative_to(a) for path in a.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(b) for path in b.rglob("*") if path.is_file())
    return [str(name) for name in names if (a / name).read_bytes() != (b / name).read_bytes()] == []


@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["--ema_decay=0.9"],
        ["--optimizer=adamw8bit"],
        ["--weight_storage=bf16", "--mixed_precision=bf16"],
    ],
)
@pytest.mark.parametrize("adversarial_weight", [0.0, 0.5])
def test_a_resumed_run_writes_the_same_checkpoint_byte_by_byte(extra, adversarial_weight, tmp_path):
    if "8bit" in "".join(extra):
        pytest.importorskip("bitsandbytes")
    whole = build_run(tmp_path / "whole", *extra, adversarial_weight=adversarial_weight)
    for _ in range(2):
        train_one_step(whole)
    whole.run.progress.best = {"loss": 0.25}
    whole.run.progress.add_validation({"loss": 0.5})
    save(whole)
    for _ in range(2):
        train_one_step(whole)
    save(whole)

    checkpoint = tmp_path / "whole/checkpoint-2"
    resumed = build_run(tmp_path / "resumed", *extra, checkpoint=checkpoint, adversarial_weight=adversarial_weight)
    load(resumed)
    assert resumed.run.progress.global_step == 2
    assert resumed.run.progress.best == {"loss": 0.25}
    assert resumed.run.progress.history == [{"step": 2, "loss": 0.5}]
    for _ in range(2):
        train_one_step(resumed)
    save(resumed)
    assert same_files(tmp_path / "resumed/checkpoint-4", tmp_path / "whole/checkpoint-4")
    for name in ["model", "domain_classifier"] if adversarial_weight else ["model"]:
        assert not same_files(tmp_path / "resumed/checkpoint-4" / name, checkpoint / name)


def test_a_checkpoint_holds_no_frozen_weights_and_has_the_computed_size(tmp_path):
    run = build_run(tmp_path, "--ema_decay=0.9")
    train_one_step(run)
    save(run)
    folder = tmp_path / "checkpoint-1"
    assert (
        load_file(folder / "model/diffusion_pytorch_model.safetensors").keys()
        == run.state.trainable.state_dict().keys()
    )
    assert sorted(path.name for path in folder.iterdir()) == [
        "ema-00000-of-00001.safetensors",
        "model",
        "optimizer-00000-of-00001.safetensors",
        STATE,
    ]
    tensors = [load_file(path) for path in folder.rglob("*.safetensors")]
    stored = sum(t.numel() * t.element_size() for tensors in tensors for t in tensors.values() if t.ndim)
    trainable = sum(parameter.numel() for parameter in run.state.trainable.parameters())
    assert stored == checkpoint_bytes(trainable, run.run.args)


def test_states_of_8_bit_adamw_that_share_tensors_are_saved(tmp_path):
    optim = pytest.importorskip("bitsandbytes.optim")
    module = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False), torch.nn.Linear(64, 64, bias=False))
    optimizer = SimpleNamespace(optimizer=optim.AdamW8bit(module.parameters()))
    module(torch.ones(1, 64)).sum().backward()
    optimizer.optimizer.step()
    shard = optimizer_shard(optimizer, dict(module.named_parameters()))
    save_file(shard, tmp_path / "optimizer-00000-of-00001.safetensors")
    assert torch.uint8 in {tensor.dtype for tensor in shard.values()}
    assert sum(tensor.numel() for tensor in shard.values() if tensor.dtype == torch.uint8) == 2 * 2 * 64 * 64


def test_old_checkpoints_are_pruned_after_the_new_one(tmp_path):
    run = build_run(tmp_path, "--checkpoints_total_limit=2")
    (tmp_path / ".checkpoint-9.tmp").mkdir()  # left by killed runs
    (tmp_path / ".checkpoint-1.removed").mkdir()
    for step in (2, 9, 10):
        save(run, step)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [9, 10]
    assert not list(tmp_path.glob(".checkpoint*"))


def test_the_newest_checkpoint_is_kept_although_later_ones_are_damaged(tmp_path):
    run = build_run(tmp_path, "--checkpoints_total_limit=1")
    for step in (10, 20):
        save(run, step)
    _truncate(tmp_path / "checkpoint-20")
    (tmp_path / ".checkpoint-20.old").mkdir()  # left by a run killed while it replaced checkpoint-20
    for step, left in ((11, [11, 20]), (20, [20]), (21, [21])):
        save(run, step)
        assert [number for number, _ in list_checkpoints(tmp_path)] == left
        assert find_damage(tmp_path / f"checkpoint-{step}") is None
    assert not list(tmp_path.glob(".checkpoint*"))


@pytest.fixture
def two_checkpoints(tmp_path):
    run = build_run(tmp_path)
    for step in (5, 20):
        save(run, step)
    return tmp_path


def test_find_checkpoint_takes_latest_names_and_paths_and_refuses_the_rest(two_checkpoints, tmp_path):
    (tmp_path / ".checkpoint-100.tmp").mkdir()
    (tmp_path / "other").mkdir()
    assert find_checkpoint(tmp_path / "missing", None) == (None, [])
    assert find_checkpoint(tmp_path / "missing", "latest") == (None, [])
    assert find_checkpoint(tmp_path, "latest") == (tmp_path / "checkpoint-20", [])
    assert find_checkpoint(tmp_path, "checkpoint-20")[0] == tmp_path / "checkpoint-20"
    with pytest.raises(InputError, match="checkpoint-20 is later"):
        find_checkpoint(tmp_path, "checkpoint-5")
    assert find_checkpoint("elsewhere", str(tmp_path / "checkpoint-5"))[0] == tmp_path / "checkpoint-5"
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "best").mkdir(parents=True)
    with pytest.raises(InputError, match="holds best of an earlier run"):
        find_checkpoint(elsewhere, str(tmp_path / "checkpoint-5"))
    for name in ("checkpoint-6", "other", str(tmp_path / "checkpoint-7")):
        with pytest.raises(InputError, match="--resume_from_checkpoint"):
            find_checkpoint(tmp_path, name)


def _truncate(path):
    file = path / "model/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_truncate, "bytes, not"),
        (lambda path: (path / "model/config.json").unlink(), "config.json is missing"),
        (lambda path: (path / STATE).unlink(), "no such file"),
        (lambda path: (path / STATE).write_text("{"), "not valid JSON"),
        (lambda path: (path / STATE).write_text("{}"), "has no entry files"),
    ],
)
def test_latest_skips_a_damaged_checkpoint_and_names_it(damage, reason, two_checkpoints):
    assert find_damage(two_checkpoints / "checkpoint-20") is None
    damage(two_checkpoints / "checkpoint-20")
    path, skipped = find_checkpoint(two_checkpoints, "latest")
    assert path == two_checkpoints / "checkpoint-5"
    assert len(skipped) == 1
    assert "checkpoint-20: incomplete" in skipped[0]
    assert reason in skipped[0]
    with pytest.raises(InputError, match="incomplete"):
        find_checkpoint(two_checkpoints, "checkpoint-20")


def test_a_run_with_damaged_checkpoints_alone_does_not_start_again(two_checkpoints):
    for name in ("checkpoint-5", "checkpoint-20"):
        (two_checkpoints / name / STATE).unlink()
    with pytest.raises(InputError, match=r"no checkpoint in .* is complete, the last one is .*checkpoint-20"):
        find_checkpoint(two_checkpoints, "latest")


@pytest.mark.parametrize("name", ["checkpoint-5", "best", "final"])
def test_an_earlier_run_is_not_overwritten(name, tmp_path):
    (tmp_path / "logs").mkdir()
    assert find_checkpoint(tmp_path, None) == (None, [])
    (tmp_path / name).mkdir()
    with pytest.raises(InputError, match="--resume_from_checkpoint latest"):
        find_checkpoint(tmp_path, None)


def _outlive_the_parent(started):
    started.set()
    time.sleep(60)


def test_a_second_run_may_not_write_into_the_same_folder(tmp_path):
    accelerator = Accelerator(cpu=True)
    lock = lock_output_dir(accelerator, tmp_path)
    with pytest.raises(InputError, match="another run is writing"):
        lock_output_dir(accelerator, tmp_path)
    # A data worker lives for seconds after its process was killed, and must not hold the lock.
    started = get_context("fork").Event()
    worker = get_context("fork").Process(target=_outlive_the_parent, args=(started,))
    worker.start()
    assert started.wait(60)
    lock.close()
    lock_output_dir(accelerator, tmp_path).close()
    assert worker.is_alive()
    worker.kill()


def resumable(run, checkpoint, inputs=None, config=None, **changed):
    config = {"injection_layers": [0, 1]} if config is None else config
    args = Namespace(**vars(run.run.args) | changed)
    inputs = {"backbone": "a"} if inputs is None else inputs
    require_resumable(checkpoint, run.run.accelerator, args, C2RControlNet, config, inputs)


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        ({"inputs": {"backbone": "b"}}, "backbone has changed"),
        ({"config": {"injection_layers": [0, 3]}}, "injection_layers [0, 1], but this run has [0, 3]"),
        ({"optimizer": "adamw8bit"}, "--optimizer adamw8bit"),
        ({"ema_decay": 0.9}, "--ema_decay 0.9"),
        ({"seed": 5}, "--seed 5"),
        ({"dit_path": "a.safetensors"}, "--dit_path a.safetensors: "),
        ({"adversarial_weight": 0.1}, "--adversarial_weight 0.1"),
    ],
)
def test_another_run_than_the_checkpoints_is_refused(changed, part, two_checkpoints):
    run = build_run(two_checkpoints)
    resumable(run, two_checkpoints / "checkpoint-20")
    with pytest.raises(InputError) as error:
        resumable(run, two_checkpoints / "checkpoint-20", **changed)
    assert part in str(error.value)


def test_an_average_is_not_dropped_silently(tmp_path):
    run = build_run(tmp_path, "--ema_decay=0.9")
    save(run, 1)
    resumable(run, tmp_path / "checkpoint-1")
    with pytest.raises(InputError, match="holds an average, which would be lost"):
        resumable(run, tmp_path / "checkpoint-1", ema_decay=None)


def test_a_domain_classifier_is_not_dropped_silently(tmp_path):
    run = build_run(tmp_path, adversarial_weight=0.1)
    save(run, 1)
    resumable(run, tmp_path / "checkpoint-1", adversarial_weight=0.3)
    with pytest.raises(InputError, match="has a domain classifier") as error:
        resumable(run, tmp_path / "checkpoint-1", adversarial_weight=0)
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_another_version_is_refused_before_a_model_is_loaded(two_checkpoints):
    state = json.loads((two_checkpoints / "checkpoint-20" / STATE).read_text())
    del state["progress"]["log_losses"]
    state["version"] = "0.0.1"
    (two_checkpoints / "checkpoint-20" / STATE).write_text(json.dumps(state))
    with pytest.raises(InputError, match=rf"written by version 0.0.1, this is {__version__}"):
        resumable(build_run(two_checkpoints), two_checkpoints / "checkpoint-20")


def test_8_bit_states_of_another_engine_are_refused(two_checkpoints):
    path = two_checkpoints / "checkpoint-20"
    state = json.loads((path / STATE).read_text())
    state |= {"sharding": "zero3", "num_processes": 8}
    state["options"]["optimizer"] = "adamw8bit"
    (path / STATE).write_text(json.dumps(state))
    blocks = "quantised in blocks of DeepSpeed ZeRO-3 on 8 processes, but this run has one process"
    with pytest.raises(InputError, match=blocks):
        resumable(build_run(two_checkpoints), path, optimizer="adamw8bit")


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    run = build_run(tmp_path)
    save(run, 1)
    with torch.no_grad():
        next(run.state.trainable.parameters()).view(-1)[0] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        save(run, 2)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [1]


def test_a_save_without_disk_space_fails_and_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    run = build_run(tmp_path)
    save(run, 1)
    monkeypatch.setattr("c2r.training.checkpoint.shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match="GB free"):
        save(run, 2)
    assert find_checkpoint(tmp_path, "latest") == (tmp_path / "checkpoint-1", [])
    assert not list(tmp_path.glob(".checkpoint*"))
