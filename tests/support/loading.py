"""Two ranks that read their data by loaders of several kinds and loading processes of several start methods."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.utils.data import DataLoader, DistributedSampler

from adabatch import AdaptiveBatch, Constant, GlobalOrder, Watchdog
from support.loops import loss_of, network, weights
from support.ranks import RanksFailed, run_ranks
from support.streams import MICRO, NUM_EXAMPLES, Examples, Read, Stream

ACCUMULATION = 2
KINDS = ("IterableDataset", "DistributedSampler", "GlobalOrder")
STARTS = ("fork", "spawn")
STREAM_FAULTS = {
    "raises": "an error in it",
    "killed": "a loading process that is killed",
    "shorter": "fewer examples on one rank",
    "same": "the same examples on all ranks",
}


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


def read(rank: int, kind: str, start: str, fault: str) -> Read:
    """One pass over the data under DDP and a watchdog."""
    torch.manual_seed(0)
    model = DistributedDataParallel(network())
    optimizer = SGD(model.parameters(), lr=0.05)
    size = Constant(MICRO * ACCUMULATION * dist.get_world_size())
    batches = AdaptiveBatch(model, optimizer, size, micro_batch_size=MICRO)
    places = []
    with Watchdog(batches, timeout=300):  # a loading process that is spawned imports torch first
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
        first, second = run_ranks(read, 2, folder, "IterableDataset", start, fault, timeout=400)
    except RanksFailed as error:
        accounts = str(error)
        return {
            "raises": "rank 1 raised" in accounts and "the sky over rank one" in accounts,
            # by the step, or by the watchdog, as the signal may come anywhere
            "killed": re.search("rank 1 raised|failed on rank 1", accounts) is not None
            and "is killed by signal" in accounts,
            "same": accounts.count("were given the same examples") >= 2,
        }.get(fault, False)
    return fault == "shorter" and first.steps == second.steps and first.weights == second.weights


def by_itself(rank: int, size: int, meeting: str, results: str, kind: str) -> None:
    """A rank that something else than ``run_ranks`` started."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    torch.save(tuple(read(rank, kind, "none", "none")), f"{results}.{rank}")
    dist.destroy_process_group()
