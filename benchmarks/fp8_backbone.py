"""Measure the error that --fp8_backbone makes in the control's gradients, on the toy's trained backbone.

    python -m benchmarks.fp8_backbone

For each seed one line: the relative error of the gradient of all control parameters, |g − g₀| / |g₀|, where g₀ is that
of fp32. Inputs and target are noise, the projectors random.
"""

import statistics

import torch
from diffusers import WanTransformer3DModel

from c2r.models.controlnet import C2RControlNet
from c2r.models.offloading import store_blocks
from c2r.models.transformer import C2RTransformer
from c2r.toy.layout import WEIGHTS

SEEDS = range(8)
FEATURE_DIM = 32


def gradient(seed: int, bf16: bool, fp8: bool) -> torch.Tensor:
    """Return the gradient of all control parameters, flattened."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    transformer = WanTransformer3DModel.from_pretrained(WEIGHTS / "model/transformer", torch_dtype=dtype)
    torch.manual_seed(seed)
    controlnet = C2RControlNet.from_transformer(transformer, 4, 1, feature_dim=FEATURE_DIM).float()
    for block in controlnet.control_blocks:
        torch.nn.init.normal_(block.projector[2].weight, std=0.02)
    model = C2RTransformer(transformer, controlnet)
    if fp8:
        store_blocks(transformer.blocks, torch.device("cpu"), float8=True)
    noisy_latents, target = torch.randn(2, 1, transformer.config.in_channels, 3, 12, 20)
    prompt_embeds = torch.randn(1, 16, transformer.config.text_dim)
    control_features = torch.randn(1, 9, 6, 10, FEATURE_DIM)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        velocity_pred = model(noisy_latents, 1000 * torch.rand(1), prompt_embeds, control_features).sample
    (velocity_pred.float() - target).square().mean().backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.trainable_parameters()])


def main():
    found = []
    for seed in SEEDS:
        reference = gradient(seed, bf16=False, fp8=False)
        grads = [gradient(seed, bf16=False, fp8=True), gradient(seed, True, False), gradient(seed, True, True)]
        errors = [float((grad - reference).norm() / reference.norm()) for grad in grads]
        found.append(errors)
        print(f"seed {seed}: fp8 {errors[0]:.2%}, bf16 {errors[1]:.2%}, bf16 with fp8 {errors[2]:.2%}", flush=True)
    fp8, bf16, both = (statistics.median(column) for column in zip(*found))
    print(f"median: fp8 {fp8:.2%}, bf16 {bf16:.2%}, bf16 with fp8 {both:.2%}")


if __name__ == "__main__":
    main()
