"""How fast this machine multiplies matrices and its ranks sum numbers: a few seconds of measurements for a plan."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist

ALL_REDUCE_BYTES = (2**12, 2**16, 2**20, 2**23)
ROUNDS = 5


def all_reduce_times(
    device: torch.device, sizes: Sequence[int] = ALL_REDUCE_BYTES, *, rounds: int = ROUNDS
) -> list[tuple[float, float]]:
    """Median seconds of an all-reduce of float32 numbers over the default group: pairs of bytes and seconds.

    All ranks must call it. The times are those of the slowest rank, the same on all ranks.

    Raises:
        RuntimeError: if there is no process group.
    """
    if not dist.is_initialized():
        raise RuntimeError("all-reduces are timed between processes: start two or more, such as with torchrun")
    timed = []
    for size in sizes:
        numbers = torch.zeros(max(size // 4, 1), device=device)
        seconds = torch.tensor(_median_seconds(partial(dist.all_reduce, numbers), device, rounds))
        seconds = seconds.to(device)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        timed.append((4.0 * numbers.numel(), float(seconds)))
    return timed


def matmul_flops(device: torch.device, *, width: int = 1024, rounds: int = ROUNDS) -> float:
    """Floating-point operations per second of a product of two square float32 matrices, from the median time."""
    left, right = (torch.randn(width, width, device=device) for _ in range(2))
    return 2 * width**3 / _median_seconds(lambda: left @ right, device, rounds)


def _median_seconds(run: Callable[[], object], device: torch.device, rounds: int) -> float:
    """The median time, after one call that is not timed and that loads kernels, makes buffers and opens connections."""
    taken = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # host sync: this is what is timed
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken[1:])
