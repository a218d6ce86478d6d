"""Configs of Wan 2.1's text-to-video transformer in Diffusers' layout and in Wan's own; other Wan models, by name."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from c2r import InputError
from c2r.files import read_json
from c2r.models.hub import Count, Layers, Width, read_config

_Epsilon = Annotated[float, Field(gt=0, lt=1)]
_Patch = Annotated[list[Count], Field(min_length=3, max_length=3)]


class BlockConfig(TypedDict):
    """The checked entries that backbone and control branch share."""

    num_layers: Layers
    num_attention_heads: Count
    attention_head_dim: Count
    ffn_dim: Width
    cross_attn_norm: bool
    qk_norm: str | None
    eps: _Epsilon


class _TransformerConfig(BlockConfig):
    in_channels: Count
    out_channels: Count
    text_dim: Width
    freq_dim: Width
    patch_size: NotRequired[_Patch]
    rope_max_seq_len: NotRequired[Annotated[int, Field(ge=1, le=16_384)]]  # its table is computed, not loaded
    image_dim: NotRequired[int | None]
    added_kv_proj_dim: NotRequired[int | None]
    pos_embed_seq_len: NotRequired[int | None]


class _OriginalConfig(TypedDict):
    """The checked entries of the config.json of Wan's own repositories, which have no Diffusers class."""

    dim: Width
    num_heads: Count
    num_layers: Layers
    ffn_dim: Width
    freq_dim: Width
    in_dim: Count
    out_dim: Count
    model_type: NotRequired[str]
    eps: NotRequired[_Epsilon]
    text_dim: NotRequired[Width]  # Wan's files leave out this entry and those below
    patch_size: NotRequired[_Patch]
    qk_norm: NotRequired[Annotated[bool, Field(strict=True)]]
    cross_attn_norm: NotRequired[bool]


# Names of models that are refused.
_I2V = "an image-to-video model (Wan I2V)"
_FLF2V = "a first-and-last-frame model (Wan FLF2V)"
_VACE = "a VACE model"
_ANIMATE = "Wan 2.2 Animate"
_S2V = "a speech-to-video model (Wan 2.2 S2V)"
_TI2V = "Wan 2.2 TI2V-5B"
_FUN = "a Wan Fun model, which reads a picture or control besides the noise"
_PAIR = "one of the two transformers of Wan 2.2 A14B, which share the noise levels"

_CLASSES = {
    "WanVACETransformer3DModel": _VACE,
    "VaceWanModel": _VACE,
    "WanAnimateTransformer3DModel": _ANIMATE,
    "WanAnimateModel": _ANIMATE,
    "WanModel_S2V": _S2V,
    "WanImageToVideoPipeline": _I2V,
    "WanVACEPipeline": _VACE,
    "WanAnimatePipeline": _ANIMATE,
}
_TYPES = {"i2v": _I2V, "flf2v": _FLF2V, "vace": _VACE, "animate": _ANIMATE, "s2v": _S2V, "ti2v": _TI2V}
#: Patterns of Diffusers' names of weights that text-to-video models do not have. The first that is found decides.
_WEIGHTS = {
    r"^vace_": _VACE,
    r"^(motion_encoder|face_adapter|pose_patch_embedding)\b": _ANIMATE,
    r"audio": _S2V,
    r"(image_embedder\.pos_embed|img_emb\.emb_pos)$": _FLF2V,
    r"(image_embedder|add_k_proj|norm_added_k)\.": _I2V,
}
#: Channels of input and output of models that have no weights under names of their own.
_CHANNELS = {(36, 16): _I2V, (48, 48): _TI2V, (48, 16): _FUN, (52, 16): _FUN, (100, 16): _FUN}
#: Names of the files and folders of Wan 2.2's pairs, whose weights have the names and shapes of Wan 2.1 14B.
_PAIR_NAME = re.compile(r"(high|low)[_-]?noise", re.IGNORECASE)


def _refuse(where, name):
    raise InputError(f"{where}: this is {name}; give a text-to-video model of Wan 2.1 (T2V-1.3B or T2V-14B)")


def read_text_to_video_config(folder: Path) -> dict[str, Any]:
    """Return the checked config of a transformer's folder, with Diffusers' entries.

    Args:
        folder: has a config.json of Diffusers, or of Wan's own repositories.

    Raises:
        InputError: there is none, or it is another model; other Wan models are named.
    """
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{folder}: no transformer here; give a Wan 2.1 pipeline folder, or best/ or final/ of phase 1"
        )
    _refuse_by_folder(folder)
    found = read_json(folder / "config.json")
    kind, type_ = found.get("_class_name"), found.get("model_type")
    if name := _CLASSES.get(str(kind)) or _TYPES.get(str(type_)):
        _refuse(folder, name)
    if "dim" in found and "num_heads" in found:
        config = _translated(folder)
    else:
        config = read_config(folder, "_class_name", "WanTransformer3DModel", _TransformerConfig)
    if config.get("pos_embed_seq_len"):
        _refuse(folder, _FLF2V)
    if config.get("image_dim") or config.get("added_kv_proj_dim"):
        _refuse(folder, _I2V)
    if name := _CHANNELS.get((config["in_channels"], config["out_channels"])):
        _refuse(folder, name)
    return config


def _translated(folder):
    """Return a config of Wan's own repositories with Diffusers' entries."""
    path = folder / "config.json"
    own = read_json(path, _OriginalConfig, extra="allow")
    if own["dim"] % own["num_heads"]:
        raise InputError(f"{path}: dim {own['dim']} is no multiple of num_heads; replace it by an undamaged copy")
    if not own.get("qk_norm", True):
        raise InputError(f"{path}: qk_norm is off, which Wan 2.1 does not have; give Wan 2.1 T2V")
    return {
        "num_layers": own["num_layers"],
        "num_attention_heads": own["num_heads"],
        "attention_head_dim": own["dim"] // own["num_heads"],
        "ffn_dim": own["ffn_dim"],
        "freq_dim": own["freq_dim"],
        "in_channels": own["in_dim"],
        "out_channels": own["out_dim"],
        "text_dim": own.get("text_dim", 4096),
        "patch_size": own.get("patch_size", [1, 2, 2]),
        "cross_attn_norm": own.get("cross_attn_norm", True),
        "qk_norm": "rms_norm_across_heads",
        "eps": own.get("eps", 1e-6),
    }


def _refuse_by_folder(folder):
    """Refuse a transformer by the pipeline that it belongs to, or by the name of its folder."""
    if _PAIR_NAME.search(folder.name):
        _refuse(folder, _PAIR)
    pipeline = folder.parent / "model_index.json"
    if folder.name not in ("transformer", "transformer_2") or not pipeline.is_file():
        return
    index = read_json(pipeline)
    if index.get("boundary_ratio") is not None or any(index.get("transformer_2") or [None]):
        _refuse(folder, _PAIR)
    if index.get("expand_timesteps"):
        _refuse(folder, _TI2V)
    if name := _CLASSES.get(str(index.get("_class_name"))):
        _refuse(folder, name)


def refuse_other_weights(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check by a file's name and the names in its header that it is no other Wan model.

    Args:
        path: file or folder of the weights.
        shapes: {Diffusers' name: shape} of the weights.

    Raises:
        InputError: it is another one, which is named.
    """
    if path.is_file() and any(_PAIR_NAME.search(name) for name in (path.name, path.absolute().parent.name)):
        _refuse(path, _PAIR)
    for pattern, model in _WEIGHTS.items():
        if any(re.search(pattern, name) for name in shapes):
            _refuse(path, model)
    if "patch_embedding.weight" in shapes and "proj_out.weight" in shapes:
        _, inputs, *patch = shapes["patch_embedding.weight"]
        outputs = shapes["proj_out.weight"][0] // max(math.prod(patch), 1)
        if name := _CHANNELS.get((inputs, outputs)):
            _refuse(path, name)
