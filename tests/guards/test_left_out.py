"""A run whose updates are left out one after another stops, and its last good checkpoint stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.loops import loss_of, network, regression, weights
from torch.optim import SGD

import adabatch
from adabatch import AdaptiveBatch, Checkpoints, Control, GlobalOrder, Guard, Limits, Measure, NormTest
from adabatch.checkpointing.files import checkpoints_in
from adabatch.guards import EXIT_NO_UPDATES, UpdatesLeftOut
from adabatch.guards.left_out import UpdatesInARow


def test_an_applied_update_begins_the_count_again() -> None:
    updates = UpdatesInARow(3)
    for consumed, applied in ((0, 0), (1, 0), (2, 0), (3, 1), (4, 1), (5, 1)):
        updates.check(consumed, applied)
    with pytest.raises(UpdatesLeftOut, match=r"last 3 updates in a row were left out, up to step 6"):
        updates.check(6, 1)
    resumed = UpdatesInARow(2)
    resumed.check(100, 40)  # what was left out before it began does not count
    resumed.check(101, 40)
    with pytest.raises(UpdatesLeftOut):
        resumed.check(102, 40)
    forever = UpdatesInARow(None)
    for consumed in range(200):
        forever.check(consumed, 0)


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(limit: int) -> None:
    with pytest.raises(ValueError, match=f"max_left_out must be at least 1 .*, got {limit}"):
        Guard(max_left_out=limit)


def batches_of(model: torch.nn.Module, **options: Any) -> tuple[AdaptiveBatch, SGD]:
    optimizer = SGD(model.parameters(), lr=0.01)
    limits = Limits(min=8, max=8)
    return AdaptiveBatch(model, optimizer, NormTest(eta=0.5), micro_batch_size=4, limits=limits, **options), optimizer


@pytest.mark.parametrize(("options", "limit"), [({}, 50), ({"guard": Guard(max_left_out=5)}, 5)])
def test_a_run_that_trains_nothing_stops_and_keeps_its_checkpoint(
    tmp_path: Path, options: dict[str, Any], limit: int
) -> None:
    model = network()
    batches, optimizer = batches_of(model, **options)
    order = GlobalOrder(regression(64))
    parts = {"model": model, "optimizer": optimizer, "batches": batches, "order": order}
    checkpoints = Checkpoints(tmp_path, **parts, every=adabatch.steps(3))

    def loop() -> None:
        with checkpoints:
            for step in batches.steps(order, until=adabatch.steps(1000)):
                for batch in step:
                    poison = float("nan") if batches.consumed.steps >= 6 else 1.0
                    step.backward(loss_of(model, batch) * poison)
                optimizer.step()
                optimizer.zero_grad()
                checkpoints.step()

    with pytest.raises(UpdatesLeftOut, match=f"last {limit} updates"):
        loop()
    assert batches.consumed.steps == 6 + limit
    assert checkpoints_in(tmp_path)
    again = network(seed=3)
    adabatch.load(tmp_path, model=again)
    assert torch.equal(weights(again), weights(model))
    assert torch.isfinite(weights(again)).all()
    assert EXIT_NO_UPDATES == 77


def test_a_finite_measurement_begins_the_count_of_those_that_are_not_again() -> None:
    updates = UpdatesInARow(5)
    for step, finite in ((0, False), (3, False), (4, True), (7, False), (10, False)):
        updates.measured(step, finite=finite)
        updates.check(step + 1, step + 1)
    updates.measured(2, finite=False)  # a state was loaded
    updates.check(3, 3)
    updates.measured(6, finite=False)
    with pytest.raises(UpdatesLeftOut, match=r"for 5 steps, up to step 8, no loss or gradient that was measured was"):
        updates.check(8, 8)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"measure": Measure(late=True), "guard": Guard(skip_nonfinite=False, max_left_out=6)}, 7),
        ({"guard": Guard(skip_nonfinite=False, max_left_out=6)}, 6),
        # every fourth step is probed: two of them span five steps, three of them nine
        ({"guard": Guard(skip_nonfinite="probed", max_left_out=6), "control": Control(interval=4)}, 9),
        ({"guard": Guard(skip_nonfinite=False, max_left_out=None)}, 20),
    ],
)
def test_a_run_stops_that_trains_on_numbers_that_are_not_finite(options: dict[str, Any], steps: int) -> None:
    model = network()
    batches, optimizer = batches_of(model, **options)
    ended = "it ran to its end"
    try:
        for step in batches.steps(GlobalOrder(regression(64)), until=adabatch.steps(20)):
            for batch in step:
                step.backward(loss_of(model, batch) * float("nan"))
            optimizer.step()
            optimizer.zero_grad()
    except UpdatesLeftOut as error:
        ended = str(error)
    assert batches.consumed.steps == steps
    assert ended.startswith("it ran to its end" if steps == 20 else "for ")


@pytest.mark.parametrize("value", ["yes", "true", 1, 0, None, 2.0, "Probed"])
def test_skip_nonfinite_takes_its_named_values_only(value: Any) -> None:
    with pytest.raises(ValueError, match="skip_nonfinite must be True, False or 'probed', got "):
        Guard(skip_nonfinite=value)
    for named in (True, False, "probed"):
        batches_of(network(), guard=Guard(skip_nonfinite=named))
