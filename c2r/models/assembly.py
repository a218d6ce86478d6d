"""Load, check and join the backbone and the control branch.

Weights are only read from safetensors, never from a pickle. User errors (a wrong path, a model of another
architecture, a ControlNet of another backbone) raise one `InputError` line, before weights are read where the config
or the safetensors header is enough to tell.
"""

from functools import partial
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypeVar

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin, WanTransformer3DModel
from pydantic import Field
from typing_extensions import TypedDict

from c2r import InputError
from c2r.files import complete_folder, library_errors_as_input, read_json
from c2r.models.contract import PhaseContract, read_contract, with_moved_models
from c2r.models.controlnet import C2RControlNet
from c2r.models.hub import (
    Count,
    Layers,
    WeightIndex,
    Width,
    fingerprint_files,
    read_config,
    resolve_model_folder,
)
from c2r.models.parts import freeze
from c2r.models.transformer import C2RTransformer

Model = TypeVar("Model", bound=ModelMixin)

_Epsilon = Annotated[float, Field(gt=0, lt=1)]


class _BlockConfig(TypedDict):
    """The checked entries that backbone and control branch share."""

    num_layers: Layers
    num_attention_heads: Count
    attention_head_dim: Count
    ffn_dim: Width
    cross_attn_norm: bool
    qk_norm: str | None
    eps: _Epsilon


class _TransformerConfig(_BlockConfig):
    in_channels: Count
    out_channels: Count
    text_dim: Width
    freq_dim: Width
    patch_size: NotRequired[Annotated[list[Count], Field(min_length=3, max_length=3)]]
    rope_max_seq_len: NotRequired[Annotated[int, Field(ge=1, le=16_384)]]  # its table is computed, not loaded
    image_dim: NotRequired[int | None]
    added_kv_proj_dim: NotRequired[int | None]
    pos_embed_seq_len: NotRequired[int | None]


class _ControlNetConfig(_BlockConfig):
    injection_layers: Annotated[list[int], Field(min_length=1, max_length=100)]
    feature_dim: Width
    temporal_stride: NotRequired[Count]


def load_for_generation(
    folder: str | Path,
    backbone: str | Path | None = None,
    torch_dtype: torch.dtype | None = None,
    base: str | Path | None = None,
) -> tuple[WanTransformer3DModel | C2RTransformer, PhaseContract]:
    """Load the trained model of a phase's best/ or final/, frozen, and its contract.

    Args:
        folder: best/ or final/. Phase 1 gives a `WanTransformer3DModel`, phase 2 a `C2RTransformer`.
        backbone: the backbone of a phase 2 folder, if it was moved since the contract was written.
        torch_dtype: dtype of the weights; None is fp32.
        base: the Wan pipeline that the backbone must fit, if it was moved.

    Raises:
        InputError: a part is missing, or the backbone is not the one that the ControlNet was trained on.
    """
    contract = read_contract(folder)
    if contract.phase == 1:
        return freeze(load_transformer(folder, torch_dtype=torch_dtype)), contract
    contract = with_moved_models(contract, folder, base_model=base, backbone=backbone)
    backbone = contract.backbone
    found = fingerprint_transformer(backbone, contract.base_model)
    if found != contract.backbone_sha256:
        raise InputError(
            f"{backbone}: not the backbone of {folder}: its fingerprint is {found}, the ControlNet was trained on "
            f"{contract.backbone_sha256}; name that one with --backbone (in Python backbone=)"
        )
    transformer = load_transformer(backbone, contract.base_model, torch_dtype)
    return freeze(C2RTransformer(transformer, load_controlnet(folder, torch_dtype))), contract


def load_transformer(
    name_or_path: str | Path,
    base: str | Path | None = None,
    torch_dtype: torch.dtype | None = None,
    empty: bool = False,
) -> WanTransformer3DModel:
    """Load the Wan backbone, in eval mode, its parameters trainable.

    Args:
        name_or_path, base: see `check_transformer`.
        torch_dtype: dtype of the weights; None is fp32. With torch.bfloat16 the time embedder, the norms and the
            modulation tables stay in fp32, as WanTransformer3DModel declares.
        empty: read no weights and leave the parameters' values undefined, for processes that receive them from the
            main process. Their memory is not touched, so that it takes no room.

    Raises:
        InputError: see `check_transformer`.
    """
    path, config = check_transformer(name_or_path, base)
    torch_dtype = torch_dtype or torch.float32
    if path.is_dir() and not empty:
        with library_errors_as_input(path):
            return WanTransformer3DModel.from_pretrained(path, torch_dtype=torch_dtype, use_safetensors=True)
    # Not by from_single_file: in bf16 it would keep no module in fp32, and in fp32 a 14B file would need 57 GB.
    with init_empty_weights():
        transformer = WanTransformer3DModel.from_config(config)
    dtype_of = partial(stored_dtype, transformer, torch_dtype=torch_dtype)
    if empty:
        named = ((name, torch.empty(p.shape, dtype=dtype_of(name))) for name, p in transformer.named_parameters())
    else:
        named = ((name, tensor.to(dtype_of(name))) for name, tensor in WeightIndex(path).tensors())
    transformer.load_state_dict(dict(named), assign=True)
    return transformer.requires_grad_(True).eval()


def stored_dtype(model: torch.nn.Module, name: str, torch_dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that `from_pretrained(torch_dtype=…)` gives a parameter: fp32 for those the model keeps so."""
    keep = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return torch.float32 if keep.intersection(name.split(".")) else torch_dtype


def load_controlnet(folder: str | Path, torch_dtype: torch.dtype | None = None) -> C2RControlNet:
    """Load the control branch of a phase 2 or pipeline folder, in eval mode, trainable; dtype None is fp32.

    Raises:
        InputError: the folder has no control branch, or its weights do not fit its config.
    """
    return load_own_model(_controlnet_folder(folder), C2RControlNet, _ControlNetConfig, torch_dtype)


def check_model(folder: str | Path, contract: PhaseContract, backbone: str | Path | None = None) -> None:
    """Check the weights that `load_for_generation` reads by configs and headers; fingerprints are not compared.

    Raises:
        InputError: see `load_for_generation`.
    """
    if contract.phase == 1:
        check_transformer(folder, contract.base_model)
        return
    check_transformer(backbone or contract.backbone, contract.base_model)
    check_own_model(_controlnet_folder(folder), C2RControlNet, _ControlNetConfig)


def _controlnet_folder(folder):
    """Return the control branch's folder of a pipeline folder; a phase 2 folder unchanged."""
    folder = complete_folder(folder)
    return folder / "controlnet" if (folder / "controlnet").is_dir() else folder


def check_own_model(folder: Path, model_class: type[ModelMixin], kind: type) -> None:
    """Compare the config of a model of this package with its files' headers, see `load_own_model`."""
    _require_fitting_weights(folder, model_class, read_config(folder, "_class_name", model_class.__name__, kind))


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


def fingerprint_transformer(name_or_path: str | Path, base: str | Path | None = None) -> str:
    """Return the fingerprint of a backbone's weights, as phase 2 contracts record it; see `check_transformer`."""
    return fingerprint_files(check_transformer(name_or_path, base)[0])


def check_transformer(name_or_path: str | Path, base: str | Path | None = None) -> tuple[Path, dict]:
    """Check a Wan backbone by its config and its files' headers, before any weight is read.

    Args:
        name_or_path: a Diffusers pipeline folder, a transformer folder, best/ or final/ of phase 1, a hub name, or a
            single .safetensors file with Diffusers' or Wan's original names.
        base: Wan pipeline, a folder or hub name. A single file takes its config from there. If `base` has a VAE and a
            text encoder, the backbone must fit them.

    Returns:
        folder or file that holds the weights, config.

    Raises:
        InputError: nothing there, another architecture, or weights that do not fit the config.
    """
    path = Path(name_or_path)
    if path.suffix == ".safetensors" or path.is_file():
        if path.suffix != ".safetensors" or not path.is_file():
            raise InputError(f"{name_or_path}: no such .safetensors file; give one, or a model folder")
        if base is None:
            raise InputError(f"{name_or_path}: a single file has no config; give the Wan pipeline that it belongs to")
        config = read_transformer_config(base)
    else:
        path = complete_folder(path)
        path = path if path.is_dir() else resolve_model_folder(name_or_path, ["transformer"])
        path = _transformer_folder(path)
        config = _read_text_to_video_config(path)
    _require_fitting_weights(path, WanTransformer3DModel, config)
    if base is not None:
        _require_fitting_base(name_or_path, config, base)
    return path, config


def read_transformer_config(name_or_path: str | Path, base: str | Path | None = None) -> dict:
    """Return the config of a backbone, see `check_transformer`; no weights are downloaded from the hub.

    Raises:
        InputError: nothing there, or another architecture.
    """
    folder = complete_folder(name_or_path)
    if not folder.is_dir():
        folder = _model_folder(base if str(name_or_path).endswith(".safetensors") else name_or_path)
    return _read_text_to_video_config(_transformer_folder(folder))


def _model_folder(name_or_path):
    """Return a folder unchanged, or a hub model's folder with its .json files."""
    return Path(name_or_path) if Path(name_or_path).is_dir() else resolve_model_folder(name_or_path, [])


def _transformer_folder(folder):
    """Return the transformer's folder of a pipeline folder; a transformer folder unchanged."""
    return folder / "transformer" if (folder / "transformer").is_dir() else folder


def _read_text_to_video_config(folder):
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{folder}: no transformer here; give a Wan 2.1 pipeline folder, or best/ or final/ of phase 1"
        )
    config = read_config(folder, "_class_name", "WanTransformer3DModel", _TransformerConfig)
    if config.get("image_dim") or config.get("added_kv_proj_dim"):
        raise InputError(f"{folder}: this is an image-to-video model; give a text-to-video one (Wan 2.1 T2V)")
    return config


def _require_fitting_weights(path: Path, model_class: type[ModelMixin], config: dict[str, Any]):
    """Compare names and shapes in the files' headers with those of a model of this config."""
    with library_errors_as_input(path), torch.device("meta"):
        model = model_class.from_config(config)
    WeightIndex(path).require_fit(model)


def _require_fitting_base(name_or_path, config, base):
    """Compare a backbone's channels and text width with VAE and text encoder of the Wan pipeline."""
    for key, part, part_key in (("in_channels", "vae", "z_dim"), ("text_dim", "text_encoder", "d_model")):
        path = _model_folder(base) / part / "config.json"
        needed = read_json(path).get(part_key) if path.is_file() else None
        if needed is not None and config.get(key) != needed:
            raise InputError(
                f"{name_or_path}: its {key} is {config.get(key)}, but the {part} of {base} has {part_key} {needed}; "
                "give the --pretrained_model_name_or_path that it was made for"
            )
