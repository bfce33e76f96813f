"""The groups of options: what they refuse, and that every one of them arrives."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.loops import network, regression
from torch.amp.grad_scaler import GradScaler
from torch.optim import SGD
from torch.utils.data import DataLoader

from adabatch import AdaptiveBatch, Constant, EngineOptions, Guard, Measure


def adaptive(**options: Any) -> AdaptiveBatch:
    model = network()
    return AdaptiveBatch(model, SGD(model.parameters(), lr=0.1), Constant(8), micro_batch_size=4, **options)


def test_the_constructor_takes_at_most_seventeen_arguments() -> None:
    assert len(inspect.signature(AdaptiveBatch).parameters) <= 17


def test_values_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="check_every must be at least 1 step"):
        Guard(check_every=0)
    with pytest.raises(ValueError, match="check_every must be a number of steps, 'auto' or None, got 'always'"):
        Guard(check_every="always")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="skip_nonfinite must be True, False or 'probed', got 'always'"):
        Guard(skip_nonfinite="always")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layers='module' groups them otherwise: give only one"):
        Measure(layers="module", layer_weights={"weight": 1.0})
    with pytest.raises(TypeError, match=r"engine must be EngineOptions.*got 'ddp'"):
        adaptive(engine="ddp")
    with pytest.raises(TypeError, match=r"scaler must be a torch\.amp\.GradScaler"):
        adaptive(engine=EngineOptions(scaler="fp16"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gradient_sync must be one of each, last or None, got 'never'"):
        adaptive(engine=EngineOptions(gradient_sync="never"))  # type: ignore[arg-type]


def test_an_engine_may_stand_in_the_place_of_its_options(tmp_path: Path) -> None:
    """For hosts; and a scaled run writes the same journal as one without, to rounding."""
    from adabatch.runtime.engines.choice import engine_for

    written = []
    for scaler in (None, GradScaler("cpu", init_scale=1024)):
        torch.manual_seed(0)
        model = network()
        optimizer = SGD(model.parameters(), lr=0.1)
        path = tmp_path / f"{scaler is None}.jsonl"
        batches = AdaptiveBatch(
            model,
            optimizer,
            Constant(8),
            micro_batch_size=4,
            measure=Measure(monitor=True),
            engine=engine_for(model, scaler=scaler),
            journal=path,
        )
        for step in batches.steps(DataLoader(regression(16), batch_size=4)):
            for x, y in step:
                step.backward((model(x) - y).square().mean())
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()
        written.append([json.loads(line) for line in path.read_text().splitlines()])
    plain, scaled = written
    assert len(plain) == len(scaled) == 2
    for one, other in zip(plain, scaled, strict=True):
        assert other["moments"]["grad_sq"] == pytest.approx(one["moments"]["grad_sq"], rel=1e-6)
