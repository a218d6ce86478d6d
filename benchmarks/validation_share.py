"""What validation and samples cost of a phase 2 run, computed: operations of forwards and of steps, not time.

    python -m benchmarks.validation_share

Wan 2.1 1.3B with 15 control layers at 480x832x81, batch 1, gradient checkpointing, on tensors without memory. On a GPU
both sides run the same kernels at the same size, so the share of the operations is close to the share of the time; a
training step also has its optimizer step and its data, so validation's real share is a little lower.
"""

import argparse
import math

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import DINOv3ViTConfig, DINOv3ViTModel
from transformers.initialization import no_init_weights

import train_phase2
from c2r.evaluation.monitor_reference import CLIPS_PER_DOMAIN
from c2r.evaluation.validation import QUANTILES
from c2r.models.controlnet import SHARED_CONFIG, C2RControlNet, injection_layers
from c2r.models.transformer import C2RTransformer
from tests.helpers.fake_cuda import DINOV3_VITB, FRAMES, HEIGHT, WAN_1_3B, WIDTH

CONTROL_LAYERS = 15
#: Forwards of each clip at each noise level, and DINOv3 passes: (real clips, CG clips). See `ControlConditions`.
CONDITIONS = {"right": 2, "other_control": 2, "no_control": 2, "other_prompt": 2, "augmented": 1, "coarse": 1}
WITH_DINOV3 = ("right", "other_control", "augmented", "coarse")
#: Of a step of a sample video with the default guidance: without prompt, and with it.
PASSES = 2


def flash_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **options):
    """As on a GPU: its backward pass computes the scores again, which the other kernels' does not."""
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]


def operations(function):
    """Floating point operations of a call; a multiplication with its addition counts as two."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def measure(num_layers):
    """{what: operations of one clip}."""
    F.scaled_dot_product_attention = flash_attention
    with FakeTensorMode():
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
            found = {
                "forward without control": operations(lambda: model(*inputs)),
                "forward with control": operations(lambda: model(*inputs, control_features)),
                "DINOv3 of a clip": operations(lambda: dinov3(frames)),
                "VAE decode of a clip": operations(lambda: vae.decode(inputs[0])),
            }
        step = operations(lambda: model(*inputs, control_features).square().mean().backward())
        return found | {"training step": step + found["DINOv3 of a clip"]}


def validation_cost(found, clips, with_coarse):
    """(forwards, operations) of one validation with so many clips a domain."""
    used = {name: domains for name, domains in CONDITIONS.items() if with_coarse or name != "coarse"}
    forwards = sum(used.values()) * clips * len(QUANTILES)
    passes = sum(domains for name, domains in used.items() if name in WITH_DINOV3) * clips
    return forwards, forwards * found["forward with control"] + passes * found["DINOv3 of a clip"]


def sampling_cost(found, options):
    """(operations of one sampling, operations of what is done once): sample videos and the CG monitor."""
    steps, samples = options.num_inference_steps, options.num_samples
    one = steps * PASSES * found["forward with control"] + 2 * found["VAE decode of a clip"]
    one += 2 * found["DINOv3 of a clip"]  # of the control, and of the output for the monitor
    alone = samples * steps * PASSES * found["forward without control"]
    reference = 2 * CLIPS_PER_DOMAIN * found["VAE decode of a clip"] + 3 * CLIPS_PER_DOMAIN * found["DINOv3 of a clip"]
    return samples * one, alone + reference


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_layers", type=int, default=WAN_1_3B["num_layers"], help="of the backbone")
    args = parser.parse_args()
    found = measure(args.num_layers)
    print("Computed, one clip of 480x832x81, 1.3B:")
    for name, count in found.items():
        print(f"  {name:26s} {count / 1e12:8.1f} TFLOP   {count / found['training step']:6.3f} training steps")
    required = ["--resume_backbone_from=b", "--real_dataset=d", "--output_dir=o"]
    defaults = train_phase2.build_parser().parse_args(required)
    steps = defaults.max_train_steps
    print(f"\nOf a run of {steps:,} steps at batch 1 ({len(QUANTILES)} noise levels, the first before step 1):")
    header = ("validation_steps", "clips a domain", "coarse", "forwards", "training steps", "share of the run")
    print("  " + "  ".join(f"{column:>16s}" for column in header))
    settings = [(500, 8), (1000, 4), (1000, 2), (1500, 4), (2000, 4)]
    settings = [(defaults.validation_steps, defaults.num_validation_clips), *settings]
    for interval, clips in dict.fromkeys(settings):
        for with_coarse in (False, True):
            forwards, cost = validation_cost(found, clips, with_coarse)
            each = cost / found["training step"]
            validations = math.ceil(steps / interval) + 1
            share = validations * each / (steps + validations * each)
            is_default = " (default)" if (interval, clips) == settings[0] else ""
            columns = (interval, clips, "yes" if with_coarse else "no", forwards, f"{each:.1f}", f"{share:.2%}")
            print("  " + "  ".join(f"{column!s:>16s}" for column in columns) + is_default)
    sampling, once = sampling_cost(found, defaults)
    samplings = math.ceil(steps / defaults.sample_steps)
    share = (samplings * sampling + once) / found["training step"] / steps
    print(
        f"\n{samplings} samplings of {defaults.num_samples} videos, every {defaults.sample_steps} steps, and the CG "
        f"monitor's reference:\n  {sampling / found['training step']:.1f} training steps each, "
        f"{once / found['training step']:.1f} once; {share:.2%} of the run"
    )


if __name__ == "__main__":
    main()
