"""Rank, world size and meeting point from what launchers set; what MPI itself says is in tests/distributed."""

from __future__ import annotations

import gc
import time
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist

from adabatch.runtime.launch.launchers import first_host
from adabatch.runtime.launch.world import World, connected

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
DEEPSPEED = {"LOCAL_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_JOB_ID": "812", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
}  # fmt: skip


def ranked(rank: int, size: int) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": str(size)}


def grouped(rank: int, size: int) -> dict[str, str]:
    return {"GROUP_RANK": str(rank), "GROUP_WORLD_SIZE": str(size)}


def crossed(rank: int, size: int) -> dict[str, str]:
    return {"CROSS_RANK": str(rank), "CROSS_SIZE": str(size)}


def tasked(rank: int, size: int) -> dict[str, str]:
    return {"SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": str(size)}


def processed(rank: int, size: int) -> dict[str, str]:
    return {"PMI_RANK": str(rank), "PMI_SIZE": str(size)}


def test_without_a_launcher_there_is_one_process() -> None:
    assert World.from_environment({}) == World(rank=0, size=1, local_rank=0)
    assert World.from_environment({"LOCAL_RANK": "0", "HOME": "/"}) == World()


def test_torchrun_says_rank_and_size() -> None:
    world = World.from_environment(TORCHRUN | ranked(5, 8) | grouped(1, 2))
    assert world == World(rank=5, size=8, local_rank=1)
    assert (world.launcher, world.address) == ("torchrun", None)  # torch reads the address itself
    assert World.from_environment(ranked(1, 2)).local_rank == 0


def test_the_deepspeed_launcher_says_rank_and_size() -> None:
    world = World.from_environment(DEEPSPEED | ranked(5, 8) | crossed(1, 2))
    assert world == World(rank=5, size=8, local_rank=1)
    assert world.launcher == "deepspeed"


def test_srun_says_rank_size_and_where_to_meet() -> None:
    worlds = [World.from_environment(SRUN | tasked(rank, 8)) for rank in (0, 5)]
    assert worlds == [World(rank=0, size=8, local_rank=1), World(rank=5, size=8, local_rank=1)]
    assert {world.launcher for world in worlds} == {"srun"}
    (address,) = {world.address for world in worlds}
    host, _, port = (address or "").partition(":")
    assert host == "gpu07"
    assert 1024 <= int(port) < 32_768
    other = World.from_environment(SRUN | tasked(0, 8) | {"SLURM_JOB_ID": "813"})
    assert other.address != address
    alone = World.from_environment(SRUN | tasked(0, 8) | {"SLURM_STEP_NUM_NODES": "1"})
    assert alone.address == f"127.0.0.1:{port}"
    given = World.from_environment(SRUN | tasked(0, 8) | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "7"})
    assert given.address == "10.0.0.1:7"


def test_the_batch_script_of_slurm_is_one_process() -> None:
    assert World.from_environment(SRUN | {"SLURM_PROCID": "0"}) == World()


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("n1", "n1"),
        ("gpu[07-09,12],cpu1", "gpu07"),
        ("a,b[1-2]", "a"),
        ("r[3,5]c-x,z", "r3c-x"),
        ("r[1-2]n[5-6]", "r1n5"),
    ],
)
def test_the_first_host_of_a_node_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


@pytest.mark.parametrize(
    "environment",
    [
        TORCHRUN | ranked(5, 8) | grouped(1, 2) | tasked(1, 2),  # srun, one torchrun a node
        TORCHRUN | ranked(5, 8) | grouped(1, 2) | processed(1, 2),  # mpiexec, one torchrun a node
        DEEPSPEED | ranked(5, 8) | crossed(1, 2) | tasked(1, 2),
        TORCHRUN | ranked(5, 8) | grouped(0, 1) | tasked(0, 1),  # on a node of its own
        TORCHRUN | ranked(5, 8) | tasked(5, 8) | grouped(5, 8),  # variables handed on
        ranked(5, 8) | tasked(5, 8),
        SRUN | tasked(5, 8) | processed(5, 8),  # srun --mpi=pmi2
    ],
    ids=str,
)
def test_launchers_may_be_nested(environment: dict[str, str]) -> None:
    world = World.from_environment(environment)
    assert (world.rank, world.size) == (5, 8)


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        (ranked(0, 1) | tasked(1, 2), r"RANK=0 and WORLD_SIZE=1 of the caller contradict SLURM_PROCID=1 and"),
        (TORCHRUN | ranked(0, 4) | grouped(0, 1) | tasked(1, 2), r"of torchrun contradict .* of srun: .*start one"),
        (DEEPSPEED | ranked(0, 4) | crossed(0, 1) | processed(1, 2), r"of deepspeed contradict PMI_RANK=1 and .*"),
    ],
    ids=["left over", "a torchrun a task", "a deepspeed a task"],
)
def test_launchers_that_contradict_each_other_are_refused(environment: dict[str, str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        World.from_environment(environment)


def test_the_environment_of_the_process_is_the_default(monkeypatch) -> None:
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert World.from_environment() == World(rank=2, size=3)


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"RANK": "0"}, "torchrun, or unset RANK"),
        ({"WORLD_SIZE": "2"}, "torchrun, or unset RANK"),
        ({"RANK": "zero", "WORLD_SIZE": "2"}, "torchrun, or unset RANK"),
        ({"RANK": "0", "WORLD_SIZE": ""}, "torchrun, or unset RANK"),
        (ranked(0, 2) | {"LOCAL_RANK": "a"}, "torchrun, or unset RANK"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "srun, or unset them"),
        ({"PMI_SIZE": "2"}, "mpiexec, or unset them"),
    ],
    ids=str,
)
def test_incomplete_variables_are_refused(environment: dict[str, str], says: str) -> None:
    with pytest.raises(ValueError, match=f"incomplete or not numbers: .*{says}"):
        World.from_environment(environment)


@pytest.mark.parametrize(("rank", "size"), [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_outside_the_world_is_refused(rank: int, size: int) -> None:
    with pytest.raises(ValueError, match=f"RANK={rank} is not below WORLD_SIZE={size}"):
        World.from_environment(ranked(rank, size))


def test_a_backend_can_be_asked_for() -> None:
    assert World.from_environment({"ADABATCH_BACKEND": "gloo"} | ranked(0, 2)).backend == "gloo"
    assert World.from_environment({"ADABATCH_BACKEND": ""}).backend is None
    with pytest.raises(ValueError, match="must be one of nccl, gloo, mpi4py, got 'tcp'"):
        World.from_environment({"ADABATCH_BACKEND": "tcp"})


def test_one_process_needs_no_group() -> None:
    with connected(World(), device=torch.device("cpu")):
        assert not dist.is_initialized()


class Failed(Exception):
    """An error in the block."""


@pytest.mark.parametrize("fails", [False, True])
def test_the_threads_of_a_group_get_the_lock_of_python_before_it_is_freed(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever refers to the group (DDP's reducer) is freed later than the wait, by a collection or by the caller.

    The deadlock itself needs a thread of gloo that frees a tensor within the same microseconds, inside torch; nothing
    can make it wait there. What keeps it away is this order.
    """
    done: list[str] = []

    class Reducer:
        def __del__(self) -> None:
            done.append("freed")

    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: done.append("begun"))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: done.append("destroyed"))
    monkeypatch.setattr(time, "sleep", lambda seconds: done.append("waited") if seconds > 0 else None)
    monkeypatch.setattr(gc, "collect", lambda: done.append("collected"))

    def run() -> None:
        reducer = Reducer()
        with connected(World(rank=0, size=2, backend="gloo"), device=torch.device("cpu")):
            done.append("run")
            if fails:
                raise Failed
        del reducer

    with pytest.raises(Failed) if fails else nullcontext():
        run()
    order = ["begun", "run", "destroyed", "waited", *["collected"] * (not fails), "freed"]
    assert done == order


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a machine without an accelerator")
def test_without_an_accelerator_the_device_is_the_cpu() -> None:
    assert World().device == torch.device("cpu")
