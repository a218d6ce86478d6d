"""Frames to normalised latents and back, by Wan's VAE."""

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from einops import rearrange


def encode_frames(vae: AutoencoderKLWan, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the distribution of the normalised latents, z' = (z − latents_mean) / latents_std per channel.

    Args:
        vae: Wan's VAE, in fp32 or bf16.
        frames: (B, F, 3, H, W) uint8 RGB on the VAE's device; F = 4k + 1.

    Returns:
        mean and log-variance of z', each (B, C, T, H/8, W/8) fp32.
    """
    pixel_values = frames.float().div(127.5).sub(1).to(vae.dtype)  # in [-1, 1], rounded once
    pixel_values = rearrange(pixel_values, "b f c h w -> b c f h w")
    distribution = vae.encode(pixel_values).latent_dist
    latents_mean, latents_std = _latent_statistics(vae, frames.device, torch.float32)
    mean = (distribution.mean.float() - latents_mean) / latents_std
    logvar = distribution.logvar.float() - 2 * latents_std.log()  # Var[z'] = Var[z] / latents_std²
    return mean, logvar


@torch.no_grad()
def decode_latents(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Decode normalised latents (B, C, T, h, w) to pixel values (B, 3, F, H, W), nominally in [−1, 1].

    The latents decide the device: an offloaded VAE follows them in its own hook.
    """
    return vae.decode(denormalise_latents(vae, latents), return_dict=False)[0]


def denormalise_latents(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Return z = z' · latents_std + latents_mean per channel, in the VAE's dtype, as the VAE's decoder takes it."""
    latents = latents.to(vae.dtype)
    latents_mean, latents_std = _latent_statistics(vae, latents.device, latents.dtype)
    return latents * latents_std + latents_mean


def decode_frames(vae: AutoencoderKLWan, latents: torch.Tensor) -> np.ndarray:
    """Decode normalised latents of one clip (C, T, h, w) to frames (F, H, W, 3) uint8."""
    pixel_values = decode_latents(vae, latents[None].to(vae.device))[0]  # (3, F, H, W)
    frames = (pixel_values * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
    return rearrange(frames, "c f h w -> f h w c").cpu().numpy()


def _latent_statistics(vae, device, dtype):
    """Return latents_mean and latents_std of each channel, (C, 1, 1, 1) each."""
    return [
        torch.tensor(values, device=device, dtype=dtype).view(-1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    ]
