"""Whole commands on tiny models and real video files."""

import json
import re
import runpy
import shutil
import sys

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from PIL import Image
from safetensors.torch import load_file, save_file

import train_phase2
from c2r import InputError
from c2r.cli import run
from c2r.data.video import probe
from c2r.pipeline import C2RPipeline
from tests.helpers.commands import LAUNCH, SIZE, images, phase2, same, scalars, succeed, weights
from tests.helpers.datasets import noise_video, write_dataset
from tests.helpers.forks import fork
from tests.helpers.source import ROOT
from tests.helpers.tiny import PROMPT_LENGTH


def test_phase1_trains_and_exports(first, tiny_models):
    out, done = first
    assert "kept 10 clips of 5 files" in done.stdout
    assert "dropped 1 rows: 1 too short" in done.stdout
    trained, start_weights = weights(out / "final"), weights(tiny_models / "pipeline/transformer")
    assert trained.keys() == start_weights.keys()
    unchanged = [name for name in trained if torch.equal(trained[name], start_weights[name])]
    assert unchanged == []
    WanTransformer3DModel.from_pretrained(out / "best")
    contract = json.loads((out / "final/c2r.json").read_text())
    assert contract["phase"] == 1
    assert contract["step"] == 4
    assert contract["num_frames"] == SIZE["num_frames"]


def test_phase1_logs_its_numbers(first):
    logged = scalars(first[0])
    assert (first[0] / "validation.png").is_file()
    assert len(logged["validation/prompt_gain"]) == len(logged["validation/loss_sigma_0.30"]) == 3
    assert len(logged["train/loss"]) == 4
    assert len(logged["validation/loss"]) == 3  # before the first step, at 2 and at 4
    # One domain, uniform noise levels, no control: the shares of training are those of `loss`.
    assert logged["validation/loss_as_trained"] == pytest.approx(logged["validation/loss"])
    assert logged["train/learning_rate"][:3] == pytest.approx([5e-4, 1e-3, 1e-3])  # a warm-up of 2
    assert {"train/grad_norm", "train/samples_per_second", "train/loss_real"} <= logged.keys()
    assert "train/loss_cg" not in logged


def test_phase1_weights_work_in_a_stock_pipeline(first, tiny_models):
    transformer = WanTransformer3DModel.from_pretrained(first[0] / "best")
    pipeline = WanPipeline.from_pretrained(tiny_models / "pipeline", transformer=transformer)
    size = {name: SIZE[name] for name in ("height", "width", "num_frames")}
    pipeline.set_progress_bar_config(disable=True)
    frames = pipeline("a street", num_inference_steps=2, max_sequence_length=PROMPT_LENGTH, **size).frames
    assert frames.shape == (1, 5, 32, 48, 3)


def test_phase2_trains_and_exports(second, first):
    out, _ = second
    contract = json.loads((out / "best/c2r.json").read_text())
    assert contract["phase"] == 2
    assert contract["metrics"].keys() >= {"loss_real", "loss_cg", "control_gain", "loss_no_control", "cg_share"}
    final = json.loads((out / "final/c2r.json").read_text())
    assert final["metrics"]["cg_share"] == 0.25  # 4 of 16 samples
    assert 0 < final["num_clips"]["cg"] < final["num_clips"]["real"] < 10  # of ten real clips some are held out
    config = json.loads((out / "final/config.json").read_text())
    assert config["injection_layers"] == [0, 2]
    before = weights(out / "checkpoint-2/model")
    after = weights(out / "checkpoint-4/model")
    assert not same(before, after)
    assert same(after, weights(out / "final"))
    logged = scalars(out)
    assert {"train/loss_cg", "train/loss_real", "train/cg_share", "validation/control_gain"} <= logged.keys()
    # The new control blocks add zeros: before the first step, any control gives the backbone's own loss.
    assert logged["validation/control_gain"][0] == 0
    assert logged["validation/loss_no_control"][0] == logged["validation/loss"][0]
    real, cg = logged["validation/loss_real"][0], logged["validation/loss_cg"][0]
    assert logged["validation/loss_as_trained"][0] == pytest.approx(0.75 * real + 0.25 * cg)
    assert logged["validation/loss_no_control"][-1] != logged["validation/loss"][-1]
    assert {"validation/prompt_gain", "validation/control_gain_sigma_0.30"} <= logged.keys()
    # The same holds for an altered look of the control, which is measured on real clips alone.
    assert logged["validation/leak_augmented"][0] == 0
    assert logged["validation/leak_augmented"][-1] != 0
    assert "validation/leak_coarse" not in logged
    assert images(out)["validation"] == 2  # three validations; one alone makes no curve
    assert logged["validation/control_gain"][-1] != 0


@pytest.mark.slow
def test_a_resumed_run_takes_the_options_of_its_command_line(first, second, tiny_models, small_datasets, tmp_path):
    """Take the new learning rate and validation clips, print both, and compare no losses of different clips."""
    shutil.copytree(second[0] / "checkpoint-2", tmp_path / "checkpoint-2")
    options = ["--max_train_steps=4", "--resume_from_checkpoint=latest", "--learning_rate=1e-5"]
    options += ["--num_validation_clips=1"]
    done = succeed(*phase2(tiny_models, small_datasets, first[0] / "final", tmp_path, *options), by=fork)
    assert "resumed with --learning_rate 1e-05 (was 0.001): from the command line" in done.stdout
    assert "resumed with --num_validation_clips 1 (was 2)" in done.stdout
    assert "resumed with --seed" not in done.stdout
    assert scalars(tmp_path)["train/learning_rate"] == pytest.approx([1e-5, 1e-5])
    assert "other validation clips or noise levels than before" in done.stdout
    history = json.loads((tmp_path / "checkpoint-4/state.json").read_text())["progress"]["history"]
    assert [entry["step"] for entry in history if "new_baseline" in entry] == [4]


def test_phase2_trains_on_cached_control_features(second, first, tiny_models, small_datasets, tmp_path):
    cache = tmp_path / "cache"

    def train(name):
        extra = ["--max_train_steps=4", "--cache_control_features", f"--cache_dir={cache}"]
        return succeed(*phase2(tiny_models, small_datasets, first[0] / "final", tmp_path / name, *extra), by=fork)

    train("out")
    live, cached = weights(second[0] / "final"), weights(tmp_path / "out/final")
    # DINOv3 runs on batches of another size, which changes the last bits.
    assert scalars(tmp_path / "out")["train/loss"] == pytest.approx(scalars(second[0])["train/loss"], rel=1e-5)
    assert max((live[name] - cached[name]).abs().max() for name in live) < 1e-4
    for path in (cache / "control").rglob("*.safetensors"):
        save_file({"control_features": 3 - load_file(path)["control_features"]}, path)
    train("other")
    other = weights(tmp_path / "other/final")
    assert max((live[name] - other[name]).abs().max() for name in live) > 1e-3


@pytest.mark.slow
def test_a_phase2_resumed_on_another_clock_is_bit_identical(first, second, tiny_models, small_datasets, tmp_path):
    # As if a run had been killed between steps 2 and 4, and its machine replaced by one in another time zone whose
    # clock is a day slow. This one has a launcher, as a user's run has.
    shutil.copytree(second[0] / "checkpoint-2", tmp_path / "checkpoint-2")
    options = ["--max_train_steps=4", "--resume_from_checkpoint=latest"]
    launcher = [*LAUNCH, "tests/helpers/on_another_clock.py"]
    done = succeed(*phase2(tiny_models, small_datasets, first[0] / "final", tmp_path, *options, launcher=launcher))
    assert "resumed from" in done.stdout
    assert same(weights(tmp_path / "final"), weights(second[0] / "final"))
    assert scalars(tmp_path)["train/loss"] == scalars(second[0])["train/loss"][2:]
    # The plot also shows the validations before the kill.
    assert (tmp_path / "validation.png").read_bytes() == (second[0] / "validation.png").read_bytes()


@pytest.mark.slow
def test_augmented_control_resumes_exactly_and_best_has_the_highest_gain(
    first, second, tiny_models, small_datasets, tmp_path
):
    options = ["--control_augmentation=0.7", "--best_by=control_gain", "--resume_from_checkpoint=latest"]
    command = phase2(tiny_models, small_datasets, first[0] / "final", tmp_path, *options)
    done = succeed(*command, "--max_train_steps=4", by=fork)
    gains = scalars(tmp_path)["validation/control_gain"]
    contract = json.loads((tmp_path / "best/c2r.json").read_text())
    assert contract["metrics"]["control_gain"] == pytest.approx(max(gains))
    assert f"(validation control gain {max(gains):.4f})" in done.stdout
    trained = weights(tmp_path / "final")
    assert not same(trained, weights(second[0] / "final"))
    shutil.rmtree(tmp_path / "checkpoint-4")
    done = succeed(*command, "--max_train_steps=4", by=fork)
    assert "resumed from" in done.stdout
    assert same(weights(tmp_path / "final"), trained)


def test_cached_files_and_remedies_switched_off_do_not_change_the_result(
    first, second, tiny_models, small_datasets, tmp_path
):
    options = ["--max_train_steps=2", f"--cache_dir={tmp_path}/cache", "--real_weight=1", "--adversarial_weight=0"]
    succeed(*phase2(tiny_models, small_datasets, first[0] / "final", tmp_path / "out", *options), by=fork)
    assert same(weights(tmp_path / "out/final"), weights(second[0] / "checkpoint-2/model"))
    assert not (tmp_path / "out/checkpoint-2/domain_classifier").exists()


def test_phase2_starts_from_a_single_file(first, tiny_models, small_datasets, tmp_path):
    single_file = first[0] / "best/diffusion_pytorch_model.safetensors"
    options = ["--max_train_steps=1", "--resume_from_checkpoint=latest"]
    done = succeed(*phase2(tiny_models, small_datasets, single_file, tmp_path, *options), by=fork)
    assert "starting at step 0" in done.stdout
    assert json.loads((tmp_path / "final/c2r.json").read_text())["backbone"].endswith(single_file.name)


def test_generate_from_both_phases(first, second, small_datasets, tmp_path):
    control = small_datasets / "cg/c0.mp4"
    for name, model, extra in (
        ("plain.mp4", first[0] / "best", []),
        ("controlled.mp4", second[0] / "final", [f"--control_video={control}"]),
    ):
        succeed(
            "-m",
            "c2r.generate",
            f"--model={model}",
            "--prompt=a street",
            f"--output={tmp_path / name}",
            "--num_inference_steps=2",
            *extra,
            by=fork,
        )
        assert probe(tmp_path / name).frames_at(SIZE["fps"]) == SIZE["num_frames"]


def test_a_run_becomes_one_folder_with_a_card(second, tmp_path):
    C2RPipeline.from_pretrained(second[0] / "final").save_pretrained(tmp_path / "pipeline")
    card = (tmp_path / "pipeline/README.md").read_text()
    assert "| optimizer steps | 4 |" in card
    assert "| share of CG samples | 0.25 |" in card
    assert re.search(r"\| real \| \d \| `[0-9a-f]{64}` \|", card)
    sheet = second[0] / "samples/step-4/sheet.png"
    assert (tmp_path / "pipeline/samples.png").read_bytes() == sheet.read_bytes()


def test_bf16_trains_fp32_weights_over_a_bf16_backbone(first, tiny_models, small_datasets, tmp_path):
    options = [
        "--max_train_steps=1",
        "--mixed_precision=bf16",
        "--report_to=none",
        f"--cache_dir={tmp_path / 'cache'}",
    ]
    succeed(*phase2(tiny_models, small_datasets, first[0] / "final", tmp_path / "out", *options), by=fork)
    trained = weights(tmp_path / "out/final")
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    assert not (tmp_path / "out/logs").exists()


def test_an_adversary_needs_both_domains(tiny_models, small_datasets, tmp_path, monkeypatch):
    options = ["--adversarial_weight=0.1", "--cg_ratio=0"]
    command = phase2(tiny_models, small_datasets, "backbone", tmp_path, *options, launcher=())
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    with pytest.raises(
        InputError, match=r"--adversarial_weight 0\.1: needs samples of both domains, but --cg_ratio 0"
    ):
        train_phase2.main()


@pytest.mark.parametrize(
    ("option", "part"),
    [
        ("--resume_backbone_from=nowhere/best", "nowhere/best"),
        ("--cg_dataset=nowhere", "nowhere"),
        ("--dinov3=nowhere", "nowhere"),
        ("--control_layers=9", "--control_layers 9"),
        ("--height=33", "--height 33"),
        ("--resume_from_checkpoint=checkpoint-77", "checkpoint-77"),
        ("--cg_ratio=1.5", "--cg_ratio 1.5"),
        ("--control_augmentation=-1", "--control_augmentation -1"),
        ("--real_weight=0", "--real_weight 0:"),
        ("--real_weight=inf", "--real_weight inf"),
        ("--adversarial_weight=-1", "--adversarial_weight -1:"),
        ("--adversarial_weight=nan", "--adversarial_weight nan"),
    ],
)
def test_bad_input_is_one_line(
    option, part, first, tiny_models, small_datasets, tmp_path, monkeypatch, signal_handlers
):
    command = phase2(tiny_models, small_datasets, first[0] / "final", tmp_path, option, launcher=())
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    with pytest.raises(SystemExit) as ended:
        run(train_phase2.main)
    (line,) = str(ended.value).splitlines()
    assert line.startswith("error: ")
    assert part in line


@pytest.mark.parametrize("command", ["encode", "generate", "prepare"])
def test_messages_of_a_command_started_by_python_m_are_printed(command):
    """`cli.log_to_stdout` prints those of the package's loggers."""
    assert runpy.run_path(str(ROOT / f"c2r/{command}.py"), run_name="started")["logger"].name == f"c2r.{command}"


def test_phase2_on_buckets_and_several_datasets(first, tiny_models, small_datasets, tmp_path):
    """Train on clips of three shapes from two datasets; the second has three times the weight of the first."""
    more = write_dataset(tmp_path / "more", [f"m{i}.mp4" for i in range(4)], ["rain"] * 4)
    for i in range(3):
        Image.fromarray(noise_video(i, 1)[0]).save(more / f"still{i}.png")
    with open(more / "metadata.csv", "a") as file:
        file.writelines(f"still{i}.png,night\n" for i in range(3))
    options = ["--max_train_steps=6", "--gradient_accumulation_steps=1", "--validation_steps=6", "--cg_ratio=0.25"]
    options += ["--buckets", "1x32x48", "5x32x48", "5x48x32"]
    options += ["--real_dataset", f"{small_datasets / 'real'}:1", f"{more}:3"]
    command = phase2(tiny_models, small_datasets, first[0] / "final", tmp_path / "out", *options)
    done = succeed(*command, by=fork)
    assert "clips by bucket: 0 of 1x32x48, 8 of 5x32x48, 2 of 5x48x32" in done.stdout
    assert "clips by bucket: 3 of 1x32x48, 8 of 5x32x48, 0 of 5x48x32" in done.stdout
    logged = scalars(tmp_path / "out")
    assert len(logged["train/loss"]) == 6
    state = json.loads((tmp_path / "out/checkpoint-6/state.json").read_text())
    assert state["sampler"]["real_parts"][1][1] == "3/4"
    assert json.loads((tmp_path / "out/final/c2r.json").read_text())["num_frames"] == 5  # of the largest bucket
