"""Does a closed form tell how long an all-reduce takes? Against a simulation of its messages, and gloo on this machine.

    python benchmarks/step_time_model.py

The simulation takes each message as latency + bytes / bandwidth, one at a time on each device. With jitter, each
message is late by an exponential time whose mean is a multiple of the latency of its own link: what a closed form
leaves out. A closed form with that mean added to each latency is still too short, as a round waits for its slowest.

gloo runs on 2, 4 and 8 processes. Latency and bandwidth are fitted to its smallest and its largest message, and closed
form and simulation then say what those between take: they were not fitted to."""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from _harness import Machine, Table, publish

from adabatch.forecast.network import Cluster, fitted, hierarchy_seconds, ring_seconds, tree_seconds
from adabatch.runtime.launch.machine_speed import all_reduce_times

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from support import simulated_network as simulated

LINK, INSIDE = (1e-5, 25e9), (3e-6, 300e9)
BYTES = (4e6, 5e8)
JITTERS = (1.0, 3.0)
RINGS, TREES, NODES = (8, 64, 256), (8, 64, 1000, 10_000), (2, 8, 64)
GLOO = (2, 4, 8)
GLOO_BYTES = (2**12, 2**16, 2**18, 2**20, 2**22)
ROUNDS = 25


class Compared(NamedTuple):
    """An all-reduce, in seconds; one entry per jitter where there are several."""

    algorithm: str
    devices: int
    num_bytes: float
    closed: float
    simulated: float
    late: tuple[float, ...]
    closed_late: tuple[float, ...]


def compared(
    *, rings: tuple[int, ...] = RINGS, trees: tuple[int, ...] = TREES, nodes: tuple[int, ...] = NODES
) -> list[Compared]:
    """Closed form and simulation of each algorithm, without and with jitter."""
    found = []
    for size in BYTES:
        for devices in rings:
            found.append(_flat("ring", devices, size))
        for devices in trees:
            found.append(_flat("tree", devices, size))
        for count in nodes:
            plain, *late = (
                simulated.hierarchy(count, 8, size, INSIDE, LINK, jitter=jitter) for jitter in (0.0, *JITTERS)
            )
            closed, *closed_late = (hierarchy_seconds(_cluster(count, 1 + jitter), size) for jitter in (0.0, *JITTERS))
            found.append(Compared("hierarchy", 8 * count, size, closed, plain, tuple(late), tuple(closed_late)))
    return found


def _flat(algorithm: str, devices: int, size: float) -> Compared:
    simulate, closed_form = {"ring": (simulated.ring, ring_seconds), "tree": (simulated.tree, tree_seconds)}[algorithm]
    plain, *late = (simulate(devices, size, LINK, jitter=jitter) for jitter in (0.0, *JITTERS))
    closed, *closed_late = (
        closed_form(devices, size, latency=(1 + jitter) * LINK[0], bandwidth=LINK[1]) for jitter in (0.0, *JITTERS)
    )
    return Compared(algorithm, devices, size, closed, plain, tuple(late), tuple(closed_late))


def _cluster(nodes: int, latencies: float) -> Cluster:
    return Cluster(
        devices=8 * nodes,
        node_size=8,
        latency=latencies * LINK[0],
        bandwidth=LINK[1],
        node_latency=latencies * INSIDE[0],
        node_bandwidth=INSIDE[1],
    )


# --- gloo -----------------------------------------------------------------------------------------------------------


class Timed(NamedTuple):
    """An all-reduce of gloo, in seconds, beside what the fit to the smallest and the largest says of it."""

    processes: int
    num_bytes: float
    measured: float
    closed: float
    simulated: float


def gloo(number: int, *, sizes: tuple[int, ...] = GLOO_BYTES, rounds: int = ROUNDS) -> tuple[list[Timed], str]:
    """gloo on ``number`` processes of this machine, and the latency and bandwidth of the fit in words."""
    with tempfile.TemporaryDirectory() as folder:
        processes.start_processes(
            _rank, args=(number, folder, sizes, rounds), nprocs=number, join=True, start_method="fork"
        )
        timed: list[tuple[float, float]] = torch.load(Path(folder, "timed.pt"))
    return rows_of(number, timed)


def rows_of(number: int, timed: list[tuple[float, float]]) -> tuple[list[Timed], str]:
    """What a fit to the smallest and the largest of timed all-reduces says of all of them."""
    latency, bandwidth = fitted(number, [timed[0], timed[-1]])
    rows = [
        Timed(
            number,
            size,
            seconds,
            ring_seconds(number, size, latency=latency, bandwidth=bandwidth),
            simulated.ring(number, size, (latency, bandwidth)),
        )
        for size, seconds in timed
    ]
    return rows, f"{number} processes: {latency:.2g} s per message, {bandwidth:.2g} bytes/s"


def _rank(rank: int, number: int, folder: str, sizes: tuple[int, ...], rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=number)
    timed = all_reduce_times(torch.device("cpu"), sizes, rounds=rounds)
    if rank == 0:
        torch.save(timed, Path(folder, "timed.pt"))
    dist.barrier()
    dist.destroy_process_group()


# --- report ---------------------------------------------------------------------------------------------------------


def simulations(rows: list[Compared]) -> tuple[Table, list[str]]:
    """The table of closed forms and simulations, and what follows from it."""
    cells = [
        (
            row.algorithm,
            f"{row.devices:,}",
            f"{row.num_bytes:.0e}",
            f"{row.closed:.3g}",
            f"{row.simulated / row.closed - 1:+.1%}",
            *(f"{late / row.closed - 1:+.0%}" for late in row.late),
            *(f"{late / closed - 1:+.0%}" for late, closed in zip(row.late, row.closed_late, strict=True)),
        )
        for row in rows
    ]
    late = [f"late by {jitter:g} latencies" for jitter in JITTERS]
    columns = (
        "algorithm",
        "devices",
        "bytes",
        "closed form",
        "simulated",
        *late,
        *(f"{each}, in both" for each in late),
    )
    worst = max(abs(row.simulated / row.closed - 1) for row in rows)
    findings = [
        f"Without jitter the closed form is at most {worst:.1%} off the simulation.",
        *(
            f"With messages that are late by an exponential time of {jitter:g} latencies of their link in the mean, "
            f"all-reduces take {min(row.late[at] / row.closed - 1 for row in rows):.0%} to "
            f"{max(row.late[at] / row.closed - 1 for row in rows):.0%} longer than the closed form. Even with the mean "
            f"lateness in its latency the closed form falls short, by up to "
            f"{max(row.late[at] / row.closed_late[at] - 1 for row in rows):.0%}: each round waits for the slowest."
            for at, jitter in enumerate(JITTERS)
        ),
        "So a plan's time of an all-reduce is a lower bound where latency counts: small messages on many devices.",
    ]
    return Table("All-reduces, in seconds, and how much longer the simulation takes", columns, cells), findings


def measurements(runs: list[tuple[list[Timed], str]]) -> tuple[Table, list[str]]:
    """The table of gloo, and what follows from it."""
    rows = [row for found, _ in runs for row in found]
    ends = {min(GLOO_BYTES), max(GLOO_BYTES)}
    cells = [
        (
            str(row.processes),
            f"{row.num_bytes:,.0f}",
            f"{row.measured:.3g}",
            f"{row.closed:.3g}",
            f"{row.closed / row.measured - 1:+.0%}" + (" (fitted)" if row.num_bytes in ends else ""),
            f"{row.simulated / row.measured - 1:+.0%}",
        )
        for row in rows
    ]
    findings = [f"gloo, fitted: {'; '.join(words for _, words in runs)}."]
    for found, _ in runs:
        errors = [abs(row.closed / row.measured - 1) for row in found if row.num_bytes not in ends]
        if errors:
            findings.append(
                f"On {found[0].processes} processes closed form and simulation are {statistics.median(errors):.0%} off "
                f"in the median and {max(errors):.0%} at most, on the messages between those that were fitted."
            )
    findings.append(
        f"This machine has {len(os.sched_getaffinity(0))} cores and other programs on them: with more processes than "
        "cores, ranks wait for each other's time slices, which neither model knows. These times check the "
        "shape of the model and not its constants."
    )
    return (
        Table(
            "gloo on this machine, in seconds (median of rounds, slowest rank)",
            ("processes", "bytes", "measured", "closed form", "off by", "simulation off by"),
            cells,
        ),
        findings,
    )


def main() -> None:
    machine = Machine.here()
    runs, unfit = [], []
    for number in GLOO:
        try:
            runs.append(gloo(number))
        except ValueError as error:  # with more processes than cores a small message may take longer than a large one
            unfit.append(f"{number} processes are left out: {error}.")
    rows = compared()
    first, said = simulations(rows)
    second, measured = measurements(runs)
    publish(
        "step_time_model",
        question="How far are closed forms of all-reduces from a simulation of their messages, and from gloo?",
        machine=machine,
        tables=[first, second],
        findings=[*said, *measured, *unfit],
        data={"rows": [row._asdict() for row in rows], "gloo": [row._asdict() for found, _ in runs for row in found]},
    )


if __name__ == "__main__":
    main()
