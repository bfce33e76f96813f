"""Fabric by the plain API: ``AdaptiveBatch`` takes what ``fabric.setup`` returned."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from support.hosts import LR, MICRO, Numbered, awkward, check_awkward, environment_kept, loss_of, needs
from support.loops import network, weights
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader

import adabatch
from adabatch import AdaptiveBatch, Constant, EngineOptions, GlobalOrder, Measure, ProgressLR
from adabatch.runtime.wrappers.fabric import inside_fabric, without_fabric

needs("lightning", "pytorch_lightning")

CLIP = 0.5
pytestmark = pytest.mark.filterwarnings("ignore:The `srun` command is available")
environment = pytest.fixture(autouse=True)(environment_kept)


def fabric_of(precision: str = "32-true") -> Any:
    from lightning.fabric import Fabric
    from lightning.fabric.plugins import MixedPrecision

    if precision != "half":
        return Fabric(accelerator="cpu", devices=1, precision=precision)  # type: ignore[arg-type]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=5)
    return Fabric(accelerator="cpu", devices=1, plugins=MixedPrecision("16-mixed", "cpu", scaler))


def set_up(fabric: Any, kind: Any = AdamW) -> tuple[Any, Any]:
    plain = network()
    return fabric.setup(plain, kind(plain.parameters(), lr=LR))  # type: ignore[no-any-return]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "half"])
def test_a_constant_batch_is_fabrics_own_accumulation_to_the_bit(precision: str) -> None:
    fabric = fabric_of(precision)
    theirs, optimizer = set_up(fabric)
    watched = adabatch.monitor(theirs, optimizer, micro_batch_size=MICRO)
    loader = fabric.setup_dataloaders(DataLoader(Numbered(), batch_size=MICRO))
    for index, batch in enumerate(loader):
        with fabric.no_backward_sync(theirs, enabled=index % 4 != 3):
            fabric.backward(loss_of(theirs, batch) / 4)
        if index % 4 == 3:
            fabric.clip_gradients(theirs, optimizer, max_norm=CLIP)
            optimizer.step()
            optimizer.zero_grad()

    fabric = fabric_of(precision)
    model, optimizer = set_up(fabric)
    loader = fabric.setup_dataloaders(DataLoader(Numbered(), batch_size=MICRO))
    batches = AdaptiveBatch(
        model, optimizer, Constant(4 * MICRO), micro_batch_size=MICRO, measure=Measure(monitor=True)
    )
    schedule = ProgressLR(optimizer, adabatch.lr.constant(), batches, total=adabatch.examples(256))
    for step in batches.steps(loader):
        for batch in step:
            step.backward(loss_of(model, batch))
        fabric.clip_gradients(model, optimizer, max_norm=CLIP)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    assert torch.equal(weights(model), weights(theirs))
    assert batches.progress.steps == 16
    rounding = 0.05 if precision == "half" else 1e-5  # the loss is scaled before float16 rounds it
    assert watched.noise_scale == pytest.approx(batches.noise_scale, rel=rounding)
    assert batches.optimizer is optimizer.optimizer


def test_a_plan_that_grows_at_awkward_steps() -> None:
    model, optimizer = set_up(fabric_of(), SGD)
    batches = AdaptiveBatch(model, optimizer, awkward(1), micro_batch_size=MICRO)
    windows, served = [], []
    for step in batches.steps(GlobalOrder(Numbered(), seed=0), until=adabatch.steps(10)):
        for batch in step:
            served += batch[2].tolist()
            step.backward(loss_of(model, batch))
        optimizer.step()
        optimizer.zero_grad()
        windows.append(len(step.portion.sizes))
    check_awkward([{"weights": weights(model).tolist(), "windows": windows, "served": served}])


def test_what_is_not_fabrics_stays_as_it_is() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=LR)
    assert inside_fabric(model) is None
    assert without_fabric(optimizer) is optimizer


def test_strategies_and_options_that_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = set_up(fabric_of())
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(ValueError, match=r"the host scales the loss by itself: leave EngineOptions\(scaler=\) out"):
        AdaptiveBatch(model, optimizer, Constant(16), micro_batch_size=4, engine=EngineOptions(scaler=scaler))
    other = network()
    local = adabatch.LocalSGD(other, SGD(other.parameters(), lr=LR), sync_every=2)
    with pytest.raises(ValueError, match=r"without Fabric's setup"):
        AdaptiveBatch(model, optimizer, Constant(16), micro_batch_size=4, local_sgd=local)
    strategies = sys.modules["lightning.fabric.strategies"]
    monkeypatch.setattr(model._strategy, "__class__", type("DeepSpeedStrategy", (strategies.Strategy,), {}))
    with pytest.raises(ValueError, match=r"DeepSpeedStrategy steps the DeepSpeed engine by itself: use ModelParallel"):
        AdaptiveBatch(model, optimizer, Constant(16), micro_batch_size=4)
