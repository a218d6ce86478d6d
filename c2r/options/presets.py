"""Options of the training scripts by the memory of a device: those that `python -m c2r.estimate --fit` found.

They are for Wan 2.1 1.3B on one device, with clips of 480×832×81. 14B depends on the engine and the number of devices
more than on these options: docs/hardware.md has its commands.
"""

from argparse import Namespace
from typing import Any

from c2r import InputError

#: As many clips in an optimizer step as by default, one at a time.
_ONE_CLIP = {"train_batch_size": 1, "gradient_accumulation_steps": 32}
_IN_PARTS = {"ffn_chunks": 4}
_EIGHT_BIT = {"optimizer": "adamw8bit"}
_SMALL = _EIGHT_BIT | {"weight_storage": "bf16"}

#: {phase: {preset: {option: value}}}
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "1": {
        "16gb": _ONE_CLIP | _IN_PARTS | {"offload_activations": True} | _SMALL,
        "24gb": _ONE_CLIP | _EIGHT_BIT,
        "48gb": _ONE_CLIP | {"gradient_checkpointing": "selective"},
        "80gb": {"gradient_checkpointing": "selective"},
    },
    "2": {
        "12gb": _IN_PARTS | {"offload_activations": True, "offload_backbone": True} | _SMALL,
        "16gb": _IN_PARTS | _EIGHT_BIT,
        "24gb": {"gradient_checkpointing": "block"},
        "48gb": {"gradient_checkpointing": "selective"},
        "80gb": {"gradient_checkpointing": "selective"},
    },
}


def preset_options(phase: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return the options that --preset sets, {} without one.

    Args:
        phase: "1" or "2".
        given: options of the command line and of --config.

    Raises:
        InputError: the phase has no such preset.
    """
    name = given.get("preset")
    if name is None:
        return {}
    if name not in PRESETS[phase]:
        raise InputError(
            f"--preset {name}: phase {phase} has none of this name; give one of {', '.join(PRESETS[phase])}"
        )
    options = PRESETS[phase][name]
    if given.keys() & _ONE_CLIP.keys():  # one of the two alone would change the clips of an optimizer step
        options = {name: value for name, value in options.items() if name not in _ONE_CLIP}
    return options


def preset_line(args: Namespace) -> str:
    """Return a line that names the options which a preset has set, and those that were given another value.

    Args:
        args: options of a training script with a preset.
    """
    options = PRESETS["2" if hasattr(args, "control_layers") else "1"][args.preset]
    kept = {name: value for name, value in options.items() if getattr(args, name) == value}
    line = f"--preset {args.preset} sets {option_words(kept) or 'nothing'}"
    others = {name: getattr(args, name) for name in options if name not in kept}
    return f"{line}; given otherwise: {option_words(others)}" if others else line


def option_words(options: dict[str, Any]) -> str:
    """Return options as on a command line."""
    words = []
    for name, value in options.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return " ".join(words)
