"""The frozen parts around the transformer: found on disk or on the hub, loaded whole, switched to evaluation."""

import re
from contextlib import contextmanager
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import AutoencoderKLWan
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from transformers import AutoTokenizer, UMT5EncoderModel

from c2r import InputError
from c2r.models.weights import read_json

PICKLES = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.msgpack", "*.h5"]


def resolve_model_folder(name_or_path, subfolders=None):
    """The local folder of a model: a path as it is, or a Hugging Face hub name through the hub's cache.

    Args:
        name_or_path: a local folder, or a hub name like `Wan-AI/Wan2.1-T2V-1.3B-Diffusers`.
        subfolders: the parts that are needed: these and every .json file are downloaded, and each part must be there.
            None: everything.

    Returns:
        `Path` of the folder that holds the model (and each of `subfolders`).

    Raises:
        InputError: no such folder or hub model, no access to a gated one, hub out of reach, a part missing.
    """
    name, folder = str(name_or_path), Path(name_or_path)
    if folder.is_file():
        raise InputError(f"{name}: this is a file, but a model folder is needed; give the folder that holds it")
    if not folder.is_dir():
        # `outputs/phase1` looks like a hub name too: where its first half is a local folder, it is a mistyped path.
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith(".") or folder.parent.is_dir():
            raise InputError(f"{name}: no such model folder; check the path")
        patterns = None if subfolders is None else ["*.json", *(f"{subfolder}/*" for subfolder in subfolders)]
        folder = _download(name, patterns)
    for subfolder in subfolders or []:
        if not (folder / subfolder).is_dir():
            raise InputError(f"{name}: has no {subfolder}/; give a Diffusers pipeline folder of Wan 2.1 T2V")
    return folder


def _download(name, patterns):
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=PICKLES))
    except GatedRepoError:
        raise InputError(
            f"{name}: access to these weights is restricted; ask for it at https://huggingface.co/{name}, "
            "then log in with `hf auth login`"
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise InputError(f"{name}: no local folder and no Hugging Face model has this name; check it") from None
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"{name}: not a local folder, and it cannot be had from the Hugging Face hub ({reason}); "
            "check the connection, or download it first and give its folder"
        ) from None


def freeze(module):
    """Switch gradients off and evaluation on; returns the module."""
    return module.requires_grad_(False).eval()


@contextmanager
def whole_weights():
    """Load transformers' models whole, although the process trains with ZeRO-3.

    Once a ZeRO-3 config is set, transformers shards every model while it loads it. The frozen models that we load
    from it stand outside the training engine, so nothing would ever gather their weights again.
    """
    integration = transformers.integrations.deepspeed
    if not integration.is_deepspeed_zero3_enabled():
        yield
        return
    config = integration._hf_deepspeed_config_weak_ref()
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration.set_hf_deepspeed_config(config)


def load_pipeline_part(name_or_path, part, torch_dtype=None):
    """One part of a Diffusers pipeline folder, ready for use: models frozen and in eval mode.

    Args:
        name_or_path: pipeline folder or hub name; only this part is downloaded.
        part: "vae", "text_encoder", "tokenizer" or "scheduler". The transformer has `load_transformer`.
        torch_dtype: dtype of a model's weights; None is fp32. What the model itself keeps in fp32 stays so.

    Raises:
        InputError: folder or part missing, another architecture, weights missing or of another shape.
    """
    folder = resolve_model_folder(name_or_path, [part])
    where = folder / part
    if part == "tokenizer":
        return AutoTokenizer.from_pretrained(where)
    if part == "scheduler":
        return getattr(diffusers, read_json(where / "scheduler_config.json")["_class_name"]).from_pretrained(where)
    if part == "vae":
        require_class(where, "AutoencoderKLWan")
        model, info = AutoencoderKLWan.from_pretrained(
            where, torch_dtype=torch_dtype, use_safetensors=True, output_loading_info=True
        )
    elif part == "text_encoder":
        if read_json(where / "config.json").get("model_type") != "umt5":
            raise InputError(f"{where}: not a UMT5 text encoder; give a Diffusers pipeline folder of Wan 2.1 T2V")
        model, info = load_transformers_model(UMT5EncoderModel, where, torch_dtype)
    else:
        raise ValueError(f"part is {part!r}, not one of vae, text_encoder, tokenizer, scheduler")
    require_complete(where, info["missing_keys"], [*info["mismatched_keys"]])
    return freeze(model)


def load_transformers_model(model_class, folder, torch_dtype=None):
    """`model_class.from_pretrained`, whole and from safetensors alone; returns (model, loading info)."""
    with whole_weights():
        return model_class.from_pretrained(
            folder, dtype=torch_dtype or torch.float32, use_safetensors=True, output_loading_info=True
        )


def require_complete(where, missing, unfit):
    """Raise an InputError that names some of the weights that are missing or of another shape, if there are any."""
    for names, what in ((missing, "missing"), (unfit, "unexpected or of another shape")):
        names = sorted(str(name) for name in names)
        if names:
            some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise InputError(f"{where}: weights are {what}: {some}; the file is damaged or of another model")


def require_class(folder, class_name):
    """Check `_class_name` of a Diffusers model folder; returns its config."""
    config = read_json(Path(folder) / "config.json")
    if config.get("_class_name") != class_name:
        raise InputError(f"{folder}: this is a {config.get('_class_name')}, but a {class_name} is needed")
    return config
