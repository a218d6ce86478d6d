"""How much device memory a run needs, by arithmetic: before it is started, and before any weight is read.

The constants are fitted to simulated 480x832x81 steps of Wan 2.1 (1.3B and 14B, both phases), which the formula meets
within 15 %; a card shows 1 to 3 GiB more than what is allocated.
"""

from dataclasses import dataclass

# Tensors that one block keeps for its own backward pass, in units of (tokens x width) of a bf16 number: of the model's
# width D, of the feed-forward width, and of D once more for a control block's projector.
KEPT_WIDTH, KEPT_FFN, KEPT_PROJECTOR = 30, 3, 4

# Blocks whose whole weights a sharding engine holds at once: the one that runs, and those that are fetched ahead.
GATHERED_BLOCKS = 2


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device at the peak of a step."""

    weights: float  #: trainable and frozen ones
    optimizer: float  #: AdamW's moments, the low bits of `--weight_storage bf16`, the average of `--ema_decay`
    gradients: float  #: as far as they live at the peak
    activations: float

    @property
    def total(self):
        return self.weights + self.optimizer + self.gradients + self.activations


def estimate_memory(args, config, *, trainable, frozen, latent_grid, sharding=None, num_processes=1):
    """Memory of one device at the peak of a training step.

    Args:
        args: has train_batch_size, gradient_accumulation_steps, gradient_checkpointing, mixed_precision, optimizer,
            weight_storage and ema_decay.
        config: the backbone's, a dict.
        trainable, frozen: numbers of parameters; with frozen ones it is phase 2.
        latent_grid: (T, h, w) of the latents.
        sharding: how weights and states are split: None, "zero2", "zero3", "zero3_offload" or "fsdp2".
        num_processes: over how many; without sharding more than one is DDP.

    Returns:
        `MemoryEstimate`.
    """
    frozen_bytes = 2 if args.mixed_precision == "bf16" else 4
    weight_bytes, low_bytes = (2, 2) if args.weight_storage == "bf16" else (4, 0)
    moment_bytes = 2 if args.optimizer == "adamw8bit" else 8
    state_bytes = low_bytes + moment_bytes
    weights = trainable * weight_bytes + frozen * frozen_bytes
    states, gradients = trainable * state_bytes, trainable * weight_bytes
    average = trainable * 4 if args.ema_decay is not None else 0
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
    if (
        args.gradient_accumulation_steps > 1 or num_processes > 1 or sharding is not None
    ):  # gradients live all the time
        return MemoryEstimate(weights, states, gradients, saved + block_activations)
    # The peak is where the backward pass starts, and all block inputs live, or where it ends, and all gradients do.
    if saved >= gradients:
        return MemoryEstimate(weights, states, 0, saved + block_activations)
    return MemoryEstimate(weights, states, gradients, block_activations)


def _activations(args, config, grid, with_projector):
    """Bytes of what the blocks keep from the forward pass, and of the one that is computed again."""
    patches = [size // patch for size, patch in zip(grid, config["patch_size"])]
    tokens = args.train_batch_size * patches[0] * patches[1] * patches[2]
    width = config["num_attention_heads"] * config["attention_head_dim"]
    number = 2 if args.mixed_precision == "bf16" else 4
    block = tokens * number * (width * (KEPT_WIDTH + KEPT_PROJECTOR * with_projector) + config["ffn_dim"] * KEPT_FFN)
    if args.gradient_checkpointing:
        return tokens * number * width * config["num_layers"], block
    return block * (config["num_layers"] - 1), block
