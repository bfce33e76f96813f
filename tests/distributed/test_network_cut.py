"""Two machines, which are network namespaces joined by a virtual cable, and the cable is cut while they train.

A cut cable resets no connection: neither side hears anything, as with a switch that fails. Both must end soon all the
same, say why, and the same job must go on once the cable is back.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support.jobs import PRELOADED, PROCESSES, prepare
from support.loops import lines, loss_of, network, regression, weights
from support.ranks import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import adabatch
from adabatch import AdaptiveBatch, Checkpoints, GlobalOrder, Limits, LocalSGD, NormTest, Watchdog
from adabatch.guards import EXIT_RANK_LOST
from adabatch.runtime.launch.world import World, connected

pytestmark = pytest.mark.distributed

STEPS, CUT_AT = 20, 10
"""The cut comes in a step that begins no round of four, four steps after a checkpoint was due."""

HANG_S, GRACE_S = 8.0, 1.0  # a busy machine may let a process wait for seconds
BOUND_S = 90.0
"""How soon both must have ended; the clock of a busy machine is in it."""


# --- what each machine runs ------------------------------------------------------------------------------------------


def go(mode: str, place: Path, *, reached: Path | None, address: str | None) -> dict[str, Any]:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.02)
    local = LocalSGD(model, optimizer, sync_every=4) if mode == "local SGD" else None
    wrapped: nn.Module = DistributedDataParallel(model) if local is None else model
    batches = AdaptiveBatch(
        wrapped, optimizer, NormTest(eta=0.5), micro_batch_size=4, limits=Limits(min=8, max=32), local_sgd=local,
        journal=place / "journal.jsonl",
    )  # fmt: skip
    order = GlobalOrder(regression(256))
    checkpoints = Checkpoints(
        place / "checkpoints", model=wrapped, optimizer=optimizer, batches=batches, order=order, local_sgd=local,
        every=adabatch.steps(3), background=False,
    )  # fmt: skip
    loaded = checkpoints.load()
    begun = batches.consumed.steps
    with checkpoints, Watchdog(batches, timeout=HANG_S, grace=GRACE_S, address=address):
        for step in batches.steps(order, until=adabatch.steps(STEPS)):
            for batch in step:
                step.backward(loss_of(wrapped, batch))
                if reached is not None and batches.consumed.steps == CUT_AT:
                    await_the_cut(reached, batches.collectives.rank)
                    batches.heartbeat.since = time.monotonic()  # it stood still for the test until now, for no rank
            optimizer.step()
            optimizer.zero_grad()
            checkpoints.step()
        if local is not None:
            local.synchronize()
    return {"begun": begun if loaded else None, "weights": weights(model).tolist()}


def await_the_cut(reached: Path, rank: int) -> None:
    """Says that the step is reached, and goes on once the cable is cut."""
    cut = reached / "cut"
    (reached / str(rank)).touch()
    while not cut.exists():
        time.sleep(0.01)


def on_a_machine(name: str, variables: dict[str, str], output: Path, mode: str, place: str, reached: str) -> None:
    enter(name)
    prepare(variables, output)
    world = World.from_environment()
    # The collectives would wait for ten minutes: it is the watchdog that ends them.
    with connected(world, device=torch.device("cpu"), timeout=timedelta(minutes=10)):
        address = os.environ["MASTER_ADDR"]
        result = go(mode, Path(place), reached=Path(reached) if reached else None, address=address)
    output.with_suffix(".json").write_text(json.dumps(result))


def on_a_rank(rank: int, mode: str, place: Path) -> dict[str, Any]:
    return go(mode, place, reached=None, address=None)


# --- machines and cables ---------------------------------------------------------------------------------------------


class Machine(NamedTuple):
    """A network namespace, its end of the cable, and its address there."""

    name: str
    device: str
    address: str


def ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True)


@contextmanager
def two_machines() -> Iterator[tuple[Machine, Machine]]:
    """Joined by a cable; skips where there can be none."""
    if shutil.which("ip") is None:
        pytest.skip("no ip: apt-get install iproute2")
    tag = f"{os.getpid() % 10_000:04d}"
    machines = tuple(Machine(f"adabatch{tag}{end}", f"ab{tag}{end}", f"10.77.0.{end + 1}") for end in (0, 1))
    first, second = machines
    try:
        for machine in machines:
            made = ip("netns", "add", machine.name)
            if made.returncode:
                pytest.skip(f"network namespaces cannot be made here: {made.stderr.strip()}")
        made = ip(
            "link", "add", first.device, "netns", first.name, "type", "veth", "peer", "name", second.device, "netns",
            second.name,
        )  # fmt: skip
        if made.returncode:
            pytest.skip(f"virtual cables cannot be made here: {made.stderr.strip()}")
        for machine in machines:
            for words in (
                ("addr", "add", f"{machine.address}/24", "dev", machine.device),
                ("link", "set", machine.device, "up"),
                ("link", "set", "lo", "up"),
            ):
                assert ip("-n", machine.name, *words).returncode == 0
        yield first, second
    finally:
        for machine in machines:
            ip("netns", "del", machine.name)


def enter(name: str) -> None:
    """Moves this process into a network namespace."""
    with open(f"/run/netns/{name}") as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0x40000000):  # CLONE_NEWNET
            raise OSError(ctypes.get_errno(), f"no way into {name}")


def start(machines: tuple[Machine, Machine], folder: Path, port: int, *arguments: str) -> list[tuple[Any, Path]]:
    """A process on each machine, and where its output goes."""
    PROCESSES.set_forkserver_preload(PRELOADED)
    running = []
    for rank, machine in enumerate(machines):
        variables = {
            "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": machines[0].address,
            "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": machine.device,
        }  # fmt: skip
        output = folder / f"{rank}.{port}"
        process = PROCESSES.Process(target=on_a_machine, args=(machine.name, variables, output, *arguments))
        process.start()
        running.append((process, output))
    return running


def ended(running: list[tuple[Any, Path]], seconds: float) -> list[tuple[int | None, str]]:
    """Status and output of each; the status of one that is not done in time is None."""
    deadline = time.monotonic() + seconds
    try:
        for process, _ in running:
            process.join(max(0.1, deadline - time.monotonic()))
        return [(process.exitcode, output.read_text()) for process, output in running]
    finally:
        for process, _ in running:
            process.kill()
            process.join()


@pytest.mark.parametrize("mode", ["DDP", "local SGD"])
def test_a_cut_cable_ends_both_sides_soon_and_the_job_goes_on(mode: str, tmp_path: Path) -> None:
    place, whole, reached = tmp_path / "cut", tmp_path / "whole", tmp_path / "reached"
    for folder in (place, whole, reached):
        folder.mkdir()
    with two_machines() as machines:
        running = start(machines, tmp_path, 29_710, mode, str(place), str(reached))
        deadline = time.monotonic() + BOUND_S
        while not all((reached / str(rank)).exists() for rank in (0, 1)):
            if time.monotonic() > deadline or any(process.exitcode is not None for process, _ in running):
                pytest.fail(f"the step was not reached: {ended(running, 1)}")
            time.sleep(0.05)
        assert ip("-n", machines[0].name, "link", "set", machines[0].device, "down").returncode == 0
        (reached / "cut").touch()
        for rank, (status, output) in enumerate(ended(running, BOUND_S)):
            assert status == EXIT_RANK_LOST, output
            assert f"rank {1 - rank} has not been heard of for {HANG_S:.0f} s" in output, output
        assert not list(tmp_path.glob("*.json"))

        assert ip("-n", machines[0].name, "link", "set", machines[0].device, "up").returncode == 0
        for status, output in ended(start(machines, tmp_path, 29_711, mode, str(place), ""), BOUND_S):
            assert status == 0, output
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert found[0]["begun"] == found[1]["begun"] == 9
    uncut = run_ranks(on_a_rank, 2, tmp_path, mode, whole)
    assert [each["weights"] for each in found] == [each["weights"] for each in uncut]
    assert lines(place / "journal.jsonl") == lines(whole / "journal.jsonl")
