"""Figures of the control's projection, on features with a planted look and without one."""

import pytest
import torch

from c2r.evaluation.projection_figures import ALTERED, COARSE, PAIR, Pair, certify, figures_of, place_accuracy
from c2r.evaluation.projection_fit import MAX_ACCURACY


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
    certificate, worst = certify(planted(5.0), planted(5.0, seed=1))
    for name in ("cg_or_real", "cg_or_real_clip", "look"):
        assert certificate[name].low > 0.6, name
    assert worst > 0.75
    assert certificate["place"].mean > 0.7
    certificate, worst = certify(planted(0.0), planted(0.0, seed=1))
    for name in ("cg_or_real", "look"):
        assert certificate[name].low - 0.05 < 0.5 < certificate[name].high + 0.05, name
    assert worst <= MAX_ACCURACY


def test_a_kind_of_looks_that_is_told_is_not_hidden_by_one_that_is_not():
    train, held_out = planted(0.0), planted(0.0, seed=1)
    train[COARSE], held_out[COARSE] = planted(5.0)[ALTERED], planted(5.0, seed=1)[ALTERED]
    certificate, worst = certify(train, held_out)
    assert certificate["look"].mean > 0.7
    assert worst > 0.7


def test_altered_frames_do_not_limit_the_number():
    train, held_out = planted(0.0), planted(0.0, seed=1)
    train[ALTERED], held_out[ALTERED] = planted(5.0)[ALTERED], planted(5.0, seed=1)[ALTERED]
    certificate, worst = certify(train, held_out)
    assert certificate["look"].mean > 0.7
    assert worst <= MAX_ACCURACY


@pytest.mark.parametrize("width", [4, 64, 256])
def test_a_probe_finds_a_look_among_any_number_of_features(width):
    certificate, _ = certify(planted(5.0, width=width), planted(5.0, width=width, seed=1))
    assert certificate["cg_or_real"].mean > 0.65


def test_more_directions_tell_at_least_as_much():
    """A probe of more directions may be worse by chance, but a network could use the fewer."""
    numbers, width = [1, 2, 4, 8], 12
    samples = planted(0.0), planted(0.0, seed=1)
    certificates, worst = figures_of(torch.zeros(width), torch.eye(width), numbers, *samples)
    assert sorted(worst.values()) == [worst[number] for number in (*numbers, None)]
    for name in ("cg_or_real", "cg_or_real_clip", "look"):
        found = [certificates[number][name] for number in (*numbers, None)]
        assert found == sorted(found), name


def test_places_are_told_by_features_that_agree():
    places, others = torch.randn(2, 4, 50, 3, generator=torch.Generator().manual_seed(0))
    assert place_accuracy(places, places) == 1
    assert place_accuracy(torch.zeros(4, 50, 3), torch.zeros(4, 50, 3)) == 0.5
    assert abs(place_accuracy(places, others) - 0.5) < 0.1
