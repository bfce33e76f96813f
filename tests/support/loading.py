"""Two ranks that read their data by loaders of several kinds and loading processes of several start methods."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, get_worker_info

from adabatch import AdaptiveBatch, Constant, GlobalOrder, Watchdog
from support.loops import loss_of, network, regression, weights
from support.ranks import RanksFailed, run_ranks

NUM_EXAMPLES, MICRO, ACCUMULATION = 96, 4, 2
KINDS = ("IterableDataset", "DistributedSampler", "GlobalOrder")
STARTS = ("fork", "spawn")
STREAM_FAULTS = {
    "raises": "an error in it",
    "killed": "a loading process that is killed",
    "shorter": "fewer examples on one rank",
    "same": "the same examples on all ranks",
}


class Examples(Dataset[Any]):
    """Regression data whose first number of each input is its place."""

    def __init__(self) -> None:
        self.x, self.y = regression(NUM_EXAMPLES).tensors
        self.x[:, 0] = torch.arange(NUM_EXAMPLES) / NUM_EXAMPLES

    def __len__(self) -> int:
        return NUM_EXAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


class Stream(IterableDataset[Any]):
    """A rank's share of the examples, dealt to the loading processes by micro-batch; on the second rank with a fault.

    Args:
        rank, size: whose share.
        fault: one of ``STREAM_FAULTS``, or "none".
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


def loader_of(kind: str, start: str, fault: str) -> Any:
    """A loader of this rank. Without a start method it reads in the process itself."""
    rank, size = dist.get_rank(), dist.get_world_size()
    processes = {} if start == "none" else {"num_workers": 2, "multiprocessing_context": start}
    if kind == "GlobalOrder":
        return GlobalOrder(Examples(), seed=3, **processes)
    if kind == "IterableDataset":
        return DataLoader(Stream(rank, size, fault), batch_size=MICRO, **processes)
    sampler: DistributedSampler[Any] = DistributedSampler(Examples(), seed=3)
    return DataLoader(Examples(), batch_size=MICRO, sampler=sampler, **processes)


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


def read(rank: int, kind: str, start: str, fault: str) -> Read:
    """One pass over the data under DDP and a watchdog."""
    torch.manual_seed(0)
    model = DistributedDataParallel(network())
    optimizer = SGD(model.parameters(), lr=0.05)
    size = Constant(MICRO * ACCUMULATION * dist.get_world_size())
    batches = AdaptiveBatch(model, optimizer, size, micro_batch_size=MICRO)
    places = []
    with Watchdog(batches, timeout=60):  # a loading process that is spawned imports torch first
        for step in batches.steps(loader_of(kind, start, fault)):
            for batch in step:
                places.append((batch[0][:, 0] * NUM_EXAMPLES).round().int().tolist())
                step.backward(loss_of(model, batch))
            optimizer.step()
            optimizer.zero_grad()
    return Read(places, batches.consumed.steps, weights(model).tolist())


def several(rank: int, starts: tuple[str, ...], kinds: tuple[str, ...]) -> dict[tuple[str, str], Read]:
    """A pass by each start method over each kind of loader."""
    return {(kind, start): read(rank, kind, start, "none") for kind in kinds for start in starts}


def stream_with(folder: Path, start: str, fault: str) -> bool:
    """Whether two ranks that read a stream with a fault both end as they should."""
    folder.mkdir(parents=True)
    try:
        first, second = run_ranks(read, 2, folder, "IterableDataset", start, fault, timeout=150)
    except RanksFailed as error:
        accounts = str(error)
        return {
            "raises": "rank 1 raised" in accounts and "the sky over rank one" in accounts,
            "killed": "rank 1 raised" in accounts and "is killed by signal" in accounts,
            "same": accounts.count("were given the same examples") >= 2,
        }.get(fault, False)
    return fault == "shorter" and first.steps == second.steps and first.weights == second.weights


def by_itself(rank: int, size: int, meeting: str, results: str, kind: str) -> None:
    """A rank that something else than ``run_ranks`` started."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    torch.save(tuple(read(rank, kind, "none", "none")), f"{results}.{rank}")
    dist.destroy_process_group()
