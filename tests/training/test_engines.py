"""Both phases on every training engine: two processes on the CPU over gloo, compared with one process.

One clip of the dataset is NaN in the cache: whenever one process draws it, all must skip the step. Every run has
gradient accumulation, clipping, warm-up, both dropouts and a moving average; phase 2 also a weight of the real
samples and an adversary.
"""

import json
import math
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

from c2r import InputError
from c2r.data.manifest import read_manifest
from c2r.data.video_writer import write_video
from c2r.encoding.encoding_pass import encode_missing
from c2r.files import load_tensors, save_tensors
from c2r.models.controlnet import C2RControlNet
from c2r.models.lora_file import WEIGHTS as LORA_WEIGHTS
from c2r.training.engine import require_supported
from c2r.training.split_weights import local_fingerprint
from c2r.training.watchdog import Watchdog
from tests.helpers.commands import CONFIGS, ENGINES, SIZE, TORCHRUN, phase1, phase2, scalars, succeed, weights
from tests.helpers.datasets import noise_video, write_dataset
from tests.helpers.forks import fork, forked_twice, start_warm, statuses
from tests.helpers.options import options, phase2_options
from tests.helpers.settings import clip_settings
from tests.helpers.tiny import tiny_transformer

STEPS, SAVED = 8, 6  # of a run, and of the checkpoint to resume from
BAD_CLIP = "r2.mp4#11"  # drawn in steps 4 and 9 of phase 1, and 6 and 11 of phase 2
SAVES_MEMORY = {
    "fsdp2": ["--optimizer=adamw8bit"],
    "zero3": ["--optimizer=adamw8bit"],
    "ddp": ["--optimizer=adamw8bit", "--weight_storage=bf16", "--mixed_precision=bf16"],
}
LORA = ["--lora_rank=4", "--max_train_steps=3", "--mixed_precision=bf16"]
MEMORY_MODES = ["--gradient_checkpointing=selective", "--offload_activations", "--ffn_chunks=2"]
SHARED_CLIPS = ["--context_parallel_degree=2", "--train_batch_size=2", "--num_samples=0"]
OTHER_MICRO_BATCHES = ["--train_batch_size=2", "--gradient_accumulation_steps=1"]
SPLITS_OPTIMIZER = ("zero2", "zero3", "zero3_offload", "fsdp2")
SPLITS_FROZEN = ("zero3", "fsdp2")  # those that are probed

# The engines add up the same fp32 numbers in another order. Largest differences measured over 20 steps: 1.7e-7 of
# a loss, 1.1e-7 of a gradient norm, 2.4e-7 in a weight. AdamW may enlarge a rounding error: a gradient near zero
# becomes a step of full size, 1e-3 here, with the sign of that error. The bounds are far below one such step.
LOSS = {"rtol": 1e-6, "atol": 0, "equal_nan": True}
NORM = {"rtol": 1e-5, "atol": 0}
DOMAIN = {"rtol": 1e-5, "atol": 0, "equal_nan": True}
# Batches of one and of two samples run other kernels, which round differently in bf16.
BF16_LOSS = {"rtol": 1e-2, "atol": 0, "equal_nan": True}
WEIGHT = {"rtol": 0, "atol": 1e-4}


@pytest.fixture(scope="session")
def models(tiny_models, tmp_path_factory):
    """Return the folder of tiny models, with a backbone of three blocks: control enters the first and the last."""
    folder = shutil.copytree(tiny_models, tmp_path_factory.mktemp("models"), dirs_exist_ok=True)
    tiny_transformer(num_layers=3).save_pretrained(folder / "pipeline/transformer")
    return folder


@pytest.fixture(scope="session")
def datasets(models, tmp_path_factory):
    """Write real/ (26 clips to train on, 13 held out) and cg/, encode them, and make BAD_CLIP's latents NaN."""
    folder = tmp_path_factory.mktemp("long")
    texts = ["a street", "the city at night", "red brick"]
    write_dataset(folder / "real", [f"r{i}.mp4" for i in range(3)], texts)
    for i in range(3):
        write_video(folder / f"real/r{i}.mp4", noise_video(i, 65), SIZE["fps"])
    write_dataset(folder / "cg", [f"f{i}.mp4" for i in range(3)], texts, [f"c{i}.mp4" for i in range(3)])
    settings, accelerator = clip_settings(base_model=str(models / "pipeline")), Accelerator(cpu=True)
    manifests = [read_manifest(folder / domain, domain, settings) for domain in ("real", "cg")]
    clips = [clip for manifest in manifests for clip in manifest.clips]
    encode_missing(clips, settings, accelerator, Watchdog(accelerator, 60))
    assert BAD_CLIP in {f"{clip.name}#{clip.window}" for clip in manifests[0].train}
    for path in (folder / "real/.c2r_cache/clips").rglob("*.safetensors"):
        tensors, metadata = load_tensors(path)
        if f"{metadata['file']}#{metadata['window']}" == BAD_CLIP:
            save_tensors(path, tensors | {"latents_mean": tensors["latents_mean"] * torch.nan}, metadata)
    return folder


@pytest.fixture(scope="session")
def command(models, datasets):
    """Return command(phase, engine, out, *options) of 4 samples a step, without its launcher."""

    def command(phase, engine, out, *options):
        options = [
            f"--train_batch_size={2 if engine == 'one process' else 1}",
            f"--max_train_steps={STEPS}",
            f"--validation_steps={STEPS}",
            f"--checkpointing_steps={SAVED}",
            # bf16 storage does not work with an average.
            *([] if "--weight_storage=bf16" in options else ["--ema_decay=0.9"]),
            *options,
        ]
        if phase == 1:
            return phase1(models, datasets, out, *options, launcher=())
        # One validation clip of each domain: ZeRO-3 takes seconds for each.
        options += [
            "--num_validation_clips=1",
            f"--sample_steps={STEPS}",
            "--num_inference_steps=1",
            "--real_weight=2",
            "--adversarial_weight=0.1",
        ]
        return phase2(models, datasets, models / "pipeline/transformer", out, *options, launcher=())

    return command


@pytest.fixture(scope="session")
def runs(command, large_backbone, tmp_path_factory):
    """Return runs(engine), which trains all runs of an engine in one launch and returns {run: (folder, output)}.

    Run 1 and run 2 are the phases in fp32, STEPS steps without interruption; (1, "resumed") and (2, "resumed")
    continue from their checkpoints SAVED. The latter tolerates no skipped step and trains until it draws BAD_CLIP.
    (1, "lora") is short and trains a LoRA.
    (2, "from one process") continues from that run's checkpoint, with another split of a step into micro-batches and
    with MEMORY_MODES, and (2, "from one process", "shared clips") with SHARED_CLIPS. (2, "bf16") is short, in the
    default precision; (1, "saves memory") is short, with the options of SAVES_MEMORY.
    Besides, "errors" are the error lines of the launch, and "reports" what `engine_probe` reports of each process.
    """
    found = {}

    def run_all(engine):
        folder = tmp_path_factory.mktemp("run")
        resume = ["--resume_from_checkpoint=latest"]
        bf16 = ["--mixed_precision=bf16", "--max_train_steps=3", "--num_samples=0"]
        legs = {1: [], (1, "resumed"): resume, 2: [], (2, "bf16"): bf16}
        if engine in SAVES_MEMORY:
            legs[1, "saves memory"] = ["--max_train_steps=3", *SAVES_MEMORY[engine]]
        legs[1, "lora"] = LORA
        legs[2, "resumed"] = [
            *resume,
            "--max_train_steps=40",
            f"--checkpointing_steps={STEPS}",
            "--max_skipped_steps=0",
        ]
        if engine == "one process":
            legs = {1: [], 2: [], (2, "bf16"): bf16, (1, "lora"): LORA}
        elif engine == "zero3_offload":  # ZeRO-3 with its states in another memory
            legs = {1: []}
        else:
            offload = ["--offload_backbone"] if engine == "ddp" else []
            legs = {
                (2, "from one process"): [*resume, *OTHER_MICRO_BATCHES, *MEMORY_MODES, *offload],
                (2, "from one process", "shared clips"): [*resume, *SHARED_CLIPS],
                **legs,
            }
        outs = {leg: folder / str(i) for i, leg in enumerate(legs)}
        arguments = [json.dumps([str(large_backbone), str(folder)] if engine in SPLITS_FROZEN else [])]
        for leg, more in legs.items():
            phase = leg if isinstance(leg, int) else leg[0]
            script, *rest = command(phase, engine, outs[leg], *more)
            copied = []
            if "--resume_from_checkpoint=latest" in more:
                source = runs("one process")[2][0] if "from one process" in leg else outs[phase]
                copied = [f"{source}/checkpoint-{SAVED}", str(outs[leg])]
            arguments.append(json.dumps([copied, script.removesuffix(".py"), *map(str, rest)]))
        done = launched(engine, "-m", "tests.helpers.engine_runs", *arguments, folder=folder)
        texts = re.split(r"== run \d\n", done.stdout)[1:]
        assert len(texts) == len(legs), done.stderr[-3000:]
        assert (done.returncode == 0) == ((2, "resumed") not in legs), done.stderr[-3000:]
        reports = [json.loads(path.read_text()) for path in sorted(folder.glob("report-*.json"))]
        finished = {leg: (outs[leg], text) for leg, text in zip(legs, texts)}
        return finished | {"errors": error_lines(done), "reports": reports}

    def runs(engine):
        if engine not in found:
            found[engine] = run_all(engine)
        return found[engine]

    return runs


def launched(engine, *command, folder):
    """Run a command to its end on an engine; in forks, where no launcher's configuration is needed."""
    if engine == "one process":
        return fork(*command)
    if ENGINES[engine] == TORCHRUN:
        codes = statuses(forked_twice(command, folder))
        texts = [(folder / "0" / name).read_text() for name in ("stdout", "stderr")]
        return subprocess.CompletedProcess(command, max(codes), *texts)
    return start_warm(*ENGINES[engine], *command)


def state_of(file):
    """Return the content of a checkpoint's state.json, without the speed and the options, which differ."""
    state = json.loads(file.read_text())
    del state["progress"]["logs"]["train/samples_per_second"], state["options"]
    return state


def skipped(text):
    """Return {step: clips} of the skipped steps in a run's output."""
    return dict(re.findall(r"step (\d+) skipped: the loss is not finite for (.*)", text))


def error_lines(done):
    return {line for line in done.stderr.splitlines() if line.startswith("error: ")}


both_phases = pytest.mark.parametrize("phase", [1, 2])
FULLY_TESTED = [name for name in ENGINES if name != "zero3_offload"]
every_engine = pytest.mark.parametrize("engine", [pytest.param(name, marks=pytest.mark.slow) for name in FULLY_TESTED])


@both_phases
@every_engine
def test_trains_as_one_process_does(engine, phase, runs):
    """The same loss, gradient norm and learning rate in every step, skipped ones included."""
    (out, text), (reference, reference_text) = runs(engine)[phase], runs("one process")[phase]
    logged, expected = scalars(out), scalars(reference)
    for name in ("train/loss", "train/loss_real", "validation/loss"):
        torch.testing.assert_close(torch.tensor(logged[name]), torch.tensor(expected[name]), **LOSS)
    for name in ("train/domain_loss", "train/domain_accuracy", "train/real_loss_share") if phase == 2 else ():
        torch.testing.assert_close(torch.tensor(logged[name]), torch.tensor(expected[name]), **DOMAIN)
    assert len(logged["train/loss"]) == STEPS
    assert logged["train/learning_rate"] == expected["train/learning_rate"]
    assert logged["train/skipped_in_a_row"] == expected["train/skipped_in_a_row"]
    # Norms before clipping. The first ones exceed --max_grad_norm, so clipped steps are compared too.
    norms, expected_norms = logged["train/grad_norm"], expected["train/grad_norm"]
    torch.testing.assert_close(
        *(torch.tensor(values).nan_to_num(posinf=0) for values in (norms, expected_norms)), **NORM
    )
    assert phase == 2 or max(filter(math.isfinite, norms)) > 1
    # DeepSpeed itself skips steps within backward(): it must skip the same ones.
    steps = {str(i) for i, loss in enumerate(logged["train/loss"], start=1) if math.isnan(loss)}
    assert 1 <= len(steps) <= STEPS / 2
    assert {str(i) for i, norm in enumerate(norms, start=1) if not math.isfinite(norm)} == steps
    assert skipped(text) == skipped(reference_text) == dict.fromkeys(steps, BAD_CLIP)


@every_engine
def test_trains_a_lora_as_one_process_does(engine, runs):
    """Frozen weights in bf16 and trained ones in fp32 lie in one block, which engines split or gather as a whole."""
    (out, _), (reference, _) = runs(engine)[1, "lora"], runs("one process")[1, "lora"]
    for name in ("final", "checkpoint-3/model"):
        trained, expected = (load_file(folder / name / LORA_WEIGHTS) for folder in (out, reference))
        assert trained.keys() == expected.keys()
        assert all(tensor.any() for tensor in trained.values())
        # More gradients have their sign from rounding in bf16: of 1.1 % of the weights under ZeRO-3 (measured).
        apart = torch.cat([((trained[key] - expected[key]).abs() > WEIGHT["atol"]).flatten() for key in trained])
        assert apart.float().mean() < 0.03
    losses = (torch.tensor(scalars(folder)["train/loss"]) for folder in (out, reference))
    torch.testing.assert_close(*losses, **BF16_LOSS)


@pytest.mark.slow
def test_offloading_trains_as_one_process_does(runs):
    test_trains_as_one_process_does("zero3_offload", 1, runs)


@both_phases
@every_engine
def test_exports_ordinary_folders(engine, phase, runs):
    out, reference = runs(engine)[phase][0], runs("one process")[phase][0]
    model_class = WanTransformer3DModel if phase == 1 else C2RControlNet
    for name in ("best", "final", f"checkpoint-{STEPS}/model"):
        model, report = model_class.from_pretrained(out / name, output_loading_info=True)
        assert not any(report.values()), report
        state_dict, expected = model.state_dict(), weights(reference / name)
        # In phase 2 the ControlNet's alone: no tensor of the backbone is stored.
        assert weights(out / name).keys() == expected.keys() == state_dict.keys()
        for key, tensor in state_dict.items():
            assert tensor.dtype == torch.float32
            torch.testing.assert_close(tensor, expected[key], **WEIGHT, msg=lambda text, k=key: f"{k}: {text}")
    trained, averaged = weights(out / f"checkpoint-{STEPS}/model"), weights(out / "final")
    assert any(not torch.equal(tensor, averaged[key]) for key, tensor in trained.items())

    # The checkpoint's other files hold two moments and an average of the trained weights, and nothing of the backbone.
    own = sum(tensor.numel() for tensor in trained.values())
    classifier = out / f"checkpoint-{STEPS}/domain_classifier"
    beside = sum(tensor.numel() for tensor in weights(classifier).values()) if phase == 2 else 0
    for kind, copies, count in (("optimizer", 2, own + beside), ("ema", 1, own)):
        files = sorted((out / f"checkpoint-{STEPS}").glob(f"{kind}-*.safetensors"))
        whole = (kind, engine) == ("ema", "zero2")  # ZeRO-2 does not split weights
        assert len(files) == (2 if engine in SPLITS_OPTIMIZER and not whole else 1)
        stored = sum(tensor.numel() for file in files for tensor in load_file(file).values() if tensor.ndim)
        assert copies * count <= stored <= 1.02 * copies * count + 64


@both_phases
@every_engine
def test_resumes_bit_for_bit(engine, phase, runs):
    out, (resumed, text) = runs(engine)[phase][0], runs(engine)[phase, "resumed"]
    assert f"resumed from {resumed / f'checkpoint-{SAVED}'} at step {SAVED}" in text
    for file in (out / f"checkpoint-{STEPS}").rglob("*"):
        again = resumed / file.relative_to(out)
        if file.name == "state.json":
            assert state_of(again) == state_of(file)
        elif file.is_file():
            assert again.read_bytes() == file.read_bytes(), file.name
    losses = scalars(resumed)["train/loss"]
    assert losses[: STEPS - SAVED] == scalars(out)["train/loss"][SAVED:]


@every_engine
def test_trains_in_bf16_over_a_bf16_backbone(engine, runs):
    """In the default precision an engine holds trainable fp32 and frozen bf16 weights, the forward under autocast."""
    logged, expected = (scalars(runs(name)[2, "bf16"][0]) for name in (engine, "one process"))
    assert len(logged["train/loss"]) == 3
    for name in ("train/loss", "validation/loss"):
        torch.testing.assert_close(torch.tensor(logged[name]), torch.tensor(expected[name]), **BF16_LOSS)
    exported = weights(runs(engine)[2, "bf16"][0] / "final")
    assert {tensor.dtype for tensor in exported.values()} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in exported.values())


@every_engine
def test_too_many_skipped_steps_end_the_run(engine, runs):
    (line,) = runs(engine)["errors"]
    assert f"not finite for {BAD_CLIP}" in line
    assert "--max_skipped_steps 0" in line


# ---------------------------------------------------------------------------------------------- a change of the engine


@every_engine
def test_a_checkpoint_of_one_process_resumes_on_every_engine_with_every_memory_mode(engine, runs):
    out, text = runs(engine)[2, "from one process"]
    assert "on 2 processes (was one process)" in text
    assert "resumed with --gradient_accumulation_steps 1 (was 2): from the command line" in text
    assert_goes_on_like(runs("one process")[2][0], out)


@every_engine
def test_processes_that_share_a_clip_train_as_one_process_does(engine, runs):
    out, text = runs(engine)[2, "from one process", "shared clips"]
    assert "resumed with --context_parallel_degree 2 (was 1): from the command line" in text
    assert_goes_on_like(runs("one process")[2][0], out)


@every_engine
def test_a_checkpoint_of_every_engine_resumes_in_one_process(engine, runs, command, tmp_path):
    out = runs(engine)[2][0]
    shutil.copytree(out / f"checkpoint-{SAVED}", tmp_path / f"checkpoint-{SAVED}")
    done = succeed(*command(2, "one process", tmp_path, "--resume_from_checkpoint=latest"), by=fork)
    assert "resumed on one process (was" in done.stdout
    assert_goes_on_like(out, tmp_path)


def assert_goes_on_like(whole, resumed):
    """A run that goes on on another engine has the losses, weights, moments and average of the uninterrupted one."""
    logged, expected = scalars(resumed), scalars(whole)
    for name, bounds in {"train/loss": LOSS, "validation/loss": LOSS, "train/grad_norm": NORM}.items():
        values, others = logged[name], expected[name][-len(logged[name]) :]
        assert len(values) == (1 if "validation" in name else STEPS - SAVED)
        torch.testing.assert_close(torch.tensor(values), torch.tensor(others), **bounds)
    found, wanted = (states_of(out / f"checkpoint-{STEPS}") for out in (resumed, whole))
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        if key.startswith("exp_avg"):  # moments are far smaller than weights
            difference = (found[key] - tensor).abs().max()
            assert difference <= 1e-3 * tensor.abs().max(), key
        else:
            torch.testing.assert_close(found[key], tensor, **WEIGHT)


def states_of(checkpoint):
    """Return weights, moments and average of a checkpoint, joined from the files of all processes."""
    states = {f"weight {name}": tensor for name, tensor in weights(checkpoint / "model").items()}
    ranges = {}
    for file in [*checkpoint.glob("optimizer-*"), *checkpoint.glob("ema-*")]:
        for key, tensor in load_file(file).items():
            name, start, state = key.split(":")
            ranges.setdefault(f"{state} {name}", {})[int(start)] = tensor
    for key, tensors in ranges.items():
        parts = [tensors[start] for start in sorted(tensors)]
        states[key] = parts[0] if key.startswith("step ") else torch.cat(parts)
    return states


# --------------------------------------------------------------------------------------------------- optimizer options


@pytest.mark.parametrize("engine", [pytest.param(name, marks=pytest.mark.slow) for name in SAVES_MEMORY])
def test_options_that_save_memory_reach_the_same_losses(engine, runs):
    out = runs(engine)[1, "saves memory"][0]
    expected = scalars(runs("one process")[1][0])["train/loss"][:3]
    assert scalars(out)["train/loss"] == pytest.approx(expected, rel=3e-3)
    (optimizer, *_) = sorted((out / "checkpoint-3").glob("optimizer-*.safetensors"))
    dtypes = {tensor.dtype for tensor in load_file(optimizer).values()}
    assert engine != "zero3" or torch.uint8 in dtypes  # below 4096 numbers bitsandbytes keeps fp32
    assert {tensor.dtype for tensor in weights(out / "final").values()} == {torch.float32}


@pytest.mark.parametrize(
    ("kind", "stage", "option", "part"),
    [
        ("FSDP", None, "--optimizer=adamw8bit", None),
        ("FSDP", None, "--weight_storage=bf16", "but FSDP2 splits them"),
        ("DEEPSPEED", 2, "--weight_storage=bf16", "but DeepSpeed ZeRO-2 splits them"),
        ("DEEPSPEED", 3, "--weight_storage=bf16", "but DeepSpeed ZeRO-3 splits them"),
        ("FSDP", None, "--compile", "is not tested with FSDP2"),
        ("FSDP", None, "--context_parallel_degree=2", None),
        ("DEEPSPEED", 3, "--context_parallel_degree=2", None),
        ("MULTI_GPU", None, "--context_parallel_degree=3", "2 processes cannot form groups of 3; start a multiple"),
        ("DEEPSPEED", 3, "--compile", "is not tested with DeepSpeed ZeRO-3"),
        ("DEEPSPEED", 3, "--optimizer=adamw8bit", None),
        ("MULTI_GPU", None, "--weight_storage=bf16", None),
        ("FSDP", None, "--offload_backbone", "FSDP2 moves or splits all weights by itself"),
        ("DEEPSPEED", 2, "--offload_backbone", "DeepSpeed ZeRO-2 moves or splits all weights by itself"),
        ("DEEPSPEED", 3, "--offload_backbone", "DeepSpeed ZeRO-3 moves or splits all weights by itself"),
        ("MULTI_GPU", None, "--offload_backbone", None),
        ("FSDP", None, "--fp8_backbone", "FSDP2 moves or splits all weights by itself"),
        ("DEEPSPEED", 2, "--fp8_backbone", "DeepSpeed ZeRO-2 moves or splits all weights by itself"),
    ],
)
def test_options_that_do_not_work_on_an_engine_are_refused(kind, stage, option, part):
    plugin = SimpleNamespace(zero_stage=stage)
    state = SimpleNamespace(deepspeed_plugin=plugin)
    accelerator = SimpleNamespace(distributed_type=kind, is_fsdp2=True, state=state, num_processes=2)
    args = phase2_options([option]) if "backbone" in option else options([option])
    if part is None:
        require_supported(accelerator, args)
        return
    with pytest.raises(InputError) as error:
        require_supported(accelerator, args)
    assert str(error.value).startswith(f"{option.replace('=', ' ')}: ")
    assert part in str(error.value)


def test_8_bit_adamw_without_bitsandbytes_is_refused_at_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(InputError, match="pip install bitsandbytes==") as error:
        require_supported(Accelerator(cpu=True), options(["--optimizer=adamw8bit"]))
    assert "\n" not in str(error.value)


def test_an_average_needs_fp32_storage():
    with pytest.raises(InputError, match=r"--ema_decay 0\.9: would average only the bf16 part"):
        require_supported(Accelerator(cpu=True), options(["--weight_storage=bf16", "--ema_decay=0.9"]))


def test_bf16_storage_needs_bf16_precision():
    args = options(["--weight_storage=bf16", "--mixed_precision=no"])
    with pytest.raises(InputError, match="does not work with --mixed_precision no; give --mixed_precision bf16"):
        require_supported(Accelerator(cpu=True), args)


def test_compiled_blocks_do_not_share_clips():
    accelerator = SimpleNamespace(distributed_type="MULTI_GPU", num_processes=2)
    with pytest.raises(InputError, match="--compile: is not tested with --context_parallel_degree 2; leave one"):
        require_supported(accelerator, options(["--compile", "--context_parallel_degree=2"]))


# -------------------------------------------------------------------------------------------------------------- memory


@pytest.fixture(scope="session")
def large_backbone(tmp_path_factory):
    """Save 0.44 GB of weights, enough to stand out from Python's own memory; return the folder."""
    folder = tmp_path_factory.mktemp("large")
    tiny_transformer(num_attention_heads=8, attention_head_dim=128, ffn_dim=4096, num_layers=6).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("engine", SPLITS_FROZEN)
def test_frozen_weights_are_split_and_only_the_main_process_loads_them(engine, large_backbone, runs):
    main, other = runs(engine)["reports"]
    frozen = sum(tensor.numel() for tensor in weights(large_backbone).values())
    for report in (main, other):
        assert report["frozen_here"] < 0.51 * frozen
        assert report["stepped_here"] == report["trained_here"] < 0.2 * report["frozen_here"]
        if engine == "fsdp2":  # DeepSpeed keeps gradients of its own
            assert report["gradients_here"] == report["trained_here"]
    assert frozen <= main["frozen_here"] + other["frozen_here"] < 1.001 * frozen
    whole = 4 * (frozen + main["trained_here"] + other["trained_here"])
    assert main["grown"] > whole
    assert other["grown"] < 0.85 * whole  # measured: 0.76 under ZeRO-3, which copies trained weights; 0.60 under FSDP2


def test_a_changed_frozen_weight_is_detected():
    """Phase 2 compares these fingerprints at its end."""
    backbone = tiny_transformer()
    before = local_fingerprint(backbone, backbone)
    assert local_fingerprint(tiny_transformer(), backbone) == before
    with torch.no_grad():
        list(backbone.parameters())[-1].view(-1)[0] += 1e-6
    assert local_fingerprint(backbone, backbone) != before


# ------------------------------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_each_config(path):
    text = path.read_text()
    assert text.startswith("# ")
    assert not text.splitlines()[1].startswith("#")
    config = load_config_from_file(str(path))
    name = path.stem
    kind = "DEEPSPEED" if "zero" in name else "FSDP" if "fsdp2" in name else "MULTI_GPU" if "multi" in name else "NO"
    assert config.distributed_type == kind
    assert config.use_cpu == (name == "cpu")
    alone = kind == "NO"
    machines = 2 if name.endswith("multinode") else 1
    assert (config.num_machines, config.num_processes) == (machines, 1 if alone else 8 * machines)
    if machines > 1:
        assert None not in (config.main_process_ip, config.main_process_port)
    if kind == "DEEPSPEED":
        offload = "cpu" if name.endswith("offload") else None
        assert config.deepspeed_config["zero_stage"] == (2 if "zero2" in name else 3)
        assert config.deepspeed_config.get("offload_param_device") == offload
        assert config.deepspeed_config.get("offload_optimizer_device") == offload
    if kind == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_cpu_ram_efficient_loading"]
    assert config.mixed_precision == "no"  # precision is --mixed_precision's
