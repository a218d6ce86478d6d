"""Measure the toy's base models on scenes that no stage of their training has seen.

    python -m benchmarks.toy_weights [--weights FOLDER] [--num_scenes 32] [--picture FILE]

Prints the figures of `c2r/toy/weights/README.md`, and draws videos that the transformer makes from captions alone.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import WanPipeline
from torch.nn import functional as F

from c2r import flow_matching
from c2r.data.contact_sheet import draw_contact_sheet
from c2r.models.dinov3 import DINOv3FeatureExtractor
from c2r.models.vae import decode_latents, encode_frames
from c2r.toy import city
from c2r.toy.layout import WEIGHTS, PeopleFinder, correlation, people_map
from c2r.toy.look import gradient_energy
from c2r.toy.pretrain import HEIGHT, NUM_FRAMES, WIDTH, psnr, to_pixel_values

FIRST_SEED = 4_000_000


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="as `python -m c2r.toy --train` writes them")
    parser.add_argument("--num_scenes", type=int, default=32)
    parser.add_argument("--picture", type=Path, help="PNG of the generated videos; none by default")
    args = parser.parse_args()
    scenes = [city.make_scene(FIRST_SEED + i) for i in range(args.num_scenes)]
    renderings = [city.render(scene) for scene in scenes]
    with torch.no_grad():
        measure(args.weights, scenes, renderings, args.picture)


def measure(weights: Path, scenes: list[city.Scene], renderings: list[dict], picture: Path | None):
    """Print what each model does on the scenes, and draw the first generated videos."""
    pipeline = WanPipeline.from_pretrained(weights / "model", torch_dtype=torch.float32)
    for name in ("vae", "text_encoder", "transformer"):
        print(f"{name}: {sum(p.numel() for p in getattr(pipeline, name).parameters()):,} parameters")

    frames = {look: [clip[look] for clip in renderings] for look in city.LOOKS}  # (F, H, W, 3) uint8
    clips = {look: [to_pixel_values(clip) for clip in frames[look]] for look in city.LOOKS}  # (3, F, H, W)
    latents = {look: [encode(pipeline.vae, clip) for clip in frames[look]] for look in city.LOOKS}
    decoded = {look: [decode(pipeline.vae, latent) for latent in latents[look]] for look in city.LOOKS}
    for look in city.LOOKS:
        print(f"vae, {look}: {psnr(torch.stack(decoded[look]), torch.stack(clips[look])):.2f} dB")

    dinov3 = DINOv3FeatureExtractor.from_pretrained(weights / "dinov3")
    coarse, real = (
        torch.stack([dinov3((clip[None, :, 0] + 1)[None] / 2).flatten() for clip in clips[look]])
        for look in ("coarse", "real")
    )
    own = (torch.cdist(coarse, real).argmin(1) == torch.arange(len(scenes))).sum()
    print(f"dinov3: {own} of {len(scenes)} coarse frames are nearest to the real frame of their own scene")

    finder = PeopleFinder.from_pretrained(weights / "people_finder", torch_dtype=torch.float32)
    places = [
        F.avg_pool2d(torch.from_numpy(clip["kinds"] == city.PERSON).float()[:, None], finder.cell)[:, 0]
        for clip in renderings
    ]
    for name, videos in (("the true clips", clips["real"]), ("them through the VAE", decoded["real"])):
        found = [people_map(finder, video.transpose(0, 1)) for video in videos]
        mean = np.mean([correlation(a, b) for a, b in zip(found, places)])
        print(f"people finder, {name}: correlation {mean:.3f}")

    for look in city.LOOKS:
        prompts = [city.caption(scene, look) for scene in scenes]
        print(f"transformer, {look}: flow-matching loss {transformer_loss(pipeline, latents[look], prompts):.4f}")

    generated = []
    for i, scene in enumerate(scenes):
        frames = pipeline(
            prompt=city.caption(scene),
            height=HEIGHT,
            width=WIDTH,
            num_frames=NUM_FRAMES,
            num_inference_steps=20,
            guidance_scale=2.0,
            generator=torch.Generator().manual_seed(i),
            output_type="pt",
        ).frames[0]
        generated.append(frames.transpose(0, 1) * 2 - 1)
    share = gradient_energy(generated) / gradient_energy(decoded["real"])
    print(f"transformer, generated: gradient energy {share:.2f} of the real look's through the VAE")
    people = [
        np.mean([people_map(finder, v.transpose(0, 1)).mean() for v in videos])
        for videos in (generated, decoded["real"])
    ]
    print(f"transformer, generated: people cover {people[0]:.3f} of the frames, {people[1]:.3f} of the true clips'")
    if picture:
        rows = {
            "generated from the caption alone": generated[:6],
            "a true clip of this caption": list(clips["real"][:6]),
        }
        columns = {title: [to_uint8(video) for video in videos] for title, videos in rows.items()}
        draw_contact_sheet(columns, [city.caption(scene) for scene in scenes[:6]]).save(picture)


def encode(vae, frames):
    """Return the normalised latents (C, T, h, w) of frames (F, H, W, 3) uint8."""
    return encode_frames(vae, torch.from_numpy(frames).permute(0, 3, 1, 2)[None])[0][0]


def decode(vae, latents):
    """Return pixel values (3, F, H, W) in [-1, 1] of normalised latents (C, T, h, w)."""
    return decode_latents(vae, latents[None])[0].clamp(-1, 1)


def transformer_loss(pipeline, latents, prompts, shift=3.0):
    """Return the mean loss over noise levels that the training draws, with the clips' captions."""
    losses = []
    for i, (latent, prompt) in enumerate(zip(latents, prompts)):
        prompt_embeds, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=16)
        generator = torch.Generator().manual_seed(i)
        clean = latent.expand(4, *latent.shape)
        noise = torch.randn(clean.shape, generator=generator)
        sigmas = flow_matching.shift_sigmas((torch.arange(4) + torch.rand(4, generator=generator)) / 4, shift)
        noisy_latents = flow_matching.add_noise(clean, noise, sigmas)
        timesteps = flow_matching.timesteps_from_sigmas(sigmas)
        velocity = pipeline.transformer(noisy_latents, timesteps, prompt_embeds.expand(4, -1, -1)).sample
        losses.append(flow_matching.velocity_loss(velocity, flow_matching.velocity_target(clean, noise)).mean())
    return torch.stack(losses).mean()


def to_uint8(video):
    return ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()


if __name__ == "__main__":
    main()
