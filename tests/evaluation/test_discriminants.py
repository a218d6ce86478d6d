"""Discriminants and probes: their scores, folds by file, and accuracies."""

import pytest
import torch

from c2r.evaluation.discriminants import (
    MAX_DEVIATIONS,
    HeldOut,
    cross_validate,
    exceeds_chance,
    file_means,
    fit_discriminant,
    fit_probe,
    folds_of,
)


def test_a_feature_that_falls_with_cg_gets_no_weight():
    generator = torch.Generator().manual_seed(0)
    real, cg = torch.randn(20, 2, generator=generator), torch.randn(20, 2, generator=generator)
    cg += torch.tensor([2.0, -2.0])
    scorer = fit_discriminant(real, cg)
    assert scorer(real).mean().item() == pytest.approx(0, abs=1e-5)
    assert scorer(cg).mean().item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(scorer(real), scorer(real + torch.tensor([0.0, 100.0])))
    assert fit_discriminant(cg[:, :1], real[:, :1])(real[:, :1]).isnan().all()


def test_a_discriminant_shrinks_differences_by_their_standard_error():
    # Three features of variance 1 within each set. The means differ by 2, by 1 and by less than a standard error.
    column = torch.tensor([-1.0, 1.0]).repeat(8) * (15 / 16) ** 0.5
    real = column[:, None].repeat(1, 3)
    cg = real + torch.tensor([2.0, 1.0, 0.3])
    error = (1 / 16 + 1 / 16) ** 0.5
    weights = torch.tensor([2 - error, 1 - error, 0.0])
    clips = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 5.0], [1.0, 1.0, 1.0]])
    expected = clips @ weights / (torch.tensor([2.0, 1.0, 0.3]) @ weights)
    torch.testing.assert_close(fit_discriminant(real, cg)(clips), expected)


def test_a_feature_without_variance_is_bounded():
    """The means differ by 1 where the values do not vary, and by 2 at variance 1."""
    column = torch.tensor([-1.0, 1.0]).repeat(8) * (15 / 16) ** 0.5
    real = torch.stack([torch.zeros(16), column], 1)
    cg = real + torch.tensor([1.0, 2.0])
    weights = torch.tensor([1 / (1 / MAX_DEVIATIONS) ** 2, 2 - (1 / 8) ** 0.5])
    expected = torch.tensor([1.0, 0.0]) @ weights / (torch.tensor([1.0, 2.0]) @ weights)
    torch.testing.assert_close(fit_discriminant(real, cg)(torch.tensor([[1.0, 0.0]])), expected[None])


def test_rescaled_scores_place_the_held_out_means_at_zero_and_one():
    held_out = HeldOut(torch.tensor([0.1, 0.3]), torch.tensor([0.5, 0.7]))
    scorer = held_out.rescale(lambda clips: clips[:, 0])
    torch.testing.assert_close(scorer(torch.tensor([[0.2], [0.6], [0.4], [1.0]])), torch.tensor([0.0, 1.0, 0.5, 2.0]))
    assert [scores.mean().item() for scores in held_out.rescaled()] == pytest.approx([0, 1], abs=1e-6)
    reversed_order = HeldOut(torch.tensor([0.6]), torch.tensor([0.2])).rescale(lambda clips: clips[:, 0])
    assert reversed_order(torch.ones(1, 1)).isnan().all()


def test_clips_of_a_file_are_in_one_fold():
    files = [f"{i // 3}.mp4" for i in range(30)]
    folds = folds_of(files)
    assert all(len({f for f, name in zip(folds.tolist(), files) if name == file}) == 1 for file in set(files))
    assert folds.bincount().tolist() == [6] * 5


@pytest.mark.parametrize("fit", [fit_discriminant, fit_probe])
def test_held_out_scores_do_not_depend_on_the_own_fold(fit):
    generator = torch.Generator().manual_seed(0)
    real, cg = torch.randn(10, 3, generator=generator), 1 + torch.randn(10, 3, generator=generator)
    files, folds = [*"abcdefghij"], torch.arange(10) % 5
    before = cross_validate(fit, real, cg, files, files).real
    real[folds == 2] += 5
    after = cross_validate(fit, real, cg, files, files).real
    scorer = fit(real[folds != 2], cg[folds != 2])
    assert torch.equal(after[folds == 2], scorer(real[folds == 2]))
    assert not torch.equal(after[folds != 2], before[folds != 2])


def test_accuracy_weighs_the_domains_alike_and_counts_nan_as_half_right():
    scores = HeldOut(torch.tensor([0.1, 0.2, 0.9, 0.3]), torch.tensor([0.8]))
    assert scores.accuracy == pytest.approx((0.75 + 1) / 2)
    assert HeldOut(torch.tensor([torch.nan]), torch.tensor([torch.nan])).accuracy == 0.5


def test_an_accuracy_exceeds_chance_if_files_without_domain_do_not_reach_it():
    """Two clips a file that are alike: only the number of files counts."""
    generator = torch.Generator().manual_seed(0)
    files = [f"{i // 2}" for i in range(16)]
    table = torch.randn(16, 1, generator=generator).repeat_interleave(2, 0)
    apart = torch.cat([table[:16], table[16:] + 100])
    assert not exceeds_chance(0.75, fit_discriminant, table[:16], table[16:], files, files)
    assert not exceeds_chance(0.75, fit_discriminant, apart[:16], apart[16:], files, files)
    assert exceeds_chance(1.0, fit_discriminant, apart[:16], apart[16:], files, files)
    # Three files a domain have 20 splits only: a permutation is the true one, and reaches its accuracy.
    assert not exceeds_chance(1.0, fit_discriminant, apart[:6], apart[16:22], files[:6], files[:6])


def test_the_mean_of_a_file_is_that_of_its_clips():
    assert file_means(torch.tensor([1.0, 5.0, 3.0]), ["b", "a", "b"]).tolist() == [5, 2]
