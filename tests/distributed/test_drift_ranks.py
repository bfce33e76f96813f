"""Ranks that drifted apart are named at the next check, on all ranks at once, however the model is wrapped."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from support.loops import loss_of, network, regression
from support.ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from adabatch import AdaptiveBatch, Constant, GlobalOrder, LocalSGD, steps
from adabatch.adaptive.options import Guard
from adabatch.guards import RanksDrifted
from adabatch.guards.drift import AUTOMATIC, check_interval
from adabatch.runtime.collectives import Collectives
from adabatch.runtime.engines.choice import engine_for

pytestmark = pytest.mark.distributed


def wrapped(wrapper: str) -> torch.nn.Module:
    model = network()
    if wrapper == "DDP":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")) if wrapper == "HSDP" else None
    return fully_shard(model, mesh=mesh)


def flip(model: torch.nn.Module) -> None:
    """The least bit of one weight."""
    parameter = next(iter(model.parameters()))
    piece = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    with torch.no_grad():
        piece.view(torch.int32).view(-1)[0] ^= 1


def drifted(rank: int, wrapper: str, what: str, which: int) -> str:
    """Steps 0 to 3; after step 2 something is different on one rank. Checked before steps 0, 2 and 4."""
    model = wrapped(wrapper)
    optimizer = SGD(model.parameters(), lr=0.1)
    batches = AdaptiveBatch(model, optimizer, Constant(24), micro_batch_size=2, guard=Guard(check_every=2))
    try:
        for index, step in enumerate(batches.steps(GlobalOrder(regression(96)), until=steps(6))):
            for batch in step:
                step.backward(loss_of(model, batch))
            optimizer.step()
            optimizer.zero_grad()
            if index == 2 and rank == which:
                if what == "weights":
                    flip(model)
                elif what == "rate":
                    optimizer.param_groups[0]["lr"] *= 1.5
    except RanksDrifted as error:
        return str(error)
    return f"{batches.progress.steps} steps"


def cases(rank: int, size: int) -> dict[str, str]:
    found = {f"{wrapper}, nothing": drifted(rank, wrapper, "nothing", 1) for wrapper in ("DDP", "FSDP2")}
    found["DDP, weights"] = drifted(rank, "DDP", "weights", 1)
    found["DDP, rate"] = drifted(rank, "DDP", "rate", size - 1)
    found["FSDP2, weights"] = drifted(rank, "FSDP2", "weights", 1)  # each exists once: there is nothing to compare
    found["FSDP2, rate"] = drifted(rank, "FSDP2", "rate", 1)
    if size == 4:
        found["HSDP, nothing"] = drifted(rank, "HSDP", "nothing", 1)
        found["HSDP, weights"] = drifted(rank, "HSDP", "weights", 3)
    return found


def test_the_rank_that_drifted_is_named(tmp_path):
    for found in run_ranks(cases, 3, tmp_path, 3):
        assert found["DDP, nothing"] == found["FSDP2, nothing"] == found["FSDP2, weights"] == "6 steps"
        assert (
            "before step 4, rank 1 holds other weights than ranks 0, 2: go back to a checkpoint"
            in found["DDP, weights"]
        )
        # Rates are compared in every step, before its update.
        assert "in step 3 the ranks are about to make different updates" in found["DDP, rate"]
        assert "lr of optimizer group 0 is 0.1 on ranks 0, 1 and 0.15000000000000002 on rank 2" in found["DDP, rate"]
        assert "lr of optimizer group 0 is 0.1 on ranks 0, 2 and 0.15000000000000002 on rank 1" in found["FSDP2, rate"]


def test_copies_of_shards_are_compared(tmp_path):
    for found in run_ranks(cases, 4, tmp_path, 4):
        assert found["HSDP, nothing"] == "6 steps"
        assert "before step 4, ranks 1 and 3 hold different weights, and there is no majority" in found["HSDP, weights"]


def ignored(rank: int) -> str:
    """A part that DDP leaves to each rank is not compared; and by default the first step is checked."""
    model = network()
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["2.bias"])
    wrapped_model = DistributedDataParallel(model)
    with torch.no_grad():
        model[2].bias.fill_(float(rank))
    model[2].bias.requires_grad_(False)
    said = []
    for index in range(2):
        if index and rank == 1:
            flip(wrapped_model)
        optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        batches = AdaptiveBatch(wrapped_model, optimizer, Constant(4), micro_batch_size=2)
        try:
            next(batches.steps(GlobalOrder(regression(8))))
            said.append("nothing")
        except RanksDrifted as error:
            said.append(str(error))
    return "; ".join(said)


def test_by_default_the_first_step_is_checked_but_for_what_ddp_ignores(tmp_path):
    for found in run_ranks(ignored, 2, tmp_path):
        assert found.startswith("nothing; before step 0, ranks 0 and 1 hold different weights")
        assert "Guard(check_every=None)" in found


def in_the_last_steps(rank: int) -> list[str]:
    """A weight of the second rank is changed in the fourth step of a loop, by the default interval."""
    found = []
    for num_steps in (25, 8):
        model = wrapped("DDP")
        optimizer = SGD(model.parameters(), lr=0.01)
        batches = AdaptiveBatch(model, optimizer, Constant(24), micro_batch_size=2)
        try:
            for index, step in enumerate(batches.steps(GlobalOrder(regression(96)), until=steps(num_steps))):
                for batch in step:
                    step.backward(loss_of(model, batch))
                optimizer.step()
                optimizer.zero_grad()
                if index == 3 and rank == 1:
                    flip(model)
            found.append(batches.heartbeat.place.phase)
        except RanksDrifted as error:
            found.append(str(error))
        batches.remove()
    return found


def test_the_end_of_a_loop_is_checked_too(tmp_path):
    for long, short in run_ranks(in_the_last_steps, 2, tmp_path):
        assert long.startswith("before step 25, ranks 0 and 1 hold different weights")
        assert short.startswith("before step 8, ranks 0 and 1 hold different weights")


def test_the_interval_by_itself() -> None:
    class Ranks:
        size = 2

    alone, many, workers = (engine_for(torch.nn.Linear(1, 1)) for _ in range(3))
    many.collectives = workers.collectives = cast("Collectives", Ranks())
    workers.copies = False
    assert [check_interval("auto", each) for each in (alone, many, workers)] == [None, AUTOMATIC, None]
    assert [check_interval(every, many) for every in (5, None)] == [5, None]


def test_workers_that_step_alone_are_not_checked() -> None:
    model: Any = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="check_every compares weights, which differ between the workers of local_sgd"):
        AdaptiveBatch(
            model,
            optimizer,
            Constant(4),
            micro_batch_size=4,
            guard=Guard(check_every=10),
            local_sgd=LocalSGD(model, optimizer, sync_every=2),
        )
