"""What does each guarantee cost as ranks grow to 10,000, and do plans, order and control stay right there?

    python benchmarks/scale.py

No processes but for the last table: the planner and the data order of every rank run in one, and a simulated collective
joins their numbers. In each simulated run a rank dies and the others resume from its checkpoint with fewer ranks, one
rank drifts by the last bit of its averages, and ranks take unequal times. What is local to a rank is timed in processor
time. What travels is modelled, by the closed forms of `adabatch.forecast`, for a network that is named, and checked
against a simulation of its messages. Then the model is fitted to all-reduces of gloo on 2 processes and asked for 4 and
8; with more processes than cores that times the scheduler of the operating system too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from _harness import RESULTS, ROOT, Machine, Quartiles, Table, publish

import adabatch
from adabatch.adaptive.planning import Ended, Measured, Planner, Policy
from adabatch.batch.control import Control, Limits
from adabatch.batch.criteria import NormTest
from adabatch.batch.moments import GradientMoments
from adabatch.batch.plan import BatchPlan, PlanGrid
from adabatch.forecast.network import Cluster, all_reduce_seconds, fitted, hierarchy_seconds, ring_seconds, tree_seconds
from adabatch.guards.connections import DEGREE
from adabatch.guards.lost_ranks import Report, lost_ranks
from adabatch.journal.writer import Journal, line
from adabatch.lr.follow import UpdateRules
from adabatch.runtime.collectives import digest_of
from adabatch.runtime.data.order_feed import SliceDealer
from adabatch.runtime.data.sequence import ExampleSequence, shuffle_of
from adabatch.runtime.launch.machine_speed import all_reduce_times
from adabatch.runtime.random_state import random_state

sys.path.insert(0, str(ROOT / "tests"))

from support import simulated_network
from support.simulated import drawn

matplotlib.use("agg")

from matplotlib import pyplot as plt

RANKS = (8, 64, 512, 4096, 10_000)
STEPS = {8: 60, 64: 40, 512: 16, 4096: 5, 10_000: 4}
EXAMPLES = 10**9
MICRO = 4
LINK, INSIDE, NODE = (5e-6, 25e9), (2e-6, 200e9), 8
"""Latency and bytes per second between nodes and within one: 200 Gbit/s, NVLink-like, assumed and not measured."""
STEP_BYTES, PLAN_BYTES, PER_RANK_BYTES = 48, 16, 24
STEP_SECONDS, JITTER = 0.5, 0.02


# --- a run of many ranks in one process -------------------------------------------------------------------------------


class Rank:
    """What a rank holds: its planner and its place in the order."""

    def __init__(self, rank: int, dp_size: int, limits: Limits) -> None:
        policy = Policy(
            criterion=NormTest(eta=0.5),
            control=Control(pace=math.inf),
            limits=limits,
            rules=UpdateRules("gain"),
            reference_batch_size=limits.min if isinstance(limits.min, int) else None,
            tokens_per_example=None,
            counts_gain=True,
            layer_weights=None,
        )
        self.planner = Planner(policy, PlanGrid(dp_size=dp_size, micro_sizes=(MICRO, 2 * MICRO, 4 * MICRO)))
        sequence = ExampleSequence(EXAMPLES, seed=1, shuffle=shuffle_of(True, EXAMPLES))
        self.dealer = SliceDealer(sequence, rank, dp_size, join_epochs=True)

    def deal(self) -> list[int]:
        """The examples of this rank's first micro-batch in the next step; the place then moves past the step."""
        plan = self.planner.plan
        self.dealer.aim(self.planner.consumed.examples, plan)
        return next(iter(self.dealer))

    def end_step(self, moments: GradientMoments) -> Ended:
        size = self.planner.plan.global_batch_size
        ended = self.planner.end_step(Measured(size, moments, True, False, 1.0, None))
        self.planner.applied(size, ended.gain)
        return ended


@dataclass
class Simulated:
    """What a simulated run showed."""

    ranks: int
    steps: int
    agreed: int
    dealt_once: bool
    drift_found: bool
    resumed: bool
    decide_us: float
    deal_us: float
    slowdown: float
    sizes: list[int]


def agreement(ranks: Sequence[Rank]) -> bool:
    """As `Collectives.agree`: a digest of what each rank holds, least and largest compared."""
    digests = [float(digest_of(rank.planner.held())) for rank in ranks]
    return min(digests) == max(digests)


def simulate(size: int, steps: int) -> Simulated:
    """A run of so many ranks with a death, a drift and stragglers."""
    limits = Limits(2 * MICRO * size, 64 * MICRO * size)
    rng, generator = np.random.default_rng(size), np.random.default_rng(1)
    ranks = [Rank(rank, size, limits) for rank in range(size)]
    agreed, decide, deal, slow, sizes, dealt_once = 0, 0.0, 0.0, [], [], True
    resumed = False
    for step in range(steps):
        if step == steps // 2:  # one rank dies; the others go on from the state, with as many fewer as a node holds
            state = ranks[0].planner.state_dict()
            state = json.loads(json.dumps(state))
            left = max(size - NODE, size // 2)
            before = ranks[0].planner
            ranks = [Rank(rank, left, limits) for rank in range(left)]
            for rank in ranks:
                rank.planner.load_state_dict(state, (MICRO, 2 * MICRO, 4 * MICRO))
            after = ranks[0].planner
            resumed = (after.consumed, after.progress, after.state) == (before.consumed, before.progress, before.state)
        begin = time.process_time()
        dealt = [rank.deal() for rank in ranks]
        deal += (time.process_time() - begin) / len(ranks)
        plan = ranks[0].planner.plan
        begin_at = ranks[0].planner.consumed.examples
        whole = ranks[0].dealer.sequence.at(begin_at, begin_at + plan.micro_batch_size * len(ranks))
        dealt_once &= sorted(itertools.chain(*dealt)) == sorted(whole.tolist()) and len(set(whole.tolist())) == len(
            whole
        )
        moments = drawn(rng, plan, noise=40.0 * limits.min * 0.25 / 0.75, d=1000)
        begin = time.process_time()
        for rank in ranks:
            rank.end_step(moments)
        decide += (time.process_time() - begin) / len(ranks)
        agreed += agreement(ranks)
        taken = STEP_SECONDS * generator.lognormal(0.0, JITTER, len(ranks))
        slow.append(taken.max() / np.median(taken))
        sizes.append(ranks[0].planner.plan.global_batch_size)
    victim = ranks[len(ranks) // 3].planner
    probe = victim.state.window.recent[-1]
    moved = (*victim.state.window.recent[:-1], probe._replace(noise=math.nextafter(probe.noise, math.inf)))
    victim.state = replace(victim.state, window=replace(victim.state.window, recent=moved))
    return Simulated(
        size,
        steps,
        agreed,
        dealt_once,
        not agreement(ranks),
        resumed,
        decide / steps * 1e6,
        deal / steps * 1e6,
        float(np.median(slow)),
        sizes,
    )


# --- what is local to a rank ------------------------------------------------------------------------------------------


class OrderCost(NamedTuple):
    """What `GlobalOrder` takes for a micro-batch of one rank."""

    examples: int
    ranks: int
    at: str
    microseconds: Quartiles
    kibibytes: float


def order_costs() -> list[OrderCost]:
    """Processor time and memory of dealing 32 examples to a rank, by size of the data set and number of ranks."""
    found = []
    for examples, ranks in ((10**6, 8), (10**9, 8), (10**9, 10_000)):
        for where, share in (("beginning", 0.0), ("0.9 of the third epoch", 2.9)):
            tracemalloc.start()
            sequence = ExampleSequence(examples, seed=1, shuffle=shuffle_of(True, 10**9))
            dealer = SliceDealer(sequence, ranks - 1, ranks, join_epochs=True)
            plan = BatchPlan(micro_batch_size=32, accumulation_steps=1, dp_size=ranks)
            dealer.aim(int(share * examples), plan)
            dealing = iter(dealer)
            next(dealing)
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            times = [_cpu(lambda dealing=dealing: next(dealing), 20) * 1e6 for _ in range(15)]
            found.append(OrderCost(examples, ranks, where, Quartiles.of(times), peak / 1024))
    return found


def _cpu(call: Callable[[], object], calls: int) -> float:
    begin = time.process_time()
    for _ in range(calls):
        call()
    return (time.process_time() - begin) / calls


class TreeCost(NamedTuple):
    """What the watchdog takes with so many ranks."""

    ranks: int
    depth: int
    connections: int
    root_bytes: int
    judge_ms: float


def tree_cost(ranks: int) -> TreeCost:
    """Depth and width of the tree, bytes per interval that reach rank 0, and processor time in which it judges them."""
    depth, at = 0, ranks - 1
    while at:
        depth, at = depth + 1, (at - 1) // DEGREE
    report = Report(12_345.0, "what follows the micro-batches", False, 0.123456, 0.012345)
    children = min(DEGREE, ranks - 1)
    message = json.dumps({"reports": [[rank, *report] for rank in range(1, ranks)]})

    def judge() -> None:
        heard = {rank: Report(*fields) for rank, *fields in json.loads(message)["reports"]}
        assert lost_ranks(heard, timeout=60.0) is None

    judged = float(np.median([_cpu(judge, 1) for _ in range(5)]))
    return TreeCost(ranks, depth, children + (0 if ranks == 1 else 1), len(message), judged * 1e3)


def journal_costs(steps: int = 20_000) -> dict[str, float]:
    """Bytes of a line, processor time to write one, and of a resume at the end of a journal of several files."""
    rank = Rank(0, 8, Limits(64, 4096))
    moments = drawn(np.random.default_rng(0), rank.planner.plan, noise=100.0, d=100)
    for _ in range(10):
        before, plan = rank.planner.consumed, rank.planner.plan
        ended = rank.end_step(moments)
    entry = line(
        plan=plan,
        num_examples=plan.global_batch_size,
        before=before,
        loss=1.2345678901234567,
        moments=moments,
        averages=rank.planner.state.averages,
        decision=ended.decision,
    )
    entry["lr"] = {"base": [0.001], "shape": [0.123456789], "factor": 1.234567891, "applied": [0.000152415787]}
    entry["applied"] = True
    size = plan.global_batch_size
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal.jsonl"
        journal = Journal(path, part_bytes=2**22)
        begin = time.process_time()
        for step in range(steps):
            journal.write({**entry, "step": step, "examples": step * size})
        written = (time.process_time() - begin) / steps
        total = sum(each.stat().st_size for each in Path(folder).iterdir())
        resume = _cpu(lambda: journal.cut((steps - 10) * size), 1)
    return {
        "bytes per line": total / steps,
        "microseconds per line": written * 1e6,
        "milliseconds of a resume, files of 4 MiB": resume * 1e3,
    }


# --- what travels -----------------------------------------------------------------------------------------------------


def cluster(ranks: int) -> Cluster:
    return Cluster(
        devices=ranks,
        bandwidth=LINK[1],
        latency=LINK[0],
        node_size=NODE,
        node_bandwidth=INSIDE[1],
        node_latency=INSIDE[0],
    )


class Reduction(NamedTuple):
    """Microseconds of the step's reduction."""

    ranks: int
    ring: float
    tree: float
    hierarchy: float
    simulated_tree: float
    late_tree: float


def reduction(ranks: int) -> Reduction:
    flat = {"latency": LINK[0], "bandwidth": LINK[1]}
    return Reduction(
        ranks,
        *(
            1e6 * seconds
            for seconds in (
                ring_seconds(ranks, STEP_BYTES, **flat),
                tree_seconds(ranks, STEP_BYTES, **flat),
                hierarchy_seconds(cluster(ranks), STEP_BYTES),
                simulated_network.tree(ranks, STEP_BYTES, LINK),
                simulated_network.tree(ranks, STEP_BYTES, LINK, jitter=1.0),
            )
        ),
    )


def work(rank: int, size: int, store: str, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    timed = all_reduce_times(torch.device("cpu"), (STEP_BYTES, 1024, 80_000, 240_000, 2**20), rounds=40)
    if rank == 0:
        results.put(timed)
    dist.barrier()
    dist.destroy_process_group()


def real_times(size: int) -> list[tuple[float, float]]:
    """Pairs of bytes and median seconds of all-reduces between processes of this machine."""
    results = mp.get_context("fork").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        args = (size, str(Path(folder) / "store"), results)
        mp.start_processes(work, args=args, nprocs=size, start_method="fork")
    timed: list[tuple[float, float]] = results.get()
    return timed


# --- the report -------------------------------------------------------------------------------------------------------


def picture(reductions: Sequence[Reduction], trees: Sequence[TreeCost], runs: Sequence[Simulated]) -> None:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    counts = [each.ranks for each in reductions]
    for name in ("ring", "tree", "hierarchy"):
        left.loglog(counts, [getattr(each, name) for each in reductions], "o-", label=name)
    left.axhline(STEP_SECONDS * 1e4, color="gray", linestyle=":", label="1 % of a step of 0.5 s")
    left.set(xlabel="ranks", ylabel="microseconds", title=f"the reduction of {STEP_BYTES} bytes (model)")
    left.legend()
    middle.loglog(counts, [PLAN_BYTES] * len(counts), "o-", label="drift check, settings: a digest")
    middle.loglog(counts, [8 * p for p in counts], "o-", label="same-data check, once per pass")
    middle.loglog(
        counts, [len(random_state(torch.device("cpu"))) * p for p in counts], "o-", label="random states, per save"
    )
    middle.loglog(
        [each.ranks for each in trees], [each.root_bytes for each in trees], "o-", label="reports at rank 0, per second"
    )
    middle.set(xlabel="ranks", ylabel="bytes on a rank", title="what grows with the ranks")
    middle.legend()
    right.semilogx([each.ranks for each in runs], [each.decide_us for each in runs], "o-", label="decide and plan")
    right.semilogx([each.ranks for each in runs], [each.deal_us for each in runs], "o-", label="deal a micro-batch")
    right.set(
        xlabel="ranks", ylabel="microseconds of processor time", title="per step and rank (measured)", ylim=(0, None)
    )
    right.legend()
    figure.savefig(RESULTS / "scale.png", dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS))
    parser.add_argument("--no-save", action="store_true", help="print only")
    parser.add_argument("--no-processes", action="store_true", help="leave out the all-reduces of gloo")
    options = parser.parse_args()
    machine = Machine.here()
    counts = options.ranks
    runs = [simulate(size, STEPS.get(size, 8)) for size in counts]
    orders, trees, journal = order_costs(), [tree_cost(size) for size in counts], journal_costs()
    reductions = [reduction(size) for size in counts]
    random_bytes = len(random_state(torch.device("cpu")))
    real = {} if options.no_processes else {size: real_times(size) for size in (2, 4, 8)}
    told, real_rows = [], []
    if real:
        latency, bandwidth = fitted(2, real[2])
        for size, timed in real.items():
            for num_bytes, seconds in timed:
                models = {
                    "ring": ring_seconds(size, num_bytes, latency=latency, bandwidth=bandwidth),
                    "tree": tree_seconds(size, num_bytes, latency=latency, bandwidth=bandwidth),
                }
                cells = [f"{each * 1e6:,.0f} ({each / seconds - 1:+.0%})" for each in models.values()]
                real_rows.append((f"{size}", f"{num_bytes:,.0f}", f"{seconds * 1e6:,.0f}", *cells))
    for run in runs:
        right = run.agreed == run.steps and run.dealt_once and run.drift_found and run.resumed
        told.append(
            f"{run.ranks:,} ranks, {run.steps} steps: all ranks held the same {run.agreed} times, each example was "
            f"dealt once, a drift of one bit was found, fewer ranks went on from the state: {'yes' if right else 'NO'}."
        )
    most = runs[-1]
    told.append(
        f"A step waits for its slowest rank: with times that spread by {JITTER:.0%} the slowest of {most.ranks:,} "
        f"takes {most.slowdown:.2f} times the median, which no reduction of ours changes."
    )
    if not options.no_save:
        picture(reductions, trees, runs)
    publish(
        "scale",
        question="What does each guarantee cost as ranks grow, and do control, plan and order stay right?",
        machine=machine,
        tables=[
            Table(
                "Real planners and orders of all ranks in one process, with faults",
                (
                    "ranks",
                    "steps",
                    "agreed",
                    "examples once",
                    "drift found",
                    "resumed",
                    "decide, us",
                    "deal, us",
                    "slowest rank",
                ),
                [
                    (
                        f"{run.ranks:,}",
                        f"{run.steps}",
                        f"{run.agreed}",
                        "yes" if run.dealt_once else "NO",
                        "yes" if run.drift_found else "NO",
                        "yes" if run.resumed else "NO",
                        f"{run.decide_us:.0f}",
                        f"{run.deal_us:.0f}",
                        f"{run.slowdown:.2f}",
                    )
                    for run in runs
                ],
            ),
            Table(
                f"The reduction of a step, {STEP_BYTES} bytes, microseconds, modelled: {LINK[0] * 1e6:g} us and "
                f"{LINK[1] / 1e9:g} GB/s between nodes of {NODE}",
                ("ranks", "ring", "tree", "hierarchy", "tree, messages simulated", "the same, late messages"),
                [(f"{row.ranks:,}", *(f"{value:,.0f}" for value in row[1:])) for row in reductions],
            ),
            Table(
                "Bytes on a rank, and modelled milliseconds of the fastest all-reduce of them",
                (
                    "ranks",
                    "digest, every 1,000 steps",
                    "same data, once per pass",
                    "FSDP2 replicas",
                    "random states per save, at rank 0",
                ),
                [
                    (
                        f"{size:,}",
                        *(
                            f"{num_bytes:,} B, {all_reduce_seconds(cluster(size), num_bytes) * 1e3:.2f} ms"
                            for num_bytes in (PLAN_BYTES, 8 * size, PER_RANK_BYTES * size, random_bytes * size)
                        ),
                    )
                    for size in counts
                ],
            ),
            Table(
                f"The watchdog, a tree of {DEGREE} children per rank",
                ("ranks", "links to rank 0", "connections of a rank", "bytes per interval at rank 0", "judged in, ms"),
                [
                    (
                        f"{row.ranks:,}",
                        f"{row.depth}",
                        f"{row.connections}",
                        f"{row.root_bytes:,}",
                        f"{row.judge_ms:.1f}",
                    )
                    for row in trees
                ],
            ),
            Table(
                "GlobalOrder: 32 examples for one rank, processor time (quartiles) and memory",
                ("examples", "ranks", "place", "microseconds", "peak KiB"),
                [
                    (f"{row.examples:,}", f"{row.ranks:,}", row.at, row.microseconds.show(0), f"{row.kibibytes:.0f}")
                    for row in orders
                ],
            ),
            Table(
                "The journal",
                ("what", "measured"),
                [
                    *((name, f"{value:,.1f}") for name, value in journal.items()),
                    ("GB in a million steps", f"{journal['bytes per line'] * 1e6 / 1e9:.2f}"),
                ],
            ),
            *(
                [
                    Table(
                        "All-reduces of gloo, microseconds; the model is fitted to 2 processes (error)",
                        ("processes", "bytes", "measured", "ring", "tree"),
                        real_rows,
                    )
                ]
                if real
                else []
            ),
        ],
        findings=told,
        data={
            "runs": [vars(run) for run in runs],
            "reductions": [row._asdict() for row in reductions],
            "trees": [row._asdict() for row in trees],
            "orders": [row._asdict() for row in orders],
            "journal": journal,
            "gloo": {str(size): timed for size, timed in real.items()},
            "version": adabatch.__version__,
        },
        save=not options.no_save,
    )


if __name__ == "__main__":
    main()
