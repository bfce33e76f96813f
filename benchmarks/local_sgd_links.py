"""What do fragments and overlap save local SGD on slow links?

    python benchmarks/local_sgd_links.py [--minutes 20]        (as root, on Linux)

Two workers on simulated links (``_links.py``). The rate is that of each worker's uplink, the delay is one way.

The model has four hidden layers of equal size and 1 MB. The time of its forward and backward is a sleep, 40 ms per
step, as if a device computed: so the cores are free for the links, and a loaded machine changes little. A third of it
is in the forward and two thirds in the backward, spread over the layers, so that DDP can overlap its buckets. All else
is real: gradients, optimizers, exchange.

Compared at equal examples: no exchange at all, DDP (8 of its steps are timed, and counted four times), synchronous
DiLoCo, its fragments in turn (streaming), and fragments with overlap, the last also with int8. Rounds of 16 steps,
outer Nesterov. The clock runs over whole rounds after the first one, so that averages which were begun and not yet
applied count once at either end."""

from __future__ import annotations

import argparse
import multiprocessing
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _harness import Machine, Table, publish
from _links import Link, join, network
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from adabatch import LocalSGD
from adabatch.local_sgd import Nesterov

QUESTION = (
    "Two workers, 1 MB of parameters, steps of 40 ms, rounds of 16 steps: how long do 32 steps take on slow links by "
    "DDP, by synchronous DiLoCo, with fragments, and with fragments and overlap?"
)
WORKERS = 2
STEP_S, SYNC_EVERY, FRAGMENTS, ROUNDS = 0.040, 16, 4, 2
WIDTH, LAYERS = 256, 4
OVERLAP = 12

LOCAL: dict[str, dict[str, Any]] = {
    "DiLoCo": {},
    "fragments": {"fragments": FRAGMENTS},
    "fragments, overlap": {"fragments": FRAGMENTS, "overlap": OVERLAP},
    "fragments, overlap, int8": {"fragments": FRAGMENTS, "overlap": OVERLAP, "compression": "int8"},
}
METHODS = ("none", "DDP", *LOCAL)
DDP_STEPS = 8


LINKS = (Link(10, 10), Link(10, 100), Link(100, 50), Link(1000, 10), Link(1000, 100))


# --- the job ----------------------------------------------------------------------------------------------------------


class Computed(torch.autograd.Function):
    """The time that a device takes for a layer."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        time.sleep(STEP_S / 3 / LAYERS)
        return x.view_as(x)

    @staticmethod
    def backward(_: Any, grad: Tensor) -> Tensor:
        time.sleep(STEP_S * 2 / 3 / LAYERS)
        return grad


class Layer(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return Computed.apply(super().forward(x).tanh())


@dataclass
class Run:
    """What 32 steps took on one worker."""

    seconds: float
    waited: float
    megabytes: float


def measure(method: str, rank: int) -> Run:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(*(Layer(WIDTH, WIDTH) for _ in range(LAYERS)))
    if method == "DDP":
        model = DistributedDataParallel(model, bucket_cap_mb=0.25)
    optimizer = SGD(model.parameters(), lr=0.01, momentum=0.9)
    local = None
    if method in LOCAL:
        local = LocalSGD(model, optimizer, sync_every=SYNC_EVERY, outer=Nesterov(), **LOCAL[method])
    generator = torch.Generator().manual_seed(rank)

    def step() -> None:
        x = torch.randn(8, WIDTH, generator=generator)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2 if local is None else SYNC_EVERY):
        step()
    waited, sent = (local.seconds_waited, local.bytes_sent) if local else (0.0, 0)
    num_steps = DDP_STEPS if method == "DDP" else ROUNDS * SYNC_EVERY
    begun = time.perf_counter()
    for _ in range(num_steps):
        step()
    seconds = (time.perf_counter() - begun) * ROUNDS * SYNC_EVERY / num_steps
    if local is None:
        size = sum(p.numel() * 4 for p in model.parameters()) * (method == "DDP")
        return Run(seconds, 0.0, ROUNDS * SYNC_EVERY * 2 * (WORKERS - 1) / WORKERS * size / 1e6)
    found = Run(seconds, local.seconds_waited - waited, (local.bytes_sent - sent) / 1e6)
    local.synchronize()
    local.remove()
    return found


def work(rank: int, namespace: str, place: str, jobs: Any, results: Any) -> None:
    """A worker: one run after another, as it is told."""
    join(namespace)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{place}/store", rank=rank, world_size=WORKERS, timeout=timedelta(minutes=5)
    )
    while (method := jobs.get()) is not None:
        dist.barrier()
        results.put((rank, measure(method, rank)))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0, help="no repeat is begun past these")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--links", type=int, default=len(LINKS), help="only the first so many")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the namespaces are removed
    machine, deadline = Machine.here(), time.monotonic() + 60 * asked.minutes
    processes = multiprocessing.get_context("spawn")
    seen: dict[tuple[Link, str], list[Run]] = {}
    with network(WORKERS) as links, tempfile.TemporaryDirectory() as place:
        jobs, results = [processes.Queue() for _ in range(WORKERS)], processes.Queue()
        workers = [
            processes.Process(target=work, args=(rank, links.names[rank], place, jobs[rank], results), daemon=True)
            for rank in range(WORKERS)
        ]
        for worker in workers:
            worker.start()
        for repeat in range(asked.repeats):
            for link in LINKS[: asked.links]:
                for method in METHODS:
                    if repeat and time.monotonic() > deadline:
                        continue
                    links.carry(link)
                    for queue in jobs:
                        queue.put(method)
                    runs = dict(results.get(timeout=600) for _ in jobs)
                    slowest = max(runs.values(), key=lambda run: run.seconds)
                    seen.setdefault((link, method), []).append(slowest)
                    print(f"{link} {method}: {slowest}", flush=True)
        for queue in jobs:
            queue.put(None)
        for worker in workers:
            worker.join(30)
    report(seen, machine)


def report(seen: dict[tuple[Link, str], list[Run]], machine: Machine) -> None:
    links = [link for link in LINKS if (link, "DDP") in seen]
    methods = [method for method in METHODS if method != "none"]
    alone = [run.seconds for (_, method), runs in seen.items() if method == "none" for run in runs]
    waited = {key: statistics.median(run.waited for run in runs) for key, runs in seen.items()}

    def times(link: Link, method: str, other: str = "none") -> list[float]:
        """Of one method by another's, repeat by repeat."""
        pairs = zip(seen[link, method], seen[link, other], strict=False)  # the last repeat may be cut short
        return sorted(mine.seconds / theirs.seconds for mine, theirs in pairs)

    def spread(link: Link, method: str) -> str:
        found = times(link, method)
        return f"{statistics.median(found):.2f} ({found[0]:.2f} to {found[-1]:.2f})"

    tables = [
        Table(
            "Wall time of 32 steps, as a multiple of that without an exchange: median (least to most)",
            ["Mbit/s", "delay, ms", *methods],
            [[f"{link.rate}", f"{link.delay}", *(spread(link, method) for method in methods)] for link in links],
        ),
        Table(
            "Of these, seconds in which the worker waited for the exchange (not counted for DDP)",
            ["Mbit/s", "delay, ms", *LOCAL],
            [[f"{link.rate}", f"{link.delay}", *(f"{waited[link, name]:.2f}" for name in LOCAL)] for link in links],
        ),
        Table(
            "Megabytes that a worker sent in them",
            methods,
            [[f"{seen[links[0], method][0].megabytes:.2f}" for method in methods]],
        ),
    ]

    def ratios(a: str, b: str) -> str:
        found = sorted(statistics.median(times(link, a, b)) for link in links)
        return f"{found[0]:.2f} to {found[-1]:.2f}"

    findings = [
        f"Synchronous DiLoCo takes {ratios('DiLoCo', 'DDP')} times the time of DDP.",
        f"Fragments with overlap take {ratios('fragments, overlap', 'DiLoCo')} times that of synchronous DiLoCo, and "
        f"{ratios('fragments, overlap', 'DDP')} times that of DDP.",
        f"Fragments without overlap take {ratios('fragments', 'DiLoCo')} times that of synchronous DiLoCo: they send "
        "less at a time, and wait for the delay once for each.",
        f"An exchange in the background leaves {ratios('fragments, overlap', 'none')} times the time of no exchange.",
        f"A step without an exchange took {1000 * statistics.median(alone) / (ROUNDS * SYNC_EVERY):.0f} ms, of which "
        f"{1000 * STEP_S:.0f} are the sleep.",
        "The links are simulated below TCP by a process that carries packets; forward and backward are a sleep.",
    ]
    publish(
        Path(__file__).stem,
        question=QUESTION,
        machine=machine,
        tables=tables,
        findings=findings,
        data={
            "runs": [
                {"link": link._asdict(), "method": method, "runs": [vars(run) for run in runs]}
                for (link, method), runs in seen.items()
            ]
        },
    )


if __name__ == "__main__":
    main()
