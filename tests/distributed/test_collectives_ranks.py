"""Connecting processes, and the reductions over them."""

from __future__ import annotations

import math
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.loops import network
from support.ports import free_port
from support.ranks import run_ranks
from torch.nn.parallel import DistributedDataParallel

from adabatch.runtime.collectives import Collectives, collectives_of
from adabatch.runtime.launch.world import World, connected

pytestmark = pytest.mark.distributed


def reduced(rank: int) -> dict[str, Any]:
    world = Collectives(dist.group.WORLD)
    values = torch.tensor([1.0 + rank, 0.1 * rank, 1 / 3], dtype=torch.float64)
    before = values.clone()
    groups = [dist.new_group([0, 1]), dist.new_group([2])]  # all ranks make both
    model = DistributedDataParallel(network(), process_group=groups[rank // 2])
    own = collectives_of(model)
    return {
        "place": (world.rank, world.size),
        "sum": world.sum(values).tolist(),
        "left alone": torch.equal(values, before),
        "sum_of": world.sum_of(rank, True, 2**40 + rank),
        "not a number": [math.isnan(each) for each in world.sum_of(math.nan if rank == 1 else 0.0, 1.0)],
        "minimum_of": world.minimum_of(-rank, 5 + rank),
        "agree": world.agree(("the same", 1)),
        "disagree": [world.agree(rank == odd) for odd in range(3)],
        "own": (own.rank, own.size, own.sum_of(1.0 + rank)),
        "moved": moved(world, rank),
        "moved alone": moved(Collectives(), rank),
    }


def moved(ranks: Collectives, rank: int) -> dict[str, Any]:
    first = torch.tensor([rank, rank + 0.5])
    ranks.copy_from_first(first)
    summed = torch.tensor([1.0, rank])
    return {
        "gather": ranks.gather(torch.tensor([rank, 7], dtype=torch.uint8)).tolist(),
        "gather_of": ranks.gather_of(rank + 0.1, 2**40),
        "gather_bytes": ranks.gather_bytes(bytes(range(253, 253 + rank))),
        "first_message": ranks.first_message(f"café {rank}" if rank or ranks.size == 1 else None),
        "first": first.tolist(),
        "in place": ranks.sum_in_place(summed) is summed and summed.tolist(),
    }


def test_all_ranks_reduce_to_the_same_numbers(tmp_path):
    results = run_ranks(reduced, 3, tmp_path)
    assert [result["place"] for result in results] == [(0, 3), (1, 3), (2, 3)]
    for result in results:
        assert result["sum"] == pytest.approx([6.0, 0.3, 1.0], rel=1e-15)
        assert result["sum"] == results[0]["sum"]  # to the bit, or ranks could decide differently
        assert result["left alone"]
        assert result["sum_of"] == [3.0, 3.0, 3 * 2.0**40 + 3]
        assert result["not a number"] == [True, False]
        assert result["minimum_of"] == [-2.0, 5.0]
        assert result["agree"]
        assert result["disagree"] == [False] * 3
    for rank, result in enumerate(results):
        assert result["moved"] == {
            "gather": [[0, 7], [1, 7], [2, 7]],
            "gather_of": [[0.1, 2**40], [1.1, 2**40], [2.1, 2**40]],
            "gather_bytes": [b"", b"\xfd", b"\xfd\xfe"],
            "first_message": (1, "café 1"),
            "first": [0.0, 0.5],
            "in place": [3.0, 3.0],
        }
        assert result["moved alone"] == {
            "gather": [[rank, 7]], "gather_of": [[rank + 0.1, 2**40]],
            "gather_bytes": [bytes(range(253, 253 + rank))],
            "first_message": (0, f"café {rank}"), "first": [rank, rank + 0.5], "in place": [1.0, rank],
        }  # fmt: skip
    # The data-parallel ranks of a model are those of its process group.
    assert [result["own"] for result in results] == [(0, 2, [3.0]), (1, 2, [3.0]), (0, 1, [3.0])]


def launched(rank: int, port: int) -> tuple[int, int, float, bool]:
    """As under torchrun, by the environment."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK="0")
    world = World.from_environment()
    with connected(world, device=torch.device("cpu"), timeout=timedelta(seconds=30)):
        total = torch.tensor(1.0 + rank)
        dist.all_reduce(total)
    return world.rank, world.size, float(total), dist.is_initialized()


def interrupted(rank: int, port: int) -> bool:
    """A group does not outlive the block that an error left."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    try:
        with connected(World.from_environment(), device=torch.device("cpu")):
            raise KeyError("an error of the user's")
    except KeyError:
        return dist.is_initialized()


def threads_of_gloo() -> int:
    """How many this process has (on Linux)."""
    return sum("gloo" in name.read_text() for name in Path("/proc/self/task").glob("*/comm"))


def referred_to(rank: int, port: int) -> tuple[int, int]:
    """Threads of a group within its block and after it, where a cycle of garbage still refers to the group."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    with connected(World.from_environment(), device=torch.device("cpu")):
        cycle: list[Any] = [dist.group.WORLD, DistributedDataParallel(network())]
        cycle.append(cycle)
        del cycle
        within = threads_of_gloo()
    return within, threads_of_gloo()


def test_processes_connect_for_a_block(tmp_path):
    results = run_ranks(launched, 2, tmp_path, free_port(), connect=False)
    assert results == [(0, 2, 3.0, False), (1, 2, 3.0, False)]
    assert run_ranks(interrupted, 2, tmp_path, free_port(), connect=False) == [False, False]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_a_group_ends_its_threads_with_its_block(tmp_path: Path):
    """A thread that is left when the interpreter ends may abort the process."""
    for within, after in run_ranks(referred_to, 2, tmp_path, free_port(), connect=False):
        assert within > 0
        assert after == 0
