"""Phase 2 with injection latent: trained from the released weights, resumed, generated from."""

import json
import shutil

import pytest
import torch

from c2r.generate import main
from c2r.models.controlnet_files import load_controlnet
from tests.helpers.commands import ENGINES, phase2, same, scalars, succeed, weights
from tests.helpers.forks import fork, start_warm
from tests.helpers.released import released_tensors, save_released


@pytest.fixture(scope="module")
def run(tiny_models, small_datasets, tmp_path_factory):
    """Run phase 2 on released weights; given a folder's name and options, return the folder and the output."""
    folder = tmp_path_factory.mktemp("latent")
    released = save_released(folder / "adapter.safetensors")

    def run(name, *options, fails=False):
        options = ["--injection=latent", "--max_train_steps=4", "--ema_decay=0.9", "--lr_warmup_steps=0", *options]
        command = phase2(tiny_models, small_datasets, tiny_models / "pipeline", folder / name, *options)
        command.append(f"--cache_dir={folder / 'cache'}")
        if fails:
            return folder / name, fork(*command).stderr
        return folder / name, succeed(*command, by=fork).stdout

    run.released = released
    return run


@pytest.fixture(scope="module")
def whole(run):
    return run("whole", f"--resume_controlnet_from={run.released}")[0]


def test_it_trains_from_the_released_weights(whole):
    config = json.loads((whole / "final/config.json").read_text())
    assert (config["injection"], config["injection_layers"]) == ("latent", [])
    trained, released = weights(whole / "final"), released_tensors()
    assert len(trained) == len(released) == 6
    change = (trained["control_adapter.proj.weight"] - released["proj.weight"]).abs()
    assert 0 < change.max() < 0.02  # four steps of 1e-3, averaged
    assert trained["control_adapter.gate"] != released["gate"]
    assert all(torch.isfinite(torch.tensor(values)).all() for values in scalars(whole).values())
    assert scalars(whole)["validation/control_gain"][0] != 0  # unlike control blocks, it acts from the start


def test_it_resumes_bit_for_bit(run, whole):
    halves = whole.with_name("halves")
    shutil.copytree(whole / "checkpoint-2", halves / "checkpoint-2")
    _, output = run("halves", "--resume_from_checkpoint=latest")
    assert "checkpoint-2 at step 2" in output
    assert same(weights(halves / "final"), weights(whole / "final"))


def test_it_generates(whole, small_datasets, tmp_path):
    control = small_datasets / "cg/c0.mp4"
    arguments = ["--prompt=a street", f"--control_video={control}", "--num_inference_steps=2"]
    main([f"--model={whole / 'final'}", *arguments, f"--output={tmp_path / 'out.mp4'}"])
    assert (tmp_path / "out.mp4").stat().st_size > 0


def test_weights_of_another_shape_are_refused_with_the_options_that_fit(run, whole):
    _, errors = run("other", "--injection=blocks", f"--resume_controlnet_from={whole / 'final'}", fails=True)
    assert f"--resume_controlnet_from {whole / 'final'}: has injection latent; give --injection latent" in errors
    _, errors = run("other", "--causal_control", f"--resume_controlnet_from={whole / 'final'}", fails=True)
    assert f"{whole / 'final'}: its adapter is not causal; leave --causal_control out" in errors
    _, errors = run("absent", f"--resume_controlnet_from={whole / 'none'}", fails=True)
    assert "no such folder or file; give best/ or final/ of phase 2" in errors


def test_causal_control_is_trained_and_saved(run):
    out, _ = run("causal", "--causal_control", "--max_train_steps=1", "--num_samples=0")
    assert load_controlnet(out / "final").control_adapter.temporal_downsample.past == 8
    _, errors = run("other", f"--resume_controlnet_from={out / 'final'}", fails=True)
    assert f"{out / 'final'}: its adapter is causal; give --causal_control" in errors


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero3", "fsdp2"])
def test_engines_train_it_as_one_process_does(engine, run, whole, tiny_models, small_datasets):
    out = whole.with_name(engine)
    options = [
        "--injection=latent",
        "--max_train_steps=4",
        "--ema_decay=0.9",
        "--lr_warmup_steps=0",
        "--num_samples=0",
    ]
    options += [f"--resume_controlnet_from={run.released}", f"--cache_dir={whole.with_name('cache')}"]
    options.append("--train_batch_size=1")  # of each of two processes
    command = phase2(tiny_models, small_datasets, tiny_models / "pipeline", out, *options, launcher=ENGINES[engine])
    succeed(*command, by=start_warm)
    assert scalars(out)["train/loss"] == pytest.approx(scalars(whole)["train/loss"], rel=1e-4)
    trained, expected = weights(out / "final"), weights(whole / "final")
    assert trained.keys() == expected.keys()
    for name, tensor in trained.items():
        # AdamW makes full steps of gradients that are nothing but rounding.
        assert (tensor - expected[name]).abs().mean() < 1e-4, name
