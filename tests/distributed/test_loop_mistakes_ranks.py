"""Mistakes of a ported loop under DDP, FSDP2 and local SGD: an error on every rank, and no false alarm."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from support.loops import loss_of, network, regression
from support.ranks import run_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import ExponentialLR

from adabatch import AdaptiveBatch, Constant, EngineOptions, GlobalOrder, LocalSGD, Measure, ProgressLR, lr, steps

pytestmark = pytest.mark.distributed


def sharded() -> nn.Module:
    model = network()
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    return fully_shard(model)


def in_ddp(**options: Any) -> nn.Module:
    return DistributedDataParallel(network(), **options)


Made = tuple[AdaptiveBatch, nn.Module, Optimizer]


def made(model: nn.Module, *, accumulation: int = 3, monitor: bool = False, **options: Any) -> Made:
    optimizer = SGD(model.parameters(), lr=0.01)
    size = Constant(8 * accumulation)
    measure = Measure(monitor=monitor)
    return AdaptiveBatch(model, optimizer, size, micro_batch_size=4, measure=measure, **options), model, optimizer


def ran(
    run: Made,
    *,
    inner: Callable[[int], Any] = lambda index: None,
    after: Callable[[], Any] = lambda: None,
    zero: Callable[[], Any] | None = None,
    around: Callable[[], Any] = nullcontext,
) -> str:
    """Two steps; the error's message, or how many steps were applied."""
    batches, model, optimizer = run
    try:
        for step in batches.steps(GlobalOrder(regression(96)), until=steps(2)):
            with around():
                for index, batch in enumerate(step):
                    inner(index)
                    step.backward(loss_of(model, batch))
                    after()
            optimizer.step()
            (zero or optimizer.zero_grad)()
    except RuntimeError as error:
        return str(error)
    return str(batches.progress.steps)


def switches(rank: int) -> dict[str, str]:
    found = {}
    for monitor in (False, True):
        model = in_ddp()
        found[f"switch {monitor}"] = ran(
            made(model, monitor=monitor),
            # As scripts do that count to an accumulation of their own.
            inner=lambda index, model=model: setattr(model, "require_backward_grad_sync", index == 1),
        )
        model = in_ddp()
        found[f"no_sync {monitor}"] = ran(made(model, monitor=monitor), around=model.no_sync)
        for sync in ("each", "last"):
            model = sharded()
            found[f"fsdp2 {sync} {monitor}"] = ran(
                made(model, monitor=monitor, engine=EngineOptions(gradient_sync=sync)),
                inner=lambda index, model=model: model.set_requires_gradient_sync(index == 1),
            )
    model = sharded()
    found["a unit"] = ran(made(model), inner=lambda index: model[0].set_requires_gradient_sync(False))
    return found


def test_a_switch_of_the_loops_own_is_said_at_the_first_step(tmp_path: Path) -> None:
    first, second = run_ranks(switches, 2, tmp_path)
    assert first == second
    assert len(first) == 9
    for case, said in first.items():
        assert "would not be reduced over the ranks: " in said, case
        word = "set_requires_gradient_sync(False)" if "fsdp2" in case or case == "a unit" else "_sync of Distributed"
        assert word in said, case
        assert "`for batch in step` synchronizes at the right micro-batches by itself" in said, case


def gradients(rank: int) -> dict[str, str]:
    found = {}
    models: dict[str, Callable[[], nn.Module]] = {
        "ddp": in_ddp,
        "views": lambda: in_ddp(gradient_as_bucket_view=True),
        "static": lambda: in_ddp(static_graph=True),
        "fsdp2": sharded,
    }
    for name, make in models.items():
        model = make()
        run = made(model, monitor=True)
        found[f"{name} right"] = ran(run)
        run = made(make())
        found[f"{name} zeros"] = ran(run, zero=lambda run=run: run[2].zero_grad(set_to_none=False))
        run = made(make())
        found[f"{name} cleared"] = ran(run, inner=lambda index, run=run: run[2].zero_grad())
        run = made(make())
        # Operations on lists of DTensors count as no change of any, so FSDP2's are not seen.
        listed = name != "fsdp2"
        found[f"{name} clipped"] = ran(
            run,
            after=lambda run=run, listed=listed: nn.utils.clip_grad_norm_(run[1].parameters(), 1e9, foreach=listed),
        )
        found[f"{name} forgotten"] = ran(made(make()), zero=lambda: None)
        run = made(make())
        found[f"{name} stepped"] = ran(run, after=run[2].step)
    model = sharded()
    run = made(model, engine=EngineOptions(gradient_sync="last"))
    found["last right"] = ran(run)
    model = sharded()
    run = made(model)
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    if rank == 1:  # something is left in the shard of this rank only, and all say so
        run[2].param_groups[0]["params"][0].grad.to_local().fill_(1.0)
    found["one shard"] = ran(run)
    return found


def check_said_on_both(ranks: list[dict[str, str]], words: dict[str, str], *, number: int) -> None:
    """Both ranks say the same in so many cases, and in each the words of its kind, the last word of its name."""
    first, second = ranks
    # what one rank alone sees, the others hear from it
    assert {case: said.removeprefix("on rank 1, ") for case, said in first.items()} == second
    assert len(first) == number
    for case, said in first.items():
        assert words[case.split()[-1]] in said, (case, said)


def test_gradients_that_are_touched_are_said_and_no_others(tmp_path: Path) -> None:
    words = {
        "right": "2",
        "zeros": "2",
        "cleared": "was cleared while",
        "clipped": "was changed while",
        "forgotten": "gradients from before the step",
        "stepped": "optimizer.step() of the SGD was called while",
        "shard": "gradients from before the step",
    }
    check_said_on_both(run_ranks(gradients, 2, tmp_path), words, number=26)


def local(rank: int) -> dict[str, str]:
    found = {}
    for name, mistake in {
        "right": {},
        "forgotten": {"zero": lambda: None},
    }.items():
        model = network()
        optimizer = SGD(model.parameters(), lr=0.01)
        with LocalSGD(model, optimizer, sync_every=2) as workers:
            batches = AdaptiveBatch(model, optimizer, Constant(16), micro_batch_size=4, local_sgd=workers)
            found[name] = ran((batches, model, optimizer), **mistake)
    return found


def test_workers_of_local_sgd_are_told_too(tmp_path: Path) -> None:
    for found in run_ranks(local, 2, tmp_path):
        assert found["right"] == "2"
        assert "gradients from before the step" in found["forgotten"]


def around_updates(rank: int) -> dict[str, str]:
    """Mistakes around the update, each with its name; a second one of the same run would be said too."""
    found = {}
    models: dict[str, Callable[[], nn.Module]] = {"ddp": in_ddp, "fsdp2": sharded}
    for name, make in models.items():
        run = made(make(), accumulation=2)
        schedule = ProgressLR(run[2], lr.linear(), run[0], total=steps(10))
        found[f"{name} not stepped"] = ran(run)
        schedule.give_way()
        run = made(make(), accumulation=2)
        schedule = ProgressLR(run[2], lr.linear(), run[0], total=steps(10))
        found[f"{name} right"] = ran(run, zero=lambda run=run, by=schedule: (run[2].zero_grad(), by.step()))
        run = made(make(), accumulation=2)
        schedule = ProgressLR(run[2], lr.linear(), run[0], total=steps(10))
        other = ExponentialLR(run[2], 0.5)

        def both(run: Made = run, by: ProgressLR = schedule, other: ExponentialLR = other) -> None:
            run[2].zero_grad()
            by.step()
            other.step()

        found[f"{name} beside"] = ran(run, zero=both)
        run = made(make(), accumulation=2)
        found[f"{name} twice"] = ran(run, zero=lambda run=run: run[2].step())
        run = made(make(), accumulation=2)
        found[f"{name} closure"] = ran(run, zero=lambda run=run: run[2].step(lambda: 0.0))
    return found


def test_mistakes_around_the_update_are_said_on_every_rank(tmp_path: Path) -> None:
    words = {
        "stepped": "call step() of the ProgressLR after each optimizer.step()",
        "right": "2",
        "beside": "something else changes it too",
        "twice": "was called a second time in one step",
        "closure": "optimizer.step(closure) of the SGD",
    }
    check_said_on_both(run_ranks(around_updates, 2, tmp_path), words, number=10)


def on_one_rank(rank: int) -> dict[str, str]:
    """What the second rank alone does between two steps, or in the first one; and a loop that goes past DDP."""
    found = {}

    def slower(group: dict[str, Any]) -> None:
        group["lr"] *= 0.5

    for name, make in {"ddp": in_ddp, "fsdp2": sharded}.items():
        run = made(make())
        group = run[2].param_groups[0]
        found[f"{name} inside"] = ran(run, inner=lambda index, g=group: slower(g) if rank and index else None)
        for monitor in (True, False):
            run = made(make(), monitor=monitor)
            group = run[2].param_groups[0]
            found[f"{name} {monitor} rate"] = ran(
                run, zero=lambda run=run, g=group: (run[2].zero_grad(), slower(g) if rank else None)
            )
        run = made(make())
        group = run[2].param_groups[0]
        found[f"{name} both"] = ran(run, zero=lambda run=run, g=group: (run[2].zero_grad(), slower(g)))
        run = made(make())
        batches, model, optimizer = run
        try:
            for step in batches.steps(GlobalOrder(regression(96)), until=steps(3)):
                for batch in step:
                    step.backward(loss_of(model, batch))
                if rank:
                    batches.leave_out()
                optimizer.step()
                optimizer.zero_grad()
        except RuntimeError as error:
            found[f"{name} update"] = str(error)
    model = in_ddp()
    batches, _, optimizer = made(model)
    found["past"] = ran((batches, model.module, optimizer))
    return found


def test_what_one_rank_alone_does_is_said_on_both(tmp_path: Path) -> None:
    words = {
        "inside": "the learning rate of the SGD was changed while",
        "rate": "in step 1 the ranks are about to make different updates, and would drift apart: lr of optimizer group "
        "0 is 0.01 on rank 0 and 0.005 on rank 1. Look for",
        "both": "2",
        "update": "in step 1 the ranks are about to make different updates, and would drift apart: number of updates "
        "so far is 1 on rank 0 and 0 on rank 1. Look for",
        "past": "Call the DistributedDataParallel that AdaptiveBatch was given in the loop, and not the module inside",
    }
    first, second = run_ranks(on_one_rank, 2, tmp_path)
    told = {case: said.removeprefix("on rank 1, ") for case, said in first.items()}
    assert [case for case in told if told[case] != first[case]] == ["ddp inside", "fsdp2 inside"]
    check_said_on_both([told, second], words, number=11)
