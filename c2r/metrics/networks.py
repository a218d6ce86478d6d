"""Load the networks of measures, prepare frames for them, and run them in chunks.

Weights are read from safetensors; code of a model's folder is never run.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Generic, NotRequired, TypeVar

import torch
from pydantic import Field, FiniteFloat
from torch.nn import functional as F
from transformers import AutoImageProcessor, PreTrainedModel
from typing_extensions import TypedDict

from c2r import InputError
from c2r.files import library_errors_as_input, read_json
from c2r.metrics.structure import to_bytes
from c2r.models.hub import refuse_entries, require_complete, resolve_model_folder
from c2r.models.parts import (
    check_transformers_weights,
    freeze,
    load_transformers_model,
    model_without_weights,
)

#: Frames per forward pass; bounds the memory.
CHUNK = 8
#: Bounds of whole numbers in a config, which a hostile one could set so that the model takes hours to build: far above
#: any model for numbers of layers, and for all others.
MAX_LAYERS, MAX_NUMBER = 100, 1_000_000
#: Bound of the sides of the pictures that a network reads, in pixels, and of all numbers of a preprocessor: a padding
#: or a divisor enlarges pictures as a size does.
MAX_SIDE = 2048
#: Videos whose results are remembered, the last ones used: generated, true and coarse.
REMEMBERED = 3

_Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]
_Size = _Side | dict[str, _Side | None] | None
_Three = Field(min_length=3, max_length=3)
Result = TypeVar("Result")


class Preprocessor(TypedDict):
    """The checked entries of preprocessor_config.json."""

    size: NotRequired[_Size]
    crop_size: NotRequired[_Size]
    image_mean: NotRequired[Annotated[list[FiniteFloat], _Three] | None]
    image_std: NotRequired[Annotated[list[Annotated[FiniteFloat, Field(gt=0)]], _Three] | None]


def load_network(
    name_or_path: str, kinds: Mapping[str, type[PreTrainedModel]], device: torch.device | str
) -> tuple[Any, Path]:
    """Load a network of transformers in fp32, frozen.

    Args:
        name_or_path: a folder or hub name.
        kinds: {model_type of config.json: its class}.
        device: where it runs; "meta": it is checked by its config and the headers of its files, and no weight is read.

    Returns:
        the model, its folder.

    Raises:
        InputError: not found, of another kind, with entries that would run code or load weights otherwise, damaged.
    """
    folder = resolve_model_folder(name_or_path)
    path = folder / "config.json"
    config = read_json(path)
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in kinds:
        raise InputError(f"{folder}: model type is {kind}, not one of {', '.join(kinds)}; give such a model")
    _check_entries(path, config)
    check_transformers_weights(kinds[kind], folder, config)
    if torch.device(device).type == "meta":
        return model_without_weights(kinds[kind], folder, config), folder
    model, info = load_transformers_model(kinds[kind], folder)
    # Not buffers: files of older versions lack some that the model computes.
    missing = dict(model.named_parameters()).keys() & set(info["missing_keys"])
    require_complete(folder, missing, info["mismatched_keys"])
    return freeze(model).to(device), folder


def _check_entries(path, config, name=""):
    """Refuse, at any depth, code, other weights, and numbers far above any model's."""
    if isinstance(config, dict):
        refuse_entries(path, config)
        for entry in ("use_pretrained_backbone", "use_timm_backbone"):
            if config.get(entry):
                raise InputError(f"{path}: has {entry}, which is not supported; give a model with all its weights")
        for key, value in config.items():
            if key not in ("label2id", "id2label"):  # their keys and values are no sizes
                _check_entries(path, value, key)
    elif isinstance(config, list):
        for value in config:
            _check_entries(path, value, name)
    elif isinstance(config, int) and not isinstance(config, bool):
        most = MAX_LAYERS if any(part in name for part in ("layers", "depths", "blocks")) else MAX_NUMBER
        if abs(config) > most:
            raise InputError(f"{path}: {name} is {config}, more than {most}; give an undamaged copy")


def read_preprocessor(folder: Path) -> Preprocessor:
    """Return the checked preprocessor_config.json of a model.

    Raises:
        InputError: it is missing or damaged, names code, or has a number above MAX_SIDE.
    """
    path = folder / "preprocessor_config.json"
    config = read_json(path, Preprocessor, extra="allow")
    refuse_entries(path, config)
    _check_numbers(path, config)
    return config


def _check_numbers(path, value, name=""):
    """Refuse, at any depth, numbers above MAX_SIDE."""
    if isinstance(value, dict):
        for key, entry in value.items():
            _check_numbers(path, entry, key)
    elif isinstance(value, list):
        for entry in value:
            _check_numbers(path, entry, name)
    elif isinstance(value, (int, float)) and not abs(value) <= MAX_SIDE:  # also NaN
        raise InputError(f"{path}: {name} is {value}, more than {MAX_SIDE}; give an undamaged copy")


def load_image_processor(folder: Path) -> Any:
    """Return the image processor of a model, which prepares frames by Pillow: torchvision is not needed.

    Raises:
        InputError: it is missing, damaged, or of a kind that needs torchvision.
    """
    read_preprocessor(folder)
    with library_errors_as_input(folder / "preprocessor_config.json"):
        return AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)


def process(processor: Any, folder: Path, frames: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what a model reads, prepared by its image processor.

    Args:
        processor: see `load_image_processor`.
        folder: the model's, for messages.
        frames: (n, 3, H, W) floats in [0, 1].
    """
    pictures = to_bytes(frames.permute(0, 2, 3, 1))
    with library_errors_as_input(folder / "preprocessor_config.json"):
        inputs = processor(images=list(pictures), return_tensors="pt")
    return {name: inputs[name] for name in ("pixel_values", "pixel_mask") if name in inputs}


def resize(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resize (n, 3, H, W) floats in [0, 1] bicubically and without aliasing, as Pillow does."""
    if tuple(frames.shape[-2:]) == (height, width):
        return frames
    return F.interpolate(frames, (height, width), mode="bicubic", antialias=True).clamp(0, 1)


def cover_and_crop(frames: torch.Tensor, side: int) -> torch.Tensor:
    """Resize (n, 3, H, W) so that the shorter side has `side` pixels, and crop the centre, (n, 3, side, side)."""
    height, width = frames.shape[-2:]
    shorter = min(height, width)
    frames = resize(frames, int(height * side / shorter), int(width * side / shorter))
    top, left = (frames.shape[-2] - side) // 2, (frames.shape[-1] - side) // 2
    return frames[..., top : top + side, left : left + side]


def normalise(frames: torch.Tensor, preprocessor: Preprocessor, mean: list[float], std: list[float]) -> torch.Tensor:
    """Subtract the mean from (..., 3, H, W) and divide by the deviation: the preprocessor's, or these defaults."""
    mean, std = preprocessor.get("image_mean") or mean, preprocessor.get("image_std") or std
    shift, scale = (frames.new_tensor(values).view(3, 1, 1) for values in (mean, std))
    return (frames - shift) / scale


def side_of(size: _Size, default: int) -> int:
    """Return one side, in pixels, of an entry `size` or `crop_size`: a number, or by height or shortest edge."""
    if isinstance(size, dict):
        return size.get("height") or size.get("shortest_edge") or default
    return size or default


def chunks(video: torch.Tensor, device: torch.device | str, size: int = CHUNK) -> Iterator[torch.Tensor]:
    """Yield some frames at a time of (F, 3, H, W), on a device, as floats."""
    for chunk in video.split(size):
        yield chunk.to(device).float()


class Remembering(Generic[Result]):
    """A function of a video that remembers its last results, since several measures need the same ones.

    A video is recognised by its identity, so it must not be changed in place.

    Args:
        compute: the function.
    """

    def __init__(self, compute: Callable[[torch.Tensor], Result]):
        self.compute = compute
        self._results: list[tuple[torch.Tensor, Result]] = []

    def __call__(self, video: torch.Tensor) -> Result:
        remembered = next((result for seen, result in self._results if seen is video), None)
        result = self.compute(video) if remembered is None else remembered
        others = [entry for entry in self._results if entry[0] is not video]
        self._results = [*others[1 - REMEMBERED :], (video, result)]  # the last one used comes last
        return result
