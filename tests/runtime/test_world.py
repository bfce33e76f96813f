"""Rank and world size from what launchers set."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from adabatch.runtime.world import World, connected


def test_without_a_launcher_there_is_one_process() -> None:
    assert World.from_environment({}) == World(rank=0, size=1, local_rank=0)
    assert World.from_environment({"LOCAL_RANK": "0", "HOME": "/"}) == World()


def test_torchrun_says_rank_and_size() -> None:
    world = World.from_environment({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node0"})
    assert world == World(rank=5, size=8, local_rank=1)
    assert World.from_environment({"RANK": "1", "WORLD_SIZE": "2"}).local_rank == 0


def test_the_environment_of_the_process_is_the_default(monkeypatch) -> None:
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert World.from_environment() == World(rank=2, size=3)


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "0"},
        {"WORLD_SIZE": "2"},
        {"RANK": "zero", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": ""},
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "a"},
    ],
    ids=str,
)
def test_incomplete_variables_are_refused(environment: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"incomplete or not numbers: .*torchrun, or unset RANK"):
        World.from_environment(environment)


@pytest.mark.parametrize(("rank", "size"), [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_outside_the_world_is_refused(rank: int, size: int) -> None:
    with pytest.raises(ValueError, match=f"RANK={rank} is not below WORLD_SIZE={size}"):
        World.from_environment({"RANK": str(rank), "WORLD_SIZE": str(size)})


def test_one_process_needs_no_group() -> None:
    with connected(World(), device=torch.device("cpu")):
        assert not dist.is_initialized()


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a machine without an accelerator")
def test_without_an_accelerator_the_device_is_the_cpu() -> None:
    assert World().device == torch.device("cpu")
