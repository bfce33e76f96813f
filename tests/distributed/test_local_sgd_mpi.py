"""Local SGD over MPI: the same weights, batch sizes and bytes as over gloo."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch
from support.loops import network, regression, train, weights
from support.mpi import mpich, run_mpi
from torch.optim import SGD

from adabatch import AdaptiveBatch, GlobalOrder, Limits, LocalSGD, NormTest, steps
from adabatch.runtime.launch.world import World, connected
from adabatch.runtime.local_sgd import Nesterov

pytestmark = pytest.mark.distributed


def one_way(world: World, backend: str) -> dict[str, Any]:
    """A run with all that is exchanged: gradients, changes in int8, what the optimizer remembers."""
    with connected(replace(world, backend=backend), device=torch.device("cpu"), timeout=timedelta(seconds=60)):
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


def both_ways() -> dict[str, Any]:
    world = World.from_environment()
    return {backend: one_way(world, backend) for backend in ("gloo", "mpi4py")}


def test_mpi_takes_the_rounds_that_gloo_takes() -> None:
    results = run_mpi(mpich(), 3, both_ways)
    for found in results:
        gloo, mpi = found["gloo"], found["mpi4py"]
        assert mpi["weights"] == results[0]["mpi4py"]["weights"]
        assert mpi["weights"] == pytest.approx(gloo["weights"], abs=2e-3)  # a rounding may move a number of int8
        assert mpi["sizes"] == gloo["sizes"]
        assert mpi["sizes"][-1] > 12
        assert mpi["bytes"] == gloo["bytes"] > 0
