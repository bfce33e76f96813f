"""What only one worker of local SGD does: said on all workers when they meet, and no false alarm."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.loops import loss_of, network, regression
from support.ranks import run_ranks
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from adabatch import AdaptiveBatch, Constant, GlobalOrder, LocalSGD, examples, steps
from adabatch.local_sgd import Nesterov

pytestmark = pytest.mark.distributed

ODD = 1
"""The worker that does something else."""

Made = tuple[LocalSGD, AdaptiveBatch, nn.Module, Optimizer]


def run(
    rank: int,
    *,
    before: Callable[[Made, int], Any] = lambda made, index: None,
    skips: Callable[[int], bool] = lambda index: False,
    loss: Callable[[int], float] = lambda index: 1.0,
    num_steps: int = 8,
    make: Callable[[Any], Optimizer] = lambda parameters: SGD(parameters, lr=0.01),
    **options: Any,
) -> tuple[str, int]:
    """The guide's loop, in which the odd worker does what the arguments say; the error, and after which step."""
    model = network()
    optimizer = make(model.parameters())
    odd, index = rank == ODD, -1
    local = LocalSGD(model, optimizer, **{"sync_every": 4, **options})
    batches = AdaptiveBatch(model, optimizer, Constant(16), micro_batch_size=4, local_sgd=local)
    try:
        with local:
            for index, step in enumerate(batches.steps(GlobalOrder(regression(96)), until=steps(num_steps))):
                for batch in step:
                    step.backward(loss_of(model, batch) * (loss(index) if odd else 1.0))
                if odd:
                    before((local, batches, model, optimizer), index)
                if not (odd and skips(index)):
                    optimizer.step()
                optimizer.zero_grad()
    except RuntimeError as error:
        return str(error), index
    finally:
        local.remove()
        batches.remove()
    return "", index


def set_group(made: Made, **settings: Any) -> None:
    made[3].param_groups[0].update(settings)


def other_rates(made: Made, index: int) -> None:
    if index == 1:
        set_group(made, lr=0.02)


def decays_once(made: Made, index: int) -> None:
    set_group(made, weight_decay=0.1 if index == 1 else 0.0)


def leaves_out(made: Made, index: int) -> None:
    if index == 2:
        made[1].leave_out()


class Estimating(SGD):
    """Like Prodigy, it keeps what it estimates from a worker's own gradients in its group."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["d"] = max(group.get("d", 1e-6), *(float(p.grad.abs().max()) for p in group["params"]))
        return super().step(closure)


WAYS: dict[str, dict[str, Any]] = {
    "averages": {},
    "outer": {"outer": Nesterov(), "compression": "bf16"},
    "fragments": {"fragments": 2},
    "overlap": {"overlap": 2},
    "gradient": {"sync_every": 1},
    "warm-up": {"warmup": steps(4)},
}


def mistakes(rank: int) -> dict[str, tuple[str, int]]:
    found = {}
    for way, options in WAYS.items():
        found[f"{way}: rates"] = run(rank, before=other_rates, **options)
        found[f"{way}: decay"] = run(rank, before=decays_once, **options)
        found[f"{way}: leaves out"] = run(rank, before=leaves_out, **options)
        found[f"{way}: leaves out, no step"] = run(rank, before=leaves_out, skips=lambda index: index == 2, **options)
        found[f"{way}: no step"] = run(rank, skips=lambda index: index == 1, **options)
        found[f"{way}: no last step"] = run(rank, skips=lambda index: index == 3, **options)
        found[f"{way}: no very last step"] = run(rank, skips=lambda index: index == 7, **options)
    return found


def test_what_one_worker_does_alone_is_said_on_all_when_they_meet(tmp_path: Path) -> None:
    first, second = run_ranks(mistakes, 2, tmp_path, timeout=120)
    assert first == second
    assert len(first) == 7 * len(WAYS)
    missed = "the number of steps without optimizer.step() is 0 on worker 0 and 1 on worker 1"
    words = {
        "rates": "lr of optimizer group 0 is 0.01 on worker 0 and 0.02 on worker 1",
        "decay": "which are the same again now",
        "leaves out": "the number of applied updates is ",
        "leaves out, no step": "the number of applied updates is ",
    }
    for case, (said, index) in first.items():
        way, mistake = case.split(": ", 1)
        assert said.startswith("the workers have not made the same steps"), (case, said)
        assert "Look for what only some of them do" in said
        # these meet after the very step
        at_once = mistake == "decay" and way in ("fragments", "gradient", "warm-up")
        here = "weight_decay of optimizer group 0 is " if at_once else words.get(mistake, missed)
        assert here in said, (case, said)
        # when they next meet; with overlap that arrives later, and a gradient is that of the next step
        meets = (7 if mistake == "no very last step" else 3) + (way in ("overlap", "warm-up", "gradient"))
        assert index <= meets, (case, index)


def right(rank: int) -> dict[str, tuple[str, int]]:
    found = {}
    for way, options in WAYS.items():
        found[way] = run(rank, **options)
        if way not in ("gradient", "warm-up"):
            found[f"{way}, not finite"] = run(rank, loss=lambda index: math.nan if index == 2 else 1.0, **options)
    found["estimates"] = run(rank, make=lambda parameters: Estimating(parameters, lr=0.01))
    found["AdamW"] = run(rank, make=lambda parameters: AdamW(parameters, lr=torch.tensor(0.01)))
    return found


def test_what_workers_may_do_alone_is_no_error(tmp_path: Path) -> None:
    """A local step that is not finite is left out by its worker, and an optimizer may estimate from its gradients."""
    for found in run_ranks(right, 2, tmp_path, timeout=120):
        for case, (said, index) in found.items():
            assert (said, index) == ("", 7), case


def all_leave_out(rank: int) -> list[int]:
    """The same steps are left out by all, each in its own way: the step() after it is optional."""
    model = network()
    optimizer = SGD(model.parameters(), lr=0.01)
    with LocalSGD(model, optimizer, sync_every=4) as local:
        batches = AdaptiveBatch(model, optimizer, Constant(16), micro_batch_size=4, local_sgd=local)
        for index, step in enumerate(batches.steps(GlobalOrder(regression(256)), until=examples(128))):
            for batch in step:
                step.backward(loss_of(model, batch))
            if index == 2:
                batches.leave_out()
            if index != 2 or rank == ODD:
                optimizer.step()
            optimizer.zero_grad()
    batches.remove()
    return [local.steps, local.rounds, batches.progress.steps, batches.consumed.steps]


def in_a_plain_loop(rank: int) -> list[str]:
    """Without ``AdaptiveBatch``: another rate, fewer steps than the others, and a worker that leaves too early."""
    found = []
    data = regression(96).tensors
    for sync_every, rate, num_steps in ((4, 0.02, 8), (1, 0.02, 8), (4, 0.01, 7), (4, 0.01, 4), (1, 0.01, 8)):
        model = network()
        optimizer = SGD(model.parameters(), lr=0.01)
        local = LocalSGD(model, optimizer, sync_every=sync_every)
        said = ""
        try:
            with local:
                for step in range(num_steps if rank == ODD else 8):
                    if step == 2 and rank == ODD:
                        optimizer.param_groups[0]["lr"] = rate
                    loss_of(model, [each[step * 8 + rank * 4 :][:4] for each in data]).backward()
                    optimizer.step()
                    optimizer.zero_grad()
        except RuntimeError as error:
            said = str(error)
        found.append(said)
    return found


def plain_loop(
    rank: int, num_steps: int, *, before: Callable[[LocalSGD, int], Any] = lambda local, step: None, **options: Any
) -> str:
    """A loop without ``AdaptiveBatch``; how many steps and rounds it came to, or the error."""
    model = network()
    optimizer = SGD(model.parameters(), lr=0.01)
    try:
        with LocalSGD(model, optimizer, **options) as local:
            for step in range(num_steps):
                before(local, step)
                loss_of(model, [each[step * 8 + rank * 4 :][:4] for each in regression(96).tensors]).backward()
                optimizer.step()
                optimizer.zero_grad()
        return f"{local.steps} steps, {local.rounds} rounds"
    except RuntimeError as error:
        return str(error)


def removed_inside(rank: int) -> list[str]:
    """Removed in the middle of a round by all workers, then by the odd one alone, also where gradients are averaged."""

    def remove(local: LocalSGD, step: int) -> None:
        if step == 2:
            local.remove()

    odd = remove if rank == ODD else lambda local, step: None
    return [
        plain_loop(rank, 8, before=remove, sync_every=4),
        plain_loop(rank, 8, before=odd, sync_every=4),
        plain_loop(rank, 8, before=odd, sync_every=1),
    ]


def test_workers_that_remove_it_inside_the_block_hear_of_each_other(tmp_path: Path) -> None:
    first, second = run_ranks(removed_inside, 2, tmp_path)
    assert first == second
    assert first[0] == "2 steps, 0 rounds"
    assert "worker 0 reaches an average after 4 steps; worker 1 leaves the block after 2 steps" in first[1]
    assert "worker 0 reaches an average after 2 steps; worker 1 leaves the block after 2 steps" in first[2]


def fewer_steps_of_averaged_gradients(rank: int) -> list[str]:
    """The odd worker has fewer batches, while each step averages the gradient: in the warm-up, and with one step per
    round; then all take the same number."""
    odd = rank == ODD
    return [
        plain_loop(rank, 5 if odd else 8, sync_every=4, warmup=steps(6)),
        plain_loop(rank, 7 if odd else 8, sync_every=1),
        plain_loop(rank, 8, sync_every=1),
    ]


def test_a_worker_with_fewer_steps_of_averaged_gradients_is_named(tmp_path: Path) -> None:
    first, second = run_ranks(fewer_steps_of_averaged_gradients, 2, tmp_path)
    assert first == second
    assert "worker 0 reaches an average after 5 steps; worker 1 leaves the block after 5 steps" in first[0]
    assert "worker 0 reaches an average after 7 steps; worker 1 leaves the block after 7 steps" in first[1]
    assert first[2] == "8 steps, 8 rounds"


def test_workers_of_a_plain_loop_hear_of_each_other(tmp_path: Path) -> None:
    assert run_ranks(all_leave_out, 2, tmp_path) == [[8, 2, 7, 8]] * 2
    first, second = run_ranks(in_a_plain_loop, 2, tmp_path)
    assert first == second
    rates = "lr of optimizer group 0 is 0.01 on worker 0 and 0.02 on worker 1"
    assert [rates in first[0], rates in first[1]] == [True, True], first
    assert "after different numbers of steps (worker 0: 8; worker 1: 7)" in first[2]
    assert "worker 0 begins a round after 4 steps; worker 1 leaves the block after 4 steps" in first[3]
    assert first[4] == ""
