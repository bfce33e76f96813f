"""Does a closed form tell how long an all-reduce takes? Against a simulation of its messages, and gloo on this machine.

    python benchmarks/step_time_model.py
    torchrun --standalone --nproc-per-node=4 benchmarks/step_time_model.py    # prints what gloo takes on 4 processes

The simulation takes each message as latency + bytes / bandwidth, one at a time on each device. With jitter, each
message is late by an exponential time, by one latency in the mean: what a closed form leaves out."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from _harness import Machine, Table, publish

from adabatch.forecast.network import Cluster, fitted, hierarchy_seconds, ring_seconds, tree_seconds
from adabatch.runtime.machine_speed import all_reduce_times

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from support import simulated_network as simulated

LINK, INSIDE = (1e-5, 25e9), (3e-6, 300e9)
BYTES = (4e6, 5e8)


def compared() -> list[tuple[str, int, float, float, float, float]]:
    """Algorithm, devices, bytes, and seconds: closed form, simulated, simulated with jitter."""
    rows = []
    for size in BYTES:
        for devices in (8, 64, 512):
            flat = {"latency": LINK[0], "bandwidth": LINK[1]}
            closed = ring_seconds(devices, size, **flat)
            late = simulated.ring(devices, size, LINK, jitter=LINK[0])
            rows.append(("ring", devices, size, closed, simulated.ring(devices, size, LINK), late))
        for devices in (8, 64, 1000, 10_000):
            closed = tree_seconds(devices, size, latency=LINK[0], bandwidth=LINK[1])
            late = simulated.tree(devices, size, LINK, jitter=LINK[0])
            rows.append(("tree", devices, size, closed, simulated.tree(devices, size, LINK), late))
        for nodes in (2, 8, 125):
            cluster = Cluster(
                devices=8 * nodes,
                node_size=8,
                latency=LINK[0],
                bandwidth=LINK[1],
                node_latency=INSIDE[0],
                node_bandwidth=INSIDE[1],
            )
            plain, late = (simulated.hierarchy(nodes, 8, size, INSIDE, LINK, jitter=jitter) for jitter in (0, LINK[0]))
            rows.append(("hierarchy", 8 * nodes, size, hierarchy_seconds(cluster, size), plain, late))
    return rows


def main() -> None:
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        timed = all_reduce_times(torch.device("cpu"), rounds=15)
        if dist.get_rank() == 0:
            latency, bandwidth = fitted(dist.get_world_size(), timed)
            print(f"{dist.get_world_size()} processes: fitted {latency:.3g} s, {bandwidth:.3g} bytes/s")
            for size, seconds in timed:
                closed = ring_seconds(dist.get_world_size(), size, latency=latency, bandwidth=bandwidth)
                print(f"  {size:.3g} bytes: {seconds:.3g} s, ring {closed:.3g} s ({closed / seconds - 1:+.0%})")
        dist.destroy_process_group()
        return
    machine, rows = Machine.here(), compared()
    cells = [
        (
            name,
            f"{devices:,}",
            f"{size:.0e}",
            f"{closed:.3g}",
            f"{plain / closed - 1:+.1%}",
            f"{late / closed - 1:+.1%}",
        )
        for name, devices, size, closed, plain, late in rows
    ]
    worst = max(abs(plain / closed - 1) for _, _, _, closed, plain, _ in rows)
    publish(
        "step_time_model",
        question="How far are closed forms of all-reduces from a simulation of their messages?",
        machine=machine,
        tables=[
            Table(
                "All-reduces, in seconds",
                ("algorithm", "devices", "bytes", "closed form", "simulated", "simulated, with jitter"),
                cells,
            )
        ],
        findings=[
            f"Without jitter the closed form is at most {worst:.1%} off the simulation.",
            "With messages that are late by one latency in the mean, all-reduces take up to "
            f"{max(late / closed - 1 for *_, closed, _, late in rows):.0%} longer than the closed form.",
        ],
        data={"rows": rows},
    )


if __name__ == "__main__":
    main()
