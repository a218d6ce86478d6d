"""The optimizer's states and the moving average in a checkpoint, in one file per process that holds a part of them.

A tensor is named `parameter:start:state` and holds a range of the flattened parameter, from element `start` on.
Whatever engine and number of processes wrote the files, a process reads the ranges that it needs from all of them.

bitsandbytes quantises blocks of the tensors that it steps on. Its states are stored whole, under the parameter at the
beginning of each tensor, so that only the same engine on the same number of processes can read them.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError, safe_open
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from c2r import InputError

#: AdamW's states with one element per element of the parameter.
MOMENTS = ("exp_avg", "exp_avg_sq")

Parameters = Mapping[str, torch.nn.Parameter]

# ------------------------------------------------------------------------------------------------------------- ranges


@dataclass(frozen=True)
class Range:
    """A range of a flattened parameter in a tensor of this process."""

    name: str  #: of the parameter
    numel: int  #: elements of the whole parameter
    start: int  #: first element of the range
    length: int
    held: torch.Tensor  #: the tensor: the parameter itself, or a flat partition of many parameters
    offset: int = 0  #: place of the range in the flattened tensor


def stepped_ranges(optimizer: Any, parameters: Parameters) -> list[Range]:
    """Return where this process's optimizer steps on which parameters; `held` are the keys of its states.

    Args:
        optimizer: prepared.
        parameters: {name: parameter} of all that it steps on.
    """
    zero = optimizer.optimizer  # of AcceleratedOptimizer or DeepSpeedOptimizerWrapper
    ranges = []
    for name, parameter in parameters.items():
        numel, start, length = _own_range(parameter)
        if hasattr(zero, "fp32_partitioned_groups_flat"):  # ZeRO-3
            group, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
            ranges.append(Range(name, numel, start, length, zero.fp32_partitioned_groups_flat[group], offset))
        elif hasattr(zero, "single_partition_of_fp32_groups"):  # ZeRO-2
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is not None:  # otherwise another process steps on it
                part, place = mapping.lp_fragment_address, mapping.hp_fragment_address
                held = zero.single_partition_of_fp32_groups[mapping.param_group_index]
                ranges.append(Range(name, numel, part.start, part.numel, held, place.start))
        else:
            ranges.append(Range(name, numel, start, length, parameter))
    return ranges


def _own_range(parameter):
    """Return (elements of the whole parameter, first element of this process's part, elements of the part)."""
    if isinstance(parameter, DTensor):
        shape, offset = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        row = parameter.shape[1:].numel()  # FSDP2 splits the first dimension
        return parameter.numel(), offset[0] * row, shape[0] * row
    if hasattr(parameter, "ds_tensor"):  # ZeRO-3 cuts the flattened parameter, and pads the last part
        size = parameter.ds_tensor.ds_numel
        start = torch.distributed.get_rank(parameter.ds_process_group) * size
        return parameter.ds_numel, start, max(0, min(size, parameter.ds_numel - start))
    return parameter.numel(), 0, parameter.numel()


def _flat(tensor):
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).view(-1)


# --------------------------------------------------------------------------------------------------- save and load


def optimizer_shard(optimizer: Any, parameters: Parameters) -> dict[str, torch.Tensor]:
    """Return this process's part of an optimizer's states, on the CPU, as `load_optimizer` reads it.

    Args:
        optimizer: prepared.
        parameters: {name: parameter} of all that it steps on.

    Raises:
        RuntimeError: the optimizer has states, but none of a parameter.
    """
    base, shard = _base(optimizer), {}
    for part in stepped_ranges(optimizer, parameters) if has_states(optimizer) else []:
        if part.length == 0 and _quantises(base):  # a parameter with fewer rows than processes: it has no states here
            continue
        if part.held not in base.state:
            raise RuntimeError(f"the optimizer has no states of {part.name}")
        for name, value in base.state[part.held].items():
            if name in MOMENTS:
                if part.length == 0:  # of a parameter with fewer elements than processes
                    continue
                value = _flat(value)[part.offset : part.offset + part.length]
            elif _quantises(base) and (part.offset > 0 or name.startswith("qmap")):  # the tables are constants
                continue
            shard[f"{part.name}:{part.start}:{name}"] = _stored(value)
    return shard


def has_states(optimizer: Any) -> bool:
    """Return True if a prepared optimizer has taken a step."""
    return bool(_base(optimizer).state)


def shard_files(checkpoint: Path, names: Iterable[str], kind: str) -> list[Path]:
    """Return the files of a kind, "optimizer" or "ema", among the names of a checkpoint's files."""
    return [checkpoint / name for name in sorted(names) if name.startswith(f"{kind}-")]


def load_optimizer(files: list[Path], optimizer: Any, parameters: Parameters):
    """Fill an optimizer's states from a checkpoint.

    Args:
        files: those of all processes that saved it.
        optimizer, parameters: see `optimizer_shard`.

    Raises:
        InputError: a file is damaged, or its states do not fit the parameters.
    """
    base = _base(optimizer)
    base.state.clear()
    with _Shards(files) as shards:
        for part in stepped_ranges(optimizer, parameters):
            if _quantises(base):
                if part.offset == 0 and part.length > 0:
                    base.init_state(base.param_groups[0], part.held, 0, 0)
                    for name, value in base.state[part.held].items():
                        if not name.startswith("qmap"):
                            base.state[part.held][name] = shards.whole(part, name, like=value)
                continue
            state = base.state.setdefault(part.held, {})
            for name in MOMENTS:
                if name not in state:
                    # fp32 also where the weight is bf16, see `SplitWeights`.
                    state[name] = torch.zeros_like(part.held, dtype=torch.float32)
                _flat(state[name])[part.offset : part.offset + part.length].copy_(shards.range(part, name))
            state["step"] = shards.whole(part, "step", like=torch.zeros((), device=part.held.device))


def ema_shard(ema: EMAModel, parameters: Parameters) -> dict[str, torch.Tensor]:
    """Return this process's part of the average, on the CPU, as `load_ema` reads it.

    Args:
        ema: average of the parameters.
        parameters: {name: parameter} of the module that trains, prepared and unwrapped.
    """
    return {
        f"{part.name}:{part.start}:average": _stored(_flat(part.held)[: part.length])
        for part in _averaged_ranges(ema, parameters)
        if part.length > 0
    }


def load_ema(files: list[Path], ema: EMAModel, parameters: Parameters):
    """Fill the average from a checkpoint.

    Args:
        files: those of all processes that saved it.
        ema, parameters: see `ema_shard`.

    Raises:
        InputError: a file is damaged, or its average does not fit the parameters.
    """
    with _Shards(files) as shards:
        for part in _averaged_ranges(ema, parameters):
            _flat(part.held)[: part.length].copy_(shards.range(part, "average"))


def _averaged_ranges(ema, parameters):
    pairs = zip(parameters.items(), ema.shadow_params, strict=True)
    return [Range(name, *_own_range(parameter), held=shadow) for (name, parameter), shadow in pairs]


def _base(optimizer):
    """Return torch's or bitsandbytes' optimizer below the wrappers of Accelerate and DeepSpeed."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _quantises(base):
    return hasattr(base, "init_state")  # bitsandbytes


def _stored(value):
    # Copied: ranges of one tensor share memory, which safetensors refuses.
    return torch.as_tensor(value).detach().to("cpu", copy=True).contiguous()


class _Shards:
    """The tensors in some files of a checkpoint."""

    def __init__(self, files):
        self._files, self._stack = files, ExitStack()
        self.found = defaultdict(list)  # {(parameter, state): [(start, tensor to be read), ...], by start}

    def __enter__(self):
        with self._stack:
            self._open_files()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *exception):
        self._stack.close()

    def _open_files(self):
        for path in self._files:
            try:
                file = self._stack.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise InputError(f"{path}: cannot be read ({error}); resume from an earlier checkpoint") from None
            for key in file.keys():  # noqa: SIM118, it is no dict
                name, start, state = (*key.split(":"), "", "")[:3]
                if not start.isdecimal():
                    raise InputError(f"{path}: has an unknown tensor {key}; resume from an earlier checkpoint")
                self.found[name, state].append((int(start), file.get_slice(key)))
        for stored in self.found.values():
            stored.sort(key=lambda entry: entry[0])

    def range(self, part, state):
        """Return a range of a state in fp32, joined from the ranges stored."""
        pieces, position, stop, end = [], part.start, part.start + part.length, 0
        for start, stored in self.found[part.name, state]:
            if len(stored.get_shape()) != 1 or stored.get_dtype() != "F32":
                raise self._unfit(part, state, f"is {stored.get_dtype()} {tuple(stored.get_shape())}, not flat fp32")
            end = start + stored.get_shape()[0]
            if start <= position < min(end, stop):
                pieces.append(stored[position - start : min(end, stop) - start])
                position = min(end, stop)
        if position < stop or end != part.numel:
            raise self._unfit(part, state, f"does not have {part.numel} elements")
        return torch.cat(pieces) if pieces else torch.empty(0)

    def whole(self, part, state, like):
        """Return a state that is not cut, like `like` in type, dtype, shape and device."""
        found = self.found[part.name, state]
        if not found:
            raise self._unfit(part, state, "is missing")
        # Every range of a parameter has been stepped on as often as the others.
        value, expected = dict(found).get(part.start, found[0][1])[...], torch.as_tensor(like)
        if value.dtype != expected.dtype or value.shape != expected.shape:
            wrong = f"is {value.dtype} {tuple(value.shape)}, not {expected.dtype} {tuple(expected.shape)}"
            raise self._unfit(part, state, wrong)
        return value.to(like.device) if isinstance(like, torch.Tensor) else type(like)(value)

    def _unfit(self, part, state, problem):
        return InputError(
            f"{self._files[0].parent if self._files else 'the checkpoint'}: does not fit the model, {state} of "
            f"{part.name} {problem}; resume from an earlier checkpoint"
        )
