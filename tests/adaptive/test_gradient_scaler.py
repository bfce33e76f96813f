"""float16 with ``torch.amp.GradScaler`` on one process: the loop by hand, unscaled numbers, skipped updates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.loops import lines, loss_of, network, regression, weights
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn import functional
from torch.optim import SGD, Adam, Optimizer
from torch.utils.data import DataLoader

from adabatch import (
    AdaptiveBatch,
    Constant,
    Control,
    GlobalOrder,
    Limits,
    NoiseScale,
    NormTest,
    PerExampleProbe,
    ProgressLR,
    examples,
    lr,
    steps,
)
from adabatch.adaptive.options import EngineOptions, Guard, Measure
from adabatch.batch import AugmentedInnerProductTest, CoordinateNormTest

OVERFLOWS = 2.0**20
"""A first scale at which gradients of order one do not fit float16 (65,504), and fit after some halvings."""


def half_loss(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    with torch.autocast("cpu", dtype=torch.float16):
        output = model(x)
        assert output.dtype is torch.float16
        return functional.mse_loss(output.float(), y)


def update(scaler: GradScaler, optimizer: Optimizer, model: nn.Module) -> None:
    """What PyTorch's notes on mixed precision write."""
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("monitor", [False, True])
def test_a_constant_policy_is_the_scaled_loop_by_hand_to_the_bit(fused: bool, monitor: bool) -> None:
    data = regression(96)
    by_hand, adaptive = network(), network()
    optimizers = [Adam(model.parameters(), lr=0.01, fused=fused) for model in (by_hand, adaptive)]
    scalers = [GradScaler("cpu", init_scale=OVERFLOWS, growth_interval=4) for _ in range(2)]
    batches = AdaptiveBatch(
        adaptive,
        optimizers[1],
        Constant(12),
        micro_batch_size=4,
        measure=Measure(monitor=monitor),
        engine=EngineOptions(scaler=scalers[1]),
    )
    loader = iter(DataLoader(data, batch_size=4))
    skipped = 0
    for step in batches.steps(DataLoader(data, batch_size=4)):
        for batch in step:
            step.backward(half_loss(adaptive, batch))
            scalers[0].scale(half_loss(by_hand, next(loader)) / 3).backward()
        before = weights(by_hand)
        update(scalers[0], optimizers[0], by_hand)
        update(scalers[1], optimizers[1], adaptive)
        skipped += torch.equal(weights(by_hand), before)
        assert scalers[1].get_scale() == scalers[0].get_scale()
        assert torch.equal(weights(adaptive), weights(by_hand))
    assert 0 < skipped < 8
    assert (batches.progress.steps, batches.consumed.steps) == (8 - skipped, 8)


CRITERIA = {
    "norm test": NormTest(eta=0.5),
    "Adam's norm": NoiseScale(multiple=2.0, norm="adam"),
    "l1 norm": NoiseScale(multiple=2.0, norm="sign"),
    "coordinates": CoordinateNormTest(eta=1.0, quantile=0.5),
    "examples": AugmentedInnerProductTest(theta=0.3, nu=1.0),
}


@pytest.mark.parametrize("name", CRITERIA)
def test_moments_losses_and_journal_are_in_unscaled_units(name: str, tmp_path: Path) -> None:
    """A scale that is a power of two rounds nothing, so the journals are equal files."""
    exact = name == "examples"
    for run, scaler in (("plain", None), ("scaled", GradScaler("cpu", init_scale=2.0**14, growth_interval=3))):
        model = network(dtype=torch.float64)
        optimizer = Adam(model.parameters(), lr=0.01)
        batches = AdaptiveBatch(
            model,
            optimizer,
            CRITERIA[name],
            micro_batch_size=4,
            limits=Limits(min=8, max=32),
            control=Control.direct(),
            lr_rule="sqrt",
            probe=PerExampleProbe(model, products=True, leave_one_out=True) if exact else None,
            measure=Measure(l1=not exact, layers=None if exact or name != "norm test" else "module"),
            engine=EngineOptions(scaler=scaler),
            journal=tmp_path / run,
        )
        for step in batches.steps(GlobalOrder(regression(128, dtype=torch.float64)), until=steps(8)):
            for batch in step:
                step.backward(loss_of(model, batch))
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()
        batches.remove()
    plain, scaled = (lines(tmp_path / run) for run in ("plain", "scaled"))
    assert len({line["next"] for line in plain}) > 1
    assert all(line["moments"]["grad_sq"] is not None for line in plain)
    assert scaled == plain


@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_overflows_consumes_data_and_moves_nothing_else(fused: bool, interval: int, tmp_path: Path) -> None:
    """A fused optimizer is called all the same, told to leave the update out. Probed or not, and the first of a run."""
    model = network()
    optimizer = Adam(model.parameters(), lr=0.01, fused=fused)
    scaler = GradScaler("cpu", init_scale=2.0**10)
    batches = AdaptiveBatch(
        model,
        optimizer,
        NormTest(eta=0.5),
        micro_batch_size=4,
        limits=Limits(min=8, max=64),
        control=Control(interval=interval, memory=2, confidence=0.5),
        follow=("betas",),
        lr_rule="sqrt",
        engine=EngineOptions(scaler=scaler),
        guard=Guard(skip_nonfinite="probed"),
        # in the other steps the scaler alone sees it
        journal=tmp_path / "journal",
    )
    schedule = ProgressLR(optimizer, lr.linear(), batches, total=examples(1000))
    too_long = {0, 3, 4}  # at an interval of 2, step 3 is not probed
    for index, step in enumerate(batches.steps(GlobalOrder(regression(256)), until=steps(7))):
        before = (weights(model), batches.progress, batches.state_dict()["control"]["window"], schedule.get_lr())
        consumed = batches.consumed.examples
        for batch in step:
            step.backward(half_loss(model, batch) * (1e9 if index in too_long else 1.0))
        assert step.finite == (index not in too_long or not step.probed)
        update(scaler, optimizer, model)
        schedule.step()
        after = (weights(model), batches.progress, batches.state_dict()["control"]["window"], schedule.get_lr())
        skipped = index in too_long
        assert torch.equal(before[0], after[0]) == skipped
        assert (before[1] == after[1]) == skipped
        assert (before[2] == after[2]) == (skipped or not step.probed)
        assert (before[3] == after[3]) == skipped
        assert batches.consumed.examples == consumed + step.global_batch_size
    batches.remove()
    assert scaler.get_scale() == 2.0**7
    journal = lines(tmp_path / "journal")
    assert [line["applied"] for line in journal] == [index not in too_long for index in range(7)]
    assert [line["reason"] == "not finite" for line in journal] == [
        index in too_long and index % interval == 0 for index in range(7)
    ]


def test_a_schedule_without_batches_counts_no_update_that_a_fused_optimizer_left_out() -> None:
    model, scaler = network(), GradScaler("cpu", init_scale=2.0**10)
    optimizer = Adam(model.parameters(), lr=1.0, fused=True)
    schedule = ProgressLR(optimizer, lr.linear(), total=steps(4))
    for factor, expected in ((1e9, 1.0), (1.0, 0.75)):
        scaler.scale(half_loss(model, regression(4).tensors) * factor).backward()
        update(scaler, optimizer, model)
        schedule.step()
        assert schedule.get_last_lr() == [expected]


def test_a_scale_that_backed_off_to_nothing_is_told_and_not_raised() -> None:
    model, scaler = network(), GradScaler("cpu", init_scale=1e-45, backoff_factor=0.1)
    optimizer = SGD(model.parameters(), lr=0.1)
    batches = AdaptiveBatch(
        model,
        optimizer,
        NormTest(eta=0.5),
        micro_batch_size=4,
        limits=Limits(min=8, max=8),
        engine=EngineOptions(scaler=scaler),
    )
    for index, step in enumerate(batches.steps(GlobalOrder(regression(64)), until=steps(2))):
        for batch in step:
            step.backward(loss_of(model, batch) * torch.inf)
        assert str(step.decision.reason) == "not finite"
        update(scaler, optimizer, model)
        assert scaler.get_scale() == 0.0, index


def test_a_scaler_that_is_not_enabled_is_none() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    batches = AdaptiveBatch(
        model,
        optimizer,
        Constant(8),
        micro_batch_size=4,
        engine=EngineOptions(scaler=GradScaler("cpu", enabled=False)),
        measure=Measure(monitor=True),
    )
    for step in batches.steps(GlobalOrder(regression(8))):
        for batch in step:
            step.backward(loss_of(model, batch))
        optimizer.step()
    assert batches.progress.steps == 1


def test_a_precision_is_no_scaler() -> None:
    model = network()
    with pytest.raises(TypeError, match=r"scaler must be a torch\.amp\.GradScaler or None, got 'fp16'"):
        AdaptiveBatch(
            model, SGD(model.parameters(), lr=0.1), Constant(8), micro_batch_size=4, engine=EngineOptions(scaler="fp16")
        )


def test_late_numbers_are_unscaled_by_the_scale_of_their_own_step(tmp_path: Path) -> None:
    """The scale halves at every overflow and doubles later, while the numbers wait; the scaler leaves updates out."""
    written = {}
    for late in (False, True):
        model = network()
        optimizer = SGD(model.parameters(), lr=0.01)
        scaler = GradScaler("cpu", init_scale=OVERFLOWS, growth_interval=2)
        batches = AdaptiveBatch(
            model,
            optimizer,
            NormTest(0.5),
            micro_batch_size=4,
            limits=Limits(8, 8),
            lr_rule="none",
            journal=tmp_path / str(late),
            measure=Measure(late=late),
            guard=Guard(skip_nonfinite=False),
            engine=EngineOptions(scaler=scaler),
        )
        for step in batches.steps(GlobalOrder(regression(96)), until=steps(12)):
            for batch in step:
                step.backward(half_loss(model, batch))
            update(scaler, optimizer, model)
        batches.remove()
        written[late] = lines(tmp_path / str(late))
    keys = ("step", "examples", "loss", "moments", "applied")
    late, on_time = ([[line[key] for key in keys] for line in written[which]] for which in (True, False))
    assert late == on_time
    assert {line["applied"] for line in written[True]} == {True, False}
    for line, before in zip(written[True][1:], written[False], strict=False):
        assert line["averages"] == before["averages"]
        assert (line["reason"] == "not finite") == (before["reason"] == "not finite")
