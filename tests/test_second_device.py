"""Every command, whole, on a device that is not the CPU (tests/helpers/simulated_device.py)."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from c2r.data.video import read_window
from tests.helpers.commands import SIZE, launch, phase1, phase2, same, scalars, succeed, weights
from tests.helpers.datasets import write_monitored_datasets
from tests.helpers.device_mistakes import EXPRESSIONS, MISTAKES, RUN, refuses
from tests.helpers.forks import fork, start_warm
from tests.helpers.sample_videos import difference, row_of

ON_DEVICE = "tests/helpers/on_simulated_device.py"

#: Largest relative difference between two devices in fp32, after four steps: they compute sums in another order.
ROUNDING = 1e-4


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The cache of all runs on the device, which encode on it too."""
    return f"--cache_dir={tmp_path_factory.mktemp('cache')}"


def assert_close(ours, theirs, tolerance=ROUNDING):
    # Single weights may differ more: AdamW makes full steps of gradients that are nothing but rounding.
    assert (ours.float() - theirs.float()).abs().mean() <= tolerance * theirs.float().abs().mean()


def assert_same_training(ours, theirs):
    """Check the weights, losses and gradients of two runs."""
    our_weights, their_weights = weights(ours / "final"), weights(theirs / "final")
    assert our_weights.keys() == their_weights.keys()
    for name, weight in their_weights.items():
        assert_close(our_weights[name], weight)
    ours, theirs = scalars(ours), scalars(theirs)
    for tag in ("validation/loss", "train/loss", "train/grad_norm"):
        assert ours[tag] == pytest.approx(theirs[tag], rel=ROUNDING)


@pytest.fixture(scope="module")
def first_on_device(tiny_models, small_datasets, cache, tmp_path_factory):
    """The run `first`, launched as on a machine with one GPU."""
    out = tmp_path_factory.mktemp("run") / "phase1"
    launcher = [*launch("single_gpu.yaml", 1), ON_DEVICE]
    command = phase1(tiny_models, small_datasets, out, "--max_train_steps=4", cache, launcher=launcher)
    succeed(*command, by=start_warm)
    return out


def test_phase_1_trains_to_the_cpus_weights(first, first_on_device):
    assert_same_training(first_on_device, first[0])


def test_phase_2_trains_and_samples_as_the_cpu_does(first, tiny_models, small_datasets, cache, tmp_path):
    # Guidance enlarges the rounding of sums in another order: at the default scale by more than half a level at times.
    options = ("--max_train_steps=4", "--guidance_scale=3")
    runs = {tmp_path / "device": ([ON_DEVICE], [cache]), tmp_path / "cpu": ([], [])}
    for out, (launcher, more) in runs.items():
        command = phase2(tiny_models, small_datasets, first[0] / "final", out, *options, *more, launcher=launcher)
        succeed(*command, by=fork)
    assert_same_training(*runs)
    for number in range(2):
        assert difference(*(row_of(out / f"samples/step-4/{number}.mp4") for out in runs)) < 0.5


@pytest.fixture(scope="module")
def monitored_datasets(tmp_path_factory):
    return write_monitored_datasets(tmp_path_factory.mktemp("data"))


#: Everything in phase 2 that may be switched on with the others.
EVERYTHING = [
    "--mixed_precision=bf16",
    "--ema_decay=0.9",
    "--adversarial_weight=0.1",
    "--control_augmentation=0.5",
    "--real_weight=2",
    "--cg_ratio=0.5",
    "--cg_ratio_min=0.2",
    "--monitor_bound=-9",
    "--monitor_patience=1",
    "--sample_steps=2",
    "--num_samples=4",
    "--num_inference_steps=1",
    "--num_validation_clips=1",
    "--control_guidance_scale=1.5",
    "--weighting_scheme=cosmap",
    "--gradient_checkpointing=selective",
    "--ffn_chunks=2",
    "--fp8_backbone",
    "--max_train_steps=3",
]


@pytest.mark.slow
def test_a_run_with_everything_on_resumes_bit_for_bit(first, tiny_models, monitored_datasets, cache, tmp_path):
    """The resumed half keeps everything on the device, which must make no difference."""
    offloaded = ["--offload_backbone", "--offload_activations"]

    def run(out, *more):
        command = phase2(
            tiny_models, monitored_datasets, first[0] / "final", out, *EVERYTHING, cache, *more, launcher=[ON_DEVICE]
        )
        return succeed(*command, by=fork).stdout

    assert "step 2: cg_ratio lowered from 0.5 to 0.25" in run(tmp_path / "whole", *offloaded)
    shutil.copytree(tmp_path / "whole/checkpoint-2", tmp_path / "halves/checkpoint-2")
    assert "checkpoint-2 at step 2" in run(tmp_path / "halves", "--resume_from_checkpoint=latest")
    assert same(weights(tmp_path / "halves/final"), weights(tmp_path / "whole/final"))


def test_a_dry_run_of_phase_1_in_bf16_with_an_average(tiny_models, small_datasets, cache, tmp_path):
    options = ["--dry_run", "--mixed_precision=bf16", "--ema_decay=0.9", "--num_validation_clips=1", cache]
    options += ["--step_in_backward", "--gradient_accumulation_steps=1", "--max_grad_norm=0", "--offload_activations"]
    command = phase1(tiny_models, small_datasets, tmp_path / "out", *options, launcher=[ON_DEVICE])
    assert "dry run: passed" in succeed(*command, by=fork).stdout


def test_a_dry_run_of_phase_2_with_bf16_weights_and_cached_features(
    first, tiny_models, small_datasets, cache, tmp_path
):
    options = ["--dry_run", "--mixed_precision=bf16", "--weight_storage=bf16", "--cache_control_features"]
    options += ["--gradient_checkpointing=none", "--num_validation_clips=1", "--num_samples=0", cache]
    backbone = first[0] / "final"
    command = phase2(tiny_models, small_datasets, backbone, tmp_path / "out", *options, launcher=[ON_DEVICE])
    assert "dry run: passed" in succeed(*command, by=fork).stdout


def test_encode_fills_the_cpus_cache(tiny_models, small_datasets, tmp_path):
    def encode(cache, *options, on=(ON_DEVICE,)):
        size = [f"--{name}={value}" for name, value in SIZE.items()]
        models = [f"--pretrained_model_name_or_path={tiny_models / 'pipeline'}", f"--dinov3={tiny_models / 'dinov3'}"]
        dataset = [f"--dataset={small_datasets / 'cg'}", "--domain=cg", "--dataloader_num_workers=1"]
        command = [*on, "c2r/encode.py", *dataset, *models, *size, f"--cache_dir={tmp_path / cache}", *options]
        return succeed(*command, by=fork).stdout

    assert "6 clips and 4 captions to encode" in encode("device", "--dry_run")
    assert "preview-cg-5x32x48.png" in encode("device", f"--preview={tmp_path / 'preview'}")
    for options in ([], ["--control_only"]):
        encode("device", *options)
        encode("cpu", *options, on=())
    files = sorted((tmp_path / "cpu").glob("*/*/*.safetensors"))
    assert len(files) == 6 + 4 + 4  # clips, captions, controls of the clips to train on
    for file in files:
        ours = load_file(tmp_path / "device" / file.relative_to(tmp_path / "cpu"))
        for name, tensor in load_file(file).items():
            assert_close(ours[name], tensor, 2**-7 if tensor.dtype == torch.bfloat16 else ROUNDING)


# ---------------------------------------------------------------------------------------------------------- generation


def generate_options(model, output, control=None):
    options = ["--prompt=rain", "--num_inference_steps=3", "--seed=3", f"--model={model}", f"--output={output}"]
    return [*options, *([f"--control_video={control}"] if control else [])]


def video(path):
    return read_window(path, 0.0, SIZE["num_frames"], SIZE["fps"], SIZE["height"], SIZE["width"])


@pytest.fixture(scope="module")
def on_cpu(second, small_datasets, tmp_path_factory):
    """A video of phase 2, generated on the CPU."""
    output = tmp_path_factory.mktemp("videos") / "cpu.mp4"
    options = generate_options(second[0] / "final", output, small_datasets / "cg/c0.mp4")
    succeed("c2r/generate.py", *options, "--control_guidance_scale=2", by=fork)
    return video(output)


# A video of two windows starts with the frames of one window.
@pytest.mark.parametrize(
    "options", [[], ["--cpu_offload"], ["--vae_tiling", "--cpu_offload"], ["--num_frames=9", "--cpu_offload"]]
)
def test_generate_makes_the_cpus_video(on_cpu, second, small_datasets, tmp_path, options):
    output = tmp_path / "out.mp4"
    given = generate_options(second[0] / "final", output, small_datasets / "cg/c0.mp4")
    succeed(ON_DEVICE, "c2r/generate.py", *given, "--control_guidance_scale=2", "--dtype=fp32", *options, by=fork)
    assert difference(video(output), on_cpu) < 0.5


def test_generate_in_bf16_without_control(first, tmp_path):
    output = tmp_path / "out.mp4"
    succeed(ON_DEVICE, "c2r/generate.py", *generate_options(first[0] / "final", output), "--guidance=cfg", by=fork)
    assert video(output).shape == (SIZE["num_frames"], 3, SIZE["height"], SIZE["width"])


def test_evaluate_in_bf16_with_validation_and_cg_look(second, monitored_datasets, cache, tmp_path):
    real, cg = monitored_datasets / "real", monitored_datasets / "cg"
    options = ["--model", second[0] / "final", "--dataset", cg, "--control", "own", "none", "--max_clips=2"]
    options += ["--real_dataset", real, "--cg_dataset", cg, "--num_validation_clips=1", cache]
    options += ["--metrics", "edge_f1", "--num_inference_steps=1", f"--output_dir={tmp_path}"]
    succeed(ON_DEVICE, "c2r/evaluate.py", *options, by=fork)
    found = json.loads((tmp_path / "results.json").read_text())
    assert [*found["measures"]] == ["edge_f1", "cg_look"]
    assert found["validation"]["phase2/final"]["numbers"]["loss"] > 0


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.fixture(scope="module")
def recorded(first, second, tiny_models, small_datasets, cache, tmp_path_factory):
    """Return what `tests.helpers.device_mistakes` has recorded."""
    folder = tmp_path_factory.mktemp("mistakes")
    short = ["--max_train_steps=1", "--num_samples=1", "--num_inference_steps=1", "--num_validation_clips=1"]
    short += ["--dataloader_num_workers=0", "--report_to=none", "--adversarial_weight=0.1", "--real_weight=2"]
    short += ["--guidance=cfg"]
    train = phase2(tiny_models, small_datasets, first[0] / "final", "{}", *short, launcher=[])[1:]
    generate = generate_options(second[0] / "final", "{}/out.mp4", small_datasets / "cg/c0.mp4")
    encode = ["--cache_control_features", "--cache_dir={}"]
    one, three = ([f"--gradient_accumulation_steps={number}"] for number in (1, 3))
    augmented = ["--control_augmentation=0.5", cache]
    commands = [[*train, *one, *augmented], [*train, *three, *augmented], [*train, *one, *encode]]
    commands += [[*generate, "--cpu_offload"]]
    (folder / "commands.json").write_text(json.dumps(dict(zip(RUN, commands, strict=True))))
    succeed(ON_DEVICE, "tests/helpers/device_mistakes.py", folder / "commands.json", folder / "outcomes.json", by=fork)
    return json.loads((folder / "outcomes.json").read_text())


@pytest.mark.parametrize("command", RUN)
def test_the_code_as_it_is_makes_no_mistake(recorded, command):
    assert recorded["outcomes"][command] is None


def test_the_host_waits_for_the_device_once_per_step_but_not_per_micro_batch(recorded):
    one, three = recorded["waits"]["train"], recorded["waits"]["train on micro-batches"]
    assert three == one
    assert any("grad_norm" in line for line in one)  # so waits are counted


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_noticed(recorded, mistake):
    error = recorded["outcomes"][mistake]
    assert error is not None
    # The preflight's estimate, on the meta device, may be the first to meet it.
    assert any(sign in error for sign in ("MixedDevices", ".numpy() is not supported", "not on the expected device"))


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_the_device_refuses_what_cuda_refuses(recorded, expression):
    assert (expression in recorded["refused"]) == EXPRESSIONS[expression]
    if torch.cuda.is_available():
        assert refuses(expression, "cuda") == EXPRESSIONS[expression]
