"""Share of validation and sampling in a phase 2 run, computed from numbers of operations.

    python -m benchmarks.validation_share

Wan 2.1 1.3B with 15 control layers at 480x832x81, batch 1, gradient checkpointing, on tensors without memory. On a GPU
validation and training run the same kernels at the same size, so the share of the operations is close to the share of
the time. A training step also has its optimizer step and its data, so the real share of validation is a little lower.
"""

import argparse
import math
from argparse import Namespace
from collections.abc import Callable
from unittest.mock import patch

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import DINOv3ViTConfig, DINOv3ViTModel
from transformers.initialization import no_init_weights

from c2r import cli
from c2r.estimation.configs import DINOV3_VITB
from c2r.evaluation.monitor_reference import CLIPS_PER_DOMAIN
from c2r.evaluation.validation import QUANTILES
from c2r.models.controlnet import SHARED_CONFIG, C2RControlNet, injection_layers
from c2r.models.transformer import C2RTransformer
from c2r.options import PHASE2
from tests.helpers.fake_cuda import FRAMES, HEIGHT, WAN_1_3B, WIDTH

CONTROL_LAYERS = 15
#: {condition of `ControlConditions`: number of domains that have it}.
CONDITIONS = {"right": 2, "other_control": 2, "no_control": 2, "other_prompt": 2, "augmented": 1, "coarse": 1}
#: Conditions whose control DINOv3 encodes.
WITH_DINOV3 = ("right", "other_control", "augmented", "coarse")
#: Forward passes for each step of a sample video with the default guidance: without and with the prompt.
PASSES = 2


def flash_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **options):
    """Attention as on a GPU, where the backward pass computes the scores again."""
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]


def operations(function: Callable[[], object]) -> int:
    """Return the floating point operations of a call; a multiplication with its addition counts as two."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def measure(num_layers: int) -> dict[str, int]:
    """Return {unit of work: its operations for one clip} with a backbone of this many blocks."""
    with FakeTensorMode(), patch("torch.nn.functional.scaled_dot_product_attention", flash_attention):
        transformer = WanTransformer3DModel(**WAN_1_3B | {"num_layers": num_layers})
        shared = {name: transformer.config[name] for name in SHARED_CONFIG}
        controlnet = C2RControlNet(injection_layers=injection_layers(CONTROL_LAYERS, 1, num_layers), **shared)
        model = C2RTransformer(transformer, controlnet).train()
        model.enable_gradient_checkpointing()
        with no_init_weights():
            dinov3 = DINOv3ViTModel(DINOv3ViTConfig(**DINOV3_VITB)).eval()
        vae = AutoencoderKLWan().eval()  # Wan's own sizes are the defaults
        inputs = [torch.randn(1, 16, (FRAMES - 1) // 4 + 1, HEIGHT // 8, WIDTH // 8), torch.rand(1)]
        inputs += [torch.randn(1, 512, 4096)]
        control_features = torch.randn(1, FRAMES, HEIGHT // 16, WIDTH // 16, 768)
        frames = torch.randn(FRAMES, 3, HEIGHT, WIDTH)
        with torch.no_grad():
            work = {
                "forward without control": operations(lambda: model(*inputs)),
                "forward with control": operations(lambda: model(*inputs, control_features)),
                "DINOv3 of a clip": operations(lambda: dinov3(frames)),
                "VAE decode of a clip": operations(lambda: vae.decode(inputs[0])),
            }
        step = operations(lambda: model(*inputs, control_features).sample.square().mean().backward())
        return work | {"training step": step + work["DINOv3 of a clip"]}


def validation_cost(work: dict[str, int], clips: int, with_coarse: bool) -> tuple[int, int]:
    """Compute the cost of one validation.

    Args:
        work: see `measure`.
        clips: number of clips of each domain.
        with_coarse: the real clips have coarse versions.

    Returns:
        forward passes, operations.
    """
    used = {name: domains for name, domains in CONDITIONS.items() if with_coarse or name != "coarse"}
    forwards = sum(used.values()) * clips * len(QUANTILES)
    passes = sum(domains for name, domains in used.items() if name in WITH_DINOV3) * clips
    return forwards, forwards * work["forward with control"] + passes * work["DINOv3 of a clip"]


def sampling_cost(work: dict[str, int], args: Namespace) -> tuple[int, int]:
    """Compute the cost of sample videos and the CG monitor.

    Args:
        work: see `measure`.
        args: options of phase 2.

    Returns:
        operations of each sampling, and of the work that a run does once: the outputs without control and the
        monitor's reference.
    """
    steps, samples = args.num_inference_steps, args.num_samples
    one = steps * PASSES * work["forward with control"] + 2 * work["VAE decode of a clip"]
    one += 2 * work["DINOv3 of a clip"]  # of the control, and of the output for the monitor
    without_control = samples * steps * PASSES * work["forward without control"]
    reference = 2 * CLIPS_PER_DOMAIN * work["VAE decode of a clip"] + 3 * CLIPS_PER_DOMAIN * work["DINOv3 of a clip"]
    return samples * one, without_control + reference


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_layers", type=int, default=WAN_1_3B["num_layers"], help="number of backbone blocks")
    work = measure(parser.parse_args().num_layers)
    required = ["--resume_backbone_from=b", "--real_dataset=r", "--cg_dataset=c", "--output_dir=o"]
    defaults = cli.parse(PHASE2, required)
    print("Computed, one clip of 480x832x81, 1.3B:")
    for name, count in work.items():
        print(f"  {name:26s} {count / 1e12:8.1f} TFLOP   {count / work['training step']:6.3f} training steps")
    print_validation_shares(work, defaults)
    print_sampling_share(work, defaults)


def print_validation_shares(work: dict[str, int], defaults: Namespace):
    """Print the share of validation in a run, for several intervals and numbers of clips."""
    steps = defaults.max_train_steps
    print(f"\nOf a run of {steps:,} steps at batch 1 ({len(QUANTILES)} noise levels, the first before step 1):")
    header = ("validation_steps", "clips a domain", "coarse", "forwards", "training steps", "share of the run")
    print("  " + "  ".join(f"{column:>16s}" for column in header))
    default = (defaults.validation_steps, defaults.num_validation_clips)
    for interval, clips in dict.fromkeys([default, (500, 8), (1000, 4), (1000, 2), (1500, 4), (2000, 4)]):
        for with_coarse in (False, True):
            forwards, cost = validation_cost(work, clips, with_coarse)
            each = cost / work["training step"]
            validations = math.ceil(steps / interval) + 1
            share = validations * each / (steps + validations * each)
            columns = (interval, clips, "yes" if with_coarse else "no", forwards, f"{each:.1f}", f"{share:.2%}")
            print(
                "  " + "  ".join(f"{column!s:>16s}" for column in columns),
                " (default)" if (interval, clips) == default else "",
                sep="",
            )


def print_sampling_share(work: dict[str, int], defaults: Namespace):
    """Print the share of sample videos and the CG monitor in a run."""
    steps = defaults.max_train_steps
    sampling, once = sampling_cost(work, defaults)
    samplings = math.ceil(steps / defaults.sample_steps)
    share = (samplings * sampling + once) / work["training step"] / steps
    print(
        f"\n{samplings} samplings of {defaults.num_samples} videos, every {defaults.sample_steps} steps, and the CG "
        f"monitor's reference:\n  {sampling / work['training step']:.1f} training steps each, "
        f"{once / work['training step']:.1f} once; {share:.2%} of the run"
    )


if __name__ == "__main__":
    main()
