"""Records which attention backends compute."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from diffusers.models.attention_dispatch import _AttentionBackendRegistry


@contextmanager
def recorded_backends() -> Iterator[list[str]]:
    """Yield a list that grows by the name of a backend whenever one computes attention."""
    calls = []

    def recording(name, function):
        def record(*args, **kwargs):
            calls.append(name.value)
            return function(*args, **kwargs)

        return record

    recorders = {name: recording(name, function) for name, function in _AttentionBackendRegistry._backends.items()}
    with mock.patch.object(_AttentionBackendRegistry, "_backends", recorders):
        yield calls
