"""``Measure(late=True)`` on several ranks: the same decisions on all of them, one step later."""

from __future__ import annotations

import io
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.loops import lines, loss_of, network, regression, train, weights
from support.ranks import run_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from adabatch import AdaptiveBatch, Checkpoints, Control, GlobalOrder, Guard, Limits, NormTest, Preemption, steps
from adabatch.adaptive.options import Measure
from adabatch.guards.drift import RanksDrifted
from adabatch.probes import CommHookProbe
from adabatch.runtime.collectives import Collectives

pytestmark = pytest.mark.distributed


def wrapped(kind: str) -> nn.Module:
    model = network()
    if kind == "FSDP2":
        for part in model:
            fully_shard(part)
        return fully_shard(model)
    return DistributedDataParallel(model)


def whole(model: nn.Module) -> list[float]:
    """All weights, whoever holds them."""
    found = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return torch.cat([each.detach().flatten() for each in found]).tolist()


class Made:
    """Model, optimizer, batches and order of a run whose batch follows the noise."""

    def __init__(self, kind: str, *, late: bool = True, journal: Path | None = None, **options: Any) -> None:
        self.model = wrapped(kind)
        self.optimizer = SGD(self.model.parameters(), lr=0.02)
        self.batches = AdaptiveBatch(
            self.model,
            self.optimizer,
            NormTest(0.4),
            micro_batch_size=2,
            limits=Limits(8, 64),
            control=Control(growth=1.5, pace=math.inf, hold=0, confidence=0.5, memory=2),
            lr_rule="gain",
            probe=CommHookProbe(self.model) if kind == "hook" else None,
            journal=journal,
            measure=Measure(late=late),
            guard=Guard(skip_nonfinite=False),
            **options,
        )
        self.order = GlobalOrder(regression(128), seed=1)

    def go(self, until: int, each: Any = lambda step: None) -> None:
        train(self.batches, self.model, self.optimizer, self.order, until=steps(until), each=each)


def on_all_kinds(rank: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind in ("tensor hooks", "hook", "FSDP2"):
        sizes: list[int] = []
        run = Made(kind, journal=folder / kind)
        run.go(10, lambda step, to=sizes: to.append(step.global_batch_size))
        again = Made(kind)
        again.go(4)
        file = io.BytesIO()
        parts = ("model", "optimizer", "batches", "order")
        torch.save({name: getattr(again, name).state_dict() for name in parts}, file)
        file.seek(0)
        rest = Made(kind)
        for name, state in torch.load(file, weights_only=False).items():
            getattr(rest, name).load_state_dict(state)
        rest.go(10)
        found[kind] = {
            "sizes": sizes,
            "weights": whole(run.model),
            "resumed": whole(rest.model),
            "noise scale": run.batches.noise_scale,
            "waits": run.batches.state_dict()["late"],
        }
        for one in (run, again, rest):
            one.batches.remove()
    return found


def test_ranks_decide_the_same_and_resume_to_the_bit(tmp_path: Path) -> None:
    first, second = run_ranks(on_all_kinds, 2, tmp_path, tmp_path, timeout=150)
    assert repr(first) == repr(second)
    for kind, found in first.items():
        # DDP deals its buckets again after the first step, and the hook adds the squares of a bucket together
        right = pytest.approx(found["weights"], rel=1e-5) if kind == "hook" else found["weights"]
        assert found["resumed"] == right, kind
        assert found["sizes"][:2] == [8, 8]
        assert len(set(found["sizes"])) > 2
        assert found["waits"]["step"] == 9
        written = lines(tmp_path / kind)
        assert [line["decided_by"] for line in written] == [None, *range(9)]
        assert all(line["moments"] is not None for line in written)


def numbers_arrive(rank: int, updated: Path) -> list[Any]:
    """The second rank sends its numbers once the first has made its update."""
    run = Made("tensor hooks")
    original, seen = Collectives.start_sum, []
    held: list[bool] = []

    def slow(self: Collectives, values: torch.Tensor) -> Any:
        if rank == 1 and not held:
            held.append(True)
            while not updated.exists():
                time.sleep(0.01)
        return original(self, values)

    Collectives.start_sum = slow  # type: ignore[method-assign]
    try:
        for step in run.batches.steps(run.order, until=steps(2)):
            for batch in step:
                step.backward(loss_of(run.model, batch))
            seen.append((step.unread, step.is_there))
            run.optimizer.step()
            run.optimizer.zero_grad()
            if rank == 0:
                updated.touch()
    finally:
        Collectives.start_sum = original  # type: ignore[method-assign]
    return seen


def test_a_rank_does_not_wait_for_the_numbers_of_another_before_its_update(tmp_path: Path) -> None:
    first, _ = run_ranks(numbers_arrive, 2, tmp_path, tmp_path / "updated")
    assert first[0] == (True, False)
    assert first[1][0]


def mistaken(rank: int) -> tuple[str, int]:
    """The second rank gives a learning rate of its own from step 2 on."""
    run, taken = Made("tensor hooks"), 0
    try:
        for step in run.batches.steps(run.order, until=steps(8)):
            taken += 1
            for batch in step:
                if rank == 1 and taken == 3:
                    run.optimizer.param_groups[0]["lr"] = 0.5
                step.backward(loss_of(run.model, batch))
            run.optimizer.step()
            run.optimizer.zero_grad()
    except RanksDrifted as error:
        return str(error), taken
    return "nothing", taken


def test_ranks_that_differ_are_told_one_step_later_on_all(tmp_path: Path) -> None:
    for message, taken in run_ranks(mistaken, 2, tmp_path):
        assert message.startswith("in step 2 the ranks")
        assert taken == 4


def last_mistake(rank: int) -> str:
    """The second rank changes its learning rate in the inner loop of the last step."""
    run = Made("tensor hooks")
    try:
        for step in run.batches.steps(run.order, until=steps(3)):
            for batch in step:
                step.backward(loss_of(run.model, batch))
                if rank == 1 and run.batches.consumed.steps == 2:
                    run.optimizer.param_groups[0]["lr"] = 0.5
            run.optimizer.step()
            run.optimizer.zero_grad()
    except RuntimeError as error:
        return str(error)
    return "nothing"


def test_a_mistake_in_the_last_step_is_told_when_the_loop_ends(tmp_path: Path) -> None:
    first, second = run_ranks(last_mistake, 2, tmp_path)
    assert second.startswith("the learning rate of the SGD was changed while the step's micro-batches were being run")
    assert first == f"on rank 1, {second}"


def voting(rank: int, folder: Path) -> tuple[list[int], int]:
    """The first rank's clock wants one checkpoint; the second rank gets a signal to stop in step 6."""
    run, saved = Made("tensor hooks"), []
    checkpoints = Checkpoints(
        folder, model=run.model, optimizer=run.optimizer, batches=run.batches, order=run.order, every_seconds=1000.0
    )
    with Preemption(run.batches) as preemption:
        for step in run.batches.steps(run.order, until=steps(20)):
            for batch in step:
                step.backward(loss_of(run.model, batch))
            run.optimizer.step()
            run.optimizer.zero_grad()
            if run.batches.consumed.steps == 2:
                checkpoints._times._saved_at = -2000.0
            if checkpoints.step():
                saved.append(run.batches.consumed.steps)
            if rank == 1 and run.batches.consumed.steps == 6:
                preemption.request()
            if preemption.agreed:
                break
    checkpoints.close()
    dist.barrier()
    return saved, run.batches.consumed.steps


def test_votes_are_counted_one_step_later_and_a_save_is_made_once(tmp_path: Path) -> None:
    first, second = run_ranks(voting, 2, tmp_path, tmp_path / "c")
    assert first == second
    saved, stopped = first
    # due after step 2 (number 3 votes), counted at the end of the one after
    assert saved == [4]
    assert stopped == 8


def test_under_one_size_and_without_a_rule_it_changes_nothing(tmp_path: Path) -> None:
    first, _ = run_ranks(without_a_rule, 2, tmp_path)
    assert first[0] == first[1]


def without_a_rule(rank: int) -> list[list[float]]:
    found = []
    for late in (False, True):
        model = DistributedDataParallel(network())
        optimizer = SGD(model.parameters(), lr=0.02)
        batches = AdaptiveBatch(
            model,
            optimizer,
            NormTest(0.4),
            micro_batch_size=2,
            limits=Limits(16, 16),
            lr_rule="none",
            measure=Measure(late=late),
            guard=Guard(skip_nonfinite=False),
        )
        train(batches, model, optimizer, GlobalOrder(regression(128), seed=1), until=steps(8))
        found.append(weights(model).tolist())
        batches.remove()
    return found
