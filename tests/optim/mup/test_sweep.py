"""Sweeps over widths: under a plan the best setting stays, at the base width there is no difference."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from adabatch.optim import mup

BASE = 16


def make(width: int) -> nn.Module:
    model = nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3))
    for layer in model[::2]:
        nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    return model


def batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    teacher = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(40):
        x = torch.randn(32, 8, generator=generator)
        yield x, (x @ teacher).argmax(1)


def adam(model: nn.Module, plan: mup.Plan, lr: float, damping: float | None) -> Optimizer:
    return torch.optim.AdamW(plan.groups(model, "adamw", lr=lr, damping=damping))


def swept(optimizer: Any = adam, **options: Any) -> mup.Sweep:
    options = {
        "loss": F.cross_entropy,
        "widths": (BASE, 16 * BASE),
        "base": BASE,
        "lrs": [2.0**-k for k in (10, 8, 6, 4, 2)],
        "steps": 40,
        **options,
    }
    return mup.transfer_sweep(make, optimizer, batches, **options)


def test_the_best_rate_stays_where_the_control_moves_it() -> None:
    ours, control = swept(), swept(parameterization="standard")
    assert ours.at(BASE) == control.at(BASE)
    assert ours.best(BASE).lr == ours.best(16 * BASE).lr
    assert control.best(16 * BASE).lr < control.best(BASE).lr
    assert ours.best(16 * BASE).loss < ours.best(BASE).loss


def test_settings_that_diverge_are_infinite_and_others_go_on() -> None:
    def sgd(model: nn.Module, plan: mup.Plan, lr: float, damping: float | None) -> Optimizer:
        return torch.optim.SGD(plan.groups(model, "sgd", lr=lr))

    seen: list[mup.Run] = []
    result = swept(sgd, lrs=[0.1, 1e30], seeds=(0, 1), done=seen.append)
    for width in result.widths:
        low, high = result.at(width)
        assert math.isfinite(low.loss)
        assert high.loss == math.inf
        assert result.largest_stable(width) == low
    assert tuple(seen) == result.runs
    assert swept(sgd, lrs=[1e30]).largest_stable(BASE) is None


def test_dampings_reach_the_optimizer_scaled() -> None:
    seen = []

    def noted(model: nn.Module, plan: mup.Plan, lr: float, damping: float | None) -> Optimizer:
        optimizer = adam(model, plan, lr, damping)
        seen.append((len(model[0].bias), damping, max(group["eps"] for group in optimizer.param_groups)))
        return optimizer

    swept(noted, lrs=[0.01], dampings=[1e-8, 1e-4], steps=1)
    assert seen == [(width, damping, damping) for width in (BASE, 16 * BASE) for damping in (1e-8, 1e-4)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lrs": []}, "lrs must hold at least one value"),
        ({"dampings": []}, "dampings must hold at least one value"),
        ({"steps": 0}, "steps must be 1 or more"),
        ({"steps": 41}, "the data ended after 40 batches, a run takes 41"),
        ({"widths": (16,)}, "two or more different"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        swept(**options)
