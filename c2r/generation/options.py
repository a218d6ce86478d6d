"""Options of `c2r.generate`: checks of those that must fit each other, and defaults from the contract of a model."""

from argparse import Namespace
from typing import TYPE_CHECKING, Any

from c2r import InputError
from c2r.options import GENERATE
from c2r.options.shared import GUIDANCE_SCALES

if TYPE_CHECKING:
    from c2r.models.contract import PhaseContract

#: Options of sampling that a contract may name, and their values where it does not.
SAMPLING: dict[str, Any] = {
    "flow_shift": 3.0,
    "conditioning_scale": 1.0,
    "guidance": "apg",
    "control_guidance_scale": 1.0,
}


def check_options(args: Namespace):
    """Raise InputError for options that do not fit each other."""
    if not args.control_guidance_start < args.control_guidance_end:
        raise InputError(
            f"--control_guidance_start {args.control_guidance_start}: not below --control_guidance_end "
            f"{args.control_guidance_end}; lower it, or raise the end"
        )
    if not args.control_video:
        if args.num_frames == "all":
            raise InputError("--num_frames all: needs a --control_video; give one, or a number")
        if args.fps == "control":
            raise InputError("--fps control: needs the rate of a --control_video; give one, or a number")
    counts = {len(args.prompt), len(args.control_video or [None])}
    if len(counts - {1}) > 1:
        raise InputError(
            f"--control_video: given {len(args.control_video)} times, --prompt {len(args.prompt)} times; "
            "give equally many, or one of either for all"
        )


def default_options(contract: "PhaseContract", guidance: str | None = None) -> dict[str, Any]:
    """Return {option: its value where it is not given}: that of the model's training, or a general one.

    Args:
        contract: of the model.
        guidance: the kind that is given, if one is; the scale of training counts for its own kind alone.
    """
    from c2r.models.contract import DEFAULT_FORMAT

    trained = {name: getattr(contract, name) for name in (*DEFAULT_FORMAT, *SAMPLING)}
    defaults = DEFAULT_FORMAT | SAMPLING | {name: value for name, value in trained.items() if value is not None}
    kind = guidance or defaults["guidance"]
    scale = contract.guidance_scale if kind == contract.guidance else None
    return defaults | {"guidance_scale": GUIDANCE_SCALES.get(kind) if scale is None else scale}


def complete_options(args: Namespace, contract: "PhaseContract"):
    """Take options that were not given from the model's contract. Changes `args` in place.

    Raises:
        InputError: the contract has a value that the option would refuse, or windows would not overlap.
    """
    from c2r.windows import trained_window

    for name, value in default_options(contract, args.guidance).items():
        is_given = getattr(args, name) is not None
        is_window = name == "num_frames" and args.window_frames is None
        if is_given and not is_window:
            continue
        try:
            value = GENERATE.options[name].type(str(value))
        except ValueError as error:
            raise InputError(f"--model {args.model}: its contract has {name} {value}: {error}") from None
        if not is_given:
            setattr(args, name, value)
    args.window_frames = args.window_frames or trained_window(contract.format["num_frames"])
    if args.window_frames == 1 != args.num_frames:
        raise InputError("--window_frames 1: windows of a longer video overlap; give at least 5, or leave it out")
    if None not in (args.window_frames, args.window_overlap) and args.window_overlap >= args.window_frames:
        raise InputError(
            f"--window_overlap {args.window_overlap}: not below --window_frames {args.window_frames}; lower it"
        )
    args.pretrained_model_name_or_path = args.pretrained_model_name_or_path or contract.base_model
    args.backbone = args.backbone or contract.backbone
    args.dinov3 = args.dinov3 or contract.dinov3
