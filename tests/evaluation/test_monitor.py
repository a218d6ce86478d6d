import json
from math import isnan, nan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from c2r import InputError
from c2r.evaluation.monitor import (
    MEASURES,
    MIN_ACCURACY,
    SCORE_RANGE,
    CGMonitor,
    RatioController,
    Reference,
    Score,
    clip_features,
    fit_discriminant,
    folds_of,
)
from tests.helpers.tiny import FEATURE_DIM

SIZES = {"texture": 4, "lighting": 4, "geometry": 3, "dinov3": 48}


def clips_of(count, shift, seed, prefix):
    """`count` clips, two of each file, of normal features with mean `shift`: one number, or one for each measure."""
    generator = torch.Generator().manual_seed(seed)
    shifts = shift if isinstance(shift, dict) else dict.fromkeys(MEASURES, shift)
    return [
        (
            f"{prefix}{i // 2}.mp4",
            {m: torch.randn(k, generator=generator) + shifts[m] for m, k in SIZES.items()},
        )
        for i in range(count)
    ]


def reference_of(shift, count=24, seed=0):
    coarse = [(f"c{i}.mp4", {"dinov3": values["dinov3"]}) for i, (_, values) in enumerate(clips_of(6, 0, 9, "c"))]
    return Reference.from_clips(
        real=clips_of(count, 0, seed, "r"), cg=clips_of(count, shift, seed + 1, "c"), coarse=coarse
    )


def judge(monitor, shift, count=8):
    return monitor.judge([values for _, values in clips_of(count, shift, 77, "s")])


def test_clip_features_are_small_and_finite():
    frames = torch.rand(3, 3, 48, 80, generator=torch.Generator().manual_seed(0))
    features = clip_features(frames, torch.ones(3, 3, 5, FEATURE_DIM, dtype=torch.bfloat16))
    assert tuple(features) == MEASURES
    assert features["dinov3"].shape == (FEATURE_DIM,)
    assert all(x.ndim == 1 and x.dtype == torch.float32 and x.isfinite().all() for x in features.values())


def test_scores_run_from_the_real_clips_to_the_cg_clips():
    monitor = CGMonitor(reference_of(1.5))
    assert monitor.informative == MEASURES
    looks = [judge(monitor, shift).look for shift in (0.0, 0.75, 1.5)]
    assert [look.mean for look in looks] == pytest.approx([0, 0.5, 1], abs=0.2)
    for look in looks:
        assert look.low <= look.mean <= look.high


def test_the_same_samples_give_the_same_numbers():
    monitor = CGMonitor(reference_of(1.5))
    assert judge(monitor, 0.5).scalars() == judge(monitor, 0.5).scalars()


def test_more_samples_give_a_narrower_interval():
    monitor = CGMonitor(reference_of(1.5))
    few, many = judge(monitor, 0.5, 4).look, judge(monitor, 0.5, 64).look
    assert many.high - many.low < few.high - few.low


@pytest.mark.parametrize("seed", range(3))
def test_two_sets_of_one_look_are_called_uninformative(seed):
    monitor = CGMonitor(reference_of(0.0, count=40, seed=10 * seed))
    assert monitor.uninformative == MEASURES
    for accuracy in monitor.accuracy.values():
        assert accuracy == pytest.approx(0.5, abs=0.2)
    look = judge(monitor, 0.0)
    assert isnan(look.look.mean)
    assert "cg_look" not in look.scalars()
    assert look.scalars()["cg_dinov3_accuracy"] == monitor.accuracy["dinov3"]


def test_a_useless_measure_is_left_out_and_named():
    monitor = CGMonitor(reference_of({"texture": 0.0, "lighting": 1.5, "geometry": 1.5, "dinov3": 1.5}))
    assert monitor.uninformative == ("texture",)
    assert monitor.accuracy["texture"] < MIN_ACCURACY
    look = judge(monitor, 1.5)
    assert look.uninformative == ("texture",)
    assert look.look.mean == pytest.approx(1, abs=0.2)
    assert "texture" in str(look)
    assert str(look).count("uninformative") == 1


def test_features_that_fall_with_cg_have_no_say():
    generator = torch.Generator().manual_seed(0)
    real, cg = torch.randn(20, 2, generator=generator), torch.randn(20, 2, generator=generator)
    cg += torch.tensor([2.0, -2.0])
    scorer = fit_discriminant(real, cg)
    assert scorer(real).mean().item() == pytest.approx(0, abs=1e-5)
    assert scorer(cg).mean().item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(scorer(real), scorer(real + torch.tensor([0.0, 100.0])))
    assert fit_discriminant(cg[:, :1], real[:, :1])(real[:, :1]).isnan().all()


def test_one_wild_clip_does_not_decide():
    monitor = CGMonitor(reference_of(1.5))
    wild = [{m: torch.full((k,), 1e6) for m, k in SIZES.items()}]
    assert monitor.judge(wild).look.mean <= SCORE_RANGE[1]


def test_clips_of_a_file_are_in_one_fold():
    files = [f"{i // 3}.mp4" for i in range(30)]
    folds = folds_of(files)
    assert all(len({f for f, name in zip(folds.tolist(), files) if name == file}) == 1 for file in set(files))
    assert folds.bincount().tolist() == [6] * 5


def test_files_that_are_alike_within_do_not_raise_the_accuracy():
    """Many clips of one file show its scene, not a look: a split by clips would know them again."""
    generator = torch.Generator().manual_seed(0)

    def domain(prefix):
        clips = []
        for file in range(8):
            scene = {m: 5 * torch.randn(k, generator=generator) for m, k in SIZES.items()}
            clips += [
                (f"{prefix}{file}", {m: x + 0.1 * torch.randn(len(x), generator=generator) for m, x in scene.items()})
                for _ in range(5)
            ]
        return clips

    assert CGMonitor(Reference.from_clips(real=domain("r"), cg=domain("c"))).accuracy["dinov3"] < MIN_ACCURACY


def test_likeness_leaves_out_the_own_coarse_rendering():
    reference = reference_of(1.5)
    monitor = CGMonitor(reference)
    sample = clips_of(1, 0.5, 3, "s")[0][1]
    sample["dinov3"] = reference.features["coarse"]["dinov3"][2]
    [own] = monitor._tables({m: sample[m][None] for m in MEASURES}, ["c2.mp4"])["geometry"]
    [any_other] = monitor._tables({m: sample[m][None] for m in MEASURES}, [None])["geometry"]
    assert own[-1] < any_other[-1]  # with its own rendering, which it equals, it would be nearer
    assert torch.equal(own[:-1], sample["geometry"])


def test_too_few_files_are_refused():
    few = clips_of(4, 0, 0, "r")
    with pytest.raises(InputError, match="at least 3 real videos"):
        CGMonitor(Reference.from_clips(real=few, cg=clips_of(8, 1, 1, "c")))


def test_a_reference_comes_back_from_its_file(tmp_path):
    reference = reference_of(1.5)
    reference.save(tmp_path / "reference.safetensors")
    again = Reference.load(tmp_path / "reference.safetensors")
    assert again.files == reference.files
    assert judge(CGMonitor(again), 0.5) == judge(CGMonitor(reference), 0.5)
    (tmp_path / "reference.safetensors").write_bytes(b"{}")
    with pytest.raises(InputError, match=r"reference\.safetensors"):
        Reference.load(tmp_path / "reference.safetensors")


ABOVE, BELOW, BETWEEN, UNKNOWN = (
    Score(0.6, 0.55, 0.7),
    Score(0.3, 0.2, 0.4),
    Score(0.5, 0.4, 0.6),
    Score(nan, nan, nan),
)
looks = st.lists(st.sampled_from([ABOVE, BELOW, BETWEEN, UNKNOWN]), max_size=40)


@given(looks, st.floats(0, 1), st.floats(0, 1), st.integers(1, 5))
def test_the_ratio_never_rises_nor_falls_below_the_minimum(looks, ratio, minimum, patience):
    controller = RatioController(0.5, patience, minimum)
    for look in looks:
        new = controller.step(look, ratio)
        assert new <= ratio
        assert new >= min(ratio, minimum)
        assert new in (ratio, ratio / 2, minimum)
        ratio = new


@given(looks, st.integers(1, 5))
def test_it_takes_patience_looks_above_the_bound_to_halve(looks, patience):
    controller, ratio, above = RatioController(0.5, patience, 0.0), 1.0, 0
    for look in looks:
        above = 0 if look is BELOW else above + (look is ABOVE)
        halved = above == patience
        above = 0 if halved else above
        new = controller.step(look, ratio)
        assert new == (ratio / 2 if halved else ratio)
        ratio = new


@given(looks, looks, st.floats(0, 1))
def test_the_controller_resumes_exactly(before, after, ratio):
    one, two = RatioController(0.5, 3, 0.01), RatioController(0.5, 3, 0.01)
    for look in before:
        ratio = one.step(look, ratio)
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    other = ratio
    for look in after:
        ratio, other = one.step(look, ratio), two.step(look, other)
        assert ratio == other


def test_a_look_between_holds_the_count_and_one_below_clears_it():
    controller = RatioController(0.5, 2, 0.1)
    ratios = [controller.step(look, 0.4) for look in (ABOVE, BELOW, ABOVE, BETWEEN, UNKNOWN, ABOVE)]
    assert ratios == [0.4] * 5 + [0.2]


def test_without_a_minimum_it_only_advises():
    controller = RatioController(0.5, 3)
    said = []
    for _ in range(3):
        assert controller.step(ABOVE, 0.2) == 0.2
        said.append(controller.advice(ABOVE, 0.2))
    assert said == [None, None, "CG look 0.60 [0.55, 0.70] for 3 samplings: consider --cg_ratio 0.1"]
    assert controller.advice(BETWEEN, 0.2) is None


@pytest.mark.parametrize(("ratio", "minimum"), [(0.1, 0.1), (0.0, None)])
def test_where_the_ratio_can_fall_no_further_other_remedies_are_named(ratio, minimum):
    controller = RatioController(0.5, 1, minimum)
    controller.step(ABOVE, ratio)
    assert "--real_weight or --control_augmentation" in controller.advice(ABOVE, ratio)
