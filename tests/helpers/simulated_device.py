"""A second device for machines without one: tensors on `sim` hold CPU tensors, and operators refuse to mix devices.

Torch treats `sim` as it treats CUDA: it is the machine's accelerator, which Diffusers chooses by itself and Accelerate
by the environment variable ACCELERATE_TORCH_DEVICE. Every operator runs its CPU kernel on the tensors inside, so whole
commands run with true values. A tensor that was left on the CPU raises `MixedDevices` where CUDA raises, and autocast
casts the operators that CUDA's autocast casts.

Not simulated: CUDA's own kernels and memory, several devices, collectives, and code that asks for "cuda" by name
(pinned memory, memory figures, DeepSpeed, bitsandbytes).

`register` cannot be undone: `tests/helpers/on_simulated_device.py` calls it in a process of its own.
"""

import os
import re
import traceback
from collections import Counter
from functools import cache, partial
from pathlib import Path

import torch
from diffusers.utils.torch_utils import TorchDeviceBackend
from torch.utils._device import _device_constructors
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "sim"
CPU = torch.device("cpu")
aten = torch.ops.aten

#: Operators whose indices may be on the CPU, as CUDA allows.
INDEXING = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
    aten._unsafe_index_put.default,
}

#: Operators that need a value or a number of values on the host: CUDA's wait until the device has computed them.
WAITING = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.repeat_interleave.Tensor,
}
#: Waits of the host for the device so far, by the line of the project's code that is to blame.
waits: Counter[str] = Counter()


class MixedDevices(RuntimeError):
    """An operator was given tensors of two devices, or a generator of another device than its result's."""


# ------------------------------------------------------------------------------------------------------------- tensors


class SimulatedTensor(torch.Tensor):
    """A tensor on the simulated device; `inner` holds its values on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )
        tensor.inner = inner
        return tensor

    def __init__(self, inner):
        pass  # torch.Tensor's would take `inner` for data to copy

    def __repr__(self):
        return f"SimulatedTensor({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return run_operator(operator, *args, **kwargs or {})

    @property
    def data(self):
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, value):
        raise NotImplementedError("torch would exchange the wrapper's size and dtype, but not the tensor inside")

    # For safetensors and Accelerate, which compare addresses to find tensors that share memory.
    def data_ptr(self):
        return self.inner.data_ptr()

    def untyped_storage(self):
        return self.inner.untyped_storage()

    # Torch's own read and fill memory by pointer, and this device has none.
    def tolist(self):
        return self.detach().cpu().tolist()

    def new_tensor(self, data, *, dtype=None, device=None, requires_grad=False):
        new = torch.tensor(data, dtype=dtype or self.dtype, device=device or self.device)
        return new.requires_grad_(requires_grad)


def is_simulated(device):
    return device is not None and torch.device(device).type == NAME


def run_operator(operator, *args, **kwargs):
    """Run an operator on the tensors inside; its result is on the device if an argument, or the argument `device`, is.

    Raises:
        MixedDevices: where CUDA would raise.
        NotImplementedError: the operator changes a tensor's shape in place.
    """
    if makes_the_host_wait(operator, args, kwargs):
        waits[blamed_line()] += 1
    if torch.Tag.inplace_view in operator.tags:
        raise NotImplementedError(f"{operator}: would change the shape of the tensor inside alone")
    inner_args = map_tensors(inner_of, args)
    inner_kwargs = {name: map_tensors(inner_of, value) for name, value in kwargs.items()}
    if operator is aten.copy_.default:
        operator(*inner_args, **inner_kwargs)
        return args[0]
    tensors = list(tensors_in((args, *kwargs.values())))
    on_device = any(isinstance(tensor, SimulatedTensor) for tensor in tensors)
    if on_device and operator is not aten._to_copy.default:
        require_one_device(operator, args, kwargs)
    if kwargs.get("device") is not None:
        on_device = is_simulated(kwargs["device"])
        inner_kwargs["device"] = CPU if on_device else kwargs["device"]
    if on_device and takes_generator(operator):
        if kwargs.get("generator") is not None:
            raise MixedDevices(f"{operator}: the generator is on cpu, but the result on {NAME}:0")
        inner_kwargs["generator"] = Backend.generator
    result = KERNELS.get(operator, operator)(*inner_args, **inner_kwargs)
    if not on_device:
        return result
    wrappers = {id(tensor.inner): tensor for tensor in tensors if isinstance(tensor, SimulatedTensor)}

    def wrap(tensor):
        return wrappers[id(tensor)] if id(tensor) in wrappers else SimulatedTensor(tensor)  # in-place: an argument

    return map_tensors(wrap, result)


def convolution_backward(gradient, inputs, weight, *settings):
    """Compute a convolution's gradients in fp32: oneDNN's bf16 gradient of a depthwise kernel is uninitialised."""
    gradients = aten.convolution_backward.default(gradient.float(), inputs.float(), weight.float(), *settings)
    return tuple(None if gradient is None else gradient.to(weight.dtype) for gradient in gradients)


#: Kernels that replace the CPU's.
KERNELS = {aten.convolution_backward.default: convolution_backward}


def makes_the_host_wait(operator, args, kwargs):
    """Return True if CUDA's operator would return only after the device has done all its work."""
    if operator in WAITING:
        return True
    if operator is aten.copy_.default:
        non_blocking = kwargs.get("non_blocking", len(args) > 2 and args[2])
        return not non_blocking and isinstance(args[0], SimulatedTensor) != isinstance(args[1], SimulatedTensor)
    if operator is aten._to_copy.default:
        to, from_device = kwargs.get("device"), isinstance(args[0], SimulatedTensor)
        # To the host nothing is copied in passing: the code behind reads the copy.
        return to is not None and is_simulated(to) != from_device and (from_device or not kwargs.get("non_blocking"))
    if operator is aten.index.Tensor:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return False


def blamed_line():
    """Return the innermost line of the project on the stack."""
    frames = [f for f in traceback.extract_stack() if "/c2r/" in f.filename or "/train_phase" in f.filename]
    return f"{Path(frames[-1].filename).name}: {frames[-1].line}" if frames else "elsewhere"


def require_one_device(operator, args, kwargs):
    """Raise MixedDevices if an argument is on the CPU that CUDA's operator would refuse there."""
    if operator in INDEXING and isinstance(args[0], SimulatedTensor):
        args = (args[0], *args[2:])
    for tensor in tensors_in((args, *kwargs.values())):
        if isinstance(tensor, SimulatedTensor):
            continue
        if tensor.ndim > 0 or not (torch.Tag.pointwise in operator.tags or operator in INDEXING):
            raise MixedDevices(
                f"{operator}: expected all tensors on one device, but found {NAME}:0 and {tensor.device}, there "
                f"{tuple(tensor.shape)} {tensor.dtype}"
            )


@cache
def takes_generator(operator):
    return any(argument.name == "generator" for argument in operator._schema.arguments)


# torch.utils._pytree would do the same, ten times as slowly.
def tensors_in(values):
    """Yield the tensors in nested lists and tuples."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)


def map_tensors(function, value):
    """Apply a function to the tensors in nested lists and tuples."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(function, entry) for entry in value)
    return value


def inner_of(tensor):
    return tensor.inner if isinstance(tensor, SimulatedTensor) else tensor


# ------------------------------------------------------------------------------------------------------------ autocast


def autocast_lists():
    """Return {name of a list: operators} from the header that CUDA's autocast is built from."""
    header = (Path(torch.__file__).parent / "include/ATen/autocast_mode.h").read_text()
    lists = {}
    for name in ("LOWER_PRECISION_FP", "FP32", "FP32_SET_OPT_DTYPE", "PROMOTE"):
        macro = re.search(rf"#define AT_FORALL_{name}\(_\)((?:.*\\\n)+.*)", header)[1]
        entries = re.findall(r"_\((\w+)(?:, (\w+))?\)", macro)
        lists[name] = [getattr(getattr(aten, op), overload or "default") for op, overload in entries]
    return lists


def lower_precision(args):
    return torch.get_autocast_dtype(NAME)


def fp32(args):
    return torch.float32


def widest(args):
    """Return fp32 if one of the arguments that can be cast is in fp32, else autocast's dtype."""
    dtypes = {tensor.dtype for tensor in tensors_in(args) if can_be_cast(tensor)}
    return torch.float32 if torch.float32 in dtypes else lower_precision(args)


def can_be_cast(tensor):
    return isinstance(tensor, SimulatedTensor) and tensor.is_floating_point() and tensor.dtype != torch.float64


def run_cast(operator, dtype_of, *args, **kwargs):
    """Run an operator below autocast on arguments that are cast to `dtype_of` them."""
    with below_autocast():
        dtype = dtype_of((args, *kwargs.values()))

        def cast(tensor):
            return tensor.to(dtype) if can_be_cast(tensor) else tensor

        return operator(*map_tensors(cast, args), **{name: map_tensors(cast, v) for name, v in kwargs.items()})


def run_to_fp32(operator, *args, **kwargs):
    """Run an operator below autocast with a result in fp32, unless the caller asks for another dtype."""
    with below_autocast():
        if can_be_cast(args[0]) and kwargs.get("dtype") is None:
            kwargs["dtype"] = torch.float32
        return operator(*args, **kwargs)


def below_autocast():
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1))


# -------------------------------------------------------------------------------------------------------------- device


class Backend:
    """The module `torch.sim`, with the functions that torch, Accelerate and Diffusers call."""

    generator = torch.Generator()  #: of the device: draws without a generator leave the CPU's one alone

    def is_initialized(self):
        return True

    def is_available(self):
        return True

    def device_count(self):
        return 1

    def current_device(self):
        return 0

    def set_device(self, device):
        pass

    def synchronize(self, device=None):
        pass

    def empty_cache(self):
        pass

    def manual_seed(self, seed):
        self.generator.manual_seed(seed)

    manual_seed_all = manual_seed

    def get_rng_state(self, device=None):
        return self.generator.get_state()

    def set_rng_state(self, state, device=None):
        self.generator.set_state(state)

    def _is_in_bad_fork(self):
        return False

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]


libraries = []  #: torch drops the kernels of a library that nothing refers to


def register():
    """Add the device to this process for good."""
    _setup_privateuseone_for_python_backend(NAME, Backend())
    os.environ["ACCELERATE_TORCH_DEVICE"] = NAME
    TorchDeviceBackend._detect_device_type.cache_clear()  # Diffusers may have been imported before
    # CUDA's tensors take the place of CPU tensors within a parameter, which an optimizer may hold already. These
    # wrappers can do so by a swap alone.
    torch.__future__.set_swap_module_params_on_conversion(True)
    _device_constructors()  # caches torch's own functions, by which `with torch.device(…)` knows them
    for name in ("tensor", "as_tensor"):  # they fill memory by pointer, and this device has none
        setattr(torch, name, partial(_through_the_cpu, getattr(torch, name)))
    every, listed = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    libraries.extend((every, listed))
    every.fallback(run_operator, "PrivateUse1")
    every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    lists = autocast_lists()
    for name, dtype_of in (("LOWER_PRECISION_FP", lower_precision), ("FP32", fp32), ("PROMOTE", widest)):
        for operator in lists[name]:
            listed.impl(operator, partial(run_cast, operator, dtype_of), "AutocastPrivateUse1")
    for operator in lists["FP32_SET_OPT_DTYPE"]:
        listed.impl(operator, partial(run_to_fp32, operator), "AutocastPrivateUse1")


def _through_the_cpu(make, *args, device=None, **kwargs):
    if is_simulated(device):
        return make(*args, **kwargs).to(device)
    return make(*args, device=device, **kwargs)
