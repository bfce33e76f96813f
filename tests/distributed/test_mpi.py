"""Ranks that a real ``mpiexec`` starts, of MPICH and of Open MPI: who they are, and collectives over MPI."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.ladder import BY_MICRO_BATCH, JUMP, WINDOWS, check_same, climb_with, growths
from support.loops import network, regression, train, weights
from support.mpi import Mpi, mpich, openmpi, run_mpi, start_mpi
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from adabatch import AdaptiveBatch, GlobalOrder, Limits, LocalSGD, NormTest, steps
from adabatch.runtime.collectives import Collectives
from adabatch.runtime.launch.world import World, connected
from adabatch.runtime.local_sgd import Nesterov

pytestmark = pytest.mark.distributed

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where Open MPI may be installed."""
    return tmp_path_factory.mktemp("mpi")


def numbers(rank: int) -> dict[str, Any]:
    """Every collective that the library uses, by both ways to call it."""
    world = Collectives(dist.group.WORLD)
    pair = dist.new_group([0, 2])
    rows = torch.arange(6.0).view(3, 2) + 10 * rank
    exchanged = torch.empty_like(rows)
    dist.all_to_all_single(exchanged, rows)
    copied = torch.tensor([1.5 * rank, 7.0], dtype=torch.bfloat16)
    world.copy_from_first(copied)
    gathered = world.gather_at(1, rows[0])
    dealt = None if gathered is None else gathered.flip(0)
    found: dict[str, Any] = {
        "sum": world.sum(torch.tensor([1.0 + rank, 0.1 * rank, 1 / 3], dtype=torch.float64)).tolist(),
        "halves": world.sum(torch.tensor([1.0 + rank], dtype=torch.bfloat16)).tolist(),
        "whole": world.sum(torch.tensor([2**40 + rank])).tolist(),
        "minimum": world.minimum_of(-rank, 5 + rank),
        "agree": [world.agree("the same"), world.agree(rank == 1)],
        "gather": world.gather_of(rank, 2.5),
        "exchange": exchanged.tolist(),
        "copied": copied.tolist(),
        "gathered": None if gathered is None else gathered.tolist(),
        "scattered": world.scatter_from(1, dealt, rows[0]).tolist(),
        "nan": [math.isnan(each) for each in world.sum_of(math.nan if rank == 1 else 0.0, 1.0)],
    }
    if rank != 1:
        found["pair"] = Collectives(pair).sum_of(1.0 + rank)
    for op in (dist.ReduceOp.AVG, dist.ReduceOp.MAX, dist.ReduceOp.PRODUCT):
        values = torch.tensor([1.0 + rank])
        dist.all_reduce(values, op=op)
        found[str(op)] = values.tolist()
    piece, whole = torch.empty(2), torch.arange(6.0) * (rank + 1)
    dist.reduce_scatter_tensor(piece, whole.clone()) if not hasattr(dist, "reduce_scatter_single") else (
        dist.reduce_scatter_single(piece, whole.clone())
    )
    found["piece"] = piece.tolist()
    listed = [torch.empty(1) for _ in range(3)]
    dist.all_gather(listed, torch.tensor([float(rank)]))
    found["listed"] = [float(each) for each in listed]
    dist.barrier()
    return found


def ladder() -> dict[str, Any]:
    """The same over gloo and over MPI, in one job."""
    world = World.from_environment()
    found: dict[str, Any] = {
        "place": [world.rank, world.size, world.local_rank], "launcher": world.launcher, "address": world.address
    }  # fmt: skip
    for backend in ("gloo", "mpi4py"):
        with connected(replace(world, backend=backend), device=CPU, timeout=timedelta(seconds=60)):
            jumped, climbed = (
                climb_with(DistributedDataParallel(network()), run, num_steps=num_steps)
                for run, num_steps in ((JUMP, len(WINDOWS)), (BY_MICRO_BATCH, 200))
            )
            found[backend] = {"carried by": dist.get_backend(), "jump": jumped, "climb": climbed}
    return found


@pytest.mark.parametrize("name", ["MPICH", "Open MPI"])
def test_mpi_takes_the_run_that_gloo_and_one_process_take(name: str, scratch: Path) -> None:
    results = run_mpi(mpich() if name == "MPICH" else openmpi(scratch), 2, ladder)
    assert [result["place"] for result in results] == [[0, 2, 0], [1, 2, 1]]
    assert {result["launcher"] for result in results} == {"mpiexec"}
    assert len({result["address"] for result in results}) == 1
    first, second = results
    assert first["mpi4py"] == second["mpi4py"]  # to the bit, or ranks would drift apart
    gloo, mpi = first["gloo"], first["mpi4py"]
    assert (gloo["carried by"], mpi["carried by"]) == ("gloo", "mpi4py")
    check_same("200 steps", mpi["climb"], gloo["climb"])
    check_same("from 1 to 4", mpi["jump"], gloo["jump"])
    assert mpi["jump"]["windows"] == WINDOWS
    alone = climb_with(network(), BY_MICRO_BATCH, num_steps=200)
    check_same("one process", mpi["climb"], alone, windows=False)
    assert growths(alone) >= 5


def one_way(world: World, backend: str) -> dict[str, Any]:
    """Local SGD with all that is exchanged: gradients, changes in int8, what the optimizer remembers."""
    with connected(replace(world, backend=backend), device=CPU, timeout=timedelta(seconds=60)):
        model = network()
        optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
        options: dict[str, Any] = {"outer": Nesterov(), "compression": "int8", "average_state": True}
        sizes: list[int] = []
        with LocalSGD(model, optimizer, sync_every=4, warmup=steps(4), **options) as local:
            batches = AdaptiveBatch(
                model, optimizer, NormTest(eta=0.6), micro_batch_size=2, max_micro_batch_size=32,
                limits=Limits(min=12, max=96), local_sgd=local,
            )  # fmt: skip
            order = GlobalOrder(regression(512))
            train(
                batches, model, optimizer, order, each=lambda step: sizes.append(step.global_batch_size),
                until=steps(40),
            )  # fmt: skip
    return {"weights": weights(model).tolist(), "sizes": sizes, "bytes": local.bytes_sent}


def on_three_ranks() -> dict[str, Any]:
    world = World.from_environment()
    with connected(replace(world, backend="mpi4py"), device=CPU, timeout=timedelta(seconds=60)):
        found = {"collectives": numbers(world.rank)}
    return found | {backend: one_way(world, backend) for backend in ("gloo", "mpi4py")}


@pytest.fixture(scope="module")
def three() -> list[dict[str, Any]]:
    """What each of three ranks found."""
    return run_mpi(mpich(), 3, on_three_ranks)


def test_collectives_over_mpi(three: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(three):
        check(found["collectives"], rank)


def test_mpi_takes_the_rounds_of_local_sgd_that_gloo_takes(three: list[dict[str, Any]]) -> None:
    """The same weights, batch sizes and bytes."""
    for found in three:
        gloo, mpi = found["gloo"], found["mpi4py"]
        assert mpi["weights"] == three[0]["mpi4py"]["weights"]
        assert mpi["weights"] == pytest.approx(gloo["weights"], abs=2e-3)  # a rounding may move a number of int8
        assert mpi["sizes"] == gloo["sizes"]
        assert mpi["sizes"][-1] > 12
        assert mpi["bytes"] == gloo["bytes"] > 0


def check(found: dict[str, Any], rank: int) -> None:
    assert found["sum"] == pytest.approx([6.0, 0.3, 1.0], rel=1e-15)
    assert found["halves"] == [6.0]
    assert found["whole"] == [3 * 2**40 + 3]
    assert found["minimum"] == [-2.0, 5.0]
    assert found["agree"] == [True, False]
    assert found["gather"] == [[0.0, 2.5], [1.0, 2.5], [2.0, 2.5]]
    assert found["exchange"] == [[2.0 * rank + 10 * sender, 2.0 * rank + 1 + 10 * sender] for sender in range(3)]
    assert found["copied"] == [0.0, 7.0]
    assert found["gathered"] == ([[0.0, 1.0], [10.0, 11.0], [20.0, 21.0]] if rank == 1 else None)
    assert found["scattered"] == [10.0 * (2 - rank), 10.0 * (2 - rank) + 1]
    assert found["nan"] == [True, False]
    assert found.get("pair") == (None if rank == 1 else [4.0])
    assert [found[f"RedOpType.{name}"] for name in ("AVG", "MAX", "PRODUCT")] == [[2.0], [3.0], [6.0]]
    assert found["piece"] == [6 * (2.0 * rank), 6 * (2.0 * rank + 1)]
    assert found["listed"] == [0.0, 1.0, 2.0]


def place() -> list[int]:
    world = World.from_environment()
    return [world.rank, world.size]


def test_variables_that_contradict_mpiexec_stop_every_rank() -> None:
    # Rank 0 sees nothing wrong by itself.
    result = start_mpi(mpich(), 2, place, variables={"RANK": "0", "WORLD_SIZE": "2"})
    assert result.returncode != 0
    assert result.output.count("PMI_RANK=1 and PMI_SIZE=2 of mpiexec contradict RANK=0 and WORLD_SIZE=2") == 2


def test_ranks_that_mpi_would_leave_alone_are_told(scratch: Path) -> None:
    """Each would be rank 0 of 1, and train the whole by itself. mpi4py itself only warns."""
    mixed = Mpi(mpich().mpiexec, openmpi(scratch).variables)
    result = start_mpi(mixed, 2, place, warnings="default")
    assert result.returncode != 0
    assert "PMI_SIZE=2 of mpiexec contradict mpi4py, which is rank 0 of 1: it runs Open MPI" in result.output
    assert not result.values


def one_fails(how: str) -> None:
    """Rank 1 raises, or comes too late."""
    world = World.from_environment()
    with connected(
        replace(world, backend="mpi4py"), device=CPU, timeout=timedelta(seconds=60 if how == "raises" else 2)
    ):
        Collectives(dist.group.WORLD).sum_of(1.0)
        if world.rank == 1:
            if how == "raises":
                raise KeyError("rank 1 fails")
            time.sleep(100)  # far longer than the test may take
        Collectives(dist.group.WORLD).sum_of(1.0)


@pytest.mark.parametrize(("how", "says"), [("raises", "rank 1 fails"), ("hangs", "rank 0 waited 2 s for the other")])
def test_a_rank_that_fails_ends_the_job(how: str, says: str) -> None:
    result = start_mpi(mpich(), 2, one_fails, how, timeout=50)
    assert result.returncode != 0
    assert says in result.output
