"""Frames to normalised latents and back, by Wan's VAE."""

import torch


def encode_frames(vae, frames):
    """The distributions of clips' normalised latents, z' = (z − latents_mean) / latents_std per channel.

    Args:
        vae: AutoencoderKLWan.
        frames: (B, F, 3, H, W) uint8 RGB on the VAE's device; F = 4k + 1.

    Returns:
        mean and log-variance of z', each (B, C, T, H/8, W/8) fp32; WanPipeline undoes the normalisation before
        decoding.
    """
    pixel_values = frames.to(vae.dtype).div(127.5).sub(1).permute(0, 2, 1, 3, 4)  # (B, 3, F, H, W) in [-1, 1]
    distribution = vae.encode(pixel_values).latent_dist
    shift, scale = (
        torch.tensor(statistic, device=frames.device, dtype=torch.float32).view(-1, 1, 1, 1)
        for statistic in (vae.config.latents_mean, vae.config.latents_std)
    )
    mean = (distribution.mean.float() - shift) / scale
    logvar = distribution.logvar.float() - 2 * scale.log()  # Var[z'] = Var[z] / latents_std²
    return mean, logvar


@torch.no_grad()
def decode_latents(vae, latents):
    """Normalised latents (B, C, T, h, w) -> pixel values (B, 3, F, H, W), nominally in [−1, 1]."""
    latents = latents.to(vae.device, vae.dtype)
    mean, std = (
        torch.tensor(values, device=latents.device, dtype=latents.dtype).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return vae.decode(latents * std + mean, return_dict=False)[0]


def decode_frames(vae, latents):
    """Normalised latents of one clip (C, T, h, w) -> frames (F, H, W, 3) uint8 on CPU."""
    pixel_values = decode_latents(vae, latents[None])[0]  # (3, F, H, W)
    return (pixel_values * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()
