"""Load, freeze, join and save the parts of a phase, and the contract that ties the phases together.

Weights are only ever read from safetensors, never from a pickle. Whatever a user can get wrong (a path, a model of
another architecture, a ControlNet of another backbone) raises one `InputError` line, before weights are read where
the config or the safetensors header already tells.
"""

from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel

from c2r import InputError
from c2r.files import complete_folder, read_json
from c2r.models.contract import read_contract
from c2r.models.controlnet import C2RControlNet
from c2r.models.hub import WeightIndex, fingerprint_files, require_class, require_complete, resolve_model_folder
from c2r.models.parts import freeze
from c2r.models.transformer import C2RTransformer


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
