"""AdamW, its schedule, and `--weight_storage bf16`, which halves weights and gradients and loses no update."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from c2r import InputError
from c2r.models.adversary import DomainClassifier

# The classifier starts from random weights and must learn as fast as the samples that it judges change.
CLASSIFIER_LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW's settings."""

    learning_rate: float
    optimizer: str = "adamw"  #: or "adamw8bit"
    weight_storage: str = "fp32"  #: or "bf16"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    epsilon: float = 1e-8

    @classmethod
    def of(cls, args: Namespace) -> "OptimizerSettings":
        """Return the settings that a script's options give."""
        return cls(
            learning_rate=args.learning_rate,
            optimizer=args.optimizer,
            weight_storage=args.weight_storage,
            betas=(args.adam_beta1, args.adam_beta2),
            weight_decay=args.adam_weight_decay,
            epsilon=args.adam_epsilon,
        )


def build_optimizer(
    module: torch.nn.Module,
    settings: OptimizerSettings,
    device: torch.device,
    domain_classifier: DomainClassifier | None = None,
    adamw_8bit_class: Callable[[], type[torch.optim.Optimizer]] | None = None,
) -> torch.optim.Optimizer:
    """Build AdamW over the trainable parameters. Call it before DDP is built: bf16 storage changes their dtypes.

    Args:
        module: the part that trains, in fp32. With bf16 storage its trainable weights become bf16, except those under
            a name in its `_keep_in_fp32_modules`.
        settings: see `OptimizerSettings`.
        device: device that the module is on or will be moved to.
        domain_classifier: trains beside the module, in fp32, at its own learning rate and on the same schedule.
        adamw_8bit_class: gives the class for `adamw8bit`; None: `adamw_8bit`.

    Raises:
        InputError: bitsandbytes is missing, or a weight is beyond the range of bf16.
        ValueError: bf16 storage of a module that is not in fp32.
    """
    options: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": settings.betas,
        "weight_decay": settings.weight_decay,
        "eps": settings.epsilon,
    }
    if settings.optimizer == "adamw8bit":
        cls = (adamw_8bit_class or adamw_8bit)()
    else:
        cls, options["fused"] = torch.optim.AdamW, device.type in ("cuda", "cpu")
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    groups: list[dict[str, Any]] = [{"params": list(trainable.values())}]
    if domain_classifier is not None:
        groups.append({"params": list(domain_classifier.parameters()), "lr": CLASSIFIER_LEARNING_RATE})
    if settings.weight_storage == "fp32":
        return cls(groups, **options)
    kept = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    optimizer = type(f"Split{cls.__name__}", (SplitWeights, cls), {})(groups, **options)
    for name, parameter in trainable.items():
        if kept.isdisjoint(name.split(".")):
            optimizer.split(name, parameter, device)
    return optimizer


def adamw_8bit() -> type[torch.optim.Optimizer]:
    """Return bitsandbytes' AdamW, which also steps on weights that FSDP2 has split.

    Raises:
        InputError: bitsandbytes is not installed.
    """
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise InputError(
            "--optimizer adamw8bit: needs bitsandbytes; pip install bitsandbytes==0.50.2, or give --optimizer adamw"
        ) from error
    return type("AdamW8bit", (LocalShards, AdamW8bit), {})


def build_lr_scheduler(optimizer: torch.optim.Optimizer, args: Namespace) -> LambdaLR:
    """Build diffusers' schedule `--lr_scheduler`, which counts optimizer steps; step n of a warm-up of w has n / w.

    diffusers starts a warm-up at 0, and the first step would train nothing.
    """
    warmup = args.lr_warmup_steps if args.lr_scheduler != "constant" else 0
    schedule = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=warmup, num_training_steps=args.max_train_steps
    )
    factor_after_warmup = schedule.lr_lambdas[0]  # the same for all parameter groups

    def factor(steps_done):
        return (steps_done + 1) / warmup if steps_done < warmup else factor_after_warmup(steps_done)

    return LambdaLR(optimizer, factor)


def set_schedule(lr_scheduler: LambdaLR, global_step: int):
    """Put a new schedule where a run resumes: rate, shape and length are those of the command line."""
    lr_scheduler.last_epoch = global_step
    factors = [factor(global_step) for factor in lr_scheduler.lr_lambdas]
    lr_scheduler._last_lr = [lr * factor for lr, factor in zip(lr_scheduler.base_lrs, factors)]
    for group, lr in zip(lr_scheduler.optimizer.param_groups, lr_scheduler._last_lr):
        group["lr"] = lr


# ------------------------------------------------------------------------------------- weights that FSDP2 has split
class LocalShards:
    """Mixin for an optimizer of plain tensors: steps on this process's part of each parameter, also under FSDP2.

    `param_groups` and `state` refer to the parameters. A part is a plain tensor in the parameter's memory; its
    moments are quantised in blocks of their own.
    """

    def step(self, closure=None):
        if not any(isinstance(p, DTensor) for group in self.param_groups for p in group["params"]):
            return super().step(closure)
        loss = None if closure is None else closure()
        groups = self.param_groups
        try:
            for group in groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._step_part(group, parameter)
        finally:
            self.param_groups = groups
        return loss

    def _step_part(self, group, parameter):
        part = _local(parameter).detach()
        if part.numel() == 0:  # the parameter has fewer rows than there are processes
            return
        part.grad = _local(parameter.grad)
        self.state[part] = self.state[parameter]
        self.param_groups = [group | {"params": [part]}]
        super().step()
        self.state[parameter] = self.state.pop(part)

    def init_state(self, group, parameter, group_index, index):
        """Create the states of a parameter's part; see bitsandbytes."""
        part = _local(parameter)
        super().init_state(group, part, group_index, index)
        if part is not parameter:
            self.state[parameter] = self.state.pop(part)


def _local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# ------------------------------------------------------------------------------------------------ bf16 weight storage
def split_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split fp32 into the nearest bf16, ties away from zero, and the 16 bits that bf16 lacks.

    Args:
        weight: fp32, any shape. From 3.396e38 on the bf16 is infinite.

    Returns:
        high bf16 and low int16, of the same shape. `merge_weight` restores every bit, also of a NaN.
    """
    bits = weight.view(torch.int32)
    # bits = 2^16·high + low with low in [−2^15, 2^15): the lower half read as a signed number carries into the upper.
    low = bits.to(torch.int16)
    return ((bits - low) >> 16).to(torch.int16).view(torch.bfloat16), low


def merge_weight(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """Undo `split_weight`: bf16 and the low 16 bits to fp32."""
    return ((high.view(torch.int16).to(torch.int32) << 16) + low).view(torch.float32)


class SplitWeights:
    """Mixin for an optimizer whose parameters are bf16 in the module and whose low 16 bits are in `low_bits`.

    A step is the fp32 optimizer's own, for one parameter after another; each is merged to fp32 for its step alone.
    `param_groups` and `state` refer to the module's parameters, and the moments equal those of the fp32 optimizer.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.low_bits: dict[torch.nn.Parameter, torch.Tensor] = {}  # int16, of the parameter's shape

    @torch.no_grad()
    def split(self, name: str, parameter: torch.nn.Parameter, device: torch.device) -> None:
        """Store a parameter of this optimizer as bf16, its low bits on the device that the module will be moved to.

        Raises:
            InputError: a value is not finite in bf16.
            ValueError: the parameter is not fp32.
        """
        if parameter.dtype != torch.float32:
            raise ValueError(f"{name} is {parameter.dtype}: only fp32 can be split")
        high, low = split_weight(parameter.data)
        if not high.isfinite().all():
            raise InputError(f"--weight_storage bf16: {name} is not finite in bf16; give --weight_storage fp32")
        parameter.grad = None
        parameter.data, self.low_bits[parameter] = high, low.to(device)

    def step(self, closure=None):
        loss = None if closure is None else closure()
        groups = self.param_groups
        try:
            for group in groups:
                self._step_whole(group, [p for p in group["params"] if p not in self.low_bits])
                for parameter in group["params"]:
                    if parameter in self.low_bits and parameter.grad is not None:
                        self._step_split(group, parameter)
        finally:
            self.param_groups = groups
        return loss

    def _step_whole(self, group, parameters):
        if parameters:
            self.param_groups = [group | {"params": parameters}]
            super().step()

    @torch.no_grad()
    def _step_split(self, group, parameter):
        # The step is taken on a copy: a parameter whose dtype changes loses the autograd node that carries DDP's
        # hooks, and its gradients would no longer be averaged.
        whole = merge_weight(parameter.detach(), self.low_bits[parameter])
        whole.grad = parameter.grad.float()
        self.state[whole] = self.state[parameter]
        try:
            self._step_whole(group, [whole])
        finally:
            del self.state[whole]
        high, low = split_weight(whole)
        parameter.copy_(high)
        self.low_bits[parameter].copy_(low)

    def load_state_dict(self, state_dict):
        """Load the options of a state dict.

        Raises:
            NotImplementedError: it holds moments, which torch would cast to bf16. Fill `state` instead.
        """
        if state_dict["state"]:
            raise NotImplementedError("moments would be cast to bf16; fill optimizer.state instead")
        super().load_state_dict(state_dict)


def exact_state_dict(module: torch.nn.Module, optimizer: Any = None) -> dict[str, torch.Tensor]:
    """Return a module's state dict in fp32 also where `--weight_storage bf16` has split a weight.

    Args:
        module: the one that `build_optimizer` was given, or a part of it.
        optimizer: from `build_optimizer`, also in Accelerate's wrapper; None for a module without one.

    Returns:
        {name: tensor}. Merged weights are on the CPU; the others share the module's memory.
    """
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    low_bits = getattr(optimizer, "low_bits", {})
    return {
        name: merge_weight(tensor.detach(), low_bits[tensor]).cpu() if tensor in low_bits else tensor.detach()
        for name, tensor in module.state_dict(keep_vars=True).items()
    }
