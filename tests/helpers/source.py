"""The project's own source, for tests that read it."""

from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def require_none(violations: Iterable[str]):
    """Fail with one line for each violation, `file:line: what is wrong`."""
    text = "\n".join(violations)
    if text:
        pytest.fail(text, pytrace=False)
