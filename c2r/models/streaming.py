"""Decode long videos latent frame by latent frame, so that the device never holds all their frames."""

from collections.abc import Iterator

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from diffusers.utils.accelerate_utils import apply_forward_hook

from c2r.models.vae import denormalise_latents


@torch.no_grad()
def stream_frames(vae: AutoencoderKLWan, latents: torch.Tensor, device: torch.device) -> Iterator[torch.Tensor]:
    """Decode normalised latents as `decode_latents` does, bit for bit, and yield the pixel values on the CPU.

    The VAE is causal: its convolutions keep the last two frames of their inputs in a cache. The device holds this
    cache and the frames of one latent frame. With tiling it holds those of one tile, and all frames come at once;
    so they do with slicing.

    Args:
        vae: Wan's VAE.
        latents: (B, C, T, h, w) on any device.
        device: where the VAE runs.

    Yields:
        (B, 3, f, H, W) in [−1, 1] on the CPU, f = 1 for the first latent frame and the VAE's factor for others.
    """
    if vae.use_slicing and len(latents) > 1:
        yield torch.cat([torch.cat(list(stream_frames(vae, latent, device)), 2) for latent in latents.split(1)])
        return
    latents = denormalise_latents(vae, latents)
    ratio = vae.spatial_compression_ratio
    tile_height, tile_width = vae.tile_sample_min_height // ratio, vae.tile_sample_min_width // ratio
    if not vae.use_tiling or (latents.shape[-2] <= tile_height and latents.shape[-1] <= tile_width):
        yield from (_pixel_values(vae, frames) for frames in _stream(vae, latents, device))
        return
    rows = [
        [
            torch.cat(list(_stream(vae, latents[..., top : top + tile_height, left : left + tile_width], device)), 2)
            for left in range(0, latents.shape[-1], vae.tile_sample_stride_width // ratio)
        ]
        for top in range(0, latents.shape[-2], vae.tile_sample_stride_height // ratio)
    ]
    height, width = (size * ratio // (vae.config.patch_size or 1) for size in latents.shape[-2:])
    yield _pixel_values(vae, _blend_tiles(vae, rows)[..., :height, :width])


def _pixel_values(vae, decoded):
    """Return pixel values in [−1, 1]: a VAE with a patch_size decodes the pixels of a patch as channels."""
    if vae.config.patch_size is not None:
        decoded = unpatchify(decoded, vae.config.patch_size)
    return decoded.clamp(-1, 1)


def _stream(vae, latents, device):
    """Yield the pixel values of each latent frame of a picture or tile."""
    vae.clear_cache()
    try:
        for number in range(latents.shape[2]):
            yield _decode_next(vae, latents[:, :, number : number + 1].to(device), number == 0).cpu()
    finally:
        vae.clear_cache()


@apply_forward_hook  # an offloaded VAE comes to the device
def _decode_next(vae, latents, is_first):
    vae._conv_idx = [0]
    return vae.decoder(
        vae.post_quant_conv(latents), feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=is_first
    )


def _blend_tiles(vae, rows):
    """Blend rows of overlapping tiles into whole frames, as `AutoencoderKLWan.tiled_decode` does."""
    patch = vae.config.patch_size or 1
    height, width = vae.tile_sample_stride_height // patch, vae.tile_sample_stride_width // patch
    overlap_height = vae.tile_sample_min_height // patch - height
    overlap_width = vae.tile_sample_min_width // patch - width
    for top, row in enumerate(rows):
        for left, tile in enumerate(row):
            if top > 0:
                tile = vae.blend_v(rows[top - 1][left], tile, overlap_height)
            if left > 0:
                tile = vae.blend_h(row[left - 1], tile, overlap_width)
            row[left] = tile
    return torch.cat([torch.cat([tile[..., :height, :width] for tile in row], -1) for row in rows], -2)
