"""Train the toy's VAE, a small one of Wan's kind."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan

from c2r.toy import city
from c2r.toy.pretraining.scenes import HEIGHT, WIDTH
from c2r.toy.pretraining.stage import HELD_OUT, fit, psnr, to_pixel_values

LATENT_CHANNELS = 16


def train_vae(folder: Path, clips: np.ndarray, kinds: np.ndarray, work_dir: Path, steps: int):
    """Train a small AutoencoderKLWan with Wan's factors: 8x in space, 4x in time, 16 channels.

    Args:
        folder: gets the model.
        clips, kinds: see `render_scenes`.
        work_dir: gets the state of the stage.
        steps: number of optimizer steps.
    """
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=32,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 3],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_spatial=8,
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )

    def draw_loss(step):
        pixel_values, people = _draw_crops(clips, kinds, np.random.default_rng((0, step)))
        posterior = vae.encode(pixel_values).latent_dist
        error = vae.decode(posterior.sample(torch.Generator().manual_seed(step))).sample - pixel_values
        error = (error.abs() + 4 * error.square()) * (1 + 2 * people)
        kl = (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean() / 2
        return error.mean() + 1e-4 * kl

    @torch.no_grad()
    def on_log():
        found = []
        for look in range(len(city.LOOKS)):
            held_out = to_pixel_values(clips[-4:, look])
            found.append(psnr(vae.decode(vae.encode(held_out).latent_dist.mean).sample, held_out))
        return "held-out PSNR " + ", ".join(f"{look} {value:.2f} dB" for look, value in zip(city.LOOKS, found))

    fit("vae", vae, draw_loss, steps, 2e-3, work_dir, on_log, log_every=100)
    with torch.no_grad():
        batches = (to_pixel_values(clips[i : i + 4, 2]) for i in range(0, 120, 4))
        latents = torch.cat([vae.encode(pixel_values).latent_dist.mean for pixel_values in batches])
    vae.register_to_config(
        latents_mean=latents.mean((0, 2, 3, 4)).tolist(), latents_std=latents.std((0, 2, 3, 4)).tolist()
    )
    vae.half().save_pretrained(folder)


def _draw_crops(clips, kinds, rng, batch=4, crop=64):
    """Return random crops (B, 3, F, crop, crop) in [-1, 1] and their masks of people (B, 1, F, crop, crop) bool."""
    crops, people = [], []
    for _ in range(batch):
        # The real look gets the largest share: generated videos have it.
        i, look, flip = rng.integers(len(clips) - HELD_OUT), rng.choice(3, p=(0.15, 0.25, 0.6)), rng.choice((-1, 1))
        y, x = rng.integers(HEIGHT - crop + 1), rng.integers(WIDTH - crop + 1)
        crops.append(clips[i, look][:, y : y + crop, x : x + crop][:, :, ::flip])
        people.append(kinds[i][:, y : y + crop, x : x + crop][:, :, ::flip] == city.PERSON)
    return to_pixel_values(np.stack(crops)), torch.from_numpy(np.stack(people))[:, None]
