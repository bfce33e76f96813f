"""Goodput on two processes whose clocks differ: one time, one integer, and 8 bytes more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.loops import lines, loss_of, network, regression
from support.ranks import run_ranks
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from adabatch import AdaptiveBatch, Control, GlobalOrder, Goodput, Limits, NoiseScale, examples
from adabatch.report.steps import read_steps
from adabatch.runtime.observers import stopwatch

pytestmark = pytest.mark.distributed

TOTAL = examples(1600)


def trained(rank: int, folder: Path, per_step: float, per_example: float) -> dict[str, Any]:
    """A run on a pretended machine, of which the second rank is a third slower; saved and resumed half-way."""
    now = 50.0 * rank  # no two hosts agree on the time

    def clock() -> float:
        return now

    stopwatch.perf_counter = clock  # the process is this test's own
    model = DistributedDataParallel(network())
    optimizer = SGD(model.parameters(), lr=0.01)
    order = GlobalOrder(regression(400), seed=3)

    def made() -> AdaptiveBatch:
        return AdaptiveBatch(
            model,
            optimizer,
            Goodput(),
            micro_batch_size=2,
            max_micro_batch_size=16,
            limits=Limits(min=8, max=256),
            control=Control(confidence=0.5),
            journal=folder / "journal.jsonl",
        )

    sizes, states = [], []
    batches = made()
    for until in (examples(TOTAL.count // 2), TOTAL):
        for step in batches.steps(order, until=until):
            for batch in step:
                step.backward(loss_of(model, batch))
                now += per_example * len(batch[0]) * (1 + rank / 3)
            now += per_step * (1 + rank / 3)
            optimizer.step()
            optimizer.zero_grad()
            sizes.append(step.global_batch_size)
        states.append(batches.state_dict())
        batches.remove()
        batches = made()
        torch.save(states[-1], folder / f"{rank}.pt")
        batches.load_state_dict(torch.load(folder / f"{rank}.pt", weights_only=True))
    batches.remove()
    return {"sizes": sizes, "states": states}


@pytest.mark.parametrize(
    ("per_step", "per_example", "grows"), [(1.0, 0.001, True), (0.001, 1.0, False)], ids=["idle", "busy"]
)
def test_ranks_whose_times_differ_choose_the_same_batches(
    per_step: float, per_example: float, grows: bool, tmp_path: Path
) -> None:
    first, second = run_ranks(trained, 2, tmp_path, tmp_path, per_step, per_example)
    assert first == second
    if grows:
        assert first["sizes"] == sorted(first["sizes"])
        assert first["sizes"][-1] > 16
    else:
        assert max(first["sizes"]) <= 16, "a busy machine grows for one trial at most"
        assert first["sizes"][-1] == 8, "and comes back"
    told = lines(tmp_path / "journal.jsonl")
    timed = [line["seconds"] for line in told if "seconds" in line]
    assert timed
    size = told[2]["plan"]["global_batch_size"]
    assert timed[0] == pytest.approx((per_step + per_example * size / 2) * 7 / 6, rel=1e-9), "the mean of the ranks"
    assert first["states"][1]["control"]["times"], "what was timed is saved"
    run = read_steps(tmp_path / "journal.jsonl", "run")
    exact = (per_step + per_example * run.batch / 2) * 7 / 6
    known = np.isfinite(run.seconds)
    assert known.sum() == len(timed)
    assert len(set(run.batch[known])) > 1, "several sizes were timed"
    np.testing.assert_allclose(run.seconds[known], exact[known], rtol=1e-9, err_msg="at the step that took so long")


def sent(rank: int) -> dict[str, int]:
    """Bytes of the reduction at a step's end, with a criterion that reads times and with one that does not."""
    found = {}
    for criterion in (NoiseScale(), Goodput()):
        model = DistributedDataParallel(network())
        optimizer = SGD(model.parameters(), lr=0.01)
        batches = AdaptiveBatch(model, optimizer, criterion, micro_batch_size=4, limits=Limits(min=8, max=8))
        counts: list[int] = []
        original = dist.all_reduce

        def counted(
            tensor: torch.Tensor, *args: Any, counts: list[int] = counts, original: Any = original, **options: Any
        ) -> Any:
            counts.append(tensor.numel() * tensor.element_size())
            return original(tensor, *args, **options)

        for step in batches.steps(GlobalOrder(regression(40), seed=0), until=examples(16)):
            counts.clear()  # the first step also compares the gradients of the ranks
            dist.all_reduce = counted
            try:
                for batch in step:
                    step.backward(loss_of(model, batch))
            finally:
                dist.all_reduce = original
            optimizer.step()
            optimizer.zero_grad()
        batches.remove()
        assert len(counts) == 1
        found[type(criterion).__name__] = counts[0]
    return found


def test_a_time_costs_one_number_on_the_reduction_that_is_made_anyway(tmp_path: Path) -> None:
    for found in run_ranks(sent, 2, tmp_path):
        assert found["Goodput"] == found["NoiseScale"] + 8
