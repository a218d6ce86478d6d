"""The LoRAs to choose from on the page."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from c2r import InputError

if TYPE_CHECKING:
    from c2r.pipeline import C2RPipeline


def find_loras(folder: str) -> list[str]:
    """Return the names of the .safetensors files in a folder."""
    return sorted(path.name for path in Path(folder).glob("*.safetensors"))


def chosen_lora(folder: str, name: str | None, scale: float) -> tuple[str, float] | None:
    """Return the path and scale of a LoRA chosen by name, None for none. It is never outside --lora_dir, `folder`.

    Raises:
        InputError: there is no such LoRA.
    """
    if not name:
        return None
    if name not in find_loras(folder):
        raise InputError(f"LoRA {name}: not in --lora_dir; choose another")
    return os.path.join(folder, name), scale


@contextmanager
def added_lora(pipeline: "C2RPipeline", lora: tuple[str, float] | None) -> Iterator[None]:
    """Add a LoRA to the backbone while the block runs."""
    if lora is None:
        yield
        return
    from c2r.files import library_errors_as_input

    path, scale = lora
    folder, name = os.path.split(path)
    try:
        with library_errors_as_input(path):
            pipeline.load_lora_weights(folder, weight_name=name, use_safetensors=True, adapter_name="page")
            pipeline.set_adapters("page", scale)
        yield
    finally:
        pipeline.unload_lora_weights()
