"""The CG monitor: scores from real to CG, uninformative measures, and a reference that can be saved."""

from math import inf, isnan, nan

import pytest
import torch

from c2r import InputError
from c2r.evaluation.discriminants import cross_validate, file_means, fit_discriminant, fit_probe
from c2r.evaluation.monitor import MEASURES, MIN_ACCURACY, SCORE_RANGE, CGMonitor, Reference, Score, clip_features
from tests.helpers.tiny import FEATURE_DIM

SIZES = {"texture": 4, "lighting": 4, "geometry": 3, "dinov3": 48}


def clips_of(count, shift, seed, prefix):
    """Return (file, features) of `count` clips, two of each file.

    The features are normal with mean `shift`, one number or {measure: number}.
    """
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


def test_clip_features_are_finite_vectors():
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


@pytest.mark.parametrize(("measure", "fit"), [("dinov3", fit_probe), ("texture", fit_discriminant)])
def test_both_kinds_of_scores_are_placed_by_the_held_out_clips(measure, fit):
    """Values for the clips that a scorer was fitted on are too good to place other clips by."""
    reference = reference_of(0.7)
    real, cg = (reference.features[domain][measure] for domain in ("real", "cg"))
    held_out = cross_validate(fit, real, cg, reference.files["real"], reference.files["cg"])
    zero, one = held_out.real.mean(), held_out.cg.mean()
    samples = [values for _, values in clips_of(8, 0.3, 77, "s")]
    raw = fit(real, cg)(torch.stack([values[measure] for values in samples]))
    expected = ((raw - zero) / (one - zero)).clamp(*SCORE_RANGE)
    assert (expected.abs() < 1).any()
    assert CGMonitor(reference).judge(samples).measures[measure].mean == pytest.approx(
        expected.mean().item(), abs=1e-5
    )


def test_the_interval_is_students_with_confidence_90_percent():
    score = Score(0.5, 0.1, 7, 8)
    assert score.high - 0.5 == pytest.approx(0.1 * 1.894579, abs=1e-6)  # quantile 0.95, 7 degrees, from a table
    assert score.low == pytest.approx(1 - score.high)
    assert str(Score(0.5, nan, nan, 1)) == "0.50 (one scene, so no interval)"


def test_the_error_has_the_samples_and_both_domains_in_it():
    """Against the three written-out terms, for one measure."""
    reference = reference_of(1.5)
    monitor, (real, cg) = CGMonitor(reference), (reference.features[d]["texture"] for d in ("real", "cg"))
    held_out = cross_validate(fit_discriminant, real, cg, reference.files["real"], reference.files["cg"])
    span = held_out.cg.mean() - held_out.real.mean()
    samples = [values for _, values in clips_of(8, 0.75, 77, "s")]
    table = torch.stack([values["texture"] for values in samples])
    scores = (fit_discriminant(real, cg)(table) - held_out.real.mean()) / span
    parts = [
        scores.var() / 8,
        (1 - scores.mean()) ** 2 * file_means(held_out.real / span, reference.files["real"]).var() / 12,
        scores.mean() ** 2 * file_means(held_out.cg / span, reference.files["cg"]).var() / 12,
    ]
    score = monitor.judge(samples).measures["texture"]
    assert score.error == pytest.approx(sum(parts).item() ** 0.5, rel=1e-4)
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / 7 + parts[1] ** 2 / 11 + parts[2] ** 2 / 11)
    assert score.freedom == pytest.approx(freedom.item(), rel=1e-4)


def test_the_same_samples_give_the_same_numbers():
    monitor = CGMonitor(reference_of(1.5))
    assert judge(monitor, 0.5).scalars() == judge(monitor, 0.5).scalars()


def test_more_samples_give_a_narrower_interval():
    monitor = CGMonitor(reference_of(1.5))
    of_4, of_64 = judge(monitor, 0.5, 4).look, judge(monitor, 0.5, 64).look
    assert of_64.high - of_64.low < of_4.high - of_4.low


@pytest.mark.parametrize("seed", range(3))
def test_every_measure_is_uninformative_if_both_domains_look_alike(seed):
    monitor = CGMonitor(reference_of(0.0, count=40, seed=10 * seed))
    assert monitor.uninformative == MEASURES
    for accuracy in monitor.accuracy.values():
        assert accuracy == pytest.approx(0.5, abs=0.2)
    look = judge(monitor, 0.0)
    assert isnan(look.look.mean)
    assert "cg_look" not in look.scalars()
    assert str(look).startswith("CG look unknown: no measure tells the real clips from the CG clips")
    assert look.scalars()["cg_dinov3_accuracy"] == monitor.accuracy["dinov3"]


def test_an_uninformative_measure_is_left_out_and_named():
    monitor = CGMonitor(reference_of({"texture": 0.0, "lighting": 1.5, "geometry": 1.5, "dinov3": 1.5}))
    assert monitor.uninformative == ("texture",)
    assert monitor.accuracy["texture"] < MIN_ACCURACY
    look = judge(monitor, 1.5)
    assert look.uninformative == ("texture",)
    assert look.look.mean == pytest.approx(1, abs=0.2)
    assert "texture" in str(look)
    assert str(look).count("uninformative") == 1


def test_a_high_accuracy_that_chance_reaches_does_not_count():
    """Domains that do not differ, of few files whose clips are equal: dinov3's 0.81 is luck."""

    def twins(prefix, seed):
        return [clip for clip in clips_of(16, 0, seed, prefix)[::2] for _ in range(2)]

    monitor = CGMonitor(Reference.from_clips(real=twins("r", 12), cg=twins("c", 1012)))
    assert monitor.accuracy["dinov3"] > MIN_ACCURACY
    assert monitor.uninformative == MEASURES


def test_samples_of_one_video_count_as_one_scene():
    monitor, samples = CGMonitor(reference_of(1.5)), [values for _, values in clips_of(5, 0.75, 77, "s")]
    files = ["a.mp4", "b.mp4", "a.mp4", "c.mp4", None]
    scores = torch.tensor([monitor.judge([sample]).look.mean for sample in samples])
    by_scene = torch.tensor([(scores[0] + scores[2]) / 2, scores[1], scores[3], scores[4]])
    look = monitor.judge(samples, files).look
    assert look.count == 4
    assert look.mean == pytest.approx(by_scene.mean().item(), abs=1e-5)
    assert look.error > by_scene.std().item() / 2


def test_scores_that_do_not_vary_have_an_interval_without_width():
    assert Score(0.5, 0.0, inf, 4).interval() == (0.5, 0.5)


def test_the_score_of_an_outlier_is_clamped():
    monitor = CGMonitor(reference_of(1.5))
    outlier = {m: torch.full((k,), 1e6) for m, k in SIZES.items()}
    assert monitor.judge([outlier]).look.mean <= SCORE_RANGE[1]


def test_similar_clips_of_one_file_do_not_raise_the_accuracy():
    """A cross-validation that splits the clips of a file would recognise its scene, not a look."""
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


def test_similarity_leaves_out_the_own_coarse_rendering():
    reference = reference_of(1.5)
    monitor = CGMonitor(reference)
    sample = clips_of(1, 0.5, 3, "s")[0][1]
    sample["dinov3"] = reference.features["coarse"]["dinov3"][2]
    [own] = monitor._tables({m: sample[m][None] for m in MEASURES}, ["c2.mp4"])["geometry"]
    [any_other] = monitor._tables({m: sample[m][None] for m in MEASURES}, [None])["geometry"]
    assert own[-1] < any_other[-1]  # the sample equals its own rendering, which would raise the mean
    assert torch.equal(own[:-1], sample["geometry"])


def test_too_few_files_are_refused():
    two_files = clips_of(4, 0, 0, "r")
    with pytest.raises(InputError, match="at least 8 real videos"):
        CGMonitor(Reference.from_clips(real=two_files, cg=clips_of(16, 1, 1, "c")))


def test_a_saved_reference_can_be_loaded(tmp_path):
    reference = reference_of(1.5)
    reference.save(tmp_path / "reference.safetensors")
    loaded = Reference.load(tmp_path / "reference.safetensors")
    assert loaded.files == reference.files
    assert judge(CGMonitor(loaded), 0.5) == judge(CGMonitor(reference), 0.5)
    (tmp_path / "reference.safetensors").write_bytes(b"{}")
    with pytest.raises(InputError, match=r"reference\.safetensors"):
        Reference.load(tmp_path / "reference.safetensors")
