from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import default_collate

from c2r import InputError, flow_matching
from c2r.training import seeded_generator
from c2r.validation import QUANTILES, choose_validation_clips, clip_losses, control_metrics, other_clips


@dataclass(frozen=True)
class Clip:
    file: str
    window: int
    domain: str = "real"


class Latents(torch.utils.data.Dataset):
    """Clips of random latents, in the form of `ClipDataset`."""

    collate = staticmethod(default_collate)

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        latents = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(index))
        return {"latents_mean": latents, "name": f"clip {index}", "index": index}


def test_losses_are_those_of_the_fixed_noise():
    dataset = Latents(3)

    def predict_zero(batch):
        return lambda noisy_latents, timesteps: torch.zeros_like(noisy_latents)

    losses = clip_losses(dataset, predict_zero, Accelerator(cpu=True), 3.0)
    for index, loss in enumerate(losses):
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
        torch.testing.assert_close(loss, torch.stack(expected).mean())


def test_a_loss_that_is_not_finite_names_its_clip():
    dataset = Latents(3)
    dataset.clips = [SimpleNamespace(name=f"{i}.mp4", window=2) for i in range(3)]

    def predict(batch):
        factor = torch.where(torch.tensor(batch["name"][0] == "clip 1"), torch.nan, 1.0)
        return lambda noisy_latents, timesteps: noisy_latents * factor

    with pytest.raises(InputError, match=r"not finite for 1\.mp4#2: "):
        clip_losses(dataset, predict, Accelerator(cpu=True), 3.0)


@pytest.mark.parametrize("batch_size", [2, 3, 8])
def test_losses_do_not_depend_on_the_batch_size(batch_size):
    def predict(batch):
        return lambda noisy_latents, timesteps: noisy_latents * timesteps.view(-1, 1, 1, 1, 1) / 1000

    accelerator = Accelerator(cpu=True)
    single = clip_losses(Latents(5), predict, accelerator, 3.0)
    assert len(set(single.tolist())) == 5
    torch.testing.assert_close(clip_losses(Latents(5), predict, accelerator, 3.0, batch_size), single)
    assert not torch.equal(clip_losses(Latents(5), predict, accelerator, 5.0), single)


def test_other_clips_are_of_another_file_and_the_same_domain():
    clips = [Clip("a", 0), Clip("a", 1), Clip("b", 0), Clip("x", 0, "cg"), Clip("x", 1, "cg"), Clip("y", 0, "cg")]
    for clip, other in zip(clips, other_clips(clips, [])):
        assert other.domain == clip.domain
        assert other.file != clip.file


def test_other_clips_come_from_the_spare_ones_where_a_domain_has_one_file():
    clips, spare = [Clip("a", 0), Clip("x", 0, "cg")], [Clip("b", 0), Clip("x", 1, "cg"), Clip("y", 3, "cg")]
    assert other_clips(clips, spare) == [Clip("b", 0), Clip("y", 3, "cg")]


@dataclass
class HeldOut:
    held_out: list
    folder: str = "data/real"


def test_validation_clips_come_from_many_files():
    clips = [Clip("a", 0), Clip("a", 1), Clip("a", 2), Clip("b", 0)]
    assert choose_validation_clips(HeldOut(clips), 2) == [Clip("a", 0), Clip("b", 0)]
    with pytest.raises(InputError, match="data/real"):
        choose_validation_clips(HeldOut([]), 2)


def test_control_metrics_weigh_the_domains_alike():
    metrics = control_metrics(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([2.0, 4.0, 9.0]), ["real", "real", "cg"])
    assert metrics == {
        "loss": 3.5,
        "loss_real": 2.0,
        "loss_cg": 5.0,
        "loss_other_control": 6.0,
        "control_gain": 2.5,
    }
