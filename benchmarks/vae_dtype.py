"""Measure the error of --vae_dtype bf16 on the toy city: of latents, decoded video and loss.

    python -m benchmarks.vae_dtype [--random]

Clips of the toy's real look are encoded by its VAE in fp32 and in bf16, and decoded in fp32. The loss is that of the
toy's trained backbone without prompts, with the noise levels of validation and the same noise for both. `--random`
also encodes one clip by a VAE of Wan's size with random weights: its latents say how roundings add up over its depth,
but not what they mean for a picture.
"""

import argparse
import copy

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from c2r import cli, flow_matching
from c2r.encoding.preview import psnr
from c2r.evaluation.validation import noise_levels
from c2r.models.parts import freeze, load_pipeline_part
from c2r.models.vae import decode_frames, encode_frames
from c2r.toy import city
from c2r.toy.layout import WEIGHTS

SCENES = range(16)
FLOW_SHIFT = 3.0
PROMPT_TOKENS = 16


def read_clip(seed: int) -> torch.Tensor:
    """Return the frames of a scene, (1, F, 3, H, W) uint8."""
    frames = city.render(city.make_scene(seed), ("real",))["real"]
    return torch.from_numpy(frames).permute(0, 3, 1, 2)[None]


def encode_both(vae: AutoencoderKLWan, frames: torch.Tensor) -> list[torch.Tensor]:
    """Return the latents' means in fp32 and in bf16, and the standard deviations of their distribution."""
    (mean, logvar), (rounded, _) = (encode_frames(each, frames) for each in (vae, copy.deepcopy(vae).bfloat16()))
    return [mean, rounded, torch.exp(0.5 * logvar)]


def relative(error: torch.Tensor, value: torch.Tensor) -> float:
    """Return the root mean square of an error over that of a value."""
    return float(error.square().mean().sqrt() / value.square().mean().sqrt())


def loss(transformer: WanTransformer3DModel, latents: torch.Tensor, seed: int) -> float:
    """Return the loss of clean latents over the noise levels of validation."""
    generator = torch.Generator().manual_seed(seed)
    prompt_embeds = torch.zeros(1, PROMPT_TOKENS, transformer.config.text_dim)
    losses = []
    for level in noise_levels(FLOW_SHIFT):
        noise = torch.randn(latents.shape, generator=generator)
        sigmas = level.reshape(1)
        noisy_latents = flow_matching.add_noise(latents, noise, sigmas)
        timesteps = flow_matching.timesteps_from_sigmas(sigmas)
        velocity_pred = transformer(noisy_latents, timesteps, prompt_embeds).sample
        losses.append(flow_matching.velocity_loss(velocity_pred, flow_matching.velocity_target(latents, noise)))
    return float(torch.cat(losses).mean())


def compare(vae: AutoencoderKLWan, transformer: WanTransformer3DModel, seed: int) -> list[float]:
    """Return the numbers of one clip, in the order in which `main` prints them."""
    frames = read_clip(seed)
    mean, rounded, deviation = encode_both(vae, frames)
    true = frames[0].permute(0, 2, 3, 1).numpy()
    exact, coarser = (decode_frames(vae, latents[0]) for latents in (mean, rounded))
    losses = [loss(transformer, latents, seed) for latents in (mean, rounded)]
    return [
        relative(rounded - mean, mean),
        relative(rounded - mean, deviation),
        *(psnr(*pair) for pair in ((exact, true), (coarser, true), (exact, coarser))),
        *losses,
        abs(losses[1] / losses[0] - 1),
    ]


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--random", action="store_true", help="also encode by a VAE of Wan's size, random weights")
    args = parser.parse_args()
    vae = load_pipeline_part(WEIGHTS / "model", "vae", torch.float32)
    transformer = freeze(WanTransformer3DModel.from_pretrained(WEIGHTS / "model/transformer").float())
    rows = [compare(vae, transformer, seed) for seed in SCENES]
    latents, noise, exact, coarser, both, *losses, change = (sum(column) / len(rows) for column in zip(*rows))
    print(f"{len(rows)} clips of the toy city, means:")
    print(f"  error of the latents: {latents:.2%} of their size, {noise:.1%} of the noise that sampling them adds")
    print(f"  PSNR to the clip: fp32 {exact:.2f} dB, bf16 {coarser:.2f} dB; between the two videos {both:.1f} dB")
    print(f"  loss: fp32 {losses[0]:.5f}, bf16 {losses[1]:.5f}")
    print(f"  change of a clip's loss: {change:.3%}, at most {max(row[-1] for row in rows):.3%}", flush=True)
    if args.random:
        torch.manual_seed(0)
        mean, rounded, _ = encode_both(freeze(AutoencoderKLWan()), read_clip(0))
        error = relative(rounded - mean, mean - mean.mean((0, 2, 3, 4), keepdim=True))
        print(f"a VAE of Wan's size with random weights: error of the latents {error:.2%} of their spread in a clip")


if __name__ == "__main__":
    cli.run(main)
