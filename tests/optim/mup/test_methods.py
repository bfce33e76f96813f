"""Optimizers by name under a width plan, and what a check and a sweep say of themselves."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from adabatch.optim import KFAC, Shampoo, mup
from adabatch.optim.mup import Coordinate, CoordinateCheck, Run, Sweep
from adabatch.optim.mup.methods import FIRST_LRS, METHODS, OTHERS_LR, optimizers_for


def net(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))


TYPES = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "shampoo": Shampoo, "kfac": KFAC}


@pytest.mark.parametrize("method", METHODS)
def test_every_parameter_is_trained_once_at_the_rate_of_its_plan(method: str) -> None:
    if method == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("torch.optim.Muon came with torch 2.9")
    model = net(64)
    plan = mup.plan(model, net(16))
    optimizers = optimizers_for(method, model, plan, lr=0.05)
    held = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    assert isinstance(optimizers[0], TYPES.get(method, torch.optim.Optimizer))
    first = {group["lr"] for group in optimizers[0].param_groups}
    assert first <= {each["lr"] for each in plan.groups(model, method, lr=0.05, only=plan.taken_by(method))}  # type: ignore[arg-type]
    for other in optimizers[1:]:
        assert isinstance(other, torch.optim.AdamW)
        assert max(group["lr"] for group in other.param_groups) == pytest.approx(OTHERS_LR)
    assert method in FIRST_LRS
    for optimizer in optimizers:
        if isinstance(optimizer, KFAC):
            optimizer.remove()


def test_an_unknown_method_is_named() -> None:
    model = net(16)
    with pytest.raises(ValueError, match="method must be one of sgd, adamw, muon, shampoo, kfac, got 'lion'"):
        optimizers_for("lion", model, mup.plan(model, net(32)), lr=0.1)


def test_the_steepest_parameters_of_a_check() -> None:
    widths = (64, 256)
    flat, steep, lost = (
        Coordinate("flat", own=(1.0, 1.1), total=(1.0, 1.0)),
        Coordinate("steep", own=(1.0, 8.0), total=(1.0, 1.0)),
        Coordinate("lost", own=(0.0, math.nan), total=(1.0, 1.0)),
    )
    check = CoordinateCheck(widths, (flat, steep, lost))
    assert [each.name for each in check.steepest(5)] == ["steep", "flat"]
    assert [each.name for each in check.steepest(1)] == ["steep"]


def test_a_sweep_survives_where_every_width_has_a_run_that_did() -> None:
    good, bad = Run(64, 0.1, None, 1.0), Run(128, 0.1, None, math.inf)
    assert not Sweep((good, bad)).survived
    assert Sweep((good, bad, Run(128, 0.01, None, 2.0))).survived
