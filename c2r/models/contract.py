"""`c2r.json`, the contract of a trained model: its origin, sizes and fingerprints."""

import json
import math
import os
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import accelerate
import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers import ModelMixin, WanTransformer3DModel
from pydantic import FiniteFloat, NonNegativeInt, PositiveInt

from c2r import InputError, __version__
from c2r.files import atomic_folder, complete_folder, read_json
from c2r.models.controlnet import C2RControlNet
from c2r.models.hub import fingerprint_files, resolve_model_folder
from c2r.models.lora import LoraWeights
from c2r.models.lora_file import LoraFile

CONTRACT = "c2r.json"
#: Diffusers' list of a pipeline's parts.
MODEL_INDEX = "model_index.json"

M = TypeVar("M", bound=ModelMixin)

#: Entries that name a model, by hub name or path; each with the keyword of `C2RPipeline.from_pretrained` and the
#: option of c2r.generate that name another one.
MODEL_ENTRIES = {
    "base_model": ("base", "--pretrained_model_name_or_path"),
    "backbone": ("backbone", "--backbone"),
    "dinov3": ("dinov3", "--dinov3"),
}
#: Entries that may be local paths.
PATH_ENTRIES = (*MODEL_ENTRIES, "backbone_base")

#: The format that Wan 2.1 was made for, used where a contract gives none.
DEFAULT_FORMAT = {"height": 480, "width": 832, "num_frames": 81, "fps": 16.0}


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that results depend on."""
    modules = {"torch": torch, "diffusers": diffusers, "transformers": transformers, "accelerate": accelerate}
    return {"python": platform.python_version()} | {name: module.__version__ for name, module in modules.items()}


@dataclass(frozen=True)
class PhaseContract:
    """Contents of the `c2r.json` in best/ and final/.

    Models are named by hub name or path. In the file a local path is relative to the folder, so that the folders of
    both phases can be moved together; `read_contract` makes it absolute.
    """

    phase: int  #: 1 or 2
    base_model: str  #: the Wan pipeline with VAE, text encoder and scheduler
    step: NonNegativeInt  #: optimizer updates
    validation_loss: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)  #: other numbers of the last validation
    dataset_fingerprints: dict[str, str] = field(default_factory=dict)  #: {domain: fingerprint of its mixture}
    num_clips: dict[str, NonNegativeInt] = field(default_factory=dict)  #: {domain: clips that were trained on}
    version: str = __version__  #: version of C2R that wrote the contract
    versions: dict[str, str] = field(default_factory=library_versions)  #: {library: version}
    height: PositiveInt | None = None  #: pixels in training
    width: PositiveInt | None = None
    num_frames: PositiveInt | None = None
    fps: FiniteFloat | None = None
    flow_shift: FiniteFloat | None = None
    # Phase 2 only, of the sample videos of training: generation uses the same where nothing else is asked for.
    conditioning_scale: FiniteFloat | None = None
    guidance: str | None = None
    guidance_scale: FiniteFloat | None = None  #: None: the default of `guidance`
    control_guidance_scale: FiniteFloat | None = None
    weights_sha256: str | None = None  #: fingerprint of this folder's weights, filled in by `save_phase`
    lora_rank: PositiveInt | None = None  #: of a phase 1 that trained a LoRA
    # Phase 2, and a LoRA of phase 1:
    backbone: str | None = None  #: the frozen backbone of the training
    backbone_sha256: str | None = None  #: `fingerprint_transformer(backbone)`
    # Phase 2 only:
    backbone_base: str | None = None  #: the model below `backbone`, where that is a LoRA
    dinov3: str | None = None
    #: Figures of the control's features, see `c2r.models.control_projection.Certificate`.
    control_certificate: dict[str, FiniteFloat] | None = None
    #: In a pipeline's folder, which holds copies: hub names of the models that they are copies of, by MODEL_ENTRIES.
    copied_from: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        if self.phase not in (1, 2):
            raise ValueError(f"phase is {self.phase!r}: it must be 1 or 2")
        absent = [name for name in ("backbone", "backbone_sha256", "dinov3") if getattr(self, name) is None]
        if self.phase == 2 and absent:
            raise ValueError(f"a phase 2 contract needs {', '.join(absent)}")
        if self.lora_rank is not None and (self.backbone is None or self.backbone_sha256 is None):
            raise ValueError("the contract of a LoRA needs backbone and backbone_sha256")
        if self.validation_loss is not None and not math.isfinite(self.validation_loss):
            raise ValueError(f"validation_loss is {self.validation_loss}: such a model must not be saved")

    @property
    def has_backbone(self) -> bool:
        """True if the folder's weights belong to a frozen backbone elsewhere: in phase 2, and in a LoRA of phase 1."""
        return self.phase == 2 or self.lora_rank is not None

    @property
    def format(self) -> dict[str, Any]:
        """Height, width, num_frames and fps of training; DEFAULT_FORMAT where an old contract has none."""
        trained = {name: getattr(self, name) for name in DEFAULT_FORMAT}
        return DEFAULT_FORMAT | {name: value for name, value in trained.items() if value is not None}


def with_weights(model: M, state_dict: dict[str, torch.Tensor]) -> M:
    """Return a model of the same class and config whose weights are those of `state_dict`, not copied."""
    # Entries with an underscore are Diffusers' own, such as the path that the model was loaded from.
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    with init_empty_weights():
        whole = type(model).from_config(config)
    whole.load_state_dict(state_dict, assign=True)
    return whole


def save_phase(
    folder: str | Path,
    model: WanTransformer3DModel | LoraWeights | C2RControlNet,
    contract: PhaseContract,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> PhaseContract:
    """Write best/ or final/ of a phase: model, config and contract; complete or absent (see `atomic_folder`).

    Call it on one process. The phase 1 folder also loads with `WanTransformer3DModel.from_pretrained`, that of a LoRA
    with `load_lora_weights` of Diffusers' pipelines.

    Args:
        folder: folder to write; an older one is replaced.
        model: `WanTransformer3DModel` or `LoraWeights` in phase 1, `C2RControlNet` in phase 2.
        contract: local paths in it are relative to the current directory.
        state_dict: weights to save instead of the module's own: gathered from a sharding engine, or averaged.

    Returns:
        the contract with `weights_sha256`.

    Raises:
        TypeError: if the model is of the other phase.
    """
    model_class = {1: WanTransformer3DModel, 2: C2RControlNet}[contract.phase]
    if contract.lora_rank is not None:
        model_class = LoraWeights
    if not isinstance(model, model_class):
        raise TypeError(f"phase {contract.phase} saves a {model_class.__name__}, not a {type(model).__name__}")
    folder = Path(os.path.realpath(folder))
    with atomic_folder(folder) as temporary:
        if state_dict is None:
            model.save_pretrained(temporary)
        else:
            with_weights(model, state_dict).save_pretrained(temporary)
        weights = fingerprint_files(temporary) if contract.lora_rank is None else LoraFile(temporary).sha256()
        contract = replace(contract, weights_sha256=weights)
        relative = {name: _relative(getattr(contract, name), folder) for name in PATH_ENTRIES}
        write_contract(temporary, replace(contract, **relative))
    return contract


def write_contract(folder: Path, contract: PhaseContract) -> None:
    """Write a contract whose local paths are relative to the folder."""
    text = json.dumps(asdict(contract), indent=2, allow_nan=False) + "\n"
    (folder / CONTRACT).write_text(text, encoding="utf-8")


def _relative(name, folder):
    """Return a local path relative to `folder`, with a leading dot; a hub name, which has none, unchanged."""
    if name is None or not os.path.exists(name):
        return name
    path = os.path.relpath(os.path.realpath(name), folder)
    return path if path.startswith("..") else f"./{path}"


def read_contract(folder: str | Path) -> PhaseContract:
    """Read the contract of a phase's best/ or final/; its local paths become absolute.

    Raises:
        InputError: no folder, no contract in it, or one that this version cannot read.
    """
    folder = complete_folder(folder)
    path = folder / CONTRACT
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give best/ or final/ of a phase")
    if not path.is_file():
        raise InputError(f"{folder}: has no {CONTRACT}; give best/ or final/ of a phase, or check the path")
    version = read_json(path).get("version", "unknown")
    try:
        contract = read_json(path, PhaseContract)
    except InputError as error:
        raise InputError(f"{error} (written by version {version}, this is {__version__}: use that version)") from None
    local = {}
    for name in PATH_ENTRIES:
        if (getattr(contract, name) or "").startswith("."):
            local[name] = os.path.realpath(folder / getattr(contract, name))
    return replace(contract, version=version, **local)


def fetch_model(name_or_path: str | Path, without: Iterable[str] = ()) -> Path:
    """Return the folder of a trained model; a model of the hub is downloaded.

    Args:
        name_or_path: best/ or final/ of a phase, or a folder that `C2RPipeline.save_pretrained` wrote; or the hub name
            of such a folder, or of a Wan pipeline.
        without: folders of parts that are not needed, such as "text_encoder".

    Raises:
        InputError: the hub's model is none of these; see also `resolve_model_folder`.
    """
    folder = complete_folder(name_or_path)
    if folder.is_dir():
        return folder
    folder = resolve_model_folder(name_or_path, [])  # the .json files alone show which parts there are
    if not (folder / MODEL_INDEX).is_file():
        if not (folder / CONTRACT).is_file():
            raise InputError(
                f"{name_or_path}: has neither {CONTRACT} nor {MODEL_INDEX}; give a trained model, or a pipeline of "
                "Diffusers"
            )
        return resolve_model_folder(name_or_path)
    parts = [path.name for path in folder.iterdir() if path.is_dir() and path.name not in without]
    return resolve_model_folder(name_or_path, sorted(parts))


def with_moved_models(contract: PhaseContract, folder: str | Path, **given: str | Path | None) -> PhaseContract:
    """Return the contract with models that a user names in place of its own.

    Args:
        contract: from `read_contract`.
        folder: its folder, for messages.
        given: {entry of MODEL_ENTRIES: hub name or path; None keeps the contract's}. Entries left out are not checked.

    Raises:
        InputError: a model of the contract is no longer there, or a backbone is given for a model that is one.
    """
    if given.get("backbone") is not None and not contract.has_backbone:
        raise InputError(
            f"--backbone {given['backbone']} (in Python backbone=): {folder} is a whole backbone itself; leave it out"
        )
    for entry, name in given.items():
        named = getattr(contract, entry)
        # A hub name is no absolute path, and stays as it is.
        if name is None and named is not None and os.path.isabs(named) and not complete_folder(named).exists():
            keyword, option = MODEL_ENTRIES[entry]
            raise InputError(
                f"{named}: not there, but {folder} names it as its {entry}; if it was moved, name its new place with "
                f"{option} (in Python {keyword}=)"
            )
    others: dict[str, Any] = {entry: str(name) for entry, name in given.items() if name is not None}
    return replace(contract, **others)
