"""Load the frozen parts around the transformer: VAE, text encoder, tokenizer and scheduler."""

import logging
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import diffusers
import torch
import transformers
from diffusers import AutoencoderKLWan
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from transformers import AutoTokenizer, PreTrainedModel, UMT5EncoderModel

from c2r import InputError
from c2r.files import read_json
from c2r.models.hub import require_class, require_complete, resolve_model_folder

logger = logging.getLogger(__name__)

#: Long prompts that a message names.
MAX_NAMED = 5

Module = TypeVar("Module", bound=torch.nn.Module)


def load_pipeline_part(name_or_path: str | Path, part: str, torch_dtype: torch.dtype | None = None):
    """Load one part of a Diffusers pipeline folder; a model is frozen and in eval mode.

    Args:
        name_or_path: pipeline folder or hub name; only this part is downloaded.
        part: "vae", "text_encoder", "tokenizer" or "scheduler". For the transformer see `load_transformer`.
        torch_dtype: dtype of a model's weights; None is fp32. Modules that the model declares as fp32 stay in fp32.

    Raises:
        InputError: folder or part missing, another architecture, weights missing or of another shape.
    """
    folder = resolve_model_folder(name_or_path, [part]) / part
    if part == "tokenizer":
        return AutoTokenizer.from_pretrained(folder)
    if part == "scheduler":
        return getattr(diffusers, read_json(folder / "scheduler_config.json")["_class_name"]).from_pretrained(folder)
    if part == "vae":
        require_class(folder, "AutoencoderKLWan")
        model, info = AutoencoderKLWan.from_pretrained(
            folder, torch_dtype=torch_dtype, use_safetensors=True, output_loading_info=True
        )
    elif part == "text_encoder":
        if read_json(folder / "config.json").get("model_type") != "umt5":
            raise InputError(f"{folder}: not a UMT5 text encoder; give a Diffusers pipeline folder of Wan 2.1 T2V")
        model, info = load_transformers_model(UMT5EncoderModel, folder, torch_dtype)
    else:
        raise ValueError(f"part is {part!r}, not one of vae, text_encoder, tokenizer, scheduler")
    require_complete(folder, info["missing_keys"], info["mismatched_keys"])
    return freeze(model)


def load_transformers_model(
    model_class: type[PreTrainedModel], folder: Path, torch_dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, dict]:
    """Return `model_class.from_pretrained(folder)`, from safetensors only, and its loading info."""
    with unsharded_loading():
        return model_class.from_pretrained(
            folder, dtype=torch_dtype or torch.float32, use_safetensors=True, output_loading_info=True
        )


@contextmanager
def unsharded_loading() -> Iterator[None]:
    """Load models of transformers unsharded inside the context, also when the process trains with ZeRO-3.

    Once a ZeRO-3 config is set, transformers shards every model while loading it. Our frozen models are outside the
    training engine, so nothing would ever gather their weights again.
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


def freeze(module: Module) -> Module:
    """Switch off gradients and training mode; return the module."""
    return module.requires_grad_(False).eval()


def max_sequence_length(tokenizer) -> int:
    """Return the number of tokens of a padded prompt: 512 as in Wan, or the tokenizer's maximum if that is lower."""
    # Some tokenizers use 1e30 for "no limit".
    return 512 if tokenizer is None else min(512, tokenizer.model_max_length)


def log_long_prompts(tokenizer, prompts: Iterable[str]) -> None:
    """Log the prompts of which the text encoder does not see the end, and their numbers of tokens."""
    limit, long = max_sequence_length(tokenizer), []
    for prompt in prompts:
        count = len(tokenizer(prompt_clean(prompt), verbose=False).input_ids)
        if count > limit:
            long.append(f"'{textwrap.shorten(prompt, 60, placeholder='…')}' ({count})")
    if long:
        logger.warning(
            "%d prompts are longer than %d tokens, their ends are not used: %s%s",
            len(long),
            limit,
            ", ".join(long[:MAX_NAMED]),
            ", …" if len(long) > MAX_NAMED else "",
        )
