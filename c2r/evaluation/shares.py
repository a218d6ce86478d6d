"""Divide work among processes whose model may be sharded."""

from accelerate import Accelerator


def equal_share(count: int, accelerator: Accelerator) -> list[int]:
    """Return the positions that this process works on: equally many on every process.

    With fewer forward passes on one process than on another, the collectives of a sharded model would hang. The last
    shares are therefore filled up with positions from `count` on. At these positions the caller works on any item and
    discards the result.
    """
    per_process = -(-count // accelerator.num_processes)
    first = accelerator.process_index * per_process
    return list(range(first, first + per_process))
