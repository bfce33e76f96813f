"""Criteria in the norms of optimizers and over coordinates, in whole runs, against gradients computed part by part."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.loops import lines, loss_of, network, regression, train
from support.options import grouped
from torch import Tensor
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader

from adabatch import (
    AdaptiveBatch,
    Control,
    GlobalOrder,
    Limits,
    MicroBatchProbe,
    NoiseScale,
    NormTest,
    PerExampleProbe,
)
from adabatch.adaptive.options import Measure
from adabatch.batch import CoordinateNormTest, Criterion

STEPS = 5


def run(criterion: Criterion, *, examples: bool = False, **options: Any) -> list[tuple[Any, Tensor, Tensor | None]]:
    """A few steps of 4 micro-batches: each with the gradients of its parts, (num_parts, d), and Adam's ``v``, (d,)."""
    model = network(dtype=torch.float64)
    optimizer = AdamW(model.parameters(), lr=0.01, eps=1e-3)
    if examples:
        norm = None if isinstance(criterion, CoordinateNormTest) else "sign"
        quantile = criterion.quantile if isinstance(criterion, CoordinateNormTest) else None
        options["probe"] = PerExampleProbe(model, norm=norm, quantile=quantile)
    batches = AdaptiveBatch(
        model, optimizer, criterion, micro_batch_size=4, limits=Limits(min=16, max=16), **grouped(options)
    )
    found = []
    loader = DataLoader(regression(16 * STEPS, dtype=torch.float64), batch_size=4)
    for step in batches.steps(loader):
        before, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict()["state"])
        seen = []
        for batch in step:
            step.backward(loss_of(model, batch))
            seen.append(batch)
        parts = [[x[i : i + 1] for x in batch] for batch in seen for i in range(4)] if examples else seen
        rows = [torch.autograd.grad(loss_of(before, part), list(before.parameters())) for part in parts]
        grads = torch.stack([torch.cat([grad.flatten() for grad in row]) for row in rows])
        second = [state[i]["exp_avg_sq"].flatten() / (1 - 0.999 ** float(state[i]["step"])) for i in sorted(state)]
        found.append((step, grads, torch.cat(second) if second else None))
        optimizer.step()
        optimizer.zero_grad()
    batches.remove()
    return found


def test_adams_norm_is_measured_from_the_second_step_on() -> None:
    first, *rest = run(NoiseScale(norm="adam"))
    step, grads, second = first
    assert second is None
    assert (step.moments.norm, step.decision.reason, step.finite) == ("adam", "not probed", True)
    assert math.isnan(step.moments.noise)
    assert step.moments.grad_l2 == pytest.approx(float(grads.mean(0).norm()), rel=1e-10)
    assert len(rest) == STEPS - 1
    for step, grads, second in rest:
        images = grads / (second.sqrt() + 1e-3)
        noise = 4 * float(images.var(0).sum())
        assert step.moments.noise == pytest.approx(noise, rel=1e-10)
        assert step.moments.signal == pytest.approx(float(images.mean(0).square().sum()) - noise / 16, rel=1e-9)
        assert step.moments.grad_l2 == pytest.approx(float(grads.mean(0).norm()), rel=1e-10)
        assert step.decision.estimate is not None


@pytest.mark.parametrize("examples", [False, True])
def test_the_norm_of_signs(examples: bool) -> None:
    for step, grads, _ in run(NoiseScale(norm="sign"), examples=examples):
        num_parts, size = len(grads), 16 / len(grads)
        short = math.sqrt(2 / (num_parts - 1)) * math.gamma(num_parts / 2) / math.gamma((num_parts - 1) / 2)
        noise = (float(grads.std(0).sum()) / short) ** 2 * size
        length = float(grads.mean(0).abs().sum())
        assert step.moments.noise == pytest.approx(noise, rel=1e-9)
        assert step.moments.signal == pytest.approx(length**2 - 2 / math.pi * noise / 16, rel=1e-9)
        assert step.moments.grad_l1 == pytest.approx(length, rel=1e-10)
        assert step.moments.num_parts == num_parts


@pytest.mark.parametrize("examples", [False, True])
@pytest.mark.parametrize("quantile", [0.25, 0.9, 1.0])
def test_the_coordinate_wise_test_asks_for_what_its_definition_says(quantile: float, examples: bool) -> None:
    criterion = CoordinateNormTest(0.5, quantile=quantile)
    for step, grads, _ in run(criterion, examples=examples, control=Control.direct()):
        ratios = grads.var(0) * (16 / len(grads)) / grads.mean(0).square()
        wanted = np.quantile(ratios.numpy(), quantile, method="inverted_cdf") / 0.25
        assert step.decision.estimate.wanted == pytest.approx(float(wanted), rel=1e-8)


def test_a_run_follows_the_coordinates_and_writes_down_what_it_saw(tmp_path: Path) -> None:
    for criterion, names in (
        (CoordinateNormTest(1.0, quantile=0.5), {"noise_at_quantile"}),
        (NoiseScale(norm="adam"), {"norm"}),
        (NoiseScale(norm="sign"), {"norm"}),
    ):
        journal = tmp_path / "journal.jsonl"
        journal.unlink(missing_ok=True)
        model = network()
        optimizer = AdamW(model.parameters(), lr=0.01)
        batches = AdaptiveBatch(
            model,
            optimizer,
            criterion,
            micro_batch_size=8,
            limits=Limits(min=16, max=128),
            lr_rule="sqrt_gain",
            measure=Measure(layers="module"),
            journal=journal,
        )
        train(batches, model, optimizer, GlobalOrder(regression(2048)))
        written = lines(journal)
        assert written[-1]["next"] > 16, criterion
        assert all(names <= line["moments"].keys() for line in written)
        assert all(line["norms"]["l2"] > 0 for line in written)
        assert set(written[-1]["layers"]) == {"0", "2"}
        assert batches.progress.gain_steps is not None
        if names == {"norm"}:  # the rule reads noise and signal in the same norm
            assert {line["moments"]["norm"] for line in written} == {criterion.norm}  # type: ignore[attr-defined]
        state = copy.deepcopy(batches.state_dict())
        batches.load_state_dict(state)
        assert batches.state_dict() == state
        batches.remove()


def test_what_a_probe_does_not_give_is_named_with_a_way_out() -> None:
    model = network()
    optimizer: Any = AdamW(model.parameters())
    options: dict[str, Any] = {"micro_batch_size": 4, "limits": Limits(min=8, max=16)}
    plain, median = MicroBatchProbe(model.parameters()), MicroBatchProbe(model.parameters(), quantile=0.5)
    said = r"needs coordinates at quantile 0.9, which MicroBatchProbe does not give \(it gives noise\)"
    with pytest.raises(ValueError, match=said + r".*NormTest, or a probe made with quantile=0.9"):
        AdaptiveBatch(model, optimizer, CoordinateNormTest(0.5, quantile=0.9), probe=plain, **grouped(options))
    with pytest.raises(ValueError, match=r"quantile 0.9.*it gives noise, coordinates at quantile 0.5"):
        AdaptiveBatch(model, optimizer, CoordinateNormTest(0.5, quantile=0.9), probe=median, **grouped(options))
    with pytest.raises(ValueError, match=r"needs noise in the norm adam.*a probe made with norm= for 'adam'"):
        AdaptiveBatch(model, optimizer, NoiseScale(norm="adam"), probe=plain, **grouped(options))
    signs = MicroBatchProbe(model.parameters(), norm="sign")
    with pytest.raises(ValueError, match=r"needs noise, which MicroBatchProbe.*noise in the norm sign"):
        AdaptiveBatch(model, optimizer, NormTest(0.5), probe=signs, **grouped(options))
    with pytest.raises(ValueError, match=r"norm='adam' reads the second moments of Adam.* SGD does not have"):
        AdaptiveBatch(model, SGD(model.parameters(), lr=0.1), NoiseScale(norm="adam"), **grouped(options))
    with pytest.raises(ValueError, match=r"inner products are Euclidean"):
        PerExampleProbe(model, products=True, norm="sign")
