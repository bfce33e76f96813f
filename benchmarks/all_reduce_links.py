"""Does the network model of ``adabatch plan`` foretell all-reduces between processes on links that are known?

    python benchmarks/all_reduce_links.py        (as root, on Linux; fifteen minutes)

2, 4 and 8 processes on simulated links (``_links.py``) sum float32 numbers over TCP: in gloo's ring, in a binomial tree
of messages between two processes, and in nodes of two (each exchanges halves, rings join the nodes, halves are
exchanged again). The model is given the delay and the rate of the links, or is fitted to the ring of two processes, as
``adabatch plan`` fits it. As the processes of one machine share its cores, delays are long beside the time that a
process waits for a core.
"""

from __future__ import annotations

import argparse
import multiprocessing
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from _harness import Machine, Table, publish
from _links import Link, join, network
from torch import Tensor

from adabatch.forecast.network import Cluster, fitted, hierarchy_seconds, ring_seconds, tree_seconds

PROCESSES, NODE = (2, 4, 8), 2
LINKS = (Link(100, 10), Link(100, 50), Link(10, 10))
SIZES = (48, 1_024, 80_000, 1_048_576)
ROUNDS, WARMUP = 9, 2


# --- three all-reduces -----------------------------------------------------------------------------------------------


def tree(numbers: Tensor) -> None:
    """Sums to rank 0 and sends the sum back, along a binomial tree."""
    rank, size = dist.get_rank(), dist.get_world_size()
    levels = [1 << level for level in range((size - 1).bit_length())]
    below = [distance for distance in levels if rank % (2 * distance) == 0]
    parts = [Coming(numbers, rank + distance) for distance in below]
    if rank:
        parent = rank - (rank & -rank)
        whole = Coming(numbers, parent)
    for part in parts:
        numbers += part.wait()
    if rank:
        dist.send(numbers, parent)
        numbers.copy_(whole.wait())
    sent = [dist.isend(numbers, rank + distance) for distance in reversed(below)]
    for each in sent:
        assert each is not None
        each.wait()


def hierarchy(numbers: Tensor, across: dist.ProcessGroup) -> None:
    """Each process sums a half of its node's numbers over all nodes; then both of a node exchange their halves.

    Args:
        numbers: of an even length.
        across: the processes that have the same place in their nodes.
    """
    rank = dist.get_rank()
    mate, place = rank ^ 1, rank % NODE
    mine, other = numbers.chunk(NODE)[place], numbers.chunk(NODE)[1 - place]
    first, last = Coming(mine, mate), Coming(other, mate)
    dist.send(other, mate)
    mine += first.wait()
    dist.all_reduce(mine, group=across)
    dist.send(mine, mate)
    other.copy_(last.wait())


class Coming:
    """A message that will come. The receiver says so at once: gloo sends no message before."""

    def __init__(self, like: Tensor, source: int) -> None:
        self._numbers = torch.empty_like(like)
        work = dist.irecv(self._numbers, source)
        assert work is not None
        self._work = work

    def wait(self) -> Tensor:
        self._work.wait()
        return self._numbers


# --- measured --------------------------------------------------------------------------------------------------------


def measured(reduce: Callable[[Tensor], Any], num_bytes: int) -> float:
    """Median seconds of the slowest process."""
    rank, size = dist.get_rank(), dist.get_world_size()
    taken = []
    for _ in range(WARMUP + ROUNDS):
        numbers = torch.full((num_bytes // 4,), float(rank))
        dist.barrier()
        begin = time.perf_counter()
        reduce(numbers)
        seconds = torch.tensor(time.perf_counter() - begin)
        assert (numbers == size * (size - 1) / 2).all()
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        taken.append(float(seconds))
    return statistics.median(taken[WARMUP:])


def work(rank: int, size: int, namespace: str, place: str, jobs: Any, results: Any) -> None:
    """One process: measures each kind at each size, once for each job."""
    join(namespace)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{place}/store", rank=rank, world_size=size, timeout=timedelta(minutes=5)
    )
    kinds: dict[str, Callable[[Tensor], Any]] = {"ring": dist.all_reduce, "tree": tree}
    if size > NODE:
        groups = [dist.new_group(list(range(first, size, NODE))) for first in range(NODE)]
        kinds["hierarchy"] = lambda numbers: hierarchy(numbers, groups[rank % NODE])
    while jobs.get() is not None:
        found = {
            (kind, num_bytes): measured(reduce, num_bytes) for kind, reduce in kinds.items() for num_bytes in SIZES
        }
        if rank == 0:
            results.put(found)
    dist.barrier()
    dist.destroy_process_group()


class Measured(NamedTuple):
    """An all-reduce and what the model says of it, in seconds."""

    link: Link
    processes: int
    kind: str
    num_bytes: int
    seconds: float
    modelled: float
    fitted: float

    def errors(self) -> tuple[float, float]:
        """Of the model of the link, and of the one fitted to two processes."""
        return self.modelled / self.seconds - 1, self.fitted / self.seconds - 1


def model(processes: int, kind: str, num_bytes: int, latency: float, bandwidth: float) -> float:
    if kind == "hierarchy":
        cluster = Cluster(devices=processes, latency=latency, bandwidth=bandwidth, node_size=NODE)
        return hierarchy_seconds(cluster, num_bytes)
    seconds = {"ring": ring_seconds, "tree": tree_seconds}[kind]
    return seconds(processes, num_bytes, latency=latency, bandwidth=bandwidth)


def measure_all(processes: int) -> list[tuple[Link, int, str, int, float]]:
    context = multiprocessing.get_context("spawn")
    found = []
    with network(processes) as links, tempfile.TemporaryDirectory() as place:
        jobs, results = [context.Queue() for _ in range(processes)], context.Queue()
        workers = [
            context.Process(
                target=work, args=(rank, processes, links.names[rank], place, jobs[rank], results), daemon=True
            )
            for rank in range(processes)
        ]
        for worker in workers:
            worker.start()
        for link in LINKS:
            links.carry(link)
            for queue in jobs:
                queue.put("measure")
            for (kind, num_bytes), seconds in results.get(timeout=600).items():
                found.append((link, processes, kind, num_bytes, seconds))
                print(found[-1], flush=True)
        for queue in jobs:
            queue.put(None)
        for worker in workers:
            worker.join(60)
    return found


def compared(measured: list[tuple[Link, int, str, int, float]]) -> list[Measured]:
    """With what the model says, given the link, and fitted to the ring of two processes on it."""
    found = []
    for link, processes, kind, num_bytes, seconds in measured:
        rings = [(float(size), taken) for at, two, of, size, taken in measured if (at, two, of) == (link, 2, "ring")]
        of_link = model(processes, kind, num_bytes, link.delay / 1e3, link.rate * 1e6 / 8)
        of_two = model(processes, kind, num_bytes, *fitted(2, rings))
        found.append(Measured(link, processes, kind, num_bytes, seconds, of_link, of_two))
    return found


def shown(errors: Sequence[float]) -> str:
    return ", ".join(f"{error:+.0%}" for error in errors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--processes", type=int, nargs="+", choices=PROCESSES[1:], default=list(PROCESSES[1:]), help="beside 2"
    )
    parser.add_argument("--no-save", action="store_true", help="only print")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the namespaces are removed
    machine = Machine.here()
    found = compared([each for processes in (2, *options.processes) for each in measure_all(processes)])
    at = {each[:4]: each for each in found}
    kinds = list(dict.fromkeys(each.kind for each in found))
    rows = []
    for link, processes, num_bytes in dict.fromkeys((each.link, each.processes, each.num_bytes) for each in found):
        cells = [at.get((link, processes, kind, num_bytes)) for kind in kinds]
        rows.append(
            [
                f"{link.rate}",
                f"{link.delay}",
                f"{processes}",
                f"{num_bytes:,}",
                *("" if one is None else f"{1e3 * one.seconds:,.0f} ({shown(one.errors())})" for one in cells),
            ]
        )
    findings = []
    for kind in kinds:
        for which, name in enumerate(("given the link", "fitted")):
            errors = sorted(one.errors()[which] for one in found if one.kind == kind and one.processes > which + 1)
            findings.append(
                f"{kind}, {name}: the model is off by {errors[0]:+.0%} to {errors[-1]:+.0%}, "
                f"{statistics.median(map(abs, errors)):.0%} in the median."
            )
    publish(
        Path(__file__).stem,
        question="Does the network model foretell all-reduces between processes on links that are known?",
        machine=machine,
        tables=[
            Table(
                "Milliseconds of an all-reduce, the slowest process (errors of the model: given the link, fitted)",
                ["Mbit/s", "delay, ms", "processes", "bytes", *kinds],
                rows,
            )
        ],
        findings=findings,
        data={"all-reduces": [{**each._asdict(), "link": each.link._asdict()} for each in found]},
        save=not options.no_save,
    )


if __name__ == "__main__":
    main()
