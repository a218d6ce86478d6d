"""Clip settings for tests."""

from typing import Any

from c2r.data.buckets import Bucket
from c2r.data.settings import ClipSettings


def clip_settings(**overrides: Any) -> ClipSettings:
    """Return settings of one small bucket at 8 fps, unless overridden."""
    defaults: dict[str, Any] = {"buckets": (Bucket(5, 32, 48),), "fps": 8.0, "base_model": "model"}
    return ClipSettings(**defaults | overrides)
