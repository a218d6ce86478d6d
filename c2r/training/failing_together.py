"""Writes that end all processes together if one of them fails."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError

from c2r import InputError
from c2r.files import write_problem


@contextmanager
def failing_together(accelerator: Accelerator, path: str | Path) -> Iterator[None]:
    """Raise one `InputError` on all processes if a write fails on one; otherwise the others would wait without end.

    Args:
        accelerator: the run's; enter and leave the context on every process.
        path: file or folder that is written, for the message.
    """
    failure = None
    try:
        yield
    except InputError as error:
        failure = str(error)
    except (OSError, SafetensorError) as error:
        failure = (
            f"{path}: cannot be written ({write_problem(error, path)}); earlier checkpoints are kept; "
            "fix it and restart with --resume_from_checkpoint latest"
        )
    failures = [failure for failure in gather_object([failure]) if failure is not None]
    if failures:
        raise InputError(failures[0])
