"""Load, freeze, join and save the parts of a phase, and the contract that ties the phases together.

Weights are only ever read from safetensors, never from a pickle. Whatever a user can get wrong (a path, a model of
another architecture, a ControlNet of another backbone) raises one `InputError` line, before weights are read where
the config or the safetensors header already tells.
"""

import json
import math
import os
import platform
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import accelerate
import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel

from c2r import InputError
from c2r.models.controlnet import C2RControlNet
from c2r.models.parts import freeze, load_pipeline_part, require_class, require_complete, resolve_model_folder
from c2r.models.transformer import C2RTransformer
from c2r.models.weights import (
    WeightIndex,
    atomic_folder,
    complete_folder,
    fingerprint,
    fingerprint_files,
    read_json,
)

__all__ = [
    "PhaseContract",
    "atomic_folder",
    "check_transformer",
    "complete_folder",
    "fingerprint",
    "fingerprint_files",
    "fingerprint_transformer",
    "freeze",
    "load_controlnet",
    "load_for_generation",
    "load_pipeline_part",
    "load_transformer",
    "read_contract",
    "read_transformer_config",
    "resolve_model_folder",
    "save_phase",
    "save_weights",
]

CONTRACT = "c2r.json"


def check_transformer(source, base=None):
    """Check a Wan backbone by its config and its files' headers, before any weight is read.

    Args:
        source: a Diffusers pipeline folder, a transformer folder, best/ or final/ of phase 1, a hub name, or a single
            .safetensors file with Diffusers' or Wan's original names.
        base: pipeline or transformer folder or hub name whose config a single file has; where it has a VAE and a text
            encoder, the backbone must fit them.

    Returns:
        path of the folder or file that holds the weights, its config (dict).

    Raises:
        InputError: nothing there, another architecture, or weights that do not fit the config.
    """
    path = Path(source)
    if path.suffix == ".safetensors" or path.is_file():
        if path.suffix != ".safetensors" or not path.is_file():
            raise InputError(f"{source}: no such .safetensors file; give one, or a model folder")
        if base is None:
            raise InputError(f"{source}: a single file has no config; name the model that it is a version of as base")
        config = read_transformer_config(base)
    else:
        path = complete_folder(path)
        path = path if path.is_dir() else resolve_model_folder(source, ["transformer"])
        path = path / "transformer" if (path / "transformer").is_dir() else path
        config = _check_transformer_config(path)
    _require_fitting(path, WanTransformer3DModel, config)
    if base is not None:
        _require_fitting_base(source, config, base)
    return path, config


def _require_fitting_base(source, config, base):
    for key, part, part_key in (("in_channels", "vae", "z_dim"), ("text_dim", "text_encoder", "d_model")):
        path = _base_folder(base) / part / "config.json"
        needed = read_json(path).get(part_key) if path.is_file() else None
        if needed is not None and config.get(key) != needed:
            raise InputError(
                f"{source}: its {key} is {config.get(key)}, but the {part} of {base} has {part_key} {needed}; "
                "give the --pretrained_model_name_or_path that it was made for"
            )


def _base_folder(base):
    return Path(base) if Path(base).is_dir() else resolve_model_folder(base, [])


def read_transformer_config(source, base=None):
    """The config of a backbone, see `check_transformer`; of a hub model no weights are downloaded.

    Raises:
        InputError: nothing there, or another architecture.
    """
    folder = complete_folder(source)
    if not folder.is_dir():
        folder = _base_folder(base if str(source).endswith(".safetensors") else source)
    return _check_transformer_config(folder / "transformer" if (folder / "transformer").is_dir() else folder)


def _check_transformer_config(folder):
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{folder}: no transformer here; give a Wan 2.1 pipeline folder, or best/ or final/ of phase 1"
        )
    config = require_class(folder, "WanTransformer3DModel")
    if config.get("image_dim") or config.get("added_kv_proj_dim"):
        raise InputError(f"{folder}: this is an image-to-video model; give a text-to-video one (Wan 2.1 T2V)")
    return config


def _require_fitting(path, model_class, config):
    """Compare the names and shapes in the files' headers with those of a model of this config."""
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in model_class.from_config(config).state_dict().items()}
    found = WeightIndex(path).shapes()
    unfit = [f"{name} {shape}" for name, shape in found.items() if expected.get(name, shape) != shape]
    unknown = [name for name in found if name not in expected]
    require_complete(path, [name for name in expected if name not in found], unfit + unknown)


def load_transformer(source, base=None, torch_dtype=None, empty=False):
    """The Wan backbone, in eval mode, its parameters trainable.

    Args:
        source, base: see `check_transformer`.
        torch_dtype: dtype of the weights; None is fp32. With torch.bfloat16 the time embedder, the norms and the
            modulation tables stay in fp32, as WanTransformer3DModel declares, from a folder and from a single file.
        empty: read no weights: the parameters have undefined values, in memory that is not touched, so that it takes
            none. For processes that are sent theirs by the main one.

    Raises:
        InputError: see `check_transformer`; raised before weights are read.
    """
    path, config = check_transformer(source, base)
    torch_dtype = torch_dtype or torch.float32
    if path.is_dir() and not empty:
        return WanTransformer3DModel.from_pretrained(path, torch_dtype=torch_dtype, use_safetensors=True)
    # Not from_single_file: in bf16 it would not keep those in fp32, and in fp32 a 14B file needs 57 GB.
    with init_empty_weights():
        transformer = WanTransformer3DModel.from_config(config)
    keep = set(transformer._keep_in_fp32_modules)

    def dtype_of(name):
        return torch.float32 if keep.intersection(name.split(".")) else torch_dtype

    if empty:
        named = ((name, torch.empty(p.shape, dtype=dtype_of(name))) for name, p in transformer.named_parameters())
    else:
        named = ((name, tensor.to(dtype_of(name))) for name, tensor in WeightIndex(path).tensors())
    transformer.load_state_dict(dict(named), assign=True)
    return transformer.requires_grad_(True).eval()


def load_controlnet(folder, torch_dtype=None):
    """The control branch of a phase 2 folder, in eval mode, its parameters trainable; None is fp32."""
    folder = complete_folder(folder)
    config = require_class(folder, "C2RControlNet")
    _require_fitting(folder, C2RControlNet, config)
    return C2RControlNet.from_pretrained(folder, torch_dtype=torch_dtype or torch.float32, use_safetensors=True)


def fingerprint_transformer(source, base=None):
    """`fingerprint_files` of a backbone, wherever `load_transformer` finds it: what a phase 2 contract records."""
    return fingerprint_files(check_transformer(source, base)[0])


def library_versions():
    modules = {"torch": torch, "diffusers": diffusers, "transformers": transformers, "accelerate": accelerate}
    return {"python": platform.python_version()} | {name: module.__version__ for name, module in modules.items()}


@dataclass(frozen=True)
class PhaseContract:
    """What a phase hands to the next one and to generation: the `c2r.json` of best/ and final/.

    Models are named by hub name or path. In the file a local path is relative to the folder, so that the folders of
    both phases can be moved together; in memory it is ready for use.
    """

    phase: int  #: 1 or 2
    base_model: str  #: the Wan pipeline of VAE, text encoder and scheduler
    step: int  #: optimizer updates so far
    validation_loss: float | None = None
    metrics: dict = field(default_factory=dict)  #: the other numbers of the last validation
    dataset_fingerprints: dict = field(default_factory=dict)  #: {dataset: fingerprint}
    versions: dict = field(default_factory=library_versions)
    height: int | None = None  #: pixels, of training
    width: int | None = None
    num_frames: int | None = None
    fps: float | None = None
    flow_shift: float | None = None
    conditioning_scale: float | None = None  #: phase 2
    weights_sha256: str | None = None  #: of this folder's weights; `save_phase` fills it in
    backbone: str | None = None  #: phase 2: the backbone it was trained on, from here on
    backbone_sha256: str | None = None  #: `fingerprint_transformer(backbone)`
    dinov3: str | None = None

    def __post_init__(self):
        if self.phase not in (1, 2):
            raise ValueError(f"phase is {self.phase!r}: it must be 1 or 2")
        absent = [name for name in ("backbone", "backbone_sha256", "dinov3") if getattr(self, name) is None]
        if self.phase == 2 and absent:
            raise ValueError(f"a phase 2 contract needs {', '.join(absent)}")
        if self.validation_loss is not None and not math.isfinite(self.validation_loss):
            raise ValueError(f"validation_loss is {self.validation_loss}: a model like that must not be saved")


PATHS = ("base_model", "backbone", "dinov3")


def save_weights(folder, model, state_dict):
    """`model.save_pretrained(folder)` with these weights instead of the module's own."""
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}  # no path of the source
    with init_empty_weights():
        whole = type(model).from_config(config)
    whole.load_state_dict(state_dict, assign=True)
    whole.save_pretrained(folder)


def save_phase(folder, model, contract, state_dict=None):
    """Write best/ or final/ of a phase: model, config and contract; complete or absent (see `atomic_folder`).

    Call it on one process. The phase 1 folder also loads with `WanTransformer3DModel.from_pretrained`.

    Args:
        folder: where; an older one is replaced.
        model: `WanTransformer3DModel` (phase 1) or `C2RControlNet` (phase 2).
        contract: `PhaseContract`; local paths in it are relative to the current directory.
        state_dict: the model's weights where the module itself does not hold them: gathered from a sharded engine, or
            averaged. None: the model's own.

    Returns:
        the contract with `weights_sha256`.

    Raises:
        TypeError: if the model is not the phase's.
    """
    model_class = {1: WanTransformer3DModel, 2: C2RControlNet}[contract.phase]
    if not isinstance(model, model_class):
        raise TypeError(f"phase {contract.phase} saves a {model_class.__name__}, not a {type(model).__name__}")
    folder = Path(os.path.realpath(folder))
    with atomic_folder(folder) as temporary:
        if state_dict is None:
            model.save_pretrained(temporary)
        else:
            save_weights(temporary, model, state_dict)
        contract = replace(contract, weights_sha256=fingerprint_files(temporary))
        stored = asdict(contract) | {name: _relative(getattr(contract, name), folder) for name in PATHS}
        (temporary / CONTRACT).write_text(json.dumps(stored, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return contract


def _relative(name, folder):
    """A local path relative to `folder`, always with a leading dot, so that it is no hub name; others as they are."""
    if name is None or not os.path.exists(name):
        return name
    path = os.path.relpath(os.path.realpath(name), folder)
    return path if path.startswith("..") else f"./{path}"


def read_contract(folder):
    """The contract of a phase's best/ or final/, its local paths ready for use.

    Raises:
        InputError: no folder, no contract in it, or one of another version.
    """
    folder = complete_folder(folder)
    path = folder / CONTRACT
    if not path.is_file():
        raise InputError(f"{folder}: has no {CONTRACT}; give best/ or final/ of a phase, or check the path")
    stored = read_json(path)
    unknown = sorted(stored.keys() - {entry.name for entry in fields(PhaseContract)})
    if unknown:
        raise InputError(f"{path}: unknown entries {', '.join(unknown)}; it was written by another version")
    for name in PATHS:
        if (stored.get(name) or "").startswith("."):
            stored[name] = os.path.realpath(folder / stored[name])
    try:
        return PhaseContract(**stored)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: {error}; it is damaged or was written by another version") from None


def load_for_generation(folder, backbone=None, torch_dtype=None):
    """The trained model of a phase's best/ or final/, frozen.

    Args:
        folder: of phase 1 or 2.
        backbone: phase 2: where its backbone is, if not where the contract says; see `load_transformer`.
        torch_dtype: dtype of the weights; None is fp32.

    Returns:
        model (`WanTransformer3DModel` of phase 1, `C2RTransformer` of phase 2), contract.

    Raises:
        InputError: a part is missing, or the backbone is not the one that the ControlNet was trained on.
    """
    contract = read_contract(folder)
    if contract.phase == 1:
        return freeze(load_transformer(folder, torch_dtype=torch_dtype)), contract
    source = backbone or contract.backbone
    found = fingerprint_transformer(source, contract.base_model)
    if found != contract.backbone_sha256:
        raise InputError(
            f"{source}: not the backbone of {folder}: its fingerprint is {found}, the ControlNet was trained on "
            f"{contract.backbone_sha256}; give the right one as backbone"
        )
    transformer = load_transformer(source, contract.base_model, torch_dtype)
    return freeze(C2RTransformer(transformer, load_controlnet(folder, torch_dtype))), contract
