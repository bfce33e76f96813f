"""The checks of a training in float16 with a ``GradScaler``: sound ones pass, and what goes wrong there is caught."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.loops import loss_of, network, regression
from support.ranks import run_ranks
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam, Optimizer

from adabatch import GlobalOrder, MicroBatchProbe
from adabatch.batch import GradientMoments
from adabatch.runtime.engines import choice
from adabatch.runtime.wrappers.backward import Backward, scaled_by
from adabatch.verification import Check, Training, all_checks, constant_policy, drift, probe_agrees, resume

FITS, OVERFLOWS = 2.0**10, 2.0**20
"""First scales at which gradients of order one fit float16 (65,504), and fit after some halvings."""


def half_loss(model: nn.Module, batch: Any) -> Tensor:
    with torch.autocast("cpu", dtype=torch.float16):
        return loss_of(lambda x: model(x).float(), batch)


def training(
    scaler: GradScaler,
    *,
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
    optimizer: Callable[[Any], Optimizer] = lambda parameters: Adam(parameters, lr=0.01),
    loss: Callable[[nn.Module, Any], Tensor] = half_loss,
) -> Training:
    model = wrap(network())
    return Training(
        model=model,
        optimizer=optimizer(model.parameters()),
        loader=GlobalOrder(regression(96), seed=2),
        loss=loss,
        micro_batch_size=4,
        scaler=scaler,
    )


def scaler_from(scale: float, kind: type[GradScaler] = GradScaler, **options: Any) -> GradScaler:
    return kind("cpu", init_scale=scale, growth_interval=3, **options)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("scale", "left_out"), [(FITS, 1), (OVERFLOWS, 5)])
def test_a_sound_training_passes_with_its_skipped_steps(scale: float, left_out: int, fused: bool) -> None:
    """One step is made to overflow; from 2 ** 20 four more do, the last at 2 ** 16."""

    def make() -> Training:
        return training(scaler_from(scale), optimizer=lambda p: Adam(p, lr=0.01, fused=fused))

    found = {check.name: check for check in all_checks(make, num_steps=8)}
    assert all(check.passed for check in found.values()), found
    assert all(found[name].measured == 0 for name in ("drift", "constant policy", "resume"))
    # The parts are scaled as in the step, so that float16 rounds them as it did there.
    assert found["probe"].measured < 1e-5
    for name in ("drift", "constant policy"):
        assert f"steps, {left_out} of them left out for overflow, " in found[name].explanation
    assert found["probe"].explanation.endswith(f"; {left_out} more overflowed")


def test_a_scaler_that_is_not_enabled_leaves_nothing_out() -> None:
    found = list(all_checks(lambda: training(scaler_from(FITS, enabled=False), loss=loss_of), num_steps=4))
    assert all(check.passed for check in found), found
    assert not any("overflow" in check.explanation for check in found)


WRAPPERS: dict[str, tuple[Callable[[nn.Module], nn.Module], Callable[[nn.Module, Any], Tensor]]] = {
    "ddp": (DistributedDataParallel, half_loss),
    "fsdp2": (
        lambda model: fully_shard(model, mp_policy=MixedPrecisionPolicy(torch.float16, torch.float32)),
        lambda model, batch: loss_of(lambda x: model(x).float(), batch),
    ),
}


class Blind(GradScaler):
    """Sees no overflow, and goes on with the scale that it has."""

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        self.unscale_(optimizer)
        return optimizer.step()

    def update(self, new_scale: Any = None) -> None:
        self._per_optimizer_states.clear()


def on_ranks(rank: int) -> dict[str, list[Check]]:
    def wrapped(name: str, scale: float, kind: type[GradScaler] = GradScaler) -> Training:
        wrap, loss = WRAPPERS[name]
        return training(scaler_from(scale, kind), wrap=wrap, loss=loss)

    found = {name: list(all_checks(partial(wrapped, name, OVERFLOWS), num_steps=8)) for name in WRAPPERS}
    kind = Blind if rank == 0 else GradScaler
    return {**found, "blind": [drift(lambda: wrapped("ddp", FITS, kind))]}


@pytest.mark.distributed
def test_an_overflow_on_one_rank_is_left_out_on_all(tmp_path: Path) -> None:
    first, second = run_ranks(on_ranks, 2, tmp_path)
    assert first == second
    for name in WRAPPERS:
        assert all(check.passed for check in first[name]), first[name]
        assert ", 5 of them left out for overflow," in first[name][0].explanation
    (blind,) = first["blind"]
    assert not blind.passed
    assert blind.explanation.startswith("rank 1 drifted from the others")  # its scale alone was halved


def test_moments_that_are_not_unscaled_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GradientMoments, "scaled", lambda self, factor: self)
    found = probe_agrees(lambda: training(scaler_from(FITS)))
    assert not found.passed
    assert found.measured == pytest.approx(1 - FITS**-2, rel=1e-3)


def test_gradients_scaled_by_another_factor_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(scaler: GradScaler) -> Backward:
        right = scaled_by(scaler)
        return right._replace(run=lambda loss: right.run(1.01 * loss))

    monkeypatch.setattr(choice, "scaled_by", wrong)
    for check in (constant_policy, probe_agrees):
        found = check(lambda: training(scaler_from(FITS), optimizer=lambda p: SGD(p, lr=0.05)))
        assert not found.passed
        assert found.measured > 1e-3


class Lost(MicroBatchProbe):
    """Says that every step overflowed."""

    def moments(self, totals: list[float]) -> GradientMoments:
        return super().moments(totals)._replace(grad_sq=math.nan)


def test_a_probe_that_sees_overflow_where_none_is_is_caught() -> None:
    def make() -> Training:
        made = training(scaler_from(FITS))
        return Training(**{**vars(made), "probe": Lost(made.model.parameters())})

    found = probe_agrees(make)
    assert not found.passed
    assert found.measured == math.inf


class Forgetful(GradScaler):
    """Starts anew when it is loaded."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


def test_a_scale_that_is_not_resumed_is_caught() -> None:
    found = resume(lambda: training(scaler_from(FITS, Forgetful)))
    assert not found.passed
    assert found.measured == FITS  # twice what it would be, after the overflow and one growth
    assert "two uninterrupted" not in found.explanation


@pytest.mark.parametrize("check", [drift, probe_agrees, constant_policy, resume])
def test_a_scale_that_never_fits_is_refused(check: Callable[..., Check]) -> None:
    with pytest.raises(ValueError, match=r"steps overflowed, so there is nothing to compare: .*smaller init_scale"):
        check(lambda: training(scaler_from(2.0**60)))


def test_a_scaler_that_is_not_built_anew_is_refused() -> None:
    scaler = scaler_from(FITS)
    with pytest.raises(ValueError, match=r"make\(\) must build another model, optimizer and scaler"):
        constant_policy(lambda: training(scaler), num_steps=4)
