"""The frozen parts around the transformer: found on disk or on the hub, loaded whole, switched to evaluation."""

from contextlib import contextmanager

import diffusers
import torch
import transformers
from diffusers import AutoencoderKLWan
from transformers import AutoTokenizer, UMT5EncoderModel

from c2r import InputError
from c2r.files import read_json
from c2r.models.hub import require_class, require_complete, resolve_model_folder


def max_sequence_length(tokenizer):
    """Tokens of a padded prompt: Wan's 512, or fewer where the tokenizer says so (some say 1e30 for "no limit")."""
    return 512 if tokenizer is None else min(512, tokenizer.model_max_length)


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
