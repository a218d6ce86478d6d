"""Pair coarse and fine videos by their names."""

import re
from collections.abc import Iterable, Sequence

from c2r import InputError
from c2r.preparation.sources import VIDEO_SUFFIXES, Source

#: (fine, coarse): patterns of names without their ending, tried in this order. `*` is any text, folders included.
PATTERNS = (("*_fine", "*_coarse"), ("fine/*", "coarse/*"), ("*/fine/*", "*/coarse/*"), ("*/fine", "*/coarse"))


def pair_sources(
    sources: Iterable[Source], patterns: Sequence[tuple[str, str]]
) -> tuple[dict[Source, Source], list[Source]]:
    """Pair sources whose names differ only where the patterns do.

    Args:
        sources: see `list_sources`.
        patterns: (fine, coarse) pairs of patterns with the same number of `*`.

    Returns:
        {fine: coarse}, and the sources without a partner.

    Raises:
        InputError: several files have one name but for their ending.
    """
    sides: tuple[dict[tuple, Source], dict[tuple, Source]] = ({}, {})
    expressions = [[_expression(pattern) for pattern in pair] for pair in patterns]
    unpaired = []
    for source in sources:
        for number, pair in enumerate(expressions):
            side, match = next(((s, m) for s in (0, 1) if (m := pair[s].fullmatch(source.stem))), (0, None))
            if match is None:
                continue
            key = (number, *(text.casefold() for text in match.groups()))
            if (other := sides[side].get(key)) is not None:
                raise InputError(
                    f"{other.name}: {source.name} has the same name but for its ending; keep one of them, or give "
                    "--fine_pattern and --coarse_pattern"
                )
            sides[side][key] = source
            break
        else:
            unpaired.append(source)
    fine, coarse = sides
    pairs = {fine[key]: coarse[key] for key in fine if key in coarse}
    return pairs, sorted(
        [*unpaired, *(side[key] for side in sides for key in side if key not in fine or key not in coarse)]
    )


def _expression(pattern):
    """Return the regular expression of a pattern; an ending such as .* or .mp4 does not count."""
    head, dot, ending = pattern.rpartition(".")
    if dot and (ending == "*" or f".{ending.lower()}" in VIDEO_SUFFIXES):
        pattern = head
    return re.compile("(.*?)".join(map(re.escape, pattern.split("*"))), re.IGNORECASE | re.DOTALL)
