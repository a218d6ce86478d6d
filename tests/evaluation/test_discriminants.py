"""Discriminants and probes: their scores, folds by file, and accuracies."""

import pytest
import torch

from c2r.evaluation.discriminants import accuracy_of, fit_discriminant, fit_probe, folds_of, held_out_scores


def test_a_feature_that_falls_with_cg_gets_no_weight():
    generator = torch.Generator().manual_seed(0)
    real, cg = torch.randn(20, 2, generator=generator), torch.randn(20, 2, generator=generator)
    cg += torch.tensor([2.0, -2.0])
    scorer = fit_discriminant(real, cg)
    assert scorer(real).mean().item() == pytest.approx(0, abs=1e-5)
    assert scorer(cg).mean().item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(scorer(real), scorer(real + torch.tensor([0.0, 100.0])))
    assert fit_discriminant(cg[:, :1], real[:, :1])(real[:, :1]).isnan().all()


def test_clips_of_a_file_are_in_one_fold():
    files = [f"{i // 3}.mp4" for i in range(30)]
    folds = folds_of(files)
    assert all(len({f for f, name in zip(folds.tolist(), files) if name == file}) == 1 for file in set(files))
    assert folds.bincount().tolist() == [6] * 5


@pytest.mark.parametrize("fit", [fit_discriminant, fit_probe])
def test_held_out_scores_do_not_depend_on_the_own_fold(fit):
    generator = torch.Generator().manual_seed(0)
    real, cg = torch.randn(10, 3, generator=generator), 1 + torch.randn(10, 3, generator=generator)
    folds = torch.arange(10) % 5
    before, _ = held_out_scores(fit, real, cg, folds, folds)
    real[folds == 2] += 5
    after, _ = held_out_scores(fit, real, cg, folds, folds)
    scorer = fit(real[folds != 2], cg[folds != 2])
    assert torch.equal(after[folds == 2], scorer(real[folds == 2]))
    assert not torch.equal(after[folds != 2], before[folds != 2])


def test_accuracy_weighs_the_domains_alike_and_counts_nan_as_half_right():
    assert accuracy_of(torch.tensor([0.1, 0.2, 0.9, 0.3]), torch.tensor([0.8])) == pytest.approx((0.75 + 1) / 2)
    assert accuracy_of(torch.tensor([torch.nan]), torch.tensor([torch.nan])) == 0.5
