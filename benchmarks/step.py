"""Time and peak memory of a training step beside a plain reference, as ratios.

    python -m benchmarks.step [--tokens 480 3456] [--phases 2 1] [--rounds 9] [--compile]

A small Wan (8 blocks of width 384, 4 control blocks, one clip) on the CPU in fp32. The reference is what one would
write first: Diffusers' blocks in one loop, each checkpointed, and torch's AdamW as it comes. All variants run in one
process, one step of each after the other, so that a change of the machine's speed meets all of them. The ratios are of
medians of the CPU time on one core, to which other processes on the machine add nothing. Every variant has a copy of
the same weights and inputs, and its first loss and gradients are compared with the reference's.

The peak is the sum of weights, optimizer states and what the CPU's allocator holds at most during a step.
"""

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from c2r import cli
from c2r.flow_matching import velocity_loss
from c2r.models.attention import use_lean_attention
from c2r.models.checkpointing import set_checkpointing
from c2r.models.controlnet import C2RControlNet
from c2r.models.transformer import C2RTransformer
from c2r.training.compilation import compile_blocks
from c2r.training.optimizer import OptimizerSettings, build_optimizer

WAN = {"num_attention_heads": 3, "attention_head_dim": 128, "ffn_dim": 2240, "num_layers": 8, "text_dim": 4096}
CONTROL_LAYERS, FEATURE_DIM, PROMPT_LENGTH = 4, 768, 512
#: {number of tokens: its (T, h, w)}.
GRIDS = {480: (3, 10, 16), 3456: (6, 24, 24)}
LEARNING_RATE = 1e-4

Forward = Callable[..., torch.Tensor]


@dataclass
class Variant:
    """A model with its optimizer; `step` is one training step."""

    name: str
    model: torch.nn.Module
    forward: Forward  #: inputs to the predicted velocity
    optimizer: torch.optim.Optimizer

    def backward(self, inputs, target) -> torch.Tensor:
        loss = velocity_loss(self.forward(*inputs), target).mean()
        loss.backward()
        return loss.detach()

    def step(self, inputs, target) -> None:
        self.backward(inputs, target)
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]


# ------------------------------------------------------------------------------------------------------- the reference
def reference_forward(
    backbone: WanTransformer3DModel,
    controlnet: C2RControlNet,
    noisy_latents: torch.Tensor,
    timesteps: torch.Tensor,
    prompt_embeds: torch.Tensor,
    control_features: torch.Tensor,
) -> torch.Tensor:
    """Predict the velocity as `C2RTransformer` does; shapes as there."""
    batch, channels, frames, height, width = noisy_latents.shape
    grid = (frames, height // 2, width // 2)
    rotary_emb = backbone.rope(noisy_latents)
    hidden_states = backbone.patch_embedding(noisy_latents).flatten(2).transpose(1, 2)  # (B, N, D)
    time_embedding, modulation, prompt, _ = backbone.condition_embedder(timesteps, prompt_embeds)
    shared = (prompt, modulation.unflatten(1, (6, -1)), rotary_emb)
    control = controlnet.control_adapter(control_features, grid)  # (B, N, D)
    for index, block in enumerate(backbone.blocks):
        hidden_states = checkpoint(block, hidden_states, *shared, use_reentrant=False)
        if index < len(controlnet.control_blocks):
            control, residual = checkpoint(controlnet.control_blocks[index], control, *shared, use_reentrant=False)
            hidden_states = hidden_states + residual
    shift, scale = (backbone.scale_shift_table + time_embedding.unsqueeze(1)).chunk(2, dim=1)
    hidden_states = backbone.proj_out(backbone.norm_out(hidden_states) * (1 + scale) + shift)
    patches = hidden_states.reshape(batch, *grid, 1, 2, 2, channels)
    return patches.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(noisy_latents.shape)


def phase2_reference(model: C2RTransformer) -> Variant:
    model = with_stock_attention(copy.deepcopy(model)).train()
    forward = partial(reference_forward, model.transformer, model.controlnet)
    return Variant("reference", model, forward, torch.optim.AdamW(model.controlnet.parameters(), LEARNING_RATE))


def phase1_reference(model: WanTransformer3DModel) -> Variant:
    model = with_stock_attention(copy.deepcopy(model)).train()
    model.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    return Variant("reference", model, lambda *inputs: model(*inputs).sample, optimizer)


def with_stock_attention(model):
    """Give a model Diffusers' own attention processors."""
    for module in model.modules():
        if isinstance(module, WanAttention):
            module.set_processor(WanAttnProcessor())
    return model


# ---------------------------------------------------------------------------------------------------------------- ours
def our_variant(name: str, model: torch.nn.Module, checkpointing: str = "block") -> Variant:
    """Return the step as the scripts take it."""
    model = copy.deepcopy(model).train()
    set_checkpointing(model, checkpointing)
    trainable = model.controlnet if isinstance(model, C2RTransformer) else model
    optimizer = build_optimizer(trainable, OptimizerSettings(LEARNING_RATE), torch.device("cpu"))
    return Variant(name, model, lambda *inputs: model(*inputs).sample, optimizer)


# --------------------------------------------------------------------------------------------------------- measurement
def build_model(phase: int, **overrides: int) -> torch.nn.Module:
    """Return the model of a phase with random weights; the control residuals are not zero."""
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(**WAN | overrides)
    if phase == 1:
        return transformer
    controlnet = C2RControlNet.from_transformer(transformer, CONTROL_LAYERS, feature_dim=FEATURE_DIM)
    for block in controlnet.control_blocks:
        block.projector[2].reset_parameters()
    return C2RTransformer(transformer, controlnet)


def draw_inputs(phase: int, grid: tuple[int, int, int]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return the model's inputs and the velocity's target for one clip of this token grid."""
    generator = torch.Generator().manual_seed(1)
    t, h, w = grid
    latents, target = (torch.randn(1, 16, t, 2 * h, 2 * w, generator=generator) for _ in range(2))
    inputs = [latents, torch.tensor([600.0]), torch.randn(1, PROMPT_LENGTH, WAN["text_dim"], generator=generator)]
    if phase == 2:
        inputs.append(torch.randn(1, 4 * (t - 1) + 1, h, w, FEATURE_DIM, generator=generator))
    return inputs, target


def build_variants(phase: int, compiled: bool = False, **overrides: int) -> list[Variant]:
    """Return the reference and the variants that are compared with it.

    Up to the default each has one saving more than the last; the others each change one option of the default.
    """
    model = build_model(phase, **overrides)
    reference = {1: phase1_reference, 2: phase2_reference}[phase](model)
    variants = [reference, our_variant("fused optimizer", model)]
    use_lean_attention(model)
    variants.append(our_variant("and lean attention (the default)", model))
    variants.append(our_variant("--gradient_checkpointing selective", model, "selective"))
    variants.append(our_variant("--gradient_checkpointing none", model, "none"))
    if compiled:
        for name, checkpointing in (("--compile", "block"), ("--gradient_checkpointing none --compile", "none")):
            variants.append(our_variant(name, model, checkpointing))
            compile_blocks(variants[-1].model)
    return variants


def differences(variant: Variant, reference: Variant, inputs, target) -> tuple[float, float]:
    """Return the relative differences of loss and gradients; the gradients are cleared.

    Both are absolute differences over the largest absolute value of the reference.
    """
    losses = [each.backward(inputs, target) for each in (reference, variant)]
    gradients = [torch.cat([p.grad.flatten() for p in each.trained]) for each in (reference, variant)]
    for each in (reference, variant):
        each.optimizer.zero_grad()
    loss, gradient = (((a - b).abs().max() / a.abs().max()).item() for a, b in (losses, gradients))
    return loss, gradient


def peak_bytes(variant: Variant, inputs, target) -> int:
    """Return weights, optimizer states and the most that the allocator holds during a step."""
    state = [value for values in variant.optimizer.state.values() for value in values.values()]
    held = sum(t.nbytes for t in [*variant.model.parameters(), *variant.model.buffers(), *state])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        variant.step(inputs, target)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return held + peak


def measure(phase: int, tokens: int, rounds: int, compiled: bool) -> None:
    """Print one row per variant."""
    inputs, target = draw_inputs(phase, GRIDS[tokens])
    variants = build_variants(phase, compiled)
    reference = variants[0]
    equality = [differences(variant, reference, inputs, target) for variant in variants]
    for variant in variants:  # warm up: states of the optimizer, caches, compilation
        variant.step(inputs, target)
    times: dict[str, list[float]] = {variant.name: [] for variant in variants}
    for _ in range(rounds):
        for variant in variants:
            started = time.process_time()
            variant.step(inputs, target)
            times[variant.name].append(time.process_time() - started)
    peaks = [peak_bytes(variant, inputs, target) for variant in variants]
    print(f"phase {phase}, {tokens} tokens, {rounds} rounds")
    for variant, peak, (loss, gradients) in zip(variants, peaks, equality):
        ratio = median(times[variant.name]) / median(times[reference.name])
        print(
            f"  {variant.name:<40} time {ratio:.2f}  peak memory {peak / peaks[0]:.2f}  "
            f"difference of loss {loss:.0e}, of gradients {gradients:.0e}",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=list(GRIDS), choices=GRIDS)
    parser.add_argument("--phases", type=int, nargs="+", default=[2, 1], choices=(1, 2))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compile", action="store_true", help="add a row with --compile")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for phase in args.phases:
        for tokens in args.tokens:
            measure(phase, tokens, args.rounds, args.compile)


if __name__ == "__main__":
    cli.run(main)
