"""Check and load a Wan backbone: a folder, a single file, quantised or not, with the LoRAs of phase 1 and of others.

Weights are only read from safetensors and GGUF, never from a pickle. A wrong path or a model of another architecture
is refused before weights are read, by its config and the headers of its files.
"""

import hashlib
import logging
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel

from c2r import InputError
from c2r.files import complete_folder, library_errors_as_input, read_json
from c2r.models.contract import CONTRACT, PhaseContract, read_contract
from c2r.models.diffusers_layout import require_fitting_weights, stored_dtype
from c2r.models.gguf_weights import PLAIN_TYPES, dequantised
from c2r.models.hub import GGUF, WeightIndex, fingerprint_files, refuse_pickle, resolve_model_folder
from c2r.models.lora_file import WEIGHTS as LORA_WEIGHTS
from c2r.models.lora_file import LoraFile, WeightIndexWithLoras
from c2r.models.parts import freeze
from c2r.models.wan import read_text_to_video_config, refuse_other_weights

logger = logging.getLogger(__name__)

#: Endings of single files that a backbone is read from.
SINGLE_FILES = (".safetensors", GGUF)


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
    require_fitting_weights(index, WanTransformer3DModel, config)
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
