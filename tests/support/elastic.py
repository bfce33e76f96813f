"""`adabatch train` under torchrun's own agents while nodes of one process come and go; whether it keeps its order."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.launcher.api import LaunchConfig, launch_agent
from torch.utils.data import TensorDataset

from adabatch import GlobalOrder
from adabatch.cli.main import main
from support.jobs import NUM_EXAMPLES, PRELOADED, PROCESSES, SEED, await_lines, command, lines, prepare
from support.ports import free_port

TOTAL = 4000
ENDLESS = 1_000_000


class Agent:
    """torchrun's own agent for one node of one process, under elastic launch of one to three nodes.

    Args:
        folder: of the job.
        arguments: of the command.
        port: of the meeting point on this machine.
        holds_it: whether the meeting point is this agent's. (Left to themselves, the first to come takes it, and it is
            gone when that one leaves.)
    """

    def __init__(self, folder: Path, arguments: Sequence[str], port: int, *, holds_it: bool = False) -> None:
        PROCESSES.set_forkserver_preload(PRELOADED)
        # torch 2.13 tells an agent that joins a later round nothing of the first one's shared store: it waits in vain.
        environment = {"GIVEN": str(folder / "given"), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        self.process = PROCESSES.Process(
            target=_agent, args=(list(arguments), environment, folder / "output", port, holds_it)
        )
        self.process.start()

    def leave(self, number: signal.Signals) -> None:
        """SIGTERM: as a node that is drained; SIGKILL: as one that loses its power."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)
        self.process.join()


def _agent(arguments: list[str], environment: dict[str, str], output: Path, port: int, holds_it: bool) -> None:
    prepare(environment, output)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=3,
        nproc_per_node=1,
        run_id="elastic",
        rdzv_backend="c10d",
        rdzv_endpoint=f"127.0.0.1:{port}",
        rdzv_configs={
            "last_call_timeout": 2,
            "keep_alive_interval": 1,
            "keep_alive_max_attempt": 5,
            "is_host": holds_it,
        },
        local_addr="127.0.0.1",
        max_restarts=9,
        monitor_interval=0.1,
        start_method="fork",
    )
    launch_agent(config, _work, [arguments])


def _work(arguments: list[str]) -> None:
    code = main(arguments)
    if code:
        sys.exit(code)


def two_one_three_two(folder: Path) -> list[dict[str, Any]]:
    """A job on two processes, of which one is drained, two join, and one loses its power; its journal."""
    slow = {"class_path": "support.jobs.Net", "init_args": {"pause": 0.005}}
    arguments = command(folder, model=slow, total={"count": TOTAL, "unit": "examples"})
    port = free_port()
    agents = [Agent(folder, arguments, port, holds_it=True), Agent(folder, arguments, port)]
    try:
        await_lines(folder, 8, size=2)
        agents[1].leave(signal.SIGTERM)
        await_lines(folder, 8, size=1)
        agents[1:] = [Agent(folder, arguments, port), Agent(folder, arguments, port)]
        await_lines(folder, 8, size=3)
        agents[2].leave(signal.SIGKILL)
        for agent in agents[:2]:
            agent.process.join(120)
            assert agent.process.exitcode == 0, (folder / "output").read_text()
    finally:
        for agent in agents:
            agent.process.kill()
            agent.process.join()
    return lines(folder)


def three_two_three_two(folder: Path) -> list[dict[str, Any]]:
    """Three workers of local SGD, of which one is drained, one joins, and one loses its power; their journal."""
    slow = {"class_path": "support.jobs.Net", "init_args": {"pause": 0.005}}
    local = {
        "class_path": "adabatch.LocalSGD",
        "init_args": {"sync_every": 4, "outer": {"class_path": "adabatch.local_sgd.Nesterov"}},
    }
    # each checkpoint is one between two rounds, so that any number of workers can go on from it
    saving = {"every": {"count": 8, "unit": "steps"}}
    # it is ended here: how long agents take to find each other is not to be foreseen
    total = {"count": ENDLESS, "unit": "examples"}
    limits = {"min": 12, "max": 24}
    arguments = command(folder, model=slow, local_sgd=local, checkpoint=saving, total=total, limits=limits)
    port = free_port()
    agents = [Agent(folder, arguments, port, holds_it=number == 0) for number in range(3)]
    try:
        await_lines(folder, 9, size=3)
        agents[1].leave(signal.SIGTERM)
        await_lines(folder, 9, size=2)
        agents[1] = Agent(folder, arguments, port)
        await_lines(folder, 20, size=3)
        agents[2].leave(signal.SIGKILL)
        await_lines(folder, 9, size=2)
        agents[1].leave(signal.SIGTERM)
        agents[0].leave(signal.SIGTERM)
    finally:
        for agent in agents:
            agent.process.kill()
            agent.process.join()
    return lines(folder)


def check_order(folder: Path, journal: list[dict[str, Any]]) -> None:
    """That each step took the next examples of the one order, and within its plan.

    Raises:
        AssertionError: it did not.
    """
    given: dict[tuple[int, int, int], list[int]] = {}
    for path in folder.glob("given.*"):
        for told in map(json.loads, path.read_text().splitlines()):
            given[told["end"], told["size"], told["rank"]] = told["given"]  # of a step that was lost, what came last
    order = GlobalOrder(TensorDataset(torch.zeros(NUM_EXAMPLES)), seed=SEED)
    positions = torch.cat([order.permutation(epoch) for epoch in range(TOTAL // NUM_EXAMPLES + 1)]).tolist()
    begin = 0
    for before, line in itertools.pairwise([None, *journal]):
        assert line is not None
        batch, size = line["plan"]["global_batch_size"], line["plan"]["dp_size"]
        assert line["examples"] == begin
        end = begin + batch
        taken = [example for rank in range(size) for example in given[end, size, rank]]
        assert sorted(taken) == sorted(positions[begin:end])
        begin = end
        assert 12 <= batch <= 48
        if before is not None:
            # Accumulation makes up for ranks that went: 6 examples are the coarsest step that 3 ranks of 2 can take.
            assert abs(batch - before["next"]) <= 3
            # The averages hold numbers per example, so they go on from where they were whatever the ranks.
            assert abs(line["averages"]["noise"] - before["averages"]["noise"]) <= 0.7 * before["averages"]["noise"]
    assert begin >= TOTAL
