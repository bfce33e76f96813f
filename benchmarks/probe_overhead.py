"""What does AdaptiveBatch cost? A DDP step with the probe at every step, against the same step without adabatch.

    python benchmarks/probe_overhead.py
    python benchmarks/probe_overhead.py --bytes    # how much is sent, which no load of the machine changes

Two gloo processes of one thread each train the same 4.8 M-parameter transformer twice side by side: in a plain DDP
loop, and in the same loop around ``AdaptiveBatch`` with the norm test, whose limits hold the batch constant so that
both do the same work. The order of the two is shuffled in every round, the same on both ranks, and the ratio is taken
round by round, once by the clock and once by the processor time of the first rank, which leaves out what other programs
took. Aims: step time at most 1.05, at most 64 extra bytes communicated a step and rank, at most 1 MiB of extra memory.

With ``--bytes``, by what feeds the loop: a small model takes the same reductions as a large one.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from _harness import Machine, Table, Timings, interleave, publish, random_texts
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

import adabatch
from adabatch.recipes import NextTokenLoss, Transformer

RANKS = 2
LENGTH = 128
PLAIN, OURS = "plain DDP", "AdaptiveBatch"
TARGETS = {"step time": 1.05, "bytes": 64, "memory": 2**20}
SMALL = 8  # examples in a micro-batch where bytes alone are counted


class Loop:
    """A model, its optimizer and one step of it."""

    def __init__(self, micro_batch_size: int, accumulation_steps: int, *, adaptive: bool) -> None:
        torch.manual_seed(0)
        self.model = DistributedDataParallel(Transformer(width=256, depth=6, num_heads=8))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.loss = NextTokenLoss()
        self.data = random_texts(micro_batch_size, LENGTH, rank=dist.get_rank())
        self.accumulation_steps = accumulation_steps
        self.step: Callable[[], None] = self.plain
        if adaptive:
            size = micro_batch_size * accumulation_steps * RANKS
            self.batches = adabatch.AdaptiveBatch(
                self.model,
                self.optimizer,
                adabatch.NormTest(eta=0.5),
                micro_batch_size=micro_batch_size,
                limits=adabatch.Limits(min=size, max=size),
                lr_rule="gain",
            )
            self.steps = self.batches.steps(self.data)
            self.step = self.adaptive

    def plain(self) -> None:
        for index in range(self.accumulation_steps):
            self.model.require_backward_grad_sync = index == self.accumulation_steps - 1
            x, y = next(self.data)
            (self.loss(self.model(x), y) / self.accumulation_steps).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def adaptive(self) -> None:
        step = next(self.steps)
        for x, y in step:
            step.backward(self.loss(self.model(x), y))
        self.optimizer.step()
        self.optimizer.zero_grad()


def peak_memory(step: Callable[[], None]) -> int:
    """Largest amount of tensor memory that one step holds beyond what was there before, in bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    held = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def bytes_sent(step: Callable[[], None]) -> int:
    """Bytes that Python code hands to all-reduce in one step (DDP's own buckets go another way)."""
    sent = 0
    original = dist.all_reduce

    def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal sent
        sent += tensor.numel() * tensor.element_size()
        return original(tensor, *args, **kwargs)

    dist.all_reduce = counted
    try:
        step()
    finally:
        dist.all_reduce = original
    return sent


def bytes_by_feed() -> dict[str, tuple[list[int], int]]:
    """Bytes handed to all-reduce, by what feeds the loop: in each step of a pass, and after the last one."""
    x, y = torch.randn(8 * SMALL, 4), torch.randn(8 * SMALL, 1)
    data = torch.utils.data.TensorDataset(x, y)

    def loader(left_over: int = 0) -> Any:
        some = torch.utils.data.Subset(data, range(6 * SMALL + left_over))
        sampler = torch.utils.data.DistributedSampler(some)
        return torch.utils.data.DataLoader(some, batch_size=SMALL, sampler=sampler)

    feeds: dict[str, tuple[Any, dict[str, Any], bool]] = {
        "a loader": (loader(), {}, False),
        "a loader that does not fill its last step": (loader(SMALL), {}, False),
        "a `GlobalOrder`": (adabatch.GlobalOrder(data), {"until": adabatch.examples(8 * SMALL)}, False),
        "a loader, `weigh=`": (loader(), {"weigh": lambda batch: float(len(batch[0]))}, False),
        "a loader, under `Preemption`": (loader(), {}, True),
    }
    return {name: _pass_bytes(feed, options, votes) for name, (feed, options, votes) in feeds.items()}


def _pass_bytes(feed: Any, options: dict[str, Any], votes: bool) -> tuple[list[int], int]:
    model = DistributedDataParallel(torch.nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    size = SMALL * RANKS
    batches = adabatch.AdaptiveBatch(
        model,
        optimizer,
        adabatch.NormTest(eta=0.5),
        micro_batch_size=SMALL,
        limits=adabatch.Limits(min=size, max=size),
    )
    if votes:
        batches.votes.listen()
    steps = batches.steps(feed, **options)
    sent, ended = [], False

    def one() -> None:
        nonlocal ended
        step = next(steps, None)
        if step is None:
            ended = True
            return
        for inputs, targets in step:
            step.backward(torch.nn.functional.mse_loss(model(inputs), targets))
        optimizer.step()
        optimizer.zero_grad()

    while not ended:
        sent.append(bytes_sent(one))
    batches.remove()
    return sent[:-1], sent[-1]


def work(rank: int, store: str, micro_batch_size: int, accumulation_steps: int, rounds: int, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)

    def loops() -> dict[str, Loop]:
        return {
            PLAIN: Loop(micro_batch_size, accumulation_steps, adaptive=False),
            OURS: Loop(micro_batch_size, accumulation_steps, adaptive=True),
        }

    def steps() -> dict[str, Callable[[], None]]:
        return {name: loop.step for name, loop in loops().items()}

    measured = {
        clock.__name__: dict(
            interleave(steps, trials=2, rounds=rounds // 2, clock=clock, synchronize=dist.barrier).seconds
        )
        for clock in (time.perf_counter, time.process_time)
    }
    both = loops()
    for loop in both.values():
        loop.step()
    memory = peak_memory(both[OURS].step) - peak_memory(both[PLAIN].step)
    sent = bytes_sent(both[OURS].step)
    if rank == 0:
        results.put((measured, memory, sent))
    dist.barrier()
    dist.destroy_process_group()


def count_bytes(rank: int, store: str, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    counted = bytes_by_feed()
    if rank == 0:
        results.put(counted)
    dist.barrier()
    dist.destroy_process_group()


def counted_bytes() -> dict[str, tuple[list[int], int]]:
    """For each feed the bytes of the steps of a pass, and of its end."""
    results = mp.get_context("fork").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        args = (str(Path(folder) / "store"), results)
        mp.start_processes(count_bytes, args=args, nprocs=RANKS, start_method="fork")
    counted: dict[str, tuple[list[int], int]] = results.get()
    return counted


def measure(micro_batch_size: int, accumulation_steps: int, rounds: int) -> tuple[Timings, Timings, int, int]:
    """Wall times and processor times of both loops, extra bytes held, extra bytes sent."""
    results = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        mp.spawn(work, args=(store, micro_batch_size, accumulation_steps, rounds, results), nprocs=RANKS)
    measured, memory, sent = results.get()
    return Timings(measured["perf_counter"]), Timings(measured["process_time"]), memory, sent


def publish_bytes(machine: Machine, *, save: bool) -> None:
    """What a rank hands to all-reduces beside its gradients."""
    counted, rows = counted_bytes(), []
    for name, (steps, end) in counted.items():
        rows.append((name, f"{steps[0]}", f"{steps[1]}", f"{steps[-1]}", f"{end}"))
    publish(
        "probe_bytes",
        question="How many bytes does a rank hand to all-reduces for AdaptiveBatch, beside its gradients?",
        machine=machine,
        tables=[
            Table(
                f"Bytes per rank and probed step, by what feeds the loop: {RANKS} ranks, a pass of 3 or 4 steps",
                ("feed", "first step of a pass", "a step", "last step", "end of the pass"),
                rows,
            )
        ],
        findings=[
            f"The first step of a pass compares settings (16 bytes, and 8 for errors), gradients (the same) and, of "
            f"loaders, the data of the ranks (8 bytes per rank; here {RANKS} ranks). It and every 1,000th check for "
            f"drift (16 bytes). In each step 16 bytes compare what decides about the next update; "
            f"Guard(check_every=None) leaves these out, with drift and gradients.",
        ],
        data={"bytes": counted},
        save=save,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help="steps of each loop in each case")
    parser.add_argument("--no-save", action="store_true", help="print only")
    parser.add_argument("--bytes", action="store_true", help="only count what is sent")
    options = parser.parse_args()
    machine = Machine.here()
    if options.bytes:
        publish_bytes(machine, save=not options.no_save)
        return
    rows, told, raw = [], [], {}
    for micro_batch_size, accumulation_steps in ((4, 1), (16, 1)):
        wall, processor, memory, sent = measure(micro_batch_size, accumulation_steps, options.rounds)
        case = f"{RANKS} ranks x {accumulation_steps} x {micro_batch_size} x {LENGTH} tokens"
        ratio, work_ratio = wall.ratio(OURS, PLAIN), processor.ratio(OURS, PLAIN)
        rows.append((case, wall.of(PLAIN).show(1, 1e3), ratio.show(3), work_ratio.show(3), f"{sent}", f"{memory:,}"))
        raw[case] = {
            "wall seconds": wall.seconds,
            "processor seconds": processor.seconds,
            "extra bytes held": memory,
            "extra bytes sent": sent,
        }
        for name, value, goal in (
            ("step time", ratio.median, TARGETS["step time"]),
            ("extra bytes sent", sent, TARGETS["bytes"]),
            ("extra bytes held", memory, TARGETS["memory"]),
        ):
            told.append(f"{case}: {name} {value:,.4g}, goal {goal:,}: {'met' if value <= goal else 'missed'}.")
    publish(
        "probe_overhead",
        question="What does AdaptiveBatch, with the probe at every step, cost a DDP loop?",
        machine=machine,
        tables=[
            Table(
                "A step around AdaptiveBatch against the same step without it: median (quartiles)",
                ("case", "plain step, ms", "ratio", "ratio of processor time", "extra bytes sent", "extra bytes held"),
                rows,
            )
        ],
        findings=told,
        data={"rounds": options.rounds, "cases": raw},
        save=not options.no_save,
    )


if __name__ == "__main__":
    main()
