"""Figures of the control's projection, on features with a planted look and without one."""

import pytest
import torch

from c2r.evaluation.projection_figures import (
    ALTERED,
    COARSE,
    PAIR,
    Pair,
    agreement,
    certify,
    figures_of,
    place_accuracy,
)
from c2r.models.control_projection import Figure

ANY = Figure(1.0)


def planted(strength, num_clips=12, width=12, seed=0):
    """Pairs of both kinds: places in all features, and a look of each clip's domain and look in the last one."""
    pairs = {ALTERED: [], PAIR: []}
    for kind, look, other_look in ((ALTERED, -1, 1), (PAIR, 1, -1)):
        for clip in range(num_clips):
            generator = torch.Generator().manual_seed(1000 * seed + 2 * clip + (kind == PAIR))
            places = torch.randn(4, 20, width, generator=generator)
            one, other = (places + 0.1 * torch.randn(4, 20, width, generator=generator) for _ in range(2))
            # Equal means, which no projection can erase: more or less of it, as in texture.
            spreads = [1 + strength * (sign > 0) for sign in (look, other_look)]
            for x, spread in zip((one, other), spreads):
                x[..., -1] = spread * torch.randn(4, 20, generator=generator)
            pairs[kind].append(Pair(f"{kind} {clip} of {seed}", one, other))
    return pairs


def test_figures_find_a_planted_look_and_are_at_chance_without_one():
    certificate = certify(planted(5.0), planted(5.0, seed=1), ANY)
    for name in ("cg_or_real", "cg_or_real_clip", "look"):
        assert certificate[name].low > 0.6, name
    assert certificate["place"].mean > 0.7
    certificate = certify(planted(0.0), planted(0.0, seed=1), ANY)
    for name in ("cg_or_real", "look"):
        assert certificate[name].low - 0.05 < 0.5 < certificate[name].high + 0.05, name


def test_a_kind_of_looks_that_is_told_is_not_hidden_by_one_that_is_not():
    train, held_out = planted(0.0), planted(0.0, seed=1)
    train[COARSE], held_out[COARSE] = planted(5.0)[ALTERED], planted(5.0, seed=1)[ALTERED]
    assert certify(train, held_out, ANY)["look"].mean > 0.7


def mixed(correlations, num_clips=30, seed=0):
    """Pairs of one kind, with these correlations between the looks of a place."""
    generator, correlations = torch.Generator().manual_seed(seed), torch.tensor(correlations)
    pairs = []
    for clip in range(num_clips):
        common, one, other = torch.randn(3, 4, 50, len(correlations), generator=generator)
        looks = (correlations.sqrt() * common + (1 - correlations).sqrt() * own for own in (one, other))
        pairs.append(Pair(f"{clip}", *(3 * look + 2 for look in looks)))
    return pairs


def test_the_agreement_of_a_feature_is_the_correlation_between_looks():
    expected = [0.9, 0.5, 0.1]
    found = agreement({PAIR: mixed(expected)})
    for figure, value in zip(found, expected):
        assert figure.low < value < figure.high
        assert figure.mean == pytest.approx(value, abs=0.05)
    pairs = mixed(expected)
    for pair in pairs:  # a look of whole frames, such as fog
        for look in pair[1:]:
            look += torch.arange(4.0)[:, None, None]
    found = agreement({PAIR: pairs})
    within = ([(look - look.mean(1, keepdim=True)).flatten(0, 1) for look in looks] for _, *looks in pairs)
    one, other = (torch.cat(looks) for looks in zip(*within))
    for number, figure in enumerate(found):
        reference = torch.corrcoef(torch.stack([one[:, number], other[:, number]]))[0, 1]
        assert figure.mean == pytest.approx(reference.item(), abs=1e-5)


def test_the_kind_of_looks_that_agrees_least_counts_but_for_altered_frames():
    pairs = {PAIR: mixed([0.9, 0.2]), COARSE: mixed([0.3, 0.8], seed=1), ALTERED: mixed([0.0, 0.0], seed=2)}
    assert [figure.mean for figure in agreement(pairs)] == pytest.approx([0.3, 0.2], abs=0.05)


def test_features_without_variance_do_not_agree():
    flat = Pair("a", torch.ones(4, 5, 1), torch.ones(4, 5, 1))
    assert agreement({PAIR: [flat, flat]})[0].mean == 0


def test_the_certificate_has_the_agreement_of_the_direction_that_agrees_least():
    pairs, held_out = ({ALTERED: mixed([0.9] * 3, seed=s), PAIR: mixed([0.9, 0.2, 0.6], seed=s + 1)} for s in (2, 4))
    certificates = figures_of(torch.zeros(3), torch.eye(3), [1, 3], pairs, held_out)
    assert certificates[1]["agreement"].mean == pytest.approx(0.9, abs=0.05)
    assert certificates[3]["agreement"].mean == pytest.approx(0.2, abs=0.05)


@pytest.mark.parametrize("width", [4, 64, 256])
def test_a_probe_finds_a_look_among_any_number_of_features(width):
    certificate = certify(planted(5.0, width=width), planted(5.0, width=width, seed=1), ANY)
    assert certificate["cg_or_real"].mean > 0.65


def test_more_directions_tell_at_least_as_much():
    """A probe of more directions may be worse by chance, but a network could use the fewer."""
    numbers, width = [1, 2, 4, 8], 12
    samples = planted(0.0), planted(0.0, seed=1)
    certificates = figures_of(torch.zeros(width), torch.eye(width), numbers, *samples)
    for name in ("cg_or_real", "cg_or_real_clip", "look"):
        found = [certificates[number][name] for number in (*numbers, None)]
        assert found == sorted(found), name


def test_places_are_told_by_features_that_agree():
    places, others = torch.randn(2, 4, 50, 3, generator=torch.Generator().manual_seed(0))
    assert place_accuracy(places, places) == 1
    assert place_accuracy(torch.zeros(4, 50, 3), torch.zeros(4, 50, 3)) == 0.5
    assert abs(place_accuracy(places, others) - 0.5) < 0.1
