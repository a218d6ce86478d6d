"""A run of phase 2 with an average, an adversary and a CG monitor: its results, and what a resumed run restores."""

import json
import shutil
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

import train_phase1
import train_phase2
from c2r.evaluation.monitor import CGMonitor
from c2r.models.controlnet import C2RControlNet
from c2r.models.transformer import C2RTransformer
from c2r.options import PHASE1, PHASE2
from tests.helpers.commands import phase1, phase2, same, weights
from tests.helpers.datasets import write_monitored_datasets
from tests.helpers.scripts import run_script

STEPS = 4
SAMPLING_PASSES = 8  # of each of four samples: with control, and with control and prompt
OPTIONS = [
    f"--max_train_steps={STEPS}",
    "--learning_rate=1e-2",
    "--lr_scheduler=constant",
    "--dataloader_num_workers=0",
    "--checkpointing_steps=1",
    "--sample_steps=1",
    "--num_samples=4",
    "--num_inference_steps=1",
    "--guidance_scale=3",
    "--conditioning_scale=0.8",
    "--ema_decay=0.9",
    "--adversarial_weight=0.1",
    "--cg_ratio=0.5",
    # Every CG look is above this bound: the controller halves the share at steps 2 and 4.
    "--monitor_bound=-9",
    "--monitor_patience=2",
    "--cg_ratio_min=0.05",
]


@pytest.fixture(scope="module")
def train(tiny_models, tmp_path_factory):
    """Return train(out, *options), which runs the script in this process."""
    data = write_monitored_datasets(tmp_path_factory.mktemp("data"))

    def run(out, *options):
        _, *argv = phase2(tiny_models, data, tiny_models / "pipeline", out, *OPTIONS, *options, launcher=())
        run_script(train_phase2, PHASE2, argv)

    return run


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """Train without interruption.

    Return the folder, (projector's weights, inputs) of each evaluation by step, and the CG monitors of the samplings.
    """
    out, evaluated, done, monitors = tmp_path_factory.mktemp("run") / "whole", {}, [], []

    def look(module, args):
        if isinstance(module, C2RTransformer) and not module.training:
            evaluated.setdefault(len(done), []).append((projector_weight(module.controlnet), args))

    def count(optimizer, *args):
        if not optimizer.param_groups[0]["params"][0].is_meta:  # as in the preflight's estimate
            done.append(args)

    def judge(monitor, *args, **options):
        monitors.append(monitor)
        return unwatched_judge(monitor, *args, **options)

    unwatched_judge = CGMonitor.judge
    hooks = [
        register_module_forward_pre_hook(look),
        register_optimizer_step_post_hook(count),
    ]
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(CGMonitor, "judge", judge)
            train(out)
    finally:
        for hook in hooks:
            hook.remove()
    return SimpleNamespace(out=out, evaluated=evaluated, monitors=monitors)


def projector_weight(controlnet):
    return controlnet.control_blocks[0].projector[2].weight.detach().clone()


def state_of(checkpoint):
    """Return a checkpoint's state without the one number that each run measures for itself."""
    state = json.loads((checkpoint / "state.json").read_text())
    del state["progress"]["logs"]["train/samples_per_second"]
    return state


def averaged(checkpoint):
    """Return the averaged weights in a checkpoint by the names of the model's."""
    model = C2RControlNet.from_pretrained(checkpoint / "model")
    average = load_file(checkpoint / "ema-00000-of-00001.safetensors")
    return {name: average[f"{name}:0:average"].view(weight.shape) for name, weight in model.named_parameters()}


def average_by_hand(out, steps):
    """Return the average of the weights in a run's checkpoints, of which there is one for each step."""
    average = weights(out / "checkpoint-1/model")  # the first step keeps nothing of the initial weights
    for step in range(2, steps + 1):
        decay = min(0.9, step / (step + 9))
        trained = weights(out / f"checkpoint-{step}/model")
        average = {name: decay * tensor + (1 - decay) * trained[name] for name, tensor in average.items()}
    return average


# ------------------------------------------------------------------------------------------------------------- average


def test_validation_and_samples_come_from_the_averaged_weights(whole):
    name = "control_blocks.0.projector.2.weight"
    for step, is_validated in ((2, True), (3, False)):
        checkpoint = whole.out / f"checkpoint-{step}"
        average, trained = averaged(checkpoint)[name], weights(checkpoint / "model")[name]
        assert not torch.equal(average, trained)
        seen = whole.evaluated[step]
        assert (len(seen) > SAMPLING_PASSES) == is_validated
        assert all(torch.equal(weight, average) for weight, _ in seen)


def test_samples_are_made_with_the_scales_of_the_options(whole):
    passes = [inputs for _, inputs in whole.evaluated[3]]
    assert len(passes) == SAMPLING_PASSES
    assert all(control_features.any() and scale == 0.8 for *_, control_features, scale in passes)


def test_the_contract_keeps_the_guidance_of_the_samples(whole):
    expected = {"guidance": "apg", "guidance_scale": 3, "control_guidance_scale": 1, "conditioning_scale": 0.8}
    for name in ("best", "final"):
        assert json.loads((whole.out / name / "c2r.json").read_text()).items() >= expected.items()


def test_the_number_of_a_sample_is_the_seed_of_its_noise(whole):
    for number, (noise, *_) in enumerate(inputs for _, inputs in whole.evaluated[3][::2]):
        generator = torch.Generator().manual_seed(number)
        assert torch.equal(noise, torch.randn(noise.shape, generator=generator))


def test_one_cg_monitor_judges_all_samplings(whole):
    assert len(whole.monitors) == STEPS
    assert all(monitor is whole.monitors[0] for monitor in whole.monitors)


def test_the_average_is_that_of_the_formula(whole):
    torch.testing.assert_close(averaged(whole.out / f"checkpoint-{STEPS}"), average_by_hand(whole.out, STEPS))


def test_best_and_final_hold_the_averaged_weights(whole):
    step = json.loads((whole.out / "best/c2r.json").read_text())["step"]
    assert step > 1  # up to the first step the average is the weights themselves
    for name, checkpoint in (("best", f"checkpoint-{step}"), ("final", f"checkpoint-{STEPS}")):
        assert same(weights(whole.out / name), averaged(whole.out / checkpoint))
        assert not same(weights(whole.out / name), weights(whole.out / checkpoint / "model"))


def test_phase_1_averages_too(tiny_models, small_datasets, tmp_path):
    options = ["--max_train_steps=3", "--ema_decay=0.9", "--learning_rate=1e-2", "--dataloader_num_workers=0"]
    _, *argv = phase1(tiny_models, small_datasets, tmp_path, *options, "--checkpointing_steps=1", launcher=())
    run_script(train_phase1, PHASE1, argv)
    average, final = average_by_hand(tmp_path, 3), weights(tmp_path / "final")
    torch.testing.assert_close(final, average)
    assert not same(final, weights(tmp_path / "checkpoint-3/model"))


# -------------------------------------------------------------------------------------------------------------- resume


@pytest.fixture(scope="module")
def resumed(whole, train, tmp_path_factory):
    """Continue that run from step 3, between two changes of the share; return the folder."""
    out = tmp_path_factory.mktemp("run") / "resumed"
    shutil.copytree(whole.out / "checkpoint-3", out / "checkpoint-3")
    train(out, "--resume_from_checkpoint=latest")
    return out


def test_a_resumed_run_restores_the_share_in_force_and_the_controllers_count(whole, resumed):
    before = state_of(whole.out / "checkpoint-3")["progress"]
    assert (before["cg_ratio"], before["controller"]) == (0.25, {"count": 1})
    for out in (whole.out, resumed):
        after = state_of(out / f"checkpoint-{STEPS}")["progress"]
        assert (after["cg_ratio"], after["controller"]) == (0.125, {"count": 0})


def test_a_resumed_run_restores_the_average(whole, resumed):
    file = f"checkpoint-{STEPS}/ema-00000-of-00001.safetensors"
    assert same(load_file(resumed / file), load_file(whole.out / file))
    assert same(weights(resumed / "final"), weights(whole.out / "final"))


def test_a_resumed_run_restores_the_adversarys_running_accuracies(whole, resumed):
    logs, expected = (state_of(out / f"checkpoint-{STEPS}")["progress"]["logs"] for out in (resumed, whole.out))
    names = [name for name in expected if name.startswith("train/domain_accuracy")]
    assert len(names) == 3
    assert {name: logs[name] for name in names} == {name: expected[name] for name in names}


def test_a_resumed_run_ends_in_the_same_state(whole, resumed):
    assert state_of(resumed / f"checkpoint-{STEPS}") == state_of(whole.out / f"checkpoint-{STEPS}")


def test_a_checkpoint_from_before_an_entry_of_the_config_existed_is_resumed(whole, train, tmp_path):
    """An entry that is missing has the default of the class, and an option that is missing its own."""
    checkpoint = tmp_path / "checkpoint-3"
    shutil.copytree(whole.out / "checkpoint-3", checkpoint)
    added = ("injection", "causal_control")
    for file, part in (("model/config.json", []), ("state.json", ["options"])):
        content = json.loads((checkpoint / file).read_text())
        for name in added:
            del (content[part[0]] if part else content)[name]
        # As long as before: a checkpoint's files are checked by their sizes.
        (checkpoint / file).write_text(json.dumps(content).ljust((checkpoint / file).stat().st_size))
    train(tmp_path, "--resume_from_checkpoint=latest", "--num_samples=0")
    assert same(weights(tmp_path / "final"), weights(whole.out / "final"))


def test_another_share_at_resume_takes_effect(whole, train, tmp_path):
    shutil.copytree(whole.out / "checkpoint-3", tmp_path / "checkpoint-3")
    train(tmp_path, "--resume_from_checkpoint=latest", "--cg_ratio=0.75", "--num_samples=0")
    before, after = (state_of(out / f"checkpoint-{step}") for out, step in ((whole.out, 3), (tmp_path, STEPS)))
    assert after["progress"]["cg_ratio"] == after["progress"]["requested_cg_ratio"] == 0.75
    # A step draws four samples: three of them are now CG.
    due = [Fraction(state["sampler"]["position"]["cg_due"]) for state in (before, after)]
    assert due[1] - due[0] == 3
