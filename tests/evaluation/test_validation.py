import io
import json
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch.utils.data import default_collate

from benchmarks.validation_share import validation_cost
from c2r import InputError, flow_matching
from c2r.data.buckets import Bucket
from c2r.data.clips import Clips
from c2r.data.manifest import read_manifest
from c2r.encoding.dataset import ClipDataset
from c2r.encoding.encoding_pass import encode_missing
from c2r.evaluation.validation import (
    QUANTILES,
    ControlConditions,
    choose_validation_clips,
    clip_losses,
    leak_warning,
    noise_levels,
    other_clips,
    validation_metrics,
)
from c2r.evaluation.validation_plot import draw_history
from c2r.models.controlnet import C2RControlNet
from c2r.models.dinov3 import DINOv3FeatureExtractor
from c2r.models.transformer import C2RTransformer
from c2r.training.run import LoopState
from c2r.training.seeds import seeded_generator
from tests.helpers.clips import clip, clips_of
from tests.helpers.commands import SIZE
from tests.helpers.datasets import write_dataset
from tests.helpers.tiny import FEATURE_DIM, tiny_transformer


class Latents(torch.utils.data.Dataset):
    """Clips of random latents, in the form of `ClipDataset`."""

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


def test_losses_are_those_of_the_fixed_noise():
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


def test_every_process_runs_as_many_forwards_and_counts_its_own_clips():
    """Three processes' shares of four clips: two forwards each, and the shares add up to what one process finds."""
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


def test_validation_ends_where_it_is_told_to():
    answers = iter([True, False])
    assert clip_losses(Latents(3), predict_zero, Accelerator(cpu=True), 3.0, go_on=lambda: next(answers)) is None


def test_other_clips_are_of_another_file_and_the_same_domain():
    clips = [clip("a", 0), clip("a", 1), clip("b", 0), clip("x", 0, "cg"), clip("x", 1, "cg"), clip("y", 0, "cg")]
    for own, other in zip(clips, other_clips(clips, [])):
        assert other.domain == own.domain
        assert other.file != own.file


def test_other_clips_have_the_shape_of_the_clip():
    tall = Bucket(5, 48, 32)
    clips = [clip("a"), clip("b", bucket=tall), clip("c"), clip("d", bucket=tall)]
    assert [other.name for other in other_clips(clips, [])] == ["c", "d", "a", "b"]
    assert other_clips(clips[:2], []) == clips[:2]


def test_other_clips_come_from_the_spare_ones_where_a_domain_has_one_file():
    clips, spare = [clip("a", 0), clip("x", 0, "cg")], [clip("b", 0), clip("x", 1, "cg"), clip("y", 3, "cg")]
    assert other_clips(clips, [spare]) == [clip("b", 0), clip("y", 3, "cg")]


@dataclass
class HeldOut:
    held_out: Clips
    name: str = "data/real"


def test_validation_clips_come_from_many_files():
    clips = clips_of(clip("a", 0), clip("a", 1), clip("a", 2), clip("b", 0))
    assert choose_validation_clips(HeldOut(clips), 2) == [clip("a", 0), clip("b", 0)]
    with pytest.raises(InputError, match="data/real"):
        choose_validation_clips(HeldOut(clips[:0]), 2)


def test_another_prompt_is_another_text_of_the_domain_where_there_is_one():
    clips = [clip("a", text="rain"), clip("b", text="rain"), clip("x", 0, "cg", "night")]
    spare = [clip("y", 0, "cg", "night"), clip("c", text="sun")]
    chosen = other_clips(clips, [spare], "text")
    assert [clip.name for clip in chosen] == ["c", "c", "x"]  # the CG clips all have one text: it can gain nothing


def losses_of(**conditions):
    """{condition: (n, 4)} with the same loss at each noise level."""
    return {name: torch.tensor(values)[:, None].repeat(1, 4) for name, values in conditions.items()}


def test_metrics_weigh_the_domains_alike():
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


def test_metrics_tell_the_noise_levels_apart():
    right = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    metrics = validation_metrics({"right": right, "other_prompt": 2 * right}, ["real"], 3.0)
    for level, value in zip(("0.30", "0.64", "0.83", "0.95"), right[0].tolist()):
        assert metrics[f"loss_sigma_{level}"] == metrics[f"prompt_gain_sigma_{level}"] == value
    assert "control_gain" not in metrics


def test_leak_is_a_share_of_the_same_clips_control_gain():
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
def test_there_is_no_leak_without_a_gain(gain):
    losses = losses_of(right=[1.0], other_control=[1.0 + gain], other_prompt=[1.0], augmented=[1.5])
    metrics = validation_metrics(losses, ["real"], 3.0)
    assert metrics["leak_augmented"] == 0.5
    assert not any(name.startswith("leak_share") for name in metrics)
    assert leak_warning(metrics, 0.0) is None


def history_of(*gains):
    entries = []
    for step, gain in enumerate(gains):
        losses = losses_of(
            right=[1.0], other_control=[1.0 + gain], no_control=[1.0], other_prompt=[1.1], coarse=[1.0 + gain / 2]
        )
        entries.append({"step": 100 * step} | validation_metrics(losses, ["real"], 3.0))
    return entries


def test_the_picture_is_the_same_for_the_same_history():
    history = history_of(0.0, 0.1, 0.3)
    picture = draw_history(history)
    # Also after a resume, through the checkpoint's JSON.
    assert draw_history(json.loads(json.dumps(history))) == picture
    assert draw_history(history_of(0.0, 0.1, 0.2)) != picture
    with Image.open(io.BytesIO(picture)) as image:
        assert image.text == {}
    phase1 = validation_metrics(losses_of(right=[1.0], other_prompt=[2.0]), ["real"], 3.0)
    assert draw_history([{"step": 0} | phase1])  # one point


def test_best_is_by_the_number_that_is_asked_for():
    loop = LoopState()
    found = []
    for step, (loss, gain) in enumerate([(3.0, 0.1), (2.0, 0.3), (2.5, 0.2), (2.2, 0.4)]):
        loop.global_step = step
        loop.add_validation({"loss": loss, "control_gain": gain})
        found.append(loop.is_best("loss" if step < 2 else "control_gain"))
    assert found == [True, True, True, True]  # the third: another number than before
    assert loop.best == {"control_gain": 0.4}
    assert loop.best_text == "validation control gain 0.4000"
    assert [entry["step"] for entry in loop.history] == [0, 1, 2, 3]
    for worse in (0.4, 0.1, torch.nan):
        loop.add_validation({"control_gain": worse})
        assert not loop.is_best("control_gain")
    loop.add_validation({"loss": 9.0})
    assert loop.is_best()
    loop.add_validation({"loss": 9.0})
    assert not loop.is_best()


@pytest.fixture(scope="module")
def conditions(tiny_models, tmp_path_factory):
    """Two real clips, the first with its own video as its coarse version, and two CG clips; no two prompts alike."""
    folder = tmp_path_factory.mktemp("held_out")
    write_dataset(folder / "real", ["a.mp4", "b.mp4"], ["", ""])
    rows = "file_name,text,control_name\na.mp4,red brick,a.mp4\nb.mp4,night,\n"
    (folder / "real/metadata.csv").write_text(rows)
    write_dataset(folder / "cg", ["f0.mp4", "f1.mp4"], ["a street", "rain"], ["c0.mp4", "c1.mp4"])
    args = SimpleNamespace(
        **SIZE,
        pretrained_model_name_or_path=str(tiny_models / "pipeline"),
        dataloader_num_workers=0,
        flow_shift=3.0,
        conditioning_scale=1.0,
        train_batch_size=3,
    )
    clips = [
        clip
        for domain in ("real", "cg")
        for clip in read_manifest(folder / domain, domain, args).clips
        if clip.window == 0
    ]
    conditions = ControlConditions(clips, [], args)
    encode_missing(conditions.to_encode, args, Accelerator(cpu=True))
    return conditions


@pytest.fixture(scope="module")
def grounded():
    """A control branch that says something."""
    transformer = tiny_transformer()
    controlnet = C2RControlNet.from_transformer(transformer, 2, 2, feature_dim=FEATURE_DIM)
    torch.manual_seed(1)
    for block in controlnet.control_blocks:
        for parameter in block.projector.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return C2RTransformer(transformer, controlnet).eval()


def test_each_condition_is_what_its_name_says(conditions, grounded, tiny_models):
    dinov3 = DINOv3FeatureExtractor.from_pretrained(tiny_models / "dinov3")
    state = torch.get_rng_state()
    losses = conditions.losses(grounded, dinov3, Accelerator(cpu=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert list(losses) == ["right", "other_control", "no_control", "other_prompt", "augmented", "coarse"]
    assert losses["augmented"].isnan().all(1).tolist() == [False, False, True, True]
    assert losses["coarse"].isnan().all(1).tolist() == [False, True, True, True]
    # Its coarse version is the very same video; in a batch of another size sums round otherwise.
    torch.testing.assert_close(losses["coarse"][0], losses["right"][0], rtol=1e-5, atol=0)
    for name in ("other_control", "no_control", "other_prompt"):
        assert (losses[name] - losses["right"]).abs().min() > 0, name
    assert (losses["augmented"][:2] - losses["right"][:2]).abs().min() > 0

    # The second CG clip, once more by hand: its other clip is the first one.
    dataset = ClipDataset(conditions.clips, conditions.args)
    clip, other = dataset[3], dataset[2]
    own, others = (dinov3(dataset.control_frames(i)[None].float() / 255) for i in (3, 2))
    by_hand = {
        "right": (clip["prompt_embeds"], own),
        "other_control": (clip["prompt_embeds"], others),
        "no_control": (clip["prompt_embeds"], torch.zeros_like(own)),
        "other_prompt": (other["prompt_embeds"], own),
    }
    latents = clip["latents_mean"]
    for name, (prompt_embeds, control_features) in by_hand.items():
        for column, quantile in enumerate(QUANTILES):
            noise = torch.randn(latents.shape, generator=seeded_generator("validation", clip["name"], quantile))
            sigmas = noise_levels(3.0)[column : column + 1]
            noisy = flow_matching.add_noise(latents[None], noise[None], sigmas)
            with torch.no_grad():
                velocity = grounded(noisy, 1000 * sigmas, prompt_embeds[None], control_features)
            loss = flow_matching.velocity_loss(velocity, flow_matching.velocity_target(latents, noise)[None])
            torch.testing.assert_close(losses[name][3, column], loss[0], rtol=1e-4, atol=0)


def test_a_validation_that_is_ended_gives_nothing(conditions, grounded, tiny_models):
    dinov3 = DINOv3FeatureExtractor.from_pretrained(tiny_models / "dinov3")
    for answers in ([False], [True, True, False], [True, True, True, False]):  # in each of the three passes
        go_on = iter(answers).__next__
        assert conditions.losses(grounded, dinov3, Accelerator(cpu=True), go_on) is None


def test_the_computed_share_counts_the_forwards_that_are_run(conditions, grounded, tiny_models):
    dinov3 = DINOv3FeatureExtractor.from_pretrained(tiny_models / "dinov3")
    single = ControlConditions(
        conditions.clips, [], SimpleNamespace(**vars(conditions.args) | {"train_batch_size": 1})
    )
    calls = []
    handle = grounded.register_forward_hook(lambda *inputs: calls.append(1))
    single.losses(grounded, dinov3, Accelerator(cpu=True))
    handle.remove()
    nothing = {"forward with control": 0, "DINOv3 of a clip": 0}
    expected, _ = validation_cost(nothing, clips=2, with_coarse=False)
    assert len(calls) == expected + len(QUANTILES)  # one clip of the two has a coarse version
