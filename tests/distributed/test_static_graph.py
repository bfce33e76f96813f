"""``DistributedDataParallel(static_graph=True)``: it learns its graph in the first backward, which must reduce."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.loops import network, regression, train
from support.ranks import run_ranks
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from adabatch import AdaptiveBatch, Constant, GlobalOrder, Measure, Stage, Stages, steps

pytestmark = pytest.mark.distributed


def trained(rank: int) -> dict[str, Any]:
    """Gradients, moments and losses with and without a static graph; accumulation from the first step or later."""
    found: dict[str, Any] = {}
    for name, criterion in {"accumulates": Constant(24), "later": Stages(8, [Stage(steps(2), 24)])}.items():
        for static in (False, True):
            model = DistributedDataParallel(network(dtype=torch.float64), static_graph=static)
            optimizer = SGD(model.parameters(), lr=0.05)
            measure = Measure(monitor=name == "accumulates")
            batches = AdaptiveBatch(model, optimizer, criterion, micro_batch_size=4, measure=measure)
            weights = found[f"{name}, {static}"] = []

            def note(step: Any, model: Any = model, weights: Any = weights) -> None:
                numbers = [] if step.moments is None else [*step.moments[:5], step.loss]
                weights.append((torch.cat([p.detach().flatten() for p in model.parameters()]), numbers))

            train(batches, model, optimizer, GlobalOrder(regression(96, dtype=torch.float64)), each=note)
    return found


def test_a_static_graph_trains_as_any_other(tmp_path: Path) -> None:
    first, second = run_ranks(trained, 2, tmp_path)
    for name in ("accumulates", "later"):
        assert len(first[f"{name}, True"]) == len(first[f"{name}, False"]) > 3
        for mine, other, plain in zip(
            first[f"{name}, True"], second[f"{name}, True"], first[f"{name}, False"], strict=True
        ):
            assert torch.equal(mine[0], other[0])
            torch.testing.assert_close(mine[0], plain[0], rtol=1e-12, atol=1e-14)
            assert mine[1] == pytest.approx(plain[1], rel=1e-10)
