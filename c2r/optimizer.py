"""AdamW in 32 or 8 bit, over weights stored in fp32 or in bf16 without losing small updates."""

import torch
from diffusers.optimization import get_scheduler

from c2r import InputError


def build_optimizer(module, args, device):
    """AdamW over the module's trainable parameters; `--weight_storage bf16` converts them here.

    Args:
        module: what trains, in fp32, before it is wrapped by an engine (DDP's buckets have the weights' dtype).
        args: the run's options.
        device: where it will run.

    Raises:
        InputError: bitsandbytes is not installed.
    """
    options = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "weight_decay": args.adam_weight_decay,
        "eps": args.adam_epsilon,
    }
    if args.optimizer == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit as optimizer_class
        except ImportError as error:
            raise InputError("--optimizer adamw8bit: pip install bitsandbytes==0.50.2") from error
    else:
        optimizer_class = torch.optim.AdamW
        options["fused"] = device.type in ("cpu", "cuda")
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if args.weight_storage == "fp32":
        return optimizer_class(parameters, **options)
    split = type(f"SplitWeight{optimizer_class.__name__}", (_SplitWeights, optimizer_class), {})(parameters, **options)
    split.split_weights(module)
    return split


def build_lr_scheduler(optimizer, args):
    """The learning-rate schedule; it counts optimizer steps."""
    return get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
    )


def split_weight(weight):
    """(bf16, int16) of an fp32 weight: rounded to the nearest, and what rounding took away, without loss.

    A bf16 number is the upper half of the fp32 one. Rounding adds half a unit, so the rest is signed and fits int16.
    """
    bits = weight.view(torch.int32)
    high = (bits + 0x8000) >> 16
    low = bits - (high << 16)
    return high.to(torch.int16).view(torch.bfloat16), low.to(torch.int16)


def merge_weight(high, low):
    """The fp32 weight that `split_weight` was given."""
    return ((high.view(torch.int16).to(torch.int32) << 16) + low).view(torch.float32)


class _SplitWeights:
    """Mixin over an optimizer: bf16 weights in the module, their low 16 bits here, fp32 only while a weight is stepped.

    In plain bf16 a weight has 8 bits: an update of less than 1/256 of it would be rounded away.
    """

    def split_weights(self, module):
        """Convert the module's parameters, but for those that it declares to be kept in fp32."""
        keep = set(getattr(module, "_keep_in_fp32_modules", None) or ())
        self.low_bits = {}
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and not keep.intersection(name.split(".")):
                parameter.data, self.low_bits[parameter] = split_weight(parameter.data)

    @torch.no_grad()
    def step(self, closure=None):
        """One step; only one parameter at a time has its fp32 weight and gradient."""
        everything = [group["params"] for group in self.param_groups]
        try:
            for group in self.param_groups:
                group["params"] = []
            for group, parameters in zip(self.param_groups, everything):
                for parameter in parameters:
                    if parameter.grad is not None:
                        group["params"] = [parameter]
                        self._step_one(parameter)
                group["params"] = []
        finally:
            for group, parameters in zip(self.param_groups, everything):
                group["params"] = parameters

    def _step_one(self, parameter):
        if parameter not in self.low_bits:
            super().step()
            return
        grad, parameter.grad = parameter.grad, None  # autograd wants weight and gradient of one dtype
        parameter.data = merge_weight(parameter.data, self.low_bits[parameter])
        parameter.grad = grad.float()
        super().step()
        parameter.grad = None
        parameter.data, self.low_bits[parameter] = split_weight(parameter.data)
        parameter.grad = grad


def exact_state_dict(module, optimizer=None):
    """The module's state dict, with the fp32 weights that `--weight_storage bf16` keeps in two parts.

    Args:
        module: not sharded.
        optimizer: of `build_optimizer`, perhaps wrapped by Accelerate.
    """
    base = getattr(optimizer, "optimizer", optimizer)
    low_bits = getattr(base, "low_bits", {})
    return {
        name: merge_weight(tensor.detach(), low_bits[tensor]) if tensor in low_bits else tensor.detach()
        for name, tensor in module.state_dict(keep_vars=True).items()
    }
