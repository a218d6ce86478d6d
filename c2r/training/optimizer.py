"""AdamW, its schedule, and `--weight_storage bf16`: weights and gradients of half the size, and no update is lost."""

import torch
from diffusers.optimization import get_scheduler

from c2r import InputError

# Of the domain classifier: it has to keep up with what it judges, and starts from nothing.
CLASSIFIER_LEARNING_RATE = 1e-3


def build_optimizer(module, args, device, domain_classifier=None):
    """AdamW over the trainable parameters. Call it before DDP is built: bf16 storage changes the module's dtypes.

    Args:
        module: what trains, in fp32; with `--weight_storage bf16` its weights are bf16 afterwards, except those under
            a name in its `_keep_in_fp32_modules`.
        args: has optimizer, weight_storage, learning_rate, adam_beta1, adam_beta2, adam_weight_decay, adam_epsilon.
        device: where the module is or will be.
        domain_classifier: trains along, in fp32 and at a learning rate of its own, under the same schedule.

    Raises:
        InputError: bitsandbytes is missing, or a weight is beyond the range of bf16.
        ValueError: bf16 storage of a module that is not in fp32.
    """
    options = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "weight_decay": args.adam_weight_decay,
        "eps": args.adam_epsilon,
    }
    if args.optimizer == "adamw8bit":
        cls = adamw_8bit()
    else:
        cls, options["fused"] = torch.optim.AdamW, device.type in ("cuda", "cpu")
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    groups = [{"params": list(trainable.values())}]
    if domain_classifier is not None:
        groups.append({"params": list(domain_classifier.parameters()), "lr": CLASSIFIER_LEARNING_RATE})
    if args.weight_storage == "fp32":
        return cls(groups, **options)
    kept = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    optimizer = type(f"Split{cls.__name__}", (SplitWeights, cls), {})(groups, **options)
    for name, parameter in trainable.items():
        if kept.isdisjoint(name.split(".")):
            optimizer.split(name, parameter, device)
    return optimizer


def adamw_8bit():
    """bitsandbytes' AdamW.

    Raises:
        InputError: it is not installed.
    """
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise InputError(
            "--optimizer adamw8bit: needs bitsandbytes; pip install bitsandbytes==0.50.2, or take --optimizer adamw"
        ) from error
    return AdamW8bit


def build_lr_scheduler(optimizer, args):
    """The schedule `--lr_scheduler` of diffusers; it counts optimizer steps."""
    return get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
    )


# ------------------------------------------------------------------------------------------------ bf16 weight storage
def split_weight(weight):
    """Split fp32 into the nearest bf16, ties away from zero, and the 16 bits that it lacks.

    Args:
        weight: fp32, any shape. From 3.396e38 on the bf16 is infinite.

    Returns:
        high bf16, low int16, of the same shape. `merge_weight` gives back every bit, those of a NaN too.
    """
    bits = weight.view(torch.int32)
    # bits = 2^16·high + low with low in [−2^15, 2^15): the lower half read as a signed number carries into the upper.
    low = bits.to(torch.int16)
    return ((bits - low) >> 16).to(torch.int16).view(torch.bfloat16), low


def merge_weight(high, low):
    """The fp32 that `split_weight` has split."""
    return ((high.view(torch.int16).to(torch.int32) << 16) + low).view(torch.float32)


class SplitWeights:
    """Mixin for an optimizer whose parameters are bf16 in the module; what they lack of fp32 is in `low_bits`.

    A step is the fp32 optimizer's own, for one parameter after another, each put together for the time of its step.
    `param_groups` and `state` name the module's parameters; the moments are what the fp32 optimizer would keep.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.low_bits = {}  # by parameter: int16 of its shape

    @torch.no_grad()
    def split(self, name, parameter, device):
        """Make a parameter of this optimizer bf16, its low bits on the device that the module will be moved to.

        Raises:
            InputError: a value is not finite in bf16.
            ValueError: it is not fp32.
        """
        if parameter.dtype != torch.float32:
            raise ValueError(f"{name} is {parameter.dtype}: only fp32 can be split")
        high, low = split_weight(parameter.data)
        if not high.isfinite().all():
            raise InputError(f"--weight_storage bf16: {name} is not finite in bf16; take --weight_storage fp32")
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
        # A stand-in is stepped on: with another dtype put into it, the parameter would lose the autograd node that
        # DDP's hooks are on, and its gradients would no longer be averaged.
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
        """Take over the options of a state dict.

        Raises:
            NotImplementedError: it holds moments: torch would cast them to the parameters' bf16. Fill `state`.
        """
        if state_dict["state"]:
            raise NotImplementedError("moments would be cast to bf16; fill optimizer.state instead")
        super().load_state_dict(state_dict)


def exact_state_dict(module, optimizer):
    """The module's state dict with fp32 where `--weight_storage bf16` has split a weight.

    Args:
        module: what `build_optimizer` was given, or a part of it, with the weights that the last step has left.
        optimizer: of `build_optimizer`, also in Accelerate's wrapper; None for a module without one.

    Returns:
        {name: tensor}. What has been put together is on the CPU; all else shares the module's memory.
    """
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    low_bits = getattr(optimizer, "low_bits", {})
    return {
        name: merge_weight(tensor.detach(), low_bits[tensor]).cpu() if tensor in low_bits else tensor.detach()
        for name, tensor in module.state_dict(keep_vars=True).items()
    }
