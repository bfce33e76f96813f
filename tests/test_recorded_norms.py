"""The recorder: norms in the journal against direct computation, and a schedule made of them for the next run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.fixed_probe import FixedProbe
from support.loops import lines, loss_of, network, regression, train
from support.options import grouped
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader

from adabatch import (
    AdaptiveBatch,
    Constant,
    Control,
    GlobalOrder,
    Limits,
    NormTest,
    ProgressLR,
    Stage,
    Stages,
    examples,
    gain_steps,
    lr,
    steps,
)
from adabatch.adaptive.options import Measure
from adabatch.batch import Progress
from adabatch.batch.moments import GradientMoments
from adabatch.batch.needs import Needs
from adabatch.lr.rules import check_follow, legw_warmup


def of_grads(model: nn.Module) -> tuple[float, float]:
    """The l2 and the l1 norm of the gradient as it stands."""
    flat = torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])
    return float(flat.norm(2)), float(flat.norm(1))


def recorded(path: Path, norm: str) -> list[float]:
    return [line["norms"][norm] for line in lines(path) if line["norms"] is not None]


@pytest.mark.parametrize(
    ("criterion", "options"),
    [
        (NormTest(eta=0.4), {"limits": Limits(min=8, max=64)}),
        (Stages(4, [Stage(examples(40), 12), Stage(examples(200), 36)]), {}),
        (Constant(4), {}),
    ],
    ids=["norm-test", "stages", "one-micro-batch"],
)
def test_the_norms_are_those_of_the_gradient_that_is_applied_before_clipping(
    criterion: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    model = network()
    optimizer = Adam(model.parameters(), lr=0.01)
    batches = AdaptiveBatch(
        model,
        optimizer,
        criterion,
        micro_batch_size=4,
        journal=tmp_path / "j.jsonl",
        **grouped(options, record_l1=True),
    )
    expected: list[tuple[float, float]] = []
    for step in batches.steps(GlobalOrder(regression(200)), until=examples(400)):
        for batch in step:
            step.backward(loss_of(model, batch))
        expected.append(of_grads(model))
        assert step.moments is not None
        assert step.moments.grad_l1 == pytest.approx(expected[-1][1], rel=1e-5)
        clip_grad_norm_(model.parameters(), 0.1)  # theirs, and not in the record
        optimizer.step()
        optimizer.zero_grad()
    assert len({line["plan"]["global_batch_size"] for line in lines(tmp_path / "j.jsonl")}) > 1 or not options
    # Float32 sums of 57 numbers.
    assert recorded(tmp_path / "j.jsonl", "l2") == pytest.approx([l2 for l2, _ in expected], rel=1e-5)
    assert recorded(tmp_path / "j.jsonl", "l1") == pytest.approx([l1 for _, l1 in expected], rel=1e-5)


def test_one_micro_batch_a_step_has_norms_and_no_noise(tmp_path: Path) -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.01)
    path = tmp_path / "j.jsonl"
    batches = AdaptiveBatch(model, optimizer, Constant(8), micro_batch_size=8, measure=Measure(l1=True), journal=path)
    train(batches, model, optimizer, DataLoader(regression(32), batch_size=8))
    written = lines(path)
    assert [line["plan"]["accumulation_steps"] for line in written] == [1] * 4
    assert all(line["moments"]["noise"] is None and line["averages"] is None for line in written)
    assert all(line["norms"]["l1"] > line["norms"]["l2"] > 0 for line in written)
    assert batches.progress.gain_steps is None
    with pytest.raises(ValueError, match="at least two micro-batches"):
        AdaptiveBatch(model, optimizer, NormTest(eta=0.5), micro_batch_size=8, limits=Limits(min=8, max=64))


def test_a_run_without_a_probe_records_no_norms_and_one_that_measures_noise_the_euclidean(tmp_path: Path) -> None:
    for options, expected in (({}, None), ({"monitor": True}, {"l1": None})):
        model = network()
        optimizer = SGD(model.parameters(), lr=0.01)
        path = tmp_path / f"{len(options)}.jsonl"
        batches = AdaptiveBatch(model, optimizer, Constant(8), micro_batch_size=4, journal=path, **grouped(options))
        train(batches, model, optimizer, DataLoader(regression(32), batch_size=4))
        for line in lines(path):
            assert line["norms"] == (expected if expected is None else {"l2": line["norms"]["l2"], **expected})
            assert expected is None or line["norms"]["l2"] > 0


def test_norms_are_recorded_on_probed_steps_only(tmp_path: Path) -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.01)
    path = tmp_path / "j.jsonl"
    batches = AdaptiveBatch(
        model,
        optimizer,
        Constant(4),
        micro_batch_size=4,
        measure=Measure(l1=True),
        control=Control(interval=3),
        journal=path,
    )
    train(batches, model, optimizer, DataLoader(regression(32), batch_size=4))
    assert [line["norms"] is not None for line in lines(path)] == [True, False, False] * 2 + [True, False]


def test_a_step_that_is_left_out_has_no_norm_that_could_be_refined(tmp_path: Path) -> None:
    """A null in the journal is no number, so ``refine`` refuses it until the step is left out, as its error says."""
    model = network()
    optimizer = SGD(model.parameters(), lr=0.01)
    path = tmp_path / "j.jsonl"
    batches = AdaptiveBatch(model, optimizer, Constant(4), micro_batch_size=4, measure=Measure(l1=True), journal=path)
    for index, step in enumerate(batches.steps(DataLoader(regression(32), batch_size=4))):
        for batch in step:
            step.backward(loss_of(model, batch) * (math.inf if index == 3 else 1.0))
        optimizer.step()
        optimizer.zero_grad()
    written = lines(path)
    assert [line["applied"] for line in written] == [True] * 3 + [False] + [True] * 4
    assert written[3]["norms"] == {"l2": None, "l1": None}
    norms = [line["norms"]["l1"] for line in written]
    with pytest.raises(ValueError, match="leave out the steps that were skipped"):
        lr.refine(norms, "adam", smoothing=0.0)
    kept = [line["norms"]["l1"] for line in written if line["applied"]]
    assert len(lr.refine(kept, "adam", smoothing=0.0).settings["values"]) == 7  # type: ignore[arg-type]


class NoiseOnly(FixedProbe):
    """A probe of one's own that measures no l1 norm."""


def test_a_probe_that_cannot_record_is_refused() -> None:
    model = network()
    with pytest.raises(ValueError, match="needs the l1 norm of the gradient, which NoiseOnly does not give"):
        AdaptiveBatch(
            model,
            SGD(model.parameters(), lr=0.1),
            Constant(8),
            micro_batch_size=4,
            measure=Measure(l1=True),
            probe=NoiseOnly(GradientMoments(1.0, 1.0, 1.0, 2.0, 2), Needs(noise="euclidean")),
        )


# --- a schedule from the norms of a run -----------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "norm", "optimizer"), [("sgd", "l2", SGD), ("adam", "l1", Adam)])
def test_a_second_run_on_the_norms_of_the_first(kind: Any, norm: str, optimizer: Any, tmp_path: Path) -> None:
    """Record, refine, train: the rates of the second run are the formula's, and it trains."""
    data, total, path = regression(256, seed=5), 1600, tmp_path / "first.jsonl"

    def run(shape: lr.Shape, **options: Any) -> tuple[list[float], float]:
        model = network()
        stepper = optimizer(model.parameters(), lr=0.02)
        batches = AdaptiveBatch(model, stepper, Constant(8), micro_batch_size=8, **grouped(options))
        schedule = ProgressLR(stepper, shape, batches, total=examples(total))
        rates: list[float] = []
        for step in batches.steps(GlobalOrder(data, seed=3), until=examples(total)):
            for batch in step:
                step.backward(loss_of(model, batch))
            rates.append(schedule.get_last_lr()[0])
            stepper.step()
            stepper.zero_grad()
            schedule.step()
        with torch.no_grad():
            return rates, float(loss_of(model, data[:]))

    run(lr.constant(), record_l1=True, journal=path)
    norms = np.array(recorded(path, norm))
    assert len(norms) == 200
    shape = lr.refine(norms, kind, smoothing=0.1)
    rates, refined = run(shape)

    # Worked out by hand: median filter of 21 steps, weights G^-2 or G^-1, each times the sum of those after it.
    padded = np.concatenate([[norms[0]] * 10, norms, norms[-2:-12:-1]])
    weights = np.array([np.median(padded[t : t + 21]) for t in range(200)]) ** (-2.0 if kind == "sgd" else -1.0)
    by_hand = weights * (weights[::-1].cumsum()[::-1] - weights)
    by_hand = np.clip(by_hand, 0, None) / by_hand.max()
    # Entry t of n stands at progress t / (n - 1); update t reads the shape at t / n.
    at = np.interp(np.arange(200) / 200, np.arange(200) / 199, by_hand)
    assert rates == pytest.approx((0.02 * at).tolist(), rel=1e-9, abs=1e-12)
    assert max(rates) == pytest.approx(0.02, rel=0.05)
    with torch.no_grad():
        assert refined < 0.9 * float(loss_of(network(), data[:]))
    again = lr.Shape.from_dict(json.loads(json.dumps(shape.to_dict())))
    assert again == shape


def test_a_refined_schedule_of_another_length(tmp_path: Path) -> None:
    """Twice the examples and batches four times as large: progress is what the shape reads."""
    path = tmp_path / "first.jsonl"
    model = network()
    optimizer = SGD(model.parameters(), lr=0.02)
    batches = AdaptiveBatch(model, optimizer, Constant(8), micro_batch_size=8, measure=Measure(l1=True), journal=path)
    train(batches, model, optimizer, GlobalOrder(regression(256)), until=examples(800))
    shape = lr.refine(recorded(path, "l2"), "sgd")

    model = network()
    optimizer = SGD(model.parameters(), lr=0.02)
    batches = AdaptiveBatch(model, optimizer, Constant(32), micro_batch_size=32)
    schedule = ProgressLR(optimizer, shape, batches, total=examples(1600))
    rates: list[float] = []
    train(
        batches,
        model,
        optimizer,
        GlobalOrder(regression(256)),
        until=examples(1600),
        schedule=schedule,
        each=lambda step: rates.append(optimizer.param_groups[0]["lr"]),
    )
    assert rates == pytest.approx([0.02 * shape(n / 1600) for n in range(32, 1601, 32)], rel=1e-12)
    assert rates[-1] == 0


# --- what a run counts, after a resume ------------------------------------------------------------------------------


def adaptive(**options: Any) -> AdaptiveBatch:
    model = network()
    return AdaptiveBatch(model, SGD(model.parameters(), lr=0.1), Constant(8), micro_batch_size=4, **grouped(options))


def trained(**options: Any) -> AdaptiveBatch:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    batches = AdaptiveBatch(model, optimizer, Constant(8), micro_batch_size=4, **grouped(options))
    train(batches, model, optimizer, DataLoader(regression(40), batch_size=4))
    return batches


def test_a_run_that_begins_to_measure_counts_its_earlier_steps_as_one_each() -> None:
    """So that its gain clock does not start again from the beginning."""
    saved = json.loads(json.dumps(trained().state_dict()))
    batches = adaptive(monitor=True, tokens_per_example=7)
    batches.load_state_dict(saved)
    expected = Progress(examples=40, steps=5, tokens=280, gain_steps=5.0)
    assert batches.progress == batches.consumed == expected
    assert not batches.progress.reached(gain_steps(6))


def test_a_run_that_no_longer_measures_counts_no_gain() -> None:
    saved = trained(monitor=True, tokens_per_example=7).state_dict()
    batches = adaptive()
    batches.load_state_dict(saved)
    assert batches.progress == Progress(examples=40, steps=5)
    batches = adaptive(monitor=True, tokens_per_example=9)
    batches.load_state_dict(saved)
    assert batches.progress == Progress(examples=40, steps=5, tokens=280, gain_steps=5.0)


# --- rules that stand by themselves ---------------------------------------------------------------------------------


def test_a_setting_that_follows_must_be_in_a_collection() -> None:
    with pytest.raises(TypeError, match=r"follow takes a collection of settings, such as \('betas',\), got 'betas'"):
        check_follow("betas")
    with pytest.raises(ValueError, match="follow takes betas, eps, weight_decay, got 'alpha', 'lr'"):
        check_follow(["lr", "betas", "alpha"])
    with pytest.raises(TypeError, match="such as"):
        adaptive(follow="eps")


def test_legw_keeps_the_steps_of_the_warmup() -> None:
    """You et al. 2019: warm-up epochs grow with the batch, so that as many steps are taken, at sqrt(k) the rate."""
    assert legw_warmup(examples(1000), 8.0) == examples(8000)
    assert legw_warmup(steps(100), 8.0) == steps(100)
    assert legw_warmup(examples(1000), 0.25) == examples(250)
    for ratio in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"ratio must be positive and finite, got {ratio}"):
            legw_warmup(steps(100), ratio)
    assert legw_warmup(0.02, 8.0) == 0.16
    for share, ratio in ((0.2, 8.0), (1.0, 0.5), (-0.1, 2.0), (math.nan, 2.0)):
        with pytest.raises(ValueError, match="both must lie in"):
            legw_warmup(share, ratio)
    with pytest.raises(ValueError, match="a warm-up of 10 gain_steps already depends on the batch"):
        legw_warmup(gain_steps(10), 2.0)


def test_a_run_with_legw_and_its_twin_at_the_reference_warm_up_in_as_many_steps() -> None:
    rates = []
    for size in (8, 32):
        model = network()
        optimizer = SGD(model.parameters(), lr=0.1)
        batches = AdaptiveBatch(
            model, optimizer, Constant(size), micro_batch_size=size, lr_rule="sqrt", reference_batch_size=8
        )
        schedule = ProgressLR(
            optimizer, lr.constant(), batches, total=examples(3200), warmup=legw_warmup(examples(80), size / 8)
        )
        seen: list[float] = []
        order = GlobalOrder(regression(256))
        for step in batches.steps(order, until=steps(15)):
            for batch in step:
                step.backward(loss_of(model, batch))
            seen.append(schedule.get_last_lr()[0])
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        rates.append(seen)
    assert rates[0] == pytest.approx([0.1 * min(1, (t + 1) / 10) for t in range(15)])
    assert rates[1] == pytest.approx([2 * rate for rate in rates[0]])
