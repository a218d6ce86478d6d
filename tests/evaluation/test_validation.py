"""Losses of held-out clips and the numbers computed from them."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import default_collate

from c2r import InputError, flow_matching
from c2r.evaluation.validation import QUANTILES, clip_losses, leak_warning, noise_levels, validation_metrics
from c2r.training.seeds import seeded_generator
from tests.helpers.clips import clip


class Latents(torch.utils.data.Dataset):
    """Clips of random latents, with the interface of `ClipDataset`."""

    collate = staticmethod(default_collate)

    def __init__(self, count):
        self.clips = [clip(str(i)) for i in range(count)]

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, index):
        latents = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(index))
        return {"latents_mean": latents, "name": f"clip {index}", "index": index}


def predict_zero(batch):
    return {"right": lambda noisy_latents, timesteps: torch.zeros_like(noisy_latents)}


def test_losses_are_computed_with_the_fixed_noise_of_the_clip():
    dataset = Latents(3)
    losses = clip_losses(dataset, predict_zero, Accelerator(cpu=True), 3.0)["right"]
    for index, row in enumerate(losses):
        clip = dataset[index]
        expected = [
            flow_matching.velocity_target(
                clip["latents_mean"],
                torch.randn(4, 2, 4, 4, generator=seeded_generator("validation", clip["name"], quantile)),
            )
            .square()
            .mean()
            for quantile in QUANTILES
        ]
        torch.testing.assert_close(row, torch.stack(expected))


def test_conditions_share_clip_noise_and_level_and_leave_the_global_rng_alone():
    seen = {"right": [], "other_control": []}

    def predictors_of(batch):
        def predictor(name):
            def predict(noisy_latents, timesteps):
                seen[name].append((noisy_latents, timesteps))
                return torch.full_like(noisy_latents, 0.0 if name == "right" else 1.0)

            return predict

        return {name: predictor(name) for name in seen}

    state = torch.get_rng_state()
    losses = clip_losses(Latents(3), predictors_of, Accelerator(cpu=True), 3.0, 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(losses) == ["right", "other_control"]
    assert losses["right"].shape == (3, len(QUANTILES))
    assert not torch.equal(losses["right"], losses["other_control"])
    for (noisy, timesteps), (other_noisy, other_timesteps) in zip(*seen.values(), strict=True):
        assert torch.equal(noisy, other_noisy)
        assert torch.equal(timesteps, other_timesteps)
    assert sorted({t.item() for _, batch in seen["right"] for t in batch}) == pytest.approx(
        (1000 * noise_levels(3.0)).tolist()
    )


def test_a_loss_that_is_not_finite_names_its_clip():
    dataset = Latents(3)
    dataset.clips = [clip(f"{i}.mp4", window=2) for i in range(3)]

    def predictors_of(batch):
        factor = torch.where(torch.tensor(batch["name"][0] == "clip 1"), torch.nan, 1.0)
        bad = {"other_control": lambda noisy_latents, timesteps: noisy_latents * factor}
        return {"right": lambda noisy_latents, timesteps: noisy_latents} | bad

    with pytest.raises(InputError, match=r"not finite for 1\.mp4#2: "):
        clip_losses(dataset, predictors_of, Accelerator(cpu=True), 3.0)


@pytest.mark.parametrize("batch_size", [2, 3, 8])
def test_losses_do_not_depend_on_the_batch_size(batch_size):
    def predictors_of(batch):
        return {"right": lambda noisy_latents, timesteps: noisy_latents * timesteps.view(-1, 1, 1, 1, 1) / 1000}

    accelerator = Accelerator(cpu=True)
    single = clip_losses(Latents(5), predictors_of, accelerator, 3.0)["right"]
    assert len(set(single.flatten().tolist())) == 5 * len(QUANTILES)
    torch.testing.assert_close(clip_losses(Latents(5), predictors_of, accelerator, 3.0, batch_size)["right"], single)
    assert not torch.equal(clip_losses(Latents(5), predictors_of, accelerator, 5.0)["right"], single)


def test_every_process_runs_equally_many_forward_passes():
    """Three processes share four clips: two forward passes each, and the sum equals the losses of one process."""
    calls, tables = [], []
    for index in range(3):
        share = SimpleNamespace(
            num_processes=3, process_index=index, device=torch.device("cpu"), reduce=lambda losses, reduction: losses
        )

        def predictors_of(batch, index=index):
            calls.append(index)
            return predict_zero(batch)

        tables.append(clip_losses(Latents(4), predictors_of, share, 3.0)["right"])
    assert calls == [0, 0, 1, 1, 2, 2]
    torch.testing.assert_close(sum(tables), clip_losses(Latents(4), predict_zero, Accelerator(cpu=True), 3.0)["right"])


def test_go_on_ends_the_validation():
    answers = iter([True, False])
    assert clip_losses(Latents(3), predict_zero, Accelerator(cpu=True), 3.0, go_on=lambda: next(answers)) is None


def losses_of(**conditions):
    """Return {condition: (n, 4)} with the same loss at each noise level."""
    return {name: torch.tensor(values)[:, None].repeat(1, 4) for name, values in conditions.items()}


def test_both_domains_have_the_same_weight():
    losses = losses_of(
        right=[1.0, 3.0, 5.0],
        other_control=[2.0, 4.0, 9.0],
        no_control=[4.0, 4.0, 6.0],
        other_prompt=[1.0, 3.0, 6.0],
    )
    metrics = validation_metrics(losses, ["real", "real", "cg"], 3.0)
    expected = {
        "loss": 3.5,
        "loss_real": 2.0,
        "loss_cg": 5.0,
        "loss_other_control": 6.0,
        "loss_no_control": 5.0,
        "loss_other_prompt": 4.0,
        "control_gain": 2.5,
        "control_gain_real": 1.0,
        "control_gain_cg": 4.0,
        "prompt_gain": 0.5,
        "prompt_gain_real": 0.0,
        "prompt_gain_cg": 1.0,
    }
    for name, value in {"loss": 3.5, "control_gain": 2.5, "prompt_gain": 0.5}.items():
        expected |= {f"{name}_sigma_{level}": value for level in ("0.30", "0.64", "0.83", "0.95")}
    assert metrics == expected


def test_metrics_contain_each_noise_level():
    right = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    metrics = validation_metrics({"right": right, "other_prompt": 2 * right}, ["real"], 3.0)
    for level, value in zip(("0.30", "0.64", "0.83", "0.95"), right[0].tolist()):
        assert metrics[f"loss_sigma_{level}"] == metrics[f"prompt_gain_sigma_{level}"] == value
    assert "control_gain" not in metrics


def test_leak_share_is_relative_to_the_control_gain_of_the_same_clips():
    nan = torch.nan
    losses = losses_of(
        right=[1.0, 1.0, 1.0],
        other_control=[3.0, 2.0, 9.0],
        other_prompt=[1.0, 1.0, 1.0],
        augmented=[1.5, 1.0, nan],
        coarse=[2.5, nan, nan],
    )
    metrics = validation_metrics(losses, ["real", "real", "cg"], 3.0)
    assert metrics["leak_augmented"] == 0.25
    assert metrics["leak_share_augmented"] == pytest.approx(0.25 / 1.5)
    assert metrics["leak_coarse"] == 1.5
    assert metrics["leak_share_coarse"] == 0.75
    assert leak_warning(metrics, 0.0).startswith("leak 0.75: real clips follow the look of their own control")
    assert "consider --control_augmentation 0.5" in leak_warning(metrics, 0.0)
    assert "raise --control_augmentation" in leak_warning(metrics, 0.5)
    del metrics["leak_share_coarse"]
    assert leak_warning(metrics, 0.0) is None


@pytest.mark.parametrize("gain", [0.0, -0.5, 0.005])
def test_there_is_no_leak_share_without_a_control_gain(gain):
    losses = losses_of(right=[1.0], other_control=[1.0 + gain], other_prompt=[1.0], augmented=[1.5])
    metrics = validation_metrics(losses, ["real"], 3.0)
    assert metrics["leak_augmented"] == 0.5
    assert not any(name.startswith("leak_share") for name in metrics)
    assert leak_warning(metrics, 0.0) is None
