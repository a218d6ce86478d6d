"""Models in Diffusers' layout, a config and its weights: checked before they are read, and the dtypes they get."""

from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import ModelMixin

from c2r.files import library_errors_as_input
from c2r.models.hub import WeightIndex, read_config

Model = TypeVar("Model", bound=ModelMixin)
Module = TypeVar("Module", bound=torch.nn.Module)


def check_own_model(folder: Path, model_class: type[ModelMixin], kind: type) -> None:
    """Compare the config of a model of this package with its files' headers, see `load_own_model`."""
    config = read_config(folder, "_class_name", model_class.__name__, kind)
    index = WeightIndex(folder)
    index.require_whole()
    require_fitting_weights(index, model_class, config)


def load_own_model(
    folder: Path, model_class: type[Model], kind: type, torch_dtype: torch.dtype | None = None
) -> Model:
    """Load a model of this package, after comparing its config with its files' headers.

    Args:
        folder: written by `save_pretrained`.
        model_class: class of the model.
        kind: TypedDict of the config's checked entries.
        torch_dtype: dtype of the weights; None is fp32.

    Raises:
        InputError: it is of another class or damaged, or its weights do not fit its config.
    """
    check_own_model(folder, model_class, kind)
    with library_errors_as_input(folder):
        return model_class.from_pretrained(folder, torch_dtype=torch_dtype or torch.float32, use_safetensors=True)


def require_fitting_weights(index: WeightIndex, model_class: type[ModelMixin], config: dict[str, Any]) -> None:
    """Compare names and shapes in the files' headers with those of a model of this config.

    Raises:
        InputError: a weight is missing, of another shape or unexpected, or no model can be made of the config.
    """
    with library_errors_as_input(index.path), torch.device("meta"):
        model = model_class.from_config(config)
    index.require_fit(model)


def stored_dtype(model: torch.nn.Module, name: str, torch_dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that `from_pretrained(torch_dtype=…)` gives a parameter: fp32 for those the model keeps so."""
    keep = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return torch.float32 if keep.intersection(name.split(".")) else torch_dtype


def with_stored_dtypes(model: Module, dtype: torch.dtype) -> Module:
    """Give a model's parameters the dtypes that `from_pretrained(torch_dtype=dtype)` gives them; return the model."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(stored_dtype(model, name, dtype))
    return model
