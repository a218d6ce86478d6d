"""Measure how much Diffusers' caches and layerwise casting change a video, with control and without.

    python -m benchmarks.diffusers_switches quickstart

Two of the toy's test scenes are sampled by the quickstart's model with control, and by a stock `WanPipeline` with its
phase 1 backbone, once plainly and once with each switch. The table holds ‖latents − plain latents‖ / ‖plain latents‖
over both videos.
"""

import argparse
import ast
import io
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import torch
from diffusers import (
    DiffusionPipeline,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    WanPipeline,
)
from diffusers.hooks import SeaCacheConfig

from c2r import cli
from c2r.models.backbone import load_transformer
from c2r.pipeline import C2RPipeline
from c2r.toy.folder import Toy, read_toy

STEPS, VIDEOS, GUIDANCE_SCALE = 20, 2, 3.0

Sample = Callable[[DiffusionPipeline], torch.Tensor]


def mag_ratios(pipeline: DiffusionPipeline, sample: Sample) -> list[float]:
    """Return MagCache's ratios for a pipeline: the means over the videos and the passes of guidance."""
    pipeline.transformer.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=STEPS))
    printed = io.StringIO()
    with redirect_stdout(printed):  # Diffusers gives them in no other way
        sample(pipeline)
    pipeline.transformer.disable_cache()
    ratios = [ast.literal_eval(line) for line in printed.getvalue().splitlines() if line.endswith("]")]
    return torch.tensor(ratios).mean(0).tolist()


def cache_configs(pipeline: DiffusionPipeline, sample: Sample) -> dict[str, object]:
    """Return {text of the table: config of a cache}."""

    def timestep():
        return pipeline.current_timestep

    ratios = {"num_inference_steps": STEPS, "mag_ratios": mag_ratios(pipeline, sample)}
    attention = {"cache_interval": 2, "cache_identifiers": [r"blocks\.\d+\.attn\d"]}
    return {
        "FirstBlockCacheConfig(threshold=0.1)": FirstBlockCacheConfig(threshold=0.1),
        "MagCacheConfig(threshold=0.12)": MagCacheConfig(threshold=0.12, **ratios),
        "SeaCacheConfig()": SeaCacheConfig(),
        "TaylorSeerCacheConfig(cache_interval=2, use_lite_mode=True)": TaylorSeerCacheConfig(
            cache_interval=2, use_lite_mode=True
        ),
        "TaylorSeerCacheConfig(cache_interval=2, cache_identifiers=…)": TaylorSeerCacheConfig(**attention),
        "PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2)": PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=timestep
        ),
    }


def differences(pipeline: DiffusionPipeline, sample: Sample) -> dict[str, float]:
    """Return {switch: relative difference of the latents}."""
    plain, found = sample(pipeline), {}

    def relative():
        return float((sample(pipeline) - plain).norm() / plain.norm())

    for name, config in cache_configs(pipeline, sample).items():
        pipeline.transformer.enable_cache(config)
        found[name] = relative()
        pipeline.transformer.disable_cache()
    pipeline.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    return {"enable_layerwise_casting, float8": relative()} | found


def sampler(toy: Toy, with_control: bool) -> Sample:
    """Return the function that samples the videos, to latents (videos, C, T, h, w)."""
    size = {name: toy[name] for name in ("height", "width", "num_frames")}

    def sample(pipeline):
        latents = []
        for scene in toy["test"][:VIDEOS]:
            own = {"control_video": scene["control_video"], "guidance": "cfg", "control_guidance_scale": 1.0}
            latents.append(
                pipeline(
                    prompt=scene["prompt"],
                    negative_prompt="",
                    **(own if with_control else {}),
                    **size,
                    num_inference_steps=STEPS,
                    guidance_scale=GUIDANCE_SCALE,
                    generator=torch.Generator().manual_seed(0),
                    output_type="latent",
                    max_sequence_length=pipeline.tokenizer.model_max_length,
                ).frames
            )
        return torch.cat(latents)

    return sample


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quickstart", type=Path, help="folder of a finished quickstart")
    quickstart = parser.parse_args().quickstart
    toy = read_toy(quickstart / "toy")
    ours = C2RPipeline.from_pretrained(quickstart / "outputs/phase2/best")
    backbone = load_transformer(quickstart / "outputs/phase1/best")
    stock = WanPipeline.from_pretrained(quickstart / "toy/model", transformer=backbone)
    found = []
    for pipeline, with_control in ((ours, True), (stock, False)):
        pipeline.set_progress_bar_config(disable=True)
        found.append(differences(pipeline, sampler(toy, with_control)))
    print("| switch | with control | stock, without control |\n|---|---|---|")
    for name, difference in found[0].items():
        print(f"| `{name}` | {difference:.3f} | {found[1][name]:.3f} |")


if __name__ == "__main__":
    cli.run(main)
