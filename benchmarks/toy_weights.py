"""Measure the toy's base models on scenes that no stage of their training has seen.

    python -m benchmarks.toy_weights [--weights FOLDER] [--num_scenes 32] [--picture FILE]

Prints the figures of `c2r/toy/weights/README.md`, and draws videos that the transformer makes from captions alone.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import WanPipeline

from c2r import flow_matching
from c2r.data.contact_sheet import draw_contact_sheet
from c2r.models.dinov3 import DINOv3FeatureExtractor
from c2r.models.parts import max_sequence_length
from c2r.models.vae import decode_frames, encode_frames
from c2r.toy import city
from c2r.toy.appearance import gradient_energy
from c2r.toy.layout import WEIGHTS, PeopleFinder, correlation, people_map, true_people_map
from c2r.toy.pretraining.scenes import HEIGHT, NUM_FRAMES, WIDTH
from c2r.toy.pretraining.stage import psnr

#: Scenes of these seeds are in no stage's training, and in no toy folder.
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
    pipeline.set_progress_bar_config(disable=True)
    for name in ("vae", "text_encoder", "transformer"):
        print(f"{name}: {sum(p.numel() for p in getattr(pipeline, name).parameters()):,} parameters")

    clips = {look: [to_frames(clip[look]) for clip in renderings] for look in city.LOOKS}  # (F, 3, H, W) uint8
    latents = {look: [encode_frames(pipeline.vae, clip[None])[0][0] for clip in clips[look]] for look in city.LOOKS}
    decoded = {
        look: [to_frames(decode_frames(pipeline.vae, latent)) for latent in latents[look]] for look in city.LOOKS
    }
    for look in city.LOOKS:
        decibels = psnr(*(pixel_values(torch.stack(x)) for x in (decoded[look], clips[look])))
        print(f"vae, {look}: {decibels:.2f} dB")

    dinov3 = DINOv3FeatureExtractor.from_pretrained(weights / "dinov3")
    coarse, real = (
        torch.stack([dinov3(clip[None, :1] / 255).flatten() for clip in clips[look]]) for look in ("coarse", "real")
    )
    own = (torch.cdist(coarse, real).argmin(1) == torch.arange(len(scenes))).sum()
    print(f"dinov3: {own} of {len(scenes)} coarse frames are nearest to the real frame of their own scene")

    finder = PeopleFinder.from_pretrained(weights / "people_finder", torch_dtype=torch.float32)
    places = [true_people_map(clip["kinds"]) for clip in renderings]
    for name, videos in (("the true clips", clips["real"]), ("them through the VAE", decoded["real"])):
        mean = np.mean([correlation(people_map(finder, pixel_values(v)), place) for v, place in zip(videos, places)])
        print(f"people finder, {name}: correlation {mean:.3f}")

    length = max_sequence_length(pipeline.tokenizer)  # that of the training; another one changes the velocity
    for look in city.LOOKS:
        prompts = [city.caption(scene, look) for scene in scenes]
        loss = transformer_loss(pipeline, latents[look], prompts, length)
        print(f"transformer, {look}: flow-matching loss {loss:.4f}")

    generated = []
    for i, scene in enumerate(scenes):
        frames = pipeline(
            prompt=city.caption(scene),
            height=HEIGHT,
            width=WIDTH,
            num_frames=NUM_FRAMES,
            num_inference_steps=20,
            guidance_scale=2.0,
            max_sequence_length=length,
            generator=torch.Generator().manual_seed(i),
            output_type="np",
        ).frames[0]
        generated.append(to_frames((frames * 255).round().astype(np.uint8)))
    both = generated, decoded["real"]
    energy, true_energy = (np.mean([gradient_energy(video.float()) for video in videos]) for videos in both)
    print(f"transformer, generated: gradient energy {energy / true_energy:.2f} of the real look's through the VAE")
    cover, true_cover = (np.mean([people_map(finder, pixel_values(v)).mean() for v in videos]) for videos in both)
    print(f"transformer, generated: people cover {cover:.3f} of the frames, {true_cover:.3f} of the real look's")
    if picture:
        rows = {"generated from the caption alone": generated, "a true clip of this caption": clips["real"]}
        columns = {title: [clip.permute(0, 2, 3, 1).numpy() for clip in clips[:6]] for title, clips in rows.items()}
        draw_contact_sheet(columns, [city.caption(scene) for scene in scenes[:6]]).save(picture)


def to_frames(clip):
    """Return (F, 3, H, W) uint8 of (F, H, W, 3) uint8."""
    return torch.from_numpy(clip).permute(0, 3, 1, 2)


def pixel_values(frames):
    """Return frames in [-1, 1]."""
    return frames / 127.5 - 1


def transformer_loss(pipeline, latents, prompts, length, shift=3.0):
    """Return the mean loss over noise levels that the training draws, with the clips' captions."""
    losses = []
    for i, (latent, prompt) in enumerate(zip(latents, prompts)):
        prompt_embeds, _ = pipeline.encode_prompt(
            prompt, do_classifier_free_guidance=False, max_sequence_length=length
        )
        generator = torch.Generator().manual_seed(i)
        clean = latent.expand(4, *latent.shape)
        noise = torch.randn(clean.shape, generator=generator)
        sigmas = flow_matching.shift_sigmas((torch.arange(4) + torch.rand(4, generator=generator)) / 4, shift)
        noisy_latents = flow_matching.add_noise(clean, noise, sigmas)
        timesteps = flow_matching.timesteps_from_sigmas(sigmas)
        velocity = pipeline.transformer(noisy_latents, timesteps, prompt_embeds.expand(4, -1, -1)).sample
        losses.append(flow_matching.velocity_loss(velocity, flow_matching.velocity_target(clean, noise)).mean())
    return torch.stack(losses).mean()


if __name__ == "__main__":
    main()
