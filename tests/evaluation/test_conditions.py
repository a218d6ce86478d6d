"""Held-out clips with right and wrong conditions."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from benchmarks.validation_share import validation_cost
from c2r import InputError, flow_matching
from c2r.data.buckets import Bucket
from c2r.data.clips import Clips
from c2r.data.manifest import read_manifest
from c2r.data.video import read_window
from c2r.encoding.cache import current_encoders
from c2r.encoding.dataset import ClipDataset
from c2r.encoding.encoding_pass import encode_missing
from c2r.evaluation.conditions import ControlConditions, PromptConditions, choose_validation_clips, other_clips
from c2r.evaluation.evaluate_run import validation_entry
from c2r.evaluation.validation import QUANTILES, noise_levels
from c2r.models.controlnet import C2RControlNet
from c2r.models.dinov3 import DINOv3FeatureExtractor
from c2r.models.transformer import C2RTransformer
from c2r.training.augmentation import augment_control_frames
from c2r.training.seeds import seeded_generator
from c2r.training.watchdog import Watchdog
from tests.helpers.clips import clip, clips_of
from tests.helpers.datasets import write_dataset
from tests.helpers.settings import clip_settings
from tests.helpers.tiny import FEATURE_DIM, tiny_transformer

TALL = Bucket(5, 48, 32)
SETTINGS = {"flow_shift": 3.0, "batch_size": 3}


@dataclass
class HeldOut:
    """The part of a mixture that validation clips are chosen from."""

    held_out: Clips
    name: str = "data/real"


def test_validation_clips_come_from_many_files():
    clips = clips_of(clip("a", 0), clip("a", 1), clip("a", 2), clip("b", 0))
    assert choose_validation_clips(HeldOut(clips), 2) == [clip("a", 0), clip("b", 0)]
    with pytest.raises(InputError, match="data/real"):
        choose_validation_clips(HeldOut(clips[:0]), 2)


def test_a_clip_is_recorded_with_what_decides_its_losses():
    own, other = clip("a", text="rain"), clip("b", text="sun")

    def recorded(own=own, other=other, fps=16):
        settings = clip_settings(fps=fps)
        conditions = SimpleNamespace(clips=[own], other_prompt_clips=[other], settings=settings, flow_shift=3.0)
        return validation_entry(4, {"right": torch.zeros(1, 4)}, conditions)["clips"][0]

    moved = replace(own, folder="elsewhere", mtime_ns=7)
    assert recorded(own=moved) == recorded()
    for changed in ({"fps": 8}, {"own": replace(own, control_name="c")}, {"own": replace(own, control_size=5)}):
        assert recorded(**changed)["key"] != recorded()["key"]
    assert recorded(other=clip("c", text="snow"))["other_prompt"] != recorded()["other_prompt"]


def test_other_clips_are_of_another_file_and_the_same_domain():
    clips = [clip("a", 0), clip("a", 1), clip("b", 0), clip("x", 0, "cg"), clip("x", 1, "cg"), clip("y", 0, "cg")]
    for own, other in zip(clips, other_clips(clips, [])):
        assert other.domain == own.domain
        assert other.target_file != own.target_file


def test_other_clips_have_the_bucket_of_the_clip():
    clips = [clip("a"), clip("b", bucket=TALL), clip("c"), clip("d", bucket=TALL)]
    assert [other.name for other in other_clips(clips, [])] == ["c", "d", "a", "b"]
    assert other_clips(clips[:2], []) == clips[:2]


def test_other_clips_are_spare_ones_if_the_domain_has_one_file():
    clips, spare = [clip("a", 0), clip("x", 0, "cg")], [clip("b", 0), clip("x", 1, "cg"), clip("y", 3, "cg")]
    assert other_clips(clips, [spare]) == [clip("b", 0), clip("y", 3, "cg")]


def test_other_clips_have_another_text_if_the_domain_has_one():
    clips = [clip("a", text="rain"), clip("b", text="rain"), clip("x", 0, "cg", "night")]
    spare = [clip("y", 0, "cg", "night"), clip("c", text="sun")]
    # All CG clips have one text: the clip itself is chosen.
    assert [other.name for other in other_clips(clips, [spare], "text")] == ["c", "c", "x"]


@pytest.fixture(scope="module")
def settings(tiny_models):
    return clip_settings(base_model=str(tiny_models / "pipeline"))


@pytest.fixture(scope="module")
def clips(settings, tmp_path_factory):
    """Two real clips and two CG clips with four different prompts, encoded.

    The first real clip has a coarse version.
    """
    folder = tmp_path_factory.mktemp("held_out")
    write_dataset(folder / "real", ["a.mp4", "b.mp4", "coarse.mp4"], [""] * 3)
    rows = "file_name,text,control_name\na.mp4,red brick,coarse.mp4\nb.mp4,night,\n"
    (folder / "real/metadata.csv").write_text(rows)
    write_dataset(folder / "cg", ["f0.mp4", "f1.mp4"], ["a street", "rain"], ["c0.mp4", "c1.mp4"])
    manifests = [read_manifest(folder / d, d, settings, current_encoders(settings)) for d in ("real", "cg")]
    clips = [clip for manifest in manifests for clip in manifest.clips if clip.window == 0]
    accelerator = Accelerator(cpu=True)
    encode_missing(clips, settings, accelerator, Watchdog(accelerator, 600))
    return clips


@pytest.fixture(scope="module")
def conditions(clips, settings):
    return ControlConditions(clips, [], settings, **SETTINGS, conditioning_scale=1.0)


@pytest.fixture(scope="module")
def dinov3(tiny_models):
    return DINOv3FeatureExtractor.from_pretrained(tiny_models / "dinov3")


@pytest.fixture(scope="module")
def grounded():
    """A model whose control branch changes the output."""
    transformer = tiny_transformer()
    controlnet = C2RControlNet.from_transformer(transformer, 2, 2, feature_dim=FEATURE_DIM)
    torch.manual_seed(1)
    for block in controlnet.control_blocks:
        for parameter in block.projector.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return C2RTransformer(transformer, controlnet).eval()


@torch.no_grad()
def losses_by_hand(predict, item):
    """Return the (S,) losses of one item of a `ClipDataset`; predict: (noisy_latents, timesteps) -> velocity."""
    latents, losses = item["latents_mean"], []
    for quantile, sigma in zip(QUANTILES, noise_levels(3.0)):
        noise = torch.randn(latents.shape, generator=seeded_generator("validation", item["name"], quantile))
        noisy = flow_matching.add_noise(latents[None], noise[None], sigma[None])
        target = flow_matching.velocity_target(latents, noise)[None]
        losses.append(flow_matching.velocity_loss(predict(noisy, 1000 * sigma[None]), target)[0])
    return torch.stack(losses)


def test_each_condition_is_what_its_name_says(conditions, grounded, dinov3):
    state = torch.get_rng_state()
    losses = conditions.losses(grounded, dinov3, Accelerator(cpu=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert conditions.domains == ["real", "real", "cg", "cg"]
    assert list(losses) == ["right", "other_control", "no_control", "other_prompt", "augmented", "coarse"]
    assert losses["augmented"].isnan().all(1).tolist() == [False, False, True, True]
    assert losses["coarse"].isnan().all(1).tolist() == [False, True, True, True]
    for name in ("other_control", "no_control", "other_prompt"):
        assert (losses[name] - losses["right"]).abs().min() > 0, name

    # By hand: the second CG clip, whose other clip is the first one; and the first real clip with another control.
    dataset = ClipDataset(conditions.clips, conditions.settings)
    clip, other, real = dataset[3], dataset[2], dataset[0]
    own, others = (dinov3(dataset.control_frames(i)[None].float() / 255) for i in (3, 2))
    coarse = read_window(f"{dataset.clips[0].folder}/coarse.mp4", 0.0, 5, 8, 32, 48).float() / 255
    altered = augment_control_frames(
        dataset.control_frames(0).float() / 255, seeded_generator("augmentation", real["name"]), chance=1.0
    )
    by_hand = [
        ("right", 3, clip, own),
        ("other_control", 3, clip, others),
        ("no_control", 3, clip, torch.zeros_like(own)),
        ("other_prompt", 3, clip | {"prompt_embeds": other["prompt_embeds"]}, own),
        ("coarse", 0, real, dinov3(coarse[None])),
        ("augmented", 0, real, dinov3(altered[None])),
    ]
    for name, row, item, control_features in by_hand:
        expected = losses_by_hand(
            lambda noisy, timesteps, prompt=item["prompt_embeds"][None], control=control_features: (
                grounded(noisy, timesteps, prompt, control).sample
            ),
            item,
        )
        torch.testing.assert_close(losses[name][row], expected, rtol=1e-4, atol=0)
        assert name == "right" or not torch.allclose(losses[name][row], losses["right"][row], rtol=1e-4, atol=0)


def test_prompt_conditions_use_the_own_and_another_prompt(clips, settings):
    conditions = PromptConditions(clips[:2], [clips], settings, **SETTINGS)
    assert [clip.name for clip in conditions.to_encode] == ["a.mp4", "b.mp4", "b.mp4", "a.mp4"]
    assert conditions.domains == ["real", "real"]
    transformer = tiny_transformer().eval()
    losses = conditions.losses(transformer, Accelerator(cpu=True))
    assert list(losses) == ["right", "other_prompt"]
    dataset = ClipDataset(clips[:2], settings)
    for name, prompt in (("right", 0), ("other_prompt", 1)):
        prompt_embeds = dataset[prompt]["prompt_embeds"][None]
        expected = losses_by_hand(
            lambda noisy, timesteps, prompt=prompt_embeds: transformer(noisy, timesteps, prompt).sample, dataset[0]
        )
        torch.testing.assert_close(losses[name][0], expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("answers", [[False], [True, True, False], [True, True, True, False]])
def test_go_on_ends_each_of_the_three_passes(conditions, grounded, dinov3, answers):
    go_on = iter(answers).__next__
    assert conditions.losses(grounded, dinov3, Accelerator(cpu=True), go_on) is None


def test_the_computed_cost_counts_the_forward_passes(clips, settings, grounded, dinov3):
    conditions = ControlConditions(clips, [], settings, flow_shift=3.0, batch_size=1, conditioning_scale=1.0)
    calls = []
    handle = grounded.register_forward_hook(lambda *inputs: calls.append(1))
    conditions.losses(grounded, dinov3, Accelerator(cpu=True))
    handle.remove()
    costs = {"forward with control": 0, "DINOv3 of a clip": 0}
    expected, _ = validation_cost(costs, clips=2, with_coarse=False)
    assert len(calls) == expected + len(QUANTILES)  # one clip of the two has a coarse version
