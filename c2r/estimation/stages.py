"""The stages of a run: encoding, the training step, validation, samples, saving, and generation afterwards.

Each runs our own functions on the fake device. Those of the training loop run beside the training state.
"""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import AutoencoderKLWan

from c2r.data.buckets import Bucket
from c2r.encoding.encoders import LatentEncoder
from c2r.estimation.configs import (
    ModelConfigs,
    build_backbone,
    build_dinov3,
    build_joined,
    build_text_encoder,
    build_vae,
)
from c2r.estimation.fake_device import DEVICE, fake_device, put_on_device
from c2r.estimation.step import (
    PROMPT_TOKENS,
    Inputs,
    TrainingModels,
    fetch_ahead,
    move_to_host,
    put_state_on_device,
    record_step,
)
from c2r.estimation.tracker import TEMPORARY, Recording, Summary, Tracker
from c2r.models.diffusers_layout import with_stored_dtypes
from c2r.models.parts import freeze, stream_text_encoder
from c2r.models.vae import decode_latents, encode_frames
from c2r.training.optimizer import merge_weight
from c2r.training.precision import frozen_dtype

# Names of the stages.
TEXT_ENCODING, VAE_ENCODING = "encoding prompts", "encoding clips"
CONTROL, STEP = "DINOv3 in a step", "training step"
VALIDATION, SAMPLES, SAVING = "validation", "sample videos", "saving"
GENERATION = "generation"


#: Groups of frames of a clip or tile that the VAE runs for real: the first, the second, and one that stands for all
#: later ones. Only then do its caches of earlier frames have their final sizes.
GROUPS_RUN = 3


def half_precision(device_type: str) -> torch.dtype:
    """Return the dtype of models outside training: bf16 on a GPU, as encoding and generation choose by themselves."""
    return torch.bfloat16 if device_type == "cuda" else torch.float32


# ------------------------------------------------------------------------------------------------------------ encoding


def record_text_encoding(configs: ModelConfigs, device_type: str, *, streamed: bool = False) -> Recording:
    """Encode one prompt.

    Args:
        configs: of the models.
        device_type: see `fake_device`.
        streamed: copy one block at a time, as `load_text_encoder` does on a device that is too small for all.
    """
    text_encoder = build_text_encoder(configs.text_encoder, half_precision(device_type))
    if streamed:
        stream_text_encoder(text_encoder, DEVICE)
        move_to_host(text_encoder.encoder.block)
    with fake_device(device_type) as tracker, torch.no_grad():
        put_on_device(text_encoder, tracker, device_type)
        _ahead = fetch_ahead(text_encoder.encoder.block[0], tracker) if streamed else []
        with tracker.measuring() as recording:
            tokens = torch.zeros(1, PROMPT_TOKENS, dtype=torch.int64, device=DEVICE)
            text_encoder(tokens, torch.ones_like(tokens))
    return recording


def record_vae_encoding(configs: ModelConfigs, bucket: Bucket, device_type: str) -> Recording:
    """Encode one batch of the encoding pass by the VAE."""
    vae = build_vae(configs.vae)
    inputs = Inputs(configs, bucket, LatentEncoder.clips_at_once(bucket), torch.float32)
    with fake_device(device_type) as tracker, torch.no_grad():
        put_on_device(vae, tracker, device_type)
        with _in_brief(vae, tracker), tracker.measuring() as recording:
            encode_frames(vae, inputs.control_frames())
    return recording


@contextmanager
def _in_brief(vae: AutoencoderKLWan, tracker: Tracker) -> Iterator[None]:
    """Let the VAE run the first groups of frames of each clip or tile, and repeat the record of the last of these."""
    parts = (vae.encoder, vae.decoder)

    def brief(forward):
        groups, summary = 0, Summary()

        def run(frames, feat_cache, feat_idx, **first):
            nonlocal groups, summary
            groups = 1 if all(cached is None for cached in feat_cache) else groups + 1
            if groups <= GROUPS_RUN:
                with tracker.summing_up() as summary:
                    result = forward(frames, feat_cache=feat_cache, feat_idx=feat_idx, **first)
                run.shape = result.shape
                return result
            tracker.repeat(summary)
            return torch.empty(run.shape, dtype=frames.dtype, device=DEVICE)

        return run

    for part in parts:
        part.forward = brief(part.forward)
    try:
        yield
    finally:
        for part in parts:
            del part.forward


# ------------------------------------------------------------------------------------------------ the training process


def record_training(
    args: Namespace,
    models: TrainingModels,
    configs: ModelConfigs,
    bucket: Bucket,
    device_type: str,
    *,
    step_only: bool = False,
) -> dict[str, Recording]:
    """Run each stage that a training process has while its models and optimizer are on the device.

    Args:
        args: options of a training script; with `control_layers` they are phase 2's.
        models: from `build_models`, used here alone.
        configs: of the models.
        bucket: size of the clips.
        device_type: see `fake_device`.
        step_only: leave out all but the step.

    Returns:
        {name of the stage: its recording}.
    """
    inputs = Inputs(configs, bucket, args.train_batch_size, frozen_dtype(args.mixed_precision))
    with fake_device(device_type) as tracker:
        state = put_state_on_device(args, models, tracker, device_type)
        recordings = {STEP: record_step(args, state, inputs, tracker)}
        if step_only:
            return recordings
        with torch.no_grad():
            if models.dinov3 is not None:
                with tracker.measuring() as recordings[CONTROL]:
                    models.dinov3(inputs.control_frames().float() / 255)
            with tracker.measuring() as recordings[SAVING], tracker.making(TEMPORARY):
                for parameter, low_bits in getattr(state.optimizer, "low_bits", {}).items():
                    merge_weight(parameter.detach(), low_bits)
            models.model.eval()
            with tracker.measuring() as recordings[VALIDATION]:
                _validate(args, models, inputs)
            if models.dinov3 is not None and args.num_samples > 0:
                vae = build_vae(configs.vae)
                vae.enable_tiling()
                put_on_device(vae, tracker, device_type)
                with _in_brief(vae, tracker), tracker.measuring() as recordings[SAMPLES]:
                    _generate(models.model, models.dinov3, vae, Inputs(configs, bucket, 1, inputs.dtype))
    return recordings


def _validate(args, models, inputs):
    """Compute one validation loss, with the controls of all conditions on the device."""
    noisy = inputs.noisy_batch()
    values: tuple = (noisy.noisy_latents, noisy.timesteps, noisy.prompt_embeds)
    if models.has_control:
        own, _other, _none = (inputs.control_features() for _ in range(3))
        values = (*values, own, args.conditioning_scale)
    models.model(*values)


# ---------------------------------------------------------------------------------------------------------- generation


def record_generation(
    configs: ModelConfigs,
    bucket: Bucket,
    device_type: str,
    *,
    control: tuple[int, int, str] | None,
    cpu_offload: bool = False,
    vae_tiling: bool = False,
) -> Recording:
    """Generate a video as `c2r.generate` does once the prompts are encoded: DINOv3, one denoising step, decoder.

    Args:
        configs: of the models.
        bucket: size of the video.
        device_type: see `fake_device`.
        control: control layers, stride and injection of a phase 2 model; None: a phase 1 model.
        cpu_offload, vae_tiling: as the options of `c2r.generate`.
    """
    dtype = half_precision(device_type)
    vae, dinov3 = build_vae(configs.vae), build_dinov3(configs.dinov3, dtype) if control else None
    transformer = freeze(_generator(configs, dtype, control))
    if vae_tiling:
        vae.enable_tiling()
    with fake_device(device_type) as tracker, torch.no_grad():

        @contextmanager
        def in_use(model: torch.nn.Module) -> Iterator[None]:
            put_on_device(model, tracker, device_type)
            yield
            if cpu_offload:
                for tensor in (*model.parameters(), *model.buffers()):
                    tracker.remove(tensor)

        if not cpu_offload:
            for model in (vae, transformer, dinov3):
                if model is not None:
                    put_on_device(model, tracker, device_type)
        with _in_brief(vae, tracker), tracker.measuring() as recording:
            _generate(transformer, dinov3, vae, Inputs(configs, bucket, 1, dtype), in_use)
    return recording


def _generator(configs, dtype, control):
    if control is None:
        return build_backbone(configs.transformer, dtype)
    joined = build_joined(configs, dtype, control_layers=control[0], control_stride=control[1], injection=control[2])
    with_stored_dtypes(joined.controlnet, dtype)
    return joined


@contextmanager
def _on_device_already(model):
    yield


def _generate(transformer, dinov3, vae, inputs, in_use=_on_device_already):
    """Make a video: control features, the two predictions of one guided denoising step, frames."""
    control: tuple = ()
    if dinov3 is not None:
        with in_use(dinov3):
            features = dinov3(inputs.control_frames().float() / 255).to(inputs.dtype)
        _blank = torch.zeros_like(features)  # as the pipeline holds it
        control = (features, 1.0)
    noisy = inputs.noisy_batch()
    with in_use(transformer):
        latents, embeds = noisy.noisy_latents, noisy.prompt_embeds.to(inputs.dtype)
        with_prompt, without_prompt = (
            transformer(latents.to(inputs.dtype), noisy.timesteps, embeds, *control).sample.float() for _ in range(2)
        )
        latents = latents + with_prompt - without_prompt
    with in_use(vae):
        decode_latents(vae, latents)
