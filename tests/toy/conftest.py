"""Fixtures of the toy's tests."""

import pytest

from c2r.toy import folder


@pytest.fixture
def few_scenes(monkeypatch):
    """Let a toy folder have two scenes to validate on and two to test on: rendering takes most of the time."""
    monkeypatch.setattr(folder, "NUM_VALIDATION", 2)
    monkeypatch.setattr(folder, "NUM_TEST", 2)
