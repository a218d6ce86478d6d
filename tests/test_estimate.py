"""`python -m c2r.estimate`: its output, its refusals, its search, and the figures of the studies."""

from dataclasses import replace

import pytest
import torch

from c2r import InputError, estimate
from c2r.data.buckets import Bucket
from c2r.estimation.configs import build_backbone, read_configs
from c2r.estimation.engines import ENGINE, Sizes, communication_of, num_bytes
from c2r.estimation.fit import RESERVED, find_fit
from c2r.estimation.report import estimate_run
from c2r.estimation.stages import GENERATION, STEP
from c2r.estimation.step import build_models
from c2r.estimation.tracker import AVERAGE, FROZEN, GRADIENTS, OPTIMIZER, SAVED, TRAINABLE
from c2r.options.presets import PRESETS
from tests.helpers.estimates import BUCKET, CONFIGS, training_options
from tests.helpers.tiny import save_tiny_dinov3, save_tiny_pipeline

GIB = 2**30


def step_of(engine="single_gpu", num_processes=1, phase=2, **given):
    args = training_options(phase, **given)
    return estimate_run(args, CONFIGS, BUCKET, engine=engine, num_processes=num_processes, step_only=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return str(save_tiny_pipeline(folder / "pipeline")), str(save_tiny_dinov3(folder / "dinov3"))


def test_the_command_prints_every_stage_and_the_largest(folders, capsys):
    size = ["--height", "64", "--width", "96", "--num_frames", "5"]
    model, dinov3 = folders
    estimate.main(["--model", model, "--dinov3", dinov3, "--control_layers", "2", "--tflops", "100", *size])
    out = capsys.readouterr().out
    for words in ("encoding prompts", "encoding clips", "training step", "DINOv3 in a step", "saving", "validation"):
        assert f"\n{words} " in out
    assert "\nsample videos " in out
    assert "\ngeneration " in out
    assert "linear" in out
    assert "recomputation" in out
    assert "largest: " in out
    assert "s a step of 1 micro-steps at 100 TFLOP/s" in out
    assert "a checkpoint" in out
    estimate.main(["--model", model, "--phase", "1", *size])
    out = capsys.readouterr().out
    assert "sample videos" not in out
    assert "TFLOP/s" not in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "nowhere"], "nowhere: no such model folder"),
        (["--phase", "3"], "--phase 3: not one of the choices; give 1 or 2"),
        (["--phase", "1", "--control_layers", "6"], "--control_layers 6: phase 1 has no control"),
        (["--control_layers", "31"], "--control_layers 31 --control_stride 1: the last residual"),
        (["--num_processes", "8"], "--num_processes 8: --engine single_gpu has one; give another engine"),
        (["--fit", "much"], "--fit much: not a size of memory; give one such as 16GB"),
        (
            ["--optimizer", "adamw8bit", "--weight_storage", "bf16", "--engine", "fsdp2"],
            "--weight_storage bf16: needs",
        ),
        (["--mixed_precision", "no", "--weight_storage", "bf16"], "--weight_storage bf16: does not work with"),
        (["--buckets", "5x64x96", "5x64x96"], "--buckets 5x64x96: named twice"),
        (["--measure", "--engine", "fsdp2"], "--measure: runs one process; leave it out, or leave out --engine fsdp2"),
        (["--height", "100"], "--height 100: must be divisible by 16"),
    ],
)
def test_bad_input_is_refused_in_one_line_before_any_work(argv, message):
    with pytest.raises(InputError) as caught:
        estimate.main(argv)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_measure_needs_a_gpu():
    with pytest.raises(InputError, match="--measure: there is no GPU here; leave it out"):
        estimate.main(["--measure"])


def test_the_command_that_fits_is_printed_with_the_options_given(folders, capsys):
    model, dinov3 = folders
    argv = ["--model", model, "--dinov3", dinov3, "--control_layers", "2", "--buckets", "5x64x96", "1x64x96"]
    estimate.main([*argv, "--fit", "80GB"])
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("fits 80 GB with ")
    assert first.endswith(
        "GiB to spare, if c2r.generate is given --cpu_offload --vae_tiling: accelerate launch --config_file "
        f"accelerate_configs/single_gpu.yaml train_phase2.py --dinov3 {dinov3} --buckets 5x64x96 1x64x96 "
        "--control_layers 2 --gradient_checkpointing none"
    )
    with pytest.raises(
        InputError, match=r"--fit 1GB: does not fit .* 0\.0 GiB for training step, of 0\.0 that tensors"
    ):
        estimate.main([*argv, "--fit", "1GB"])


# ------------------------------------------------------------------------------------------------------------- engines


def test_ddp_keeps_all_gradients_from_the_start():
    one, ddp = step_of(gradient_accumulation_steps=2), step_of("multi_gpu", 2)
    assert ddp.peaks[STEP][GRADIENTS] == pytest.approx(one.peaks[STEP][TRAINABLE], rel=0.01)
    assert ddp.total(STEP) == pytest.approx(one.total(STEP), rel=0.01)


def test_fsdp2_and_zero3_split_everything_but_activations():
    one = step_of().peaks[STEP]
    for engine, copies in (("fsdp2", 0), ("deepspeed_zero3", one[TRAINABLE])):
        four = step_of(engine, 4).peaks[STEP]
        assert four[TRAINABLE] == pytest.approx(one[TRAINABLE] / 4)
        assert four[OPTIMIZER] == pytest.approx((one[OPTIMIZER] + copies) / 4, rel=0.01)
        assert one[FROZEN] / 4 < four[FROZEN] < one[FROZEN]  # DINOv3 stays whole
        assert four[ENGINE] > 0


def test_zero2_splits_states_alone_and_offload_leaves_none():
    one, two = step_of().peaks[STEP], step_of("deepspeed_zero2", 2).peaks[STEP]
    assert two[TRAINABLE] == one[TRAINABLE]
    assert two[FROZEN] == one[FROZEN]
    assert two[OPTIMIZER] == pytest.approx((one[OPTIMIZER] + one[TRAINABLE]) / 2, rel=0.01)
    offloaded = step_of("deepspeed_zero3_offload", 2)
    assert offloaded.peaks[STEP][OPTIMIZER] == offloaded.peaks[STEP][TRAINABLE] == 0
    assert offloaded.host >= 5 * one[TRAINABLE]


def test_communication_is_counted_from_the_sizes_of_weights():
    sizes = Sizes.of(build_models(training_options(2), CONFIGS).model)
    weights, trained = sizes.frozen + sizes.trainable, sizes.trainable
    expected = {  # gathered, reduced in a step of three micro-steps
        "single_gpu": (trained, trained),
        "multi_gpu": (trained, trained),
        "deepspeed_zero2": (trained, 3 * trained),
        "deepspeed_zero3": (6 * weights, 3 * trained),
        "deepspeed_zero3_offload": (6 * weights, 3 * trained),
        "fsdp2": (6 * weights, 3 * trained),
    }
    for engine, numbers in expected.items():
        moved = communication_of(engine, 16, sizes, 3)
        assert (moved.gathered, moved.reduced) == numbers
        assert moved.received == pytest.approx(sum(numbers) * 15 / 16)
        assert moved.nvlink_seconds == pytest.approx(moved.received / 450e9)
        # Each of two machines lacks half of what its devices collect.
        assert moved.network_seconds(1) == pytest.approx(sum(numbers) / 2 / 50e9)
        assert moved.network_seconds(8) == pytest.approx(moved.network_seconds(1) / 8)
    assert communication_of("single_gpu", 1, sizes, 1).received == 0
    assert communication_of("fsdp2", 8, sizes, 1).network_seconds(1) == 0


def test_communication_is_printed_for_several_devices(folders, capsys):
    model, dinov3 = folders
    argv = ["--model", model, "--dinov3", dinov3, "--control_layers", "2", "--buckets", "5x64x96", "--tflops", "1"]
    estimate.main(argv)
    out = capsys.readouterr().out
    assert "communication:" not in out
    assert "GPU hours" not in out
    estimate.main([*argv, "--engine", "fsdp2", "--num_processes", "8"])
    out = capsys.readouterr().out
    assert "s over NVLink at 450 GB/s" in out
    assert "GPU hours" in out
    assert "network:" not in out
    estimate.main([*argv, "--engine", "deepspeed_zero3", "--num_processes", "16"])
    assert "s between machines of 8 devices with one adapter of 400 Gb/s (50 GB/s) each" in capsys.readouterr().out


def test_options_change_the_peak_by_their_bytes():
    state = step_of().peaks[STEP]
    averaged = step_of(ema_decay=0.999).peaks[STEP]
    assert averaged[AVERAGE] == pytest.approx(state[TRAINABLE], rel=0.01)
    for engine, share in (("deepspeed_zero2", 1), ("deepspeed_zero3", 1 / 2), ("deepspeed_zero3_offload", 0)):
        assert step_of(engine, 2, ema_decay=0.999).peaks[STEP][AVERAGE] == share * averaged[AVERAGE]
    in_bf16 = step_of("multi_gpu", 2, weight_storage="bf16").peaks[STEP]
    assert in_bf16[GRADIENTS] == pytest.approx(in_bf16[TRAINABLE], rel=0.01)
    eight_bit = step_of(optimizer="adamw8bit").peaks[STEP]
    assert eight_bit[OPTIMIZER] == pytest.approx(state[OPTIMIZER] / 4, rel=0.1)  # small tensors stay in fp32
    split = step_of(weight_storage="bf16").peaks[STEP]
    assert split[TRAINABLE] == pytest.approx(state[TRAINABLE] / 2, rel=0.05)
    assert split[OPTIMIZER] == pytest.approx(state[OPTIMIZER] + state[TRAINABLE] / 2, rel=0.05)
    more = step_of(train_batch_size=2, gradient_checkpointing="none").peaks[STEP]
    less = step_of(train_batch_size=1, gradient_checkpointing="none").peaks[STEP]
    assert more[SAVED] == pytest.approx(2 * less[SAVED], rel=0.05)


def test_memory_modes_keep_less_on_the_device():
    plain = step_of(gradient_checkpointing="block")
    offloaded = step_of(offload_activations=True)
    assert offloaded.peaks[STEP][SAVED] < plain.peaks[STEP][SAVED]
    assert offloaded.host > plain.host == 0
    streamed = step_of(offload_backbone=True)
    blocks = num_bytes(build_backbone(CONFIGS.transformer, torch.bfloat16).blocks)
    count = CONFIGS.transformer["num_layers"]
    # One block is on its way while another runs, whose copy counts as an activation.
    freed = plain.peaks[STEP][FROZEN] - streamed.peaks[STEP][FROZEN]
    assert freed == pytest.approx(blocks * (count - 1) / count, rel=0.01)
    assert streamed.flops == plain.flops
    assert streamed.host == pytest.approx(blocks)
    eight_bit = step_of(fp8_backbone=True)
    assert plain.peaks[STEP][FROZEN] - eight_bit.peaks[STEP][FROZEN] == pytest.approx(blocks / 2, rel=0.1)


# --------------------------------------------------------------------------------------------------------------- --fit


def test_the_fastest_options_that_fit_are_found():
    args = training_options(1)

    def run(options, step_only):  # the other stages take the same in all modes
        return estimate_run(options, CONFIGS, BUCKET, step_only=True)

    plain, checkpointed = (
        run(training_options(1, gradient_checkpointing=value), True).total(STEP) for value in ("none", "block")
    )
    assert checkpointed < plain
    fits = find_fit(args, plain + RESERVED, run)
    assert fits.changes == {"gradient_checkpointing": "none"}
    assert fits.args.gradient_checkpointing == "none"
    assert fits.estimate.total(STEP) == plain
    checkpointing = find_fit(
        args,
        checkpointed + RESERVED,
        run,
        lambda options: options.gradient_checkpointing != "selective",
    )
    assert checkpointing.changes == {}
    with pytest.raises(InputError, match=r"the least that was found takes 0\.0 GiB for training step"):
        find_fit(args, RESERVED, run)


def test_one_clip_at_a_time_is_tried_before_a_slower_mode():
    args = training_options(1, train_batch_size=4, gradient_accumulation_steps=2)

    def run(options, step_only):
        return estimate_run(options, CONFIGS, BUCKET, step_only=True)

    def needed(batch, accumulation):
        options = training_options(
            1, train_batch_size=batch, gradient_accumulation_steps=accumulation, gradient_checkpointing="none"
        )
        return run(options, True).total(STEP)

    assert needed(1, 8) < needed(4, 2)
    assert find_fit(args, needed(4, 2) + RESERVED, run).changes == {"gradient_checkpointing": "none"}
    assert find_fit(args, needed(1, 8) + RESERVED, run).changes == {
        "gradient_checkpointing": "none",
        "train_batch_size": 1,
        "gradient_accumulation_steps": 8,
    }


def test_the_stage_that_does_not_fit_is_named_where_the_step_does():
    args = training_options(1)
    full = estimate_run(args, CONFIGS, BUCKET)
    whole = replace(full, peaks={**full.peaks, GENERATION: {FROZEN: 2.0 * GIB}})

    def run(options, step_only):
        return full if step_only else whole

    with pytest.raises(InputError, match=r"the least that was found takes 2\.0 GiB for generation, of 1\.0 that"):
        find_fit(args, GIB + RESERVED, run)


# ---------------------------------------------------------------------------------------------------------- real sizes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phase", "options", "simulated"),
    [
        (1, {"optimizer": "adamw8bit"}, 17.8),
        # The study had no DINOv3 in memory, 0.16 GiB.
        (2, {"control_layers": 15}, 19.3 + 0.16),
    ],
)
def test_a_step_of_1_3b_is_within_3_percent_of_the_studys(phase, options, simulated):
    """GiB allocated in simulated steps of plain blocks on fake CUDA tensors, 480x832x81."""
    args = training_options(phase, **options)
    step = estimate_run(args, read_configs("1.3b", None), Bucket(81, 480, 832), step_only=True)
    assert step.total(STEP) / GIB == pytest.approx(simulated, rel=0.03)
    tera = sum(step.flops.values()) / 1e12 / args.train_batch_size
    expected = {1: 1232, 2: 1337 if args.gradient_checkpointing == "none" else 1754}[phase]
    assert tera == pytest.approx(expected, rel=0.001)


@pytest.mark.slow
@pytest.mark.parametrize(("phase", "name"), [("2", "12gb"), ("1", "16gb")])
def test_a_preset_fits_its_card_in_every_stage(phase, name):
    args = training_options(int(phase), **({"control_layers": 15} if phase == "2" else {}), **PRESETS[phase][name])
    estimated = estimate_run(args, read_configs("1.3b", None), Bucket(81, 480, 832), cpu_offload=True, vae_tiling=True)
    assert estimated.total(estimated.largest) <= int(name.removesuffix("gb")) * GIB - RESERVED
