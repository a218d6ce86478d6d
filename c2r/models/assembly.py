"""Load, check and join the backbone and the control branch.

Weights are only read from safetensors and GGUF, never from a pickle. User errors (a wrong path, a model of another
architecture, a ControlNet of another backbone) raise one `InputError` line, before weights are read where the config
or the header of a file is enough to tell.
"""

import hashlib
import logging
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypeVar

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin, WanTransformer3DModel
from pydantic import Field

from c2r import InputError
from c2r.files import complete_folder, library_errors_as_input, read_json
from c2r.models.contract import CONTRACT, PhaseContract, read_contract, with_moved_models
from c2r.models.controlnet import SHARED_CONFIG, C2RControlNet
from c2r.models.gguf_weights import PLAIN_TYPES, dequantised
from c2r.models.hub import (
    GGUF,
    Count,
    WeightIndex,
    Width,
    fingerprint_files,
    read_config,
    refuse_pickle,
    resolve_model_folder,
)
from c2r.models.injections import Injection
from c2r.models.lora_file import WEIGHTS as LORA_WEIGHTS
from c2r.models.lora_file import LoraFile, WeightIndexWithLoras
from c2r.models.parts import freeze
from c2r.models.released import load_released, read_released, released_config
from c2r.models.transformer import C2RTransformer
from c2r.models.wan import BlockConfig, read_text_to_video_config, refuse_other_weights

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=ModelMixin)


#: Endings of single files that a backbone is read from.
SINGLE_FILES = (".safetensors", GGUF)


class _ControlNetConfig(BlockConfig):
    injection_layers: Annotated[list[int], Field(max_length=100)]
    feature_dim: Width
    temporal_stride: NotRequired[Count]
    injection: NotRequired[Injection]
    causal_control: NotRequired[bool]


def load_for_generation(
    folder: str | Path,
    backbone: str | Path | None = None,
    torch_dtype: torch.dtype | None = None,
    base: str | Path | None = None,
    loras: Iterable[LoraFile] = (),
) -> tuple[WanTransformer3DModel | C2RTransformer, PhaseContract]:
    """Load the trained model of a phase's best/ or final/, frozen, and its contract.

    Args:
        folder: best/ or final/. Phase 1 gives a `WanTransformer3DModel`, phase 2 a `C2RTransformer`.
        backbone: the backbone of a phase 2 folder, if it was moved since the contract was written, or a quantised copy
            of it (.gguf, or float8), which cannot be compared with it: a warning is logged.
        torch_dtype: dtype of the weights; None is fp32.
        base: the Wan pipeline that the backbone must fit, if it was moved.
        loras: added to the backbone.

    Raises:
        InputError: a part is missing, or the backbone is not the one that the ControlNet or LoRA was trained on, or
            one is given for a whole model of phase 1.
    """
    contract, loras = read_contract(folder), list(loras)
    _warn_of_other_backbones(loras, contract.backbone_sha256 if contract.has_backbone else contract.weights_sha256)
    if not contract.has_backbone:
        with_moved_models(contract, folder, backbone=backbone)
        return freeze(load_transformer(folder, torch_dtype=torch_dtype, loras=loras)), contract
    if contract.phase == 1:
        loras = [LoraFile(folder), *loras]
    moved = with_moved_models(contract, folder, base_model=base, backbone=backbone)
    assert moved.backbone is not None  # `PhaseContract` has checked it
    _require_backbone(folder, moved, may_differ=moved.backbone != contract.backbone)
    transformer = load_transformer(moved.backbone, moved.base_model, torch_dtype, loras=loras)
    if moved.phase == 1:
        return freeze(transformer), moved
    return freeze(C2RTransformer(transformer, load_controlnet(folder, torch_dtype))), moved


def _warn_of_other_backbones(loras, backbone_sha256):
    """Log a warning for each LoRA of a phase 1 that was trained on another backbone; other files do not say."""
    for lora in loras:
        folder = lora.path.parent
        if (folder / CONTRACT).is_file() and read_contract(folder).backbone_sha256 != backbone_sha256:
            logger.warning("--lora %s: was trained on another backbone than the one that it is added to", folder)


def _require_backbone(folder, contract, may_differ):
    """Check by its fingerprint that a contract's backbone is the one that the ControlNet or LoRA was trained on.

    `may_differ` accepts a quantised one with a warning, as it may be a copy of that one. A copy has no LoRA in it.
    """
    backbone = contract.backbone
    path, _ = check_transformer(backbone, contract.base_model)
    found = fingerprint_transformer(backbone, contract.base_model)
    if found == contract.backbone_sha256:
        return
    index = WeightIndex(path)
    has_lora = contract.lora_rank is not None or contract.backbone_base is not None
    if has_lora or not (may_differ and (index.is_gguf or index.float8)):
        raise InputError(
            f"{backbone}: not the backbone of {folder}: its fingerprint is {found}, it was trained on "
            f"{contract.backbone_sha256}; name that one with --backbone (in Python backbone=)"
        )
    logger.warning(
        "%s: its weights are quantised, so it cannot be checked that they are those that %s was trained on",
        *(backbone, folder),
    )


def load_transformer(
    name_or_path: str | Path,
    base: str | Path | None = None,
    torch_dtype: torch.dtype | None = None,
    empty: bool = False,
    loras: Iterable[LoraFile] = (),
) -> WanTransformer3DModel:
    """Load the Wan backbone, in eval mode, its parameters trainable; that of a .gguf file is frozen.

    Weights in float8 are dequantised, and a warning states what their rounding has changed. A LoRA's folder gives the
    backbone below it with the LoRA.

    Args:
        name_or_path, base: see `check_transformer`.
        torch_dtype: dtype of the weights; None is fp32. With torch.bfloat16 the time embedder, the norms and the
            modulation tables stay in fp32, as WanTransformer3DModel declares. The matrices of a .gguf file stay
            quantised, and each is dequantised to `torch_dtype` while it is used.
        empty: read no weights and leave the parameters' values undefined, for processes that receive them from the
            main process. Their memory is not touched, so that it takes no room. Not for a .gguf file.
        loras: added to the weights, each of which is then cast; not to those of a .gguf file.

    Raises:
        InputError: see `check_transformer`.
    """
    index, config = index_weights(name_or_path, base, loras)
    path, torch_dtype = index.path, torch_dtype or torch.float32
    if index.is_gguf:
        return _load_quantised(index, config, _transformer_folder(_model_folder(base)), torch_dtype)
    if path.is_dir() and not (empty or index.loras or index.is_original or index.float8):
        with library_errors_as_input(path):
            return WanTransformer3DModel.from_pretrained(path, torch_dtype=torch_dtype, use_safetensors=True)
    # Not by from_single_file: in bf16 it would keep no module in fp32, and in fp32 a 14B file would need 57 GB.
    with init_empty_weights():
        transformer = WanTransformer3DModel.from_config(config)
    dtype_of = partial(stored_dtype, transformer, torch_dtype=torch_dtype)
    if empty:
        named = ((name, torch.empty(p.shape, dtype=dtype_of(name))) for name, p in transformer.named_parameters())
    else:
        named = ((name, tensor.to(dtype_of(name))) for name, tensor in index.tensors())
    transformer.load_state_dict(dict(named), assign=True)
    if index.rounding.count:
        logger.warning(
            "%s: %d of %d weights are stored in float8: rounding has changed their entries by about %.1f %%; the bf16 "
            "or fp16 file of this model has them whole",
            *(path, index.rounding.count, len(transformer.state_dict()), index.rounding.percent()),
        )
    return transformer.requires_grad_(True).eval()


def index_weights(
    name_or_path: str | Path, base: str | Path | None = None, loras: Iterable[LoraFile] = ()
) -> tuple[WeightIndexWithLoras, dict]:
    """Return the weights that `load_transformer` loads, before they are cast, and the config. Only headers are read.

    Args: see `load_transformer`.

    Raises:
        InputError: see `check_transformer` and `WeightIndexWithLoras`.
    """
    path, config = check_transformer(name_or_path, base)
    below, *_ = _below_loras(name_or_path, base)
    return WeightIndexWithLoras(path, [*map(LoraFile, below), *loras]), config


def _load_quantised(index, config, config_folder, torch_dtype):
    """Load the transformer of a .gguf file by Diffusers' quantisation, frozen."""
    from diffusers import GGUFQuantizationConfig  # a placeholder without the package gguf

    # Diffusers gives other modules than Linear, such as norms, their quantised bytes as weights: they are made whole.
    quantised = _quantised_types(index, config)
    weights = {name: t if name in quantised else dequantised(t) for name, t in index.tensors()}
    with library_errors_as_input(index.path):
        transformer = WanTransformer3DModel.from_single_file(
            weights,
            config=str(config_folder),
            quantization_config=GGUFQuantizationConfig(compute_dtype=torch_dtype),
            torch_dtype=torch_dtype,
        )
    return freeze(transformer)


def quantised_types(name_or_path: str | Path, base: str | Path) -> dict[str, str]:
    """Return {name: type, such as Q4_K} of the weights that stay quantised in memory; only a .gguf file has some.

    Only the file's header is read.

    Raises:
        InputError: see `check_transformer`.
    """
    if not str(name_or_path).endswith(GGUF):
        return {}
    path, config = check_transformer(name_or_path, base)
    return _quantised_types(WeightIndex(path), config)


def _quantised_types(index, config):
    with torch.device("meta"):
        model = WanTransformer3DModel.from_config(config)
    matrices = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return {
        name: type_
        for name, type_ in index.types().items()
        if type_ not in PLAIN_TYPES
        and name in matrices
        and stored_dtype(model, name, torch.bfloat16) == torch.bfloat16  # not kept in fp32
    }


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


def control_start_config(name_or_path: str | Path, backbone_config: dict) -> dict[str, Any]:
    """Return the config of weights that a control branch can start from: of phase 2, or released ones.

    Args:
        name_or_path: best/ or final/ of phase 2, a pipeline folder, or a file of the released C2R.
        backbone_config: config of the backbone.

    Raises:
        InputError: nothing there, damaged, or made for another backbone.
    """
    path = Path(name_or_path)
    if path.is_file():
        return released_config(path, read_released(path), backbone_config)
    folder = _controlnet_folder(path)
    if not folder.is_dir():
        raise InputError(
            f"{name_or_path}: no such folder or file; give best/ or final/ of phase 2, or a released file"
        )
    check_own_model(folder, C2RControlNet, _ControlNetConfig)
    config = read_config(folder, "_class_name", C2RControlNet.__name__, _ControlNetConfig)
    for name in SHARED_CONFIG:
        if config.get(name) != backbone_config[name]:
            raise InputError(
                f"{name_or_path}: made for a backbone with {name} {config.get(name)}, this one has "
                f"{backbone_config[name]}; give that backbone"
            )
    return config


def load_control_start(
    name_or_path: str | Path, backbone_config: dict, torch_dtype: torch.dtype | None = None
) -> C2RControlNet:
    """Load weights that a control branch can start from, see `control_start_config`; dtype None is fp32."""
    path = Path(name_or_path)
    if not path.is_file():
        return load_controlnet(path, torch_dtype)
    controlnet = load_released(path, backbone_config)
    for name, parameter in controlnet.named_parameters():
        parameter.data = parameter.data.to(stored_dtype(controlnet, name, torch_dtype or torch.float32))
    return controlnet


def check_model(
    folder: str | Path,
    contract: PhaseContract,
    backbone: str | Path | None = None,
    loras: Iterable[LoraFile] = (),
) -> None:
    """Check the weights that `load_for_generation` reads by configs and headers; fingerprints are not compared.

    Raises:
        InputError: see `load_for_generation`.
    """
    own = [LoraFile(folder)] if contract.lora_rank is not None else []
    whole = (backbone or contract.backbone) if contract.has_backbone else folder
    index_weights(whole, contract.base_model, [*own, *loras])
    if contract.phase == 1:
        return
    check_own_model(_controlnet_folder(folder), C2RControlNet, _ControlNetConfig)


def _controlnet_folder(folder):
    """Return the control branch's folder of a pipeline folder; a phase 2 folder unchanged."""
    folder = complete_folder(folder)
    return folder / "controlnet" if (folder / "controlnet").is_dir() else folder


def check_own_model(folder: Path, model_class: type[ModelMixin], kind: type) -> None:
    """Compare the config of a model of this package with its files' headers, see `load_own_model`."""
    config = read_config(folder, "_class_name", model_class.__name__, kind)
    index = WeightIndex(folder)
    index.require_whole()
    _require_fitting_weights(index, model_class, config)


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
    """Return the fingerprint of a backbone's weights, as phase 2 contracts record it.

    That of a LoRA's folder combines those of the LoRA and of the backbone below it, which may be a LoRA's too: the
    sums of the two may differ in their last bits between machines.

    Args:
        name_or_path, base: see `check_transformer`.

    Raises:
        InputError: see `check_transformer`; or a LoRA or the backbone below it is not the one that its contract names.
    """
    path, _ = check_transformer(name_or_path, base)
    lora = find_lora(name_or_path)
    if lora is None:
        return fingerprint_files(path)
    assert lora.backbone is not None  # `PhaseContract` has checked it
    sha256 = fingerprint_transformer(lora.backbone, base or lora.base_model)
    if sha256 != lora.backbone_sha256:
        raise InputError(
            f"{name_or_path}: its LoRA was trained on the backbone {lora.backbone_sha256}, but the fingerprint of "
            f"{lora.backbone} is {sha256}; restore that one"
        )
    if LoraFile(name_or_path).sha256() != lora.weights_sha256:
        raise InputError(f"{name_or_path}: its LoRA is not the one that its c2r.json names; copy the folder again")
    return hashlib.sha256(f"{sha256} {lora.weights_sha256}".encode()).hexdigest()


def find_lora(name_or_path: str | Path) -> PhaseContract | None:
    """Return the contract of a folder in which phase 1 has saved a LoRA; None for any other model.

    Raises:
        InputError: the folder has a LoRA without a contract that names its backbone.
    """
    folder = complete_folder(name_or_path)
    if not (folder / LORA_WEIGHTS).is_file():
        return None
    contract = read_contract(folder)
    if contract.lora_rank is None:
        raise InputError(f"{folder}: its c2r.json names no backbone for its LoRA; give best/ or final/ of phase 1")
    backbone = str(contract.backbone)
    if os.path.isabs(backbone) and not complete_folder(backbone).exists():
        raise InputError(
            f"{backbone}: not there, but the LoRA in {folder} was trained on it; if it was moved, write its new place "
            f"as the entry backbone into {folder / CONTRACT}"
        )
    return contract


def _below_loras(name_or_path, base):
    """Return the folders of the LoRAs that a backbone is made of, the lowest first; the model below; its Wan pipeline.

    Without a LoRA that is [], `name_or_path` and `base`.
    """
    loras = []
    while (lora := find_lora(name_or_path)) is not None:
        folder = Path(os.path.realpath(complete_folder(name_or_path)))
        if folder in loras:
            raise InputError(
                f"{folder / CONTRACT}: names a backbone that has this LoRA already; copy the folder again"
            )
        loras.insert(0, folder)
        name_or_path, base = lora.backbone, base or lora.base_model
    return loras, name_or_path, base


def check_transformer(name_or_path: str | Path, base: str | Path | None = None) -> tuple[Path, dict]:
    """Check a Wan backbone by its config and its files' headers, before any weight is read.

    Args:
        name_or_path: a Diffusers pipeline folder, a transformer folder, best/ or final/ of phase 1 (also of a LoRA), a
            folder in Wan's original layout, a hub name of one of these, or a single .safetensors or .gguf file with
            Diffusers' or Wan's original names, with or without ComfyUI's prefix.
        base: Wan pipeline, a folder or hub name. A single file takes its config from there. If `base` has a VAE and a
            text encoder, the backbone must fit them.

    Returns:
        folder or file that holds the weights, for a LoRA those below it; config.

    Raises:
        InputError: nothing there, another architecture, or weights that do not fit the config.
    """
    loras, name_or_path, base = _below_loras(name_or_path, base)
    path = Path(name_or_path)
    if path.suffix in SINGLE_FILES or path.is_file():
        if path.suffix not in SINGLE_FILES or not path.is_file():
            if path.is_file():
                refuse_pickle(path)
            no_such = "not a" if path.is_file() else "no such"
            raise InputError(f"{name_or_path}: {no_such} .safetensors or .gguf file; give one, or a model folder")
        if base is None:
            raise InputError(f"{name_or_path}: a single file has no config; give the Wan pipeline that it belongs to")
        config = read_transformer_config(base)
    else:
        path = complete_folder(path)
        if not path.is_dir():
            path = resolve_model_folder(name_or_path, [])  # its configs tell where the weights are
            config = read_text_to_video_config(_transformer_folder(path))
            in_part = (path / "transformer").is_dir()
            path = resolve_model_folder(name_or_path, ["transformer"] if in_part else None)
        path = _transformer_folder(path)
        config = read_text_to_video_config(path)
    index = WeightIndex(path)
    refuse_other_weights(path, index.shapes())
    if path.is_file():
        _require_size_of(base, config, path, index.shapes())
    _require_fitting_weights(index, WanTransformer3DModel, config)
    if base is not None:
        _require_fitting_base(name_or_path, config, base)
    WeightIndexWithLoras(path, map(LoraFile, loras))
    return path, config


def read_transformer_config(name_or_path: str | Path, base: str | Path | None = None) -> dict:
    """Return the config of a backbone, see `check_transformer`; no weights are downloaded from the hub.

    Raises:
        InputError: nothing there, or another architecture.
    """
    _, name_or_path, base = _below_loras(name_or_path, base)
    folder = complete_folder(name_or_path)
    if not folder.is_dir():
        folder = _model_folder(base if str(name_or_path).endswith(SINGLE_FILES) else name_or_path)
    return read_text_to_video_config(_transformer_folder(folder))


def _model_folder(name_or_path):
    """Return a folder unchanged, or a hub model's folder with its .json files."""
    return Path(name_or_path) if Path(name_or_path).is_dir() else resolve_model_folder(name_or_path, [])


def _transformer_folder(folder):
    """Return the transformer's folder of a pipeline folder; a transformer folder unchanged."""
    return folder / "transformer" if (folder / "transformer").is_dir() else folder


def _require_size_of(base, config, path, shapes):
    """Compare the size of a single file with that of the pipeline whose config it takes."""
    blocks = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
    found = len(blocks), shapes.get("patch_embedding.weight", (0,))[0]
    needed = config["num_layers"], config["num_attention_heads"] * config["attention_head_dim"]
    if all(found) and found != needed:
        raise InputError(
            f"{path}: has {found[0]} blocks of width {found[1]}, but {base} has {needed[0]} of width {needed[1]}; "
            "give the --pretrained_model_name_or_path of this size"
        )


def _require_fitting_weights(index: WeightIndex, model_class: type[ModelMixin], config: dict[str, Any]):
    """Compare names and shapes in the files' headers with those of a model of this config."""
    with library_errors_as_input(index.path), torch.device("meta"):
        model = model_class.from_config(config)
    index.require_fit(model)


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
