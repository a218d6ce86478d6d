"""Check and load the frozen parts around the transformer: VAE, text encoder, tokenizer and scheduler."""

import logging
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypeVar

import diffusers
import torch
import transformers
from diffusers import AutoencoderKLWan
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from pydantic import Field, FiniteFloat
from transformers import AutoTokenizer, PreTrainedModel, UMT5EncoderModel
from typing_extensions import TypedDict

from c2r import InputError
from c2r.files import library_errors_as_input, read_json
from c2r.models.hub import (
    Count,
    Layers,
    WeightIndex,
    Width,
    read_config,
    refuse_entries,
    require_complete,
    resolve_model_folder,
)
from c2r.models.offloading import store_blocks
from c2r.units import GIB, size_text

logger = logging.getLogger(__name__)

#: Long prompts that a message names.
MAX_NAMED = 5
#: Bytes that a text encoder must leave free on a device: activations of a prompt take 0.1 GiB, libraries the rest.
TEXT_ENCODER_ROOM = GIB

Module = TypeVar("Module", bound=torch.nn.Module)

#: Parts that turn videos and prompts into what the transformer reads.
ENCODERS = ("vae", "text_encoder", "tokenizer")

#: Flow-matching schedulers of Diffusers that have a shift.
SCHEDULERS = (
    "UniPCMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
)
#: UMT5's tokenizer by its names in different versions of transformers, and any tokenizer.json.
TOKENIZERS = ("T5Tokenizer", "T5TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")

# The checked entries of the parts' configs; entries that are missing have the default of their library.

_Statistics = Annotated[list[FiniteFloat], Field(min_length=1, max_length=1000)]
_PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class VaeConfig(TypedDict):
    z_dim: Count
    latents_mean: _Statistics
    latents_std: Annotated[list[_PositiveFloat], Field(min_length=1, max_length=1000)]
    base_dim: NotRequired[Count]
    decoder_base_dim: NotRequired[Count | None]
    dim_mult: NotRequired[Annotated[list[Count], Field(min_length=1, max_length=10)]]
    num_res_blocks: NotRequired[Annotated[int, Field(ge=1, le=10)]]
    temperal_downsample: NotRequired[Annotated[list[bool], Field(max_length=10)]]
    attn_scales: NotRequired[Annotated[list[float], Field(max_length=10)]]
    is_residual: NotRequired[bool]
    in_channels: NotRequired[Count]
    out_channels: NotRequired[Count]
    patch_size: NotRequired[Count | None]
    scale_factor_temporal: NotRequired[Count]
    scale_factor_spatial: NotRequired[Count]


class TextEncoderConfig(TypedDict):
    d_model: Width
    d_kv: Width
    d_ff: Width
    num_layers: Layers
    num_heads: Count
    vocab_size: Width
    num_decoder_layers: NotRequired[Layers | None]
    relative_attention_num_buckets: NotRequired[Count]
    relative_attention_max_distance: NotRequired[Width]


class _SchedulerConfig(TypedDict):
    num_train_timesteps: NotRequired[Annotated[int, Field(ge=1, le=100_000)]]
    solver_order: NotRequired[Count]


class _TokenizerConfig(TypedDict):
    model_max_length: NotRequired[Annotated[int | float, Field(ge=1)]]


def check_pipeline_parts(name_or_path: str | Path, parts: Iterable[str] = ENCODERS) -> None:
    """Check parts of a Diffusers pipeline folder before any weight is read; a hub model's parts are downloaded.

    Args:
        name_or_path: see `load_pipeline_part`.
        parts: see `load_pipeline_part`.

    Raises:
        InputError: see `load_pipeline_part`; or the tokenizer gives tokens that the text encoder does not have.
    """
    folder = resolve_model_folder(name_or_path, list(parts))
    found = {part: _CHECKS[part](folder / part) for part in parts}
    if {"text_encoder", "tokenizer"} <= found.keys():
        largest, vocab_size = _largest_token(found["tokenizer"]), found["text_encoder"]["vocab_size"]
        if largest >= vocab_size:
            raise InputError(
                f"{folder / 'tokenizer'}: has a token {largest}, but the text encoder has {vocab_size} tokens; give "
                "the tokenizer that belongs to it"
            )


def load_pipeline_part(name_or_path: str | Path, part: str, torch_dtype: torch.dtype | None = None):
    """Load one part of a Diffusers pipeline folder; a model is frozen and in eval mode.

    Args:
        name_or_path: pipeline folder or hub name; only this part is downloaded.
        part: "vae", "text_encoder", "tokenizer" or "scheduler". For the transformer see `load_transformer`.
        torch_dtype: dtype of a model's weights; None is fp32. Modules that the model declares as fp32 stay in fp32.

    Raises:
        InputError: folder or part missing, another architecture, a damaged file, weights missing or of another shape.
        ValueError: there is no such part.
    """
    if part not in _CHECKS:
        raise ValueError(f"part is {part!r}, not one of {', '.join(_CHECKS)}")
    folder = resolve_model_folder(name_or_path, [part]) / part
    checked = _CHECKS[part](folder)
    if part in ("tokenizer", "scheduler"):
        return checked
    if part == "vae":
        with library_errors_as_input(folder):
            model, info = AutoencoderKLWan.from_pretrained(
                folder, torch_dtype=torch_dtype, use_safetensors=True, output_loading_info=True
            )
    else:
        model, info = load_transformers_model(UMT5EncoderModel, folder, torch_dtype)
    require_complete(folder, info["missing_keys"], info["mismatched_keys"])
    return freeze(model)


def load_text_encoder(
    name_or_path: str | Path, torch_dtype: torch.dtype, device: torch.device, free: float | None = None
) -> UMT5EncoderModel:
    """Load the text encoder to a device, and stream its blocks if the device has not enough memory for all of them.

    Args:
        name_or_path: see `load_pipeline_part`.
        torch_dtype: dtype of the weights.
        device: device to encode on.
        free: bytes that are free on the device; None: what CUDA reports, no bound on other devices.

    Raises:
        InputError: see `load_pipeline_part`.
    """
    text_encoder = load_pipeline_part(name_or_path, "text_encoder", torch_dtype)
    needed = sum(parameter.numel() * parameter.element_size() for parameter in text_encoder.parameters())
    if free is None and device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    if free is not None and needed + TEXT_ENCODER_ROOM > free:
        logger.info(
            "the text encoder's %s do not fit the %s that are free on the device: its blocks stay in the CPU's "
            "memory, and each is copied while it runs",
            *(size_text(needed), size_text(int(free))),
        )
        stream_text_encoder(text_encoder, device)
    return text_encoder.to(device)


def stream_text_encoder(text_encoder: UMT5EncoderModel, device: torch.device) -> None:
    """Keep the blocks of a frozen text encoder on the CPU, and copy each to the device while it runs, in place.

    Embeddings are equal. The table of tokens is not among the blocks.
    """
    store_blocks(text_encoder.encoder.block, device, offload=True)


def read_vae_config(folder: Path) -> VaeConfig:
    """Return the checked config.json of a VAE, see `read_config`."""
    config = read_config(folder, "_class_name", "AutoencoderKLWan", VaeConfig)
    if {len(config["latents_mean"]), len(config["latents_std"])} != {config["z_dim"]}:
        raise InputError(
            f"{folder}/config.json: latents_mean and latents_std do not have {config['z_dim']} numbers, one per "
            "channel; give an undamaged copy"
        )
    return config


def read_text_encoder_config(folder: Path) -> TextEncoderConfig:
    """Return the checked config.json of a text encoder, see `read_config`."""
    return read_config(folder, "model_type", "umt5", TextEncoderConfig)


def _check_vae(folder):
    config = read_vae_config(folder)
    with library_errors_as_input(folder), torch.device("meta"):
        vae = AutoencoderKLWan.from_config(config)
    index = WeightIndex(folder)
    index.require_whole()
    index.require_fit(vae, exactly=False)
    return config


def _check_text_encoder(folder):
    config = read_text_encoder_config(folder)
    check_transformers_weights(UMT5EncoderModel, folder, config)
    return config


def _check_tokenizer(folder):
    """Return the tokenizer, after a trial of what WanPipeline does with it."""
    path = folder / "tokenizer_config.json"
    config = read_json(path, _TokenizerConfig, extra="allow")
    refuse_entries(path, config)
    if config.get("tokenizer_class", TOKENIZERS[-1]) not in TOKENIZERS:
        raise InputError(
            f"{path}: tokenizer_class is {config['tokenizer_class']}, not one of {', '.join(TOKENIZERS)}; give the "
            "tokenizer of Wan 2.1"
        )
    with library_errors_as_input(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        _tokenize_nothing(tokenizer)
    return tokenizer


def _tokenize_nothing(tokenizer):
    return tokenizer(
        [""],
        padding="max_length",
        max_length=max_sequence_length(tokenizer),
        truncation=True,
        add_special_tokens=True,
        return_attention_mask=True,
        return_tensors="pt",
    ).input_ids


def _largest_token(tokenizer):
    return max(*tokenizer.get_vocab().values(), int(_tokenize_nothing(tokenizer).max()))


def _check_scheduler(folder):
    """Return the scheduler, after a trial step."""
    path = folder / "scheduler_config.json"
    config = read_json(path, _SchedulerConfig, extra="allow")
    name = config.get("_class_name")
    if name not in SCHEDULERS:
        raise InputError(f"{path}: its class is {name}, not one of {', '.join(SCHEDULERS)}; give that of Wan 2.1")
    with library_errors_as_input(path):
        trial, scheduler = (getattr(diffusers, name).from_pretrained(folder) for _ in range(2))
        trial.set_timesteps(2)
        latents = torch.zeros(1, 1, 1, 1, 1)
        for timestep in trial.timesteps:
            latents = trial.step(latents, timestep, latents, return_dict=False)[0]
    if not latents.isfinite().all():
        raise InputError(f"{path}: its noise levels are not finite; give an undamaged copy")
    return scheduler


#: For each part: check its files, and return its config, or what is loaded at once.
_CHECKS: dict[str, Callable[[Path], Any]] = {
    "vae": _check_vae,
    "text_encoder": _check_text_encoder,
    "tokenizer": _check_tokenizer,
    "scheduler": _check_scheduler,
}


def check_transformers_weights(
    model_class: type[PreTrainedModel], folder: Path, config: dict[str, Any]
) -> WeightIndex:
    """Check that a folder of transformers has the weights that its config describes; return their index.

    Raises:
        InputError: it has too few, or the config is damaged.
    """
    index = WeightIndex(folder)
    index.require_whole()
    index.require_enough_for(model_without_weights(model_class, folder, config))
    return index


def model_without_weights(model_class: type[PreTrainedModel], folder: Path, config: dict[str, Any]) -> PreTrainedModel:
    """Return the model of transformers that a config describes, frozen and on the device "meta".

    Raises:
        InputError: the config, which is that of `folder`, is damaged.
    """
    with library_errors_as_input(folder), torch.device("meta"):
        return freeze(model_class(model_class.config_class.from_dict(dict(config))))


def load_transformers_model(
    model_class: type[PreTrainedModel], folder: Path, torch_dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, dict]:
    """Return `model_class.from_pretrained(folder)`, from safetensors only, and its loading info."""
    with library_errors_as_input(folder), unsharded_loading():
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
    return 512 if tokenizer is None else int(min(512, tokenizer.model_max_length))


def long_prompts(tokenizer, prompts: Iterable[str]) -> dict[str, int]:
    """Return the prompts of which the text encoder does not see the end, with their numbers of tokens."""
    limit, long = max_sequence_length(tokenizer), {}
    for prompt in prompts:
        if len(prompt.encode()) + 2 <= limit:  # a token is at least a byte; SentencePiece adds a space and an end
            continue
        count = len(tokenizer(prompt_clean(prompt), verbose=False).input_ids)
        if count > limit:
            long[prompt] = count
    return long


def log_long_prompts(tokenizer, prompts: Iterable[str]) -> None:
    """Log the prompts of which the text encoder does not see the end, and their numbers of tokens."""
    limit = max_sequence_length(tokenizer)
    long = [
        f"'{textwrap.shorten(prompt, 60, placeholder='…')}' ({count})"
        for prompt, count in long_prompts(tokenizer, prompts).items()
    ]
    if long:
        logger.warning(
            "%d %s longer than %d tokens, the rest is not used: %s%s",
            len(long),
            "prompt is" if len(long) == 1 else "prompts are",
            limit,
            ", ".join(long[:MAX_NAMED]),
            ", …" if len(long) > MAX_NAMED else "",
        )
