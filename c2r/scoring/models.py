"""The models that `c2r.evaluate` compares: find them, check them, and give them one guidance."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from c2r import InputError
from c2r.generation.models import find_model
from c2r.generation.options import default_options
from c2r.models.assembly import check_model
from c2r.models.backbone import fingerprint_transformer
from c2r.models.contract import PhaseContract, fetch_model, read_contract
from c2r.models.dinov3 import check_dinov3
from c2r.models.parts import ENCODERS, check_pipeline_parts
from c2r.reporting.run_folder import run_names
from c2r.scoring.scenes import ClipFormat, Scene, other_controls

#: Kinds of control in names of sources.
CONTROL_NAMES = {"own": "own control", "shuffled": "another scene's control", "none": "no control"}


@dataclass(frozen=True)
class Model:
    """A model that generates videos.

    Attributes:
        name: for tables.
        args: options of c2r.generate, completed from the contract.
        contract: of the model.
        dtype: of its weights.
        other_backbone: fingerprint of --backbone, if it is not that of the training.
        controls: kinds of control that it generates with; a model of phase 1 takes none.
    """

    name: str
    args: Namespace
    contract: PhaseContract
    dtype: torch.dtype
    other_backbone: str | None
    controls: tuple[str, ...]

    @property
    def description(self) -> dict[str, Any]:
        """Folder, step, fingerprints and guidance."""
        entries = ("phase", "step", "weights_sha256", "backbone_sha256")
        trained = {name: getattr(self.contract, name) for name in entries}
        return {"folder": self.args.model} | trained | self.guidance

    @property
    def guidance(self) -> dict[str, Any]:
        """Its guidance, by the options of c2r.generate."""
        return {name: getattr(self.args, name) for name in ("guidance", "guidance_scale", "control_guidance_scale")}

    @property
    def guidance_text(self) -> str:
        """Its folder and guidance, for messages."""
        return f"{self.args.model} has {', '.join(f'{name} {value}' for name, value in self.guidance.items())}"

    @property
    def form(self) -> ClipFormat:
        """The format of its videos."""
        return ClipFormat(self.args.num_frames, self.args.height, self.args.width, float(self.args.fps))

    @property
    def trained_with(self) -> tuple[float, float]:
        """Shift of the noise levels and scale of the control, of its training: its validation has these."""
        trained = default_options(self.contract)
        return trained["flow_shift"], trained["conditioning_scale"]

    @property
    def source_names(self) -> dict[str, str]:
        """{kind of control: name of its videos, for tables}."""
        if self.controls == ("own",):
            return {"own": self.name}
        return {control: f"{self.name}, {CONTROL_NAMES[control]}" for control in self.controls}


def source_names(paths: Sequence[str]) -> dict[str, str]:
    """Return a short name for each model and folder of videos."""
    names = run_names([*paths])
    # "best" alone tells a reader nothing.
    names = [
        "/".join(Path(path).parts[-2:]) if name in ("best", "final") else name for path, name in zip(paths, names)
    ]
    return dict(zip(paths, names))


def find_model_to_evaluate(args: Namespace, path: str, name: str, device: str) -> Model:
    """Find a model and complete its options from its contract.

    Raises:
        InputError: see `c2r.generation.models.find_model`; or --backbone cannot be read.
    """
    # A whole model of phase 1 has no other backbone.
    backbone = args.backbone if read_contract(fetch_model(path)).has_backbone else None
    own = Namespace(**vars(args) | {"model": path, "backbone": backbone, "control_video": None})
    contract, dtype = find_model(own, device, with_control=True)
    other = None
    if backbone is not None:
        other = fingerprint_transformer(backbone, contract.base_model)
        other = None if other == contract.backbone_sha256 else other
    controls = tuple(args.control) if contract.phase == 2 else ("none",)
    return Model(name, own, contract, dtype, other, controls)


def agree_on_guidance(models: Sequence[Model]) -> None:
    """Give a model whose contract names no guidance that of the others, so that the models alone differ.

    Raises:
        InputError: two models have different ones, from their training.
    """
    named = [model for model in models if model.contract.guidance is not None]
    for model in named:
        if model.guidance != named[0].guidance:
            both = f"{named[0].guidance_text}; {model.guidance_text}"
            raise InputError(
                f"--guidance: that of the samples in training differs: {both}; give --guidance, --guidance_scale "
                "and --control_guidance_scale"
            )
    for model in models:
        for name, value in named[0].guidance.items() if named else ():
            setattr(model.args, name, value)


def check_models(args: Namespace, models: Sequence[Model], scenes: Sequence[Scene], form: ClipFormat) -> None:
    """Check the weights that the models need by their headers, and that the scenes have what they need.

    Raises:
        InputError: a model is incomplete, or a scene lacks its prompt or control.
    """
    controls = {control for model in models for control in model.controls}
    for scene in scenes if models else []:
        if not scene.prompt.strip():
            raise InputError(f"--dataset {args.dataset}: {scene.name} has no text to generate from; add its prompt")
        if scene.control is None and controls - {"none"}:
            raise InputError(
                f"--dataset {args.dataset}: {scene.name} has no control_name; name its coarse video, or give "
                "--control none"
            )
    if "shuffled" in controls:
        other_controls(scenes)
    if args.backbone is not None:
        trained_on = {model.contract.backbone_sha256 for model in models if model.contract.has_backbone}
        if len(trained_on) != 1:
            raise InputError(
                f"--backbone {args.backbone}: the models were trained on {len(trained_on) or 'no'} other backbones; "
                "evaluate those of each backbone by a command of their own"
            )
    for model in models:
        check_model(model.args.model, model.contract)
        if model.contract.phase == 2:
            check_dinov3(model.args.dinov3, [(form.height, form.width)])
        check_pipeline_parts(model.args.pretrained_model_name_or_path, [*ENCODERS, "scheduler"])
