"""Device memory of a training step, computed before the run starts and before any weight is read.

The constants are fitted to simulated steps of Wan 2.1 at 480x832x81 (1.3B and 14B, both phases). The estimates are
within 15 % of these. A card shows 1 to 3 GiB more, because the estimates count allocated memory only.
"""

import math
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Numbers of tensors that one block keeps for its backward pass: of tokens x the model's width, of tokens x the
# feed-forward width, and of tokens x the model's width for a control block's projector.
KEPT_WIDTH, KEPT_FFN, KEPT_PROJECTOR = 30, 3, 4

# Blocks whose whole weights a sharding engine holds at once: the one that runs and those fetched ahead.
GATHERED_BLOCKS = 2


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device at the peak of a step."""

    weights: float  #: trainable and frozen
    optimizer: float  #: AdamW's moments, the low bits of `--weight_storage bf16`, the average of `--ema_decay`
    gradients: float  #: those that exist at the peak
    activations: float  #: kept from the forward pass for the backward pass

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return self.weights + self.optimizer + self.gradients + self.activations


def estimate_memory(
    args: Namespace,
    config: dict[str, Any],
    *,
    trainable: int,
    frozen: int,
    latent_grid: Sequence[int],
    sharding: str | None = None,
    num_processes: int = 1,
) -> MemoryEstimate:
    """Compute the memory of one device at the peak of a training step.

    Args:
        args: options of a training script; train_batch_size, gradient_accumulation_steps, gradient_checkpointing,
            mixed_precision, optimizer, weight_storage and ema_decay count.
        config: the backbone's.
        trainable, frozen: numbers of parameters. Frozen ones mean phase 2, whose control blocks have projectors.
        latent_grid: (T, h, w) of the latents.
        sharding: None, "zero2", "zero3", "zero3_offload" or "fsdp2".
        num_processes: processes over which `sharding` splits weights and states; without sharding they are DDP's.
    """
    frozen_bytes = 2 if args.mixed_precision == "bf16" else 4
    weight_bytes, low_bytes = (2, 2) if args.weight_storage == "bf16" else (4, 0)
    moment_bytes = 2 if args.optimizer == "adamw8bit" else 8
    state_bytes = low_bytes + moment_bytes
    weights = float(trainable * weight_bytes + frozen * frozen_bytes)
    states, gradients = float(trainable * state_bytes), float(trainable * weight_bytes)
    average = float(trainable * 4 if args.ema_decay is not None else 0)
    if sharding is not None:
        # ZeRO keeps fp32 copies of its own partitions beside the module's weights.
        states = (states + (trainable * 4 if sharding.startswith("zero") else 0)) / num_processes
        gradients /= num_processes
        if sharding != "zero2":
            width = config["num_attention_heads"] * config["attention_head_dim"]
            block = 8 * width**2 + 2 * width * config["ffn_dim"]  # two attentions of four matrices, and the MLP
            weights = weights / num_processes + GATHERED_BLOCKS * block * 4
            average /= num_processes
        if sharding == "zero3_offload":
            weights, states, gradients, average = GATHERED_BLOCKS * block * 4, 0, 0, 0
    states += average
    saved, block_activations = _activations(args, config, latent_grid, with_projector=frozen > 0)
    gradients_stay = args.gradient_accumulation_steps > 1 or num_processes > 1 or sharding is not None
    if gradients_stay:
        return MemoryEstimate(weights, states, gradients, saved + block_activations)
    # The peak is at the start of the backward pass, with all block inputs, or at its end, with all gradients.
    if saved >= gradients:
        return MemoryEstimate(weights, states, 0, saved + block_activations)
    return MemoryEstimate(weights, states, gradients, block_activations)


def _activations(args, config, latent_grid, with_projector):
    """Return the bytes kept from the forward pass of all blocks, and those of the block in the backward pass."""
    patches = [size // patch for size, patch in zip(latent_grid, config["patch_size"])]
    tokens = args.train_batch_size * math.prod(patches)
    width = config["num_attention_heads"] * config["attention_head_dim"]
    number_bytes = 2 if args.mixed_precision == "bf16" else 4
    kept_width = KEPT_WIDTH + KEPT_PROJECTOR * with_projector
    block = tokens * number_bytes * (width * kept_width + config["ffn_dim"] * KEPT_FFN)
    if args.gradient_checkpointing:
        return tokens * number_bytes * width * config["num_layers"], block
    return block * (config["num_layers"] - 1), block
