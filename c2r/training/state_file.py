"""state.json of a checkpoint: its schema, checked before anything is made of its content."""

from dataclasses import fields
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, JsonValue, NonNegativeInt, PositiveInt, StringConstraints
from typing_extensions import TypedDict

from c2r import InputError, __version__
from c2r.files import read_json
from c2r.training.progress import Progress

#: Written last into a checkpoint: its state, and the size of every other file.
STATE = "state.json"


def _checked_fraction(text):
    try:
        Fraction(text)
    except ZeroDivisionError:
        raise ValueError("a fraction of zero") from None
    return text


_Share = Annotated[str, StringConstraints(pattern=r"^-?\d{1,40}(/\d{1,40})?$"), AfterValidator(_checked_fraction)]
_FileName = Annotated[str, StringConstraints(pattern=r"^[\w-][\w./-]*$", max_length=255)]


def _require_all_fields(progress):
    missing = [entry.name for entry in fields(Progress) if isinstance(progress, dict) and entry.name not in progress]
    if missing:
        raise ValueError(f"has no {', '.join(missing)}")
    return progress


class _Position(TypedDict):
    drawn: list[NonNegativeInt]
    queues: list[tuple[int, list[NonNegativeInt]]]
    batches: NonNegativeInt
    cg_due: _Share


class _SamplerState(TypedDict):
    seed: int
    num_real: NonNegativeInt
    num_cg: NonNegativeInt
    real_parts: list[tuple[int, _Share]]
    cg_parts: list[tuple[int, _Share]]
    buckets: str | None
    position: _Position
    cg_ratios: list[tuple[NonNegativeInt, _Share]]


def _check_sampler(state):
    """Check what `MixedCGRealSampler` would only find out in the middle of an epoch."""
    position, count = state["position"], state["num_real"] + state["num_cg"]
    if len(position["drawn"]) != len(state["real_parts"]) + len(state["cg_parts"]):
        raise ValueError("position.drawn does not have one number per dataset")
    if any(index >= count for _, queue in position["queues"] for index in queue):
        raise ValueError(f"position.queues names a sample above {count - 1}")
    shares = dict(state["cg_ratios"])
    if not any(first_batch <= position["batches"] for first_batch in shares):
        raise ValueError("cg_ratios gives no share for the next batch")
    if not all(0 <= Fraction(share) <= 1 for share in shares.values()):
        raise ValueError("cg_ratios has a share outside [0, 1]")
    return state


class _Average(TypedDict):
    optimization_step: NonNegativeInt


class _State(TypedDict):
    version: str
    progress: Annotated[Progress, BeforeValidator(_require_all_fields)]
    sampler: Annotated[_SamplerState, AfterValidator(_check_sampler)]
    options: dict[str, JsonValue]
    ema: _Average | None
    sharding: Literal["zero2", "zero3", "fsdp2"] | None
    num_processes: PositiveInt
    files: dict[_FileName, NonNegativeInt]


class _Files(TypedDict):
    files: dict[_FileName, NonNegativeInt]


def read_file_sizes(checkpoint: Path) -> dict[str, int]:
    """Return {name within the checkpoint: bytes} of all other files; a state of any version will do.

    Raises:
        InputError: the file is missing or damaged.
    """
    return read_json(checkpoint / STATE, _Files, extra="allow")["files"]


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return the checked content of a checkpoint's state.json.

    Raises:
        InputError: it is missing, damaged or of another version.
    """
    path = checkpoint / STATE
    content = read_json(path)
    try:
        read_json(path, _State)
    except InputError as error:
        version = content.get("version", "before 0.1.0")
        if version != __version__:
            raise InputError(
                f"{checkpoint}: written by version {version}, this is {__version__}; resume with that version, or "
                "start a new run with another --output_dir"
            ) from error
        raise
    return content
