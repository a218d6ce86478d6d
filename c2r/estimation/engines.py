"""The part of a run's memory that a training engine leaves on one device, and the engine's own buffers.

The engines' communication cannot run on the fake device, so this is arithmetic on sizes, with the engines' defaults.
"""

from dataclasses import dataclass, field

import torch
from torch import nn

from c2r.estimation.tracker import AVERAGE, FROZEN, GRADIENTS, OPTIMIZER, TRAINABLE, Recording

#: The kind of memory that an engine adds: gathered weights, and buffers for sums over processes.
ENGINE = "engine's buffers"

#: DeepSpeed's reduce_bucket_size: elements of the buffer in which gradients are summed, in the weights' dtype.
DEEPSPEED_BUCKET = 500_000_000
#: DeepSpeed's stage3_max_live_parameters: elements of whole weights that ZeRO-3 keeps at most.
ZERO3_LIVE = 1_000_000_000


@dataclass(frozen=True)
class Sizes:
    """Bytes of the weights of a run's model, of which an engine may split those that `accelerate` prepares."""

    frozen: int
    trainable: int
    count: int  #: trainable parameters
    largest_block: int  #: of the pair that runs at a time: a backbone block, with its control block if it has one
    largest_gradient: int  #: of the trainable weights in one block
    outside: int  #: of the weights outside all blocks, which FSDP2 gathers as one group
    elements: int  #: parameters in all

    @classmethod
    def of(cls, model: nn.Module) -> "Sizes":
        """Measure a model by its `_no_split_modules`, as the engines' wrapping policies do."""
        names = set(model._no_split_modules)  # type: ignore[arg-type]
        blocks = [part for part in model.modules() if type(part).__name__ in names]
        largest: dict[str, int] = {}
        for block in blocks:
            kind = type(block).__name__
            largest[kind] = max(largest.get(kind, 0), num_bytes(block))
        parameters = list(model.parameters())
        inside = {id(parameter) for block in blocks for parameter in block.parameters()}
        return cls(
            frozen=sum(bytes_of(p) for p in parameters if not p.requires_grad),
            trainable=sum(bytes_of(p) for p in parameters if p.requires_grad),
            count=sum(p.numel() for p in parameters if p.requires_grad),
            largest_block=sum(largest.values()),
            largest_gradient=max(sum(bytes_of(p) for p in b.parameters() if p.requires_grad) for b in blocks),
            outside=sum(bytes_of(p) for p in parameters if id(p) not in inside),
            elements=sum(p.numel() for p in parameters),
        )


def bytes_of(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor."""
    return tensor.numel() * tensor.element_size()


def num_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's parameters."""
    return sum(bytes_of(parameter) for parameter in module.parameters())


@dataclass(frozen=True)
class Split:
    """The part of a run's memory that one device holds."""

    factors: dict[str, float] = field(default_factory=dict)  #: share of each kind, where it is not 1
    fixed: dict[str, float] = field(default_factory=dict)  #: bytes that are there all the time
    host: float = 0.0  #: bytes on the host, of all processes of the run together

    def peak(self, recording: Recording) -> dict[str, float]:
        """Return the bytes of each kind on one device at the peak of a recording."""
        peak = recording.peak(self.factors)
        return peak | {kind: peak.get(kind, 0.0) + num_bytes for kind, num_bytes in self.fixed.items()}


def split_by(engine: str, num_processes: int, sizes: Sizes, dinov3: int = 0) -> Split:
    """Return what an engine leaves on one device.

    Args:
        engine: one of `c2r.options.ENGINES`.
        num_processes: devices that the engine splits over.
        sizes: of the model that the engine wraps.
        dinov3: bytes of the frozen model beside it, which no engine splits.
    """
    if engine == "single_gpu":
        return Split()
    if engine == "multi_gpu":
        # Gradients are views of DDP's buckets, which stay.
        return Split({GRADIENTS: 0.0}, {GRADIENTS: sizes.trainable})
    share = 1 / num_processes
    # `Recording` counts all frozen weights as one kind, DINOv3's included.
    frozen = (sizes.frozen * share + dinov3) / max(sizes.frozen + dinov3, 1)
    if engine == "fsdp2":
        # Whole at a time: the block that runs, the one fetched ahead, the group of all other weights, and the block's
        # gradients before they are split.
        gathered = 2 * sizes.largest_block + sizes.outside + sizes.largest_gradient
        return Split(
            {FROZEN: frozen, TRAINABLE: share, GRADIENTS: share, OPTIMIZER: share, AVERAGE: share},
            {ENGINE: gathered * (1 - share)},
        )
    # ZeRO steps on fp32 copies of its partitions, beside the module's own weights.
    copies, bucket = 4 * sizes.count * share, 4 * DEEPSPEED_BUCKET
    if engine == "deepspeed_zero2":
        return Split({GRADIENTS: share, OPTIMIZER: share}, {OPTIMIZER: copies, ENGINE: bucket})  # averages stay whole
    live = (sizes.frozen + sizes.trainable) * min(1.0, ZERO3_LIVE / sizes.elements)
    if engine == "deepspeed_zero3":
        # Its part of the gradients has a buffer that stays.
        factors = {FROZEN: frozen, TRAINABLE: share, GRADIENTS: 0.0, OPTIMIZER: share, AVERAGE: share}
        return Split(factors, {GRADIENTS: sizes.trainable * share, OPTIMIZER: copies, ENGINE: bucket + live})
    factors = {FROZEN: dinov3 / max(sizes.frozen + dinov3, 1)}
    factors |= dict.fromkeys((TRAINABLE, GRADIENTS, OPTIMIZER, AVERAGE), 0.0)
    # Weights, gradients and AdamW's moments beside the copies.
    host = sizes.frozen + sizes.trainable * 2 + 4 * sizes.count + 8 * sizes.count
    return Split(factors, {ENGINE: bucket + live}, host)


# ------------------------------------------------------------------------------------------------------- communication

#: Bytes that a link moves in a second in one direction, by specification; none is measured.
#: NVLink 4 of an H100 SXM: 900 GB/s in both directions together.
NVLINK = 450e9
#: A network adapter of 400 Gb/s, such as InfiniBand NDR.
ADAPTER = 400e9 / 8
#: Devices that NVLink joins: those of one machine.
DEVICES_OF_A_MACHINE = 8


@dataclass(frozen=True)
class Communication:
    """The tensors that an engine moves in an optimizer step, each whole, as if it were on one device."""

    gathered: float  #: bytes of weights that every device collects from the others
    reduced: float  #: bytes of gradients that are summed over all devices, each of which gets its part
    num_processes: int

    @property
    def received(self) -> float:
        """Bytes that each device receives."""
        # Rings: of n parts a device has one, and receives n - 1.
        return (self.gathered + self.reduced) * (1 - 1 / self.num_processes)

    @property
    def nvlink_seconds(self) -> float:
        """Time within a machine."""
        return self.received / NVLINK

    def network_seconds(self, adapters: int) -> float:
        """Time between machines, each of which receives what it does not have, through a number of adapters."""
        machines = self.num_processes / DEVICES_OF_A_MACHINE
        return (self.gathered + self.reduced) * max(0.0, 1 - 1 / machines) / (adapters * ADAPTER)


def communication_of(engine: str, num_processes: int, sizes: Sizes, micro_steps: int) -> Communication:
    """Return what an engine moves in an optimizer step, in the dtypes in which the weights are stored.

    Args:
        engine: one of `c2r.options.ENGINES`.
        num_processes: number of devices.
        sizes: of the model that the engine wraps.
        micro_steps: of an optimizer step.
    """
    weights = sizes.frozen + sizes.trainable
    if engine in ("single_gpu", "multi_gpu"):  # DDP's all-reduce is a reduction, and a gathering of its result
        return Communication(sizes.trainable, sizes.trainable, num_processes)
    if engine == "deepspeed_zero2":
        return Communication(sizes.trainable, micro_steps * sizes.trainable, num_processes)
    # ZeRO-3 and FSDP2 gather all weights for the forward and again for the backward pass.
    return Communication(micro_steps * 2 * weights, micro_steps * sizes.trainable, num_processes)
