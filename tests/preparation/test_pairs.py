"""Pairs by names and by folders."""

import pytest

from c2r import InputError
from c2r.preparation.pairs import PATTERNS, pair_sources
from c2r.preparation.sources import Source


def paired(names, patterns=PATTERNS):
    sources = [Source(name, name.rpartition(".")[0] or name, "." not in name) for name in names]
    pairs, unpaired = pair_sources(sources, patterns)
    return {fine.name: coarse.name for fine, coarse in pairs.items()}, [source.name for source in unpaired]


@pytest.mark.parametrize(
    ("fine", "coarse"),
    [
        ("07_fine.mp4", "07_coarse.mp4"),
        ("day/07_FINE.mov", "day/07_Coarse.mp4"),
        ("fine/07.mp4", "coarse/07.webm"),
        ("city/fine/day/07.mp4", "city/coarse/day/07.mp4"),
        ("shots/07/fine", "shots/07/coarse"),
        ("shots/07_fine", "shots/07_coarse"),
    ],
)
def test_pairs_are_found_by_name_or_folder(fine, coarse):
    assert paired([coarse, "other.mp4", fine]) == ({fine: coarse}, ["other.mp4"])


def test_files_without_a_partner_are_named():
    names = ["a_fine.mp4", "b_coarse.mp4", "c_fine.mp4", "c_coarse.mp4", "day/d_fine.mp4", "night/d_coarse.mp4"]
    assert paired(names) == (
        {"c_fine.mp4": "c_coarse.mp4"},
        ["a_fine.mp4", "b_coarse.mp4", "day/d_fine.mp4", "night/d_coarse.mp4"],
    )


@pytest.mark.parametrize("ending", ["", ".*", ".mp4"])
def test_pairs_are_found_by_patterns_of_the_user(ending):
    patterns = [(f"final/*_v*{ending}", f"layout/*/*{ending}")]
    names = ["final/a_v1.mp4", "layout/a/1.mp4", "b_fine.mp4", "b_coarse.mp4", "finalXa_v2.mp4"]
    found, unpaired = paired(names, patterns)
    assert found == {"final/a_v1.mp4": "layout/a/1.mp4"}
    assert unpaired == ["b_coarse.mp4", "b_fine.mp4", "finalXa_v2.mp4"]


def test_two_files_of_one_name_are_refused():
    with pytest.raises(InputError, match=r"^a_fine\.mov: a_fine\.mp4 has the same name but for its ending; keep one"):
        paired(["a_fine.mov", "a_fine.mp4", "a_coarse.mp4"])
