"""`adabatch plan --measure`: what is timed, and what the plan makes of times that are given."""

from __future__ import annotations

import io
import json
import math
import os
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ports import free_port
from support.ranks import run_ranks

from adabatch.cli.main import main
from adabatch.cli.measuring import measured
from adabatch.cli.plan import _parser, plan_of_arguments
from adabatch.forecast.network import ring_seconds
from adabatch.runtime.launch.machine_speed import all_reduce_times, matmul_flops

LATENCY, BANDWIDTH, DEVICES = 2e-4, 5e8, 4
GUESS = ["--examples=2e6", "--tokens_per_example=2048", "--parameters=1e8"]


def found() -> dict[str, Any]:
    """Times of a ring that was never there."""
    sizes = (4096.0, 65536.0, 1048576.0)
    timed = [(size, ring_seconds(DEVICES, size, latency=LATENCY, bandwidth=BANDWIDTH)) for size in sizes]
    return {"devices": DEVICES, "all_reduce": timed, "flops": 1e12}


def planned(*options: str) -> Any:
    return plan_of_arguments(_parser().parse_args([*GUESS, *options]), None, found())


def test_the_network_and_the_speed_come_from_what_was_timed():
    made = planned()
    assert made.here.devices == DEVICES
    assert made.here.all_reduce == pytest.approx(ring_seconds(DEVICES, 4e8, latency=LATENCY, bandwidth=BANDWIDTH))
    # Nothing beside the network: the price is an all-reduce, in examples of 6 x parameters x tokens operations.
    assert made.here.price == pytest.approx(DEVICES * made.here.all_reduce / (6 * 1e8 * 2048 / 1e12))
    assert any("4 processes" in note and "5e+08 bytes/s" in note for note in made.notes)
    assert any("1e+12 per second" in note and "float32" in note for note in made.notes)


def test_the_command_line_goes_before_what_was_timed():
    made = planned("--bandwidth=1e9", "--latency=0", "--devices=8", "--flops=2e12")
    assert made.here.devices == 8
    assert made.here.all_reduce == pytest.approx(ring_seconds(8, 4e8, latency=0, bandwidth=1e9))
    assert made.here.price == pytest.approx(8 * made.here.all_reduce / (6 * 1e8 * 2048 / 2e12))


def test_times_that_do_not_grow_are_refused():
    flat = found() | {"all_reduce": [(4096.0, 0.02), (65536.0, 0.01)]}
    with pytest.raises(ValueError, match="took no longer for more bytes"):
        plan_of_arguments(_parser().parse_args(GUESS), None, flat)


def test_alone_a_process_times_a_product():
    assert 0 < matmul_flops(torch.device("cpu"), width=64, rounds=2) < math.inf
    with pytest.raises(RuntimeError, match="between processes"):
        all_reduce_times(torch.device("cpu"))
    first, alone = measured()
    assert first
    assert alone["devices"] == 1
    assert alone["flops"] > 0
    assert "all_reduce" not in alone


def timed_on(rank: int) -> list[tuple[float, float]]:
    return all_reduce_times(torch.device("cpu"), sizes=(4096, 65536), rounds=2)


def test_two_processes_agree_on_the_times(tmp_path: Path):
    one, other = run_ranks(timed_on, 2, tmp_path)
    assert one == other  # the slowest rank's
    assert [size for size, _ in one] == [4096, 65536]
    assert all(0 < seconds < math.inf for _, seconds in one)


def plan_on(rank: int, port: int) -> str:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    said = io.StringIO()
    with redirect_stdout(said):
        # The network is given, as a busy machine may time a megabyte faster than a kilobyte; it is timed all the same.
        assert main(["plan", *GUESS, "--measure", "--json", "--bandwidth=1e9", "--latency=1e-5"]) == 0
    return said.getvalue()


def test_the_whole_command_on_two_processes(tmp_path: Path):
    first, second = run_ranks(plan_on, 2, tmp_path, free_port(), connect=False)
    assert second == ""  # one plan, of the first rank
    told = json.loads(first)
    assert told["forecast"]["devices"] == 2
    assert any("float32 matrices" in note for note in told["notes"])
