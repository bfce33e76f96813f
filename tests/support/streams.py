"""Data sets for loading processes of every start method, and what a rank read of them.

A process that is spawned imports this module by its name, and torch beside it, which is slow enough.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

NUM_EXAMPLES, MICRO = 96, 4


class Examples(Dataset[Any]):
    """Regression data whose first number of each input is its place."""

    def __init__(self) -> None:
        self.x = torch.randn(NUM_EXAMPLES, 6, generator=torch.Generator().manual_seed(3))
        self.x[:, 0] = torch.arange(NUM_EXAMPLES) / NUM_EXAMPLES
        self.y = self.x.sin().sum(1, keepdim=True)

    def __len__(self) -> int:
        return NUM_EXAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


class Stream(IterableDataset[Any]):
    """A rank's share of the examples, dealt to the loading processes by micro-batch; on the second rank with a fault.

    Args:
        rank, size: whose share.
        fault: one of ``STREAM_FAULTS`` of ``support.loading``, or "none".
    """

    def __init__(self, rank: int, size: int, fault: str) -> None:
        self.rank, self.size = (0, 1) if fault == "same" else (rank, size)
        self.fault = fault if rank == 1 else "none"

    def __iter__(self) -> Iterator[Any]:
        process = get_worker_info()
        first, stride = (0, 1) if process is None else (process.id, process.num_workers)
        data, share = Examples(), list(range(self.rank, NUM_EXAMPLES, self.size))
        share = share[: len(share) // 2] if self.fault == "shorter" else share
        for number in range(first, len(share) // MICRO, stride):
            if number == 5 and self.fault == "raises":
                raise ZeroDivisionError("the sky over rank one")
            if number == 5 and self.fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            yield from (data[place] for place in share[number * MICRO : (number + 1) * MICRO])


class Read(NamedTuple):
    """What a rank read in a pass, and what it came to.

    Args:
        places: of its examples, by micro-batch.
        steps: how many there were.
        weights: at the end.
    """

    places: list[list[int]]
    steps: int
    weights: list[float]
