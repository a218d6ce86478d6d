"""The stages of a run beside its training step: encoding, validation, samples, saving and generation.

Each runs our own functions on fake tensors. Those within the training loop run beside the training state.
"""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers.models.dinov3_vit import modeling_dinov3_vit

from c2r.data.buckets import Bucket
from c2r.encoding.encoders import LatentEncoder
from c2r.estimation.configs import (
    ModelConfigs,
    build_backbone,
    build_dinov3,
    build_joined,
    build_text_encoder,
    build_vae,
    with_stored_dtypes,
)
from c2r.estimation.fake_device import DEVICE, fake_device, put_on_device
from c2r.estimation.step import PROMPT_TOKENS, fake_batch, fake_features, put_state_on_device
from c2r.estimation.tracker import HOST, TEMPORARY, Recording
from c2r.models.parts import freeze
from c2r.models.vae import decode_latents, encode_frames
from c2r.training.optimizer import merge_weight
from c2r.training.precision import frozen_dtype

GENERATION_DTYPE = torch.bfloat16  # the default of c2r.generate on a GPU


# ------------------------------------------------------------------------------------------------------------ encoding


def record_vae_encoding(configs: ModelConfigs, bucket: Bucket, device_type: str) -> Recording:
    """Encode one batch of the encoding pass by the VAE."""
    with fake_device(device_type) as tracker, torch.no_grad():
        vae = build_vae(configs.vae)
        put_on_device(vae, tracker, device_type)
        tracker.start_measuring()
        clips = LatentEncoder.clips_at_once(bucket)
        encode_frames(vae, torch.zeros(clips, bucket.num_frames, 3, bucket.height, bucket.width, dtype=torch.uint8))
        return tracker.recording


def record_text_encoding(configs: ModelConfigs, device_type: str) -> Recording:
    """Encode one prompt."""
    dtype = torch.bfloat16 if device_type == "cuda" else torch.float32
    with fake_device(device_type) as tracker, torch.no_grad():
        text_encoder = build_text_encoder(configs.text_encoder, dtype)
        put_on_device(text_encoder, tracker, device_type)
        tracker.start_measuring()
        tokens = torch.zeros(1, PROMPT_TOKENS, dtype=torch.int64)
        text_encoder(tokens, torch.ones_like(tokens))
        return tracker.recording


def record_control_encoding(
    configs: ModelConfigs, bucket: Bucket, dtype: torch.dtype, device_type: str, clips: int = 1
) -> Recording:
    """Compute the control features of a batch of clips by DINOv3 alone."""
    with fake_device(device_type) as tracker:
        dinov3 = build_dinov3(configs.dinov3, dtype)
        put_on_device(dinov3, tracker, device_type)
        tracker.start_measuring()
        _encode_control(dinov3, bucket, clips, tracker)
        return tracker.recording


def _encode_control(dinov3, bucket, clips, tracker):
    """Return the features of clips whose frames come from the host."""
    with tracker.making(HOST):
        frames = torch.zeros(clips, bucket.num_frames, 3, bucket.height, bucket.width, dtype=torch.uint8)
    with _uncached_coordinates():
        return dinov3(frames.clone().float() / 255)


@contextmanager
def _uncached_coordinates() -> Iterator[None]:
    """Leave no fake tensor in transformers' cache of coordinates, which a real DINOv3 would find there."""
    cached = modeling_dinov3_vit.get_patches_center_coordinates
    modeling_dinov3_vit.get_patches_center_coordinates = cached.__wrapped__
    try:
        yield
    finally:
        modeling_dinov3_vit.get_patches_center_coordinates = cached


# -------------------------------------------------------------------------------------------- beside the training state


def record_validation(args: Namespace, configs: ModelConfigs, bucket: Bucket, device_type: str) -> Recording:
    """Compute one validation loss: the model in eval mode, with the controls of all conditions on the device."""
    dtype = frozen_dtype(args.mixed_precision)
    with fake_device(device_type) as tracker, torch.no_grad():
        state = put_state_on_device(args, configs, tracker, device_type)
        state.model.eval()
        tracker.start_measuring()
        noisy = fake_batch(args.train_batch_size, configs, bucket, tracker)
        inputs: tuple = (noisy.noisy_latents, noisy.timesteps, noisy.prompt_embeds)
        if state.has_control:
            own, _other, _none = (fake_features(args.train_batch_size, configs, bucket, dtype) for _ in range(3))
            inputs = (*inputs, own, args.conditioning_scale)
        state.model(*inputs)
        return tracker.recording


def record_sampling(args: Namespace, configs: ModelConfigs, bucket: Bucket, device_type: str) -> Recording:
    """Denoise a video once with guidance and decode it in tiles, beside the training state."""
    dtype = frozen_dtype(args.mixed_precision)
    with fake_device(device_type) as tracker, torch.no_grad():
        state = put_state_on_device(args, configs, tracker, device_type)
        state.model.eval()
        vae = build_vae(configs.vae)
        put_on_device(vae, tracker, device_type)
        vae.enable_tiling()
        tracker.start_measuring()
        features = fake_features(1, configs, bucket, dtype)
        latents = _denoise(state.model, configs, bucket, dtype, (features, torch.zeros_like(features)), tracker)
        decode_latents(vae, latents)
        return tracker.recording


def _denoise(model, configs, bucket, dtype, controls, tracker):
    """Return latents after the predictions of one guided denoising step, with these control features or without."""
    noisy = fake_batch(1, configs, bucket, tracker)
    latents, embeds = noisy.noisy_latents, noisy.prompt_embeds.to(dtype)
    others = (controls[0], 1.0) if controls else ()
    predictions = [
        model(latents.to(dtype), noisy.timesteps, embeds, *others).sample.float()
        for _ in range(2)  # with the prompt and without
    ]
    return latents + predictions[0] - predictions[1]


def record_saving(args: Namespace, configs: ModelConfigs, device_type: str) -> Recording:
    """Gather the weights for a checkpoint: in place, or with bf16 storage each merged to fp32 before it is copied."""
    with fake_device(device_type) as tracker, torch.no_grad():
        state = put_state_on_device(args, configs, tracker, device_type)
        tracker.start_measuring()
        low_bits = getattr(state.optimizer, "low_bits", {})
        with tracker.making(TEMPORARY):
            for parameter in state.trainable:
                if parameter in low_bits:
                    merge_weight(parameter.detach(), low_bits[parameter])
        with tracker.making(HOST):
            _on_host = [torch.empty(parameter.shape) for parameter in state.trainable]
        return tracker.recording


# ---------------------------------------------------------------------------------------------------------- generation


def record_generation(
    configs: ModelConfigs,
    bucket: Bucket,
    device_type: str,
    *,
    control: tuple[int, int] | None,
    cpu_offload: bool = False,
    vae_tiling: bool = False,
) -> Recording:
    """Generate a video as `c2r.generate` does: one denoising step with guidance, then the decoder.

    The prompts are left out: they are encoded first, and the text encoder is freed.

    Args:
        configs: of the models.
        bucket: size of the video.
        device_type: see `fake_device`.
        control: control layers and stride of a phase 2 model; None: a phase 1 model.
        cpu_offload, vae_tiling: as the options of `c2r.generate`.
    """
    dtype = GENERATION_DTYPE if device_type == "cuda" else torch.float32
    with fake_device(device_type) as tracker, torch.no_grad():
        vae, transformer = build_vae(configs.vae), freeze(_generator(configs, dtype, control))
        dinov3 = build_dinov3(configs.dinov3, dtype) if control else None
        if vae_tiling:
            vae.enable_tiling()
        if not cpu_offload:
            for model in (vae, transformer, dinov3):
                if model is not None:
                    put_on_device(model, tracker, device_type)

        @contextmanager
        def in_use(model):
            if cpu_offload:
                put_on_device(model, tracker, device_type)
            yield model
            if cpu_offload:
                _remove(model)

        controls: tuple = ()
        if dinov3 is not None:
            with in_use(dinov3):
                features = _encode_control(dinov3, bucket, 1, tracker)
            controls = (features, torch.zeros_like(features))
        with in_use(transformer):
            latents = _denoise(transformer, configs, bucket, dtype, controls, tracker)
        with in_use(vae):
            decode_latents(vae, latents)
        return tracker.recording


def _generator(configs, dtype, control):
    if control is None:
        return build_backbone(configs.transformer, dtype)
    joined = build_joined(configs, dtype, control_layers=control[0], control_stride=control[1])
    with_stored_dtypes(joined.controlnet, dtype)
    return joined


def _remove(model):
    for part in model.modules():
        part._parameters.clear()
        part._buffers.clear()
