"""Train the network by which the quickstart measures control."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch.nn import functional as F

from c2r.toy import city
from c2r.toy.layout import PeopleFinder
from c2r.toy.pretraining.scenes import NUM_FRAMES
from c2r.toy.pretraining.stage import HELD_OUT, fit, to_pixel_values


def train_people_finder(
    folder: Path, clips: np.ndarray, kinds: np.ndarray, vae: AutoencoderKLWan, work_dir: Path, steps: int
):
    """Train the network by which the quickstart measures control: it finds people in pixels.

    Args:
        folder: gets the model.
        clips, kinds: see `render_scenes`.
        vae: a trained one in fp32.
        work_dir: gets the state of the stage.
        steps: number of optimizer steps.
    """
    torch.manual_seed(0)
    finder = PeopleFinder()
    train = len(clips) - HELD_OUT

    @torch.no_grad()
    def decoded(clip):  # generated videos come from the VAE's decoder, so half of the examples do too
        pixel_values = to_pixel_values(clip)[None]
        return vae.decode(vae.encode(pixel_values).latent_dist.mean).sample[0]

    pool = [(to_pixel_values(clips[i, 2]), decoded(clips[i, 2]), kinds[i]) for i in range(min(train, 300))]

    def draw_loss(step):
        rng, generator = np.random.default_rng((0, step)), torch.Generator().manual_seed(step)
        frames, maps = [], []
        for _ in range(16):
            true, through_vae, kind = pool[rng.integers(len(pool))]
            t, flip = rng.integers(NUM_FRAMES), rng.random() < 0.5
            frame = (true if rng.random() < 0.5 else through_vae)[:, t]
            frame = frame + 0.1 * rng.random() * torch.randn(frame.shape, generator=generator)
            people = torch.from_numpy(kind[t] == city.PERSON).float()[None]
            frames.append(frame.flip(-1) if flip else frame)
            maps.append(people.flip(-1) if flip else people)
        target = F.avg_pool2d(torch.stack(maps), finder.cell)[:, 0]
        return F.binary_cross_entropy_with_logits(finder(torch.stack(frames)), target)

    fit("people", finder, draw_loss, steps, 4e-3, work_dir, log_every=100)
    finder.save_pretrained(folder)
