"""A layer that one rank alone freezes, thaws or replaces during the run: every rank says so, and none waits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from support.loops import loss_of, network, regression
from support.ranks import run_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from adabatch import AdaptiveBatch, Constant, EngineOptions, GlobalOrder, Guard, Limits, LocalSGD, Measure, steps
from adabatch.runtime.engines.choice import engine_for
from adabatch.runtime.engines.hosted import HostedEngine

pytestmark = pytest.mark.distributed

CHANGES_AT = 2


def changed(model: nn.Module, change: str) -> None:
    """Changes the last layer."""
    if change == "frozen":
        model[-1].requires_grad_(False)
    else:
        model[-1] = nn.Linear(model[-1].in_features, model[-1].out_features)


def ended(batches: AdaptiveBatch, model: nn.Module, optimizer: Any, change: Callable[[], object] | None) -> str:
    """The error of the loop, with a change before the third step, unless ``change`` is None."""
    try:
        for number, step in enumerate(batches.steps(GlobalOrder(regression(96)), until=steps(8))):
            if number == CHANGES_AT and change is not None:
                change()
            for batch in step:
                step.backward(loss_of(model, batch))
            optimizer.step()
            optimizer.zero_grad()
    except RuntimeError as error:
        return f"{batches.progress.steps} steps: {error}"
    return "no error"


def in_ddp(rank: int) -> dict[str, str]:
    found = {}
    for change in ("frozen", "replaced"):
        for measured in ("probe", "finite", "probe, in a host"):
            inner = network()
            model = DistributedDataParallel(inner)
            optimizer = SGD(model.parameters(), lr=0.01)
            hosted = HostedEngine(engine_for(model), synchronizes=lambda last: None, ended=lambda: None)
            batches = AdaptiveBatch(
                model,
                optimizer,
                Constant(16),
                micro_batch_size=4,
                engine=hosted if "host" in measured else EngineOptions(),
                limits=Limits(16, 16),
                measure=Measure(monitor="probe" in measured),
                guard=Guard(check_every=None),
            )
            found[f"{change}, {measured}"] = ended(
                batches, model, optimizer, partial(changed, inner, change) if rank else None
            )
            batches.remove()
    return found


def in_other_engines(rank: int) -> dict[str, str]:
    """Engines whose ranks do not all wait for gradients of the same parameters."""
    found = {}
    for name in ("find_unused_parameters", "static_graph", "fsdp2"):
        for change in ("frozen", "replaced")[: 1 if name == "fsdp2" else 2]:
            inner = network()
            if name == "fsdp2":
                model: nn.Module = fully_shard(inner)
            else:
                model = DistributedDataParallel(inner, **{name: True})
            optimizer = SGD(model.parameters(), lr=0.01)
            batches = AdaptiveBatch(model, optimizer, Constant(16), micro_batch_size=4, limits=Limits(16, 16))
            found[f"{change}, {name}"] = ended(
                batches, model, optimizer, partial(changed, inner, change) if rank else None
            )
            if name == "fsdp2" and rank:
                assert not inner[-1].weight.requires_grad  # as the loop left it
            batches.remove()
    return found


def three_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 1))


def other_groups(rank: int) -> dict[str, str]:
    """The second layer is reduced from the beginning; the optimizer holds it or not, and one rank changes that."""
    found = {}
    for name, change in product(("ddp", "fsdp2"), ("added", "removed", "other frozen")):
        inner = three_layers()
        model: nn.Module = DistributedDataParallel(inner) if name == "ddp" else fully_shard(inner)
        second = list(inner[2].parameters())
        rest = [*inner[0].parameters(), *inner[4].parameters()]
        optimizer = SGD([{"params": rest}, *([{"params": second}] if change == "removed" else [])], lr=0.01)
        # without a probe: that of FSDP2 measures all that is reduced
        batches = AdaptiveBatch(model, optimizer, Constant(16), micro_batch_size=4, limits=Limits(16, 16))
        change_on_rank_1 = {
            "added": partial(optimizer.add_param_group, {"params": second}),
            "removed": optimizer.param_groups.pop,
            "other frozen": partial(inner[2].requires_grad_, False),
        }[change]
        found[f"{change}, {name}"] = ended(batches, model, optimizer, change_on_rank_1 if rank else None)
        batches.remove()
    return found


def gradients_left_on_one_rank(rank: int) -> dict[str, str]:
    found = {}
    for name in ("ddp", "fsdp2"):
        inner = three_layers()
        model: nn.Module = DistributedDataParallel(inner) if name == "ddp" else fully_shard(inner)
        optimizer = SGD(model.parameters(), lr=0.01)
        batches = AdaptiveBatch(model, optimizer, Constant(16), micro_batch_size=4, limits=Limits(16, 16))
        try:
            for step in batches.steps(GlobalOrder(regression(96)), until=steps(4)):
                for batch in step:
                    step.backward(loss_of(model, batch))
                optimizer.step()
                if rank == 0:
                    optimizer.zero_grad()
        except RuntimeError as error:
            found[name] = str(error)
        batches.remove()
    return found


def of_workers(rank: int) -> str:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.01)
    workers = LocalSGD(model, optimizer, sync_every=4)
    batches = AdaptiveBatch(
        model, optimizer, Constant(16), micro_batch_size=4, local_sgd=workers, guard=Guard(skip_nonfinite=False)
    )
    return ended(batches, model, optimizer, partial(changed, model, "frozen") if rank else None)


def test_a_layer_frozen_by_one_worker_of_local_sgd_is_an_error_at_the_average(tmp_path: Path) -> None:
    other, own = run_ranks(of_workers, 2, tmp_path)
    assert "steps: the parameters that train are not those that this LocalSGD was made for" in own
    assert "on rank 1, the parameters that train are not those that this LocalSGD was made for" in other


def test_a_layer_changed_on_one_rank_is_an_error_on_all(tmp_path: Path) -> None:
    check_said_on_both(*run_ranks(in_ddp, 2, tmp_path))


# DDP warns where it looked for unused parameters and found none.
@pytest.mark.filterwarnings("ignore:find_unused_parameters")
def test_whatever_the_ranks_wait_for(tmp_path: Path) -> None:
    check_said_on_both(*run_ranks(in_other_engines, 2, tmp_path))


def test_a_group_added_or_removed_on_one_rank_is_an_error_on_all(tmp_path: Path) -> None:
    other, own = run_ranks(other_groups, 2, tmp_path)
    assert len(own) == 6
    for name, error in own.items():
        verb = "joined" if "added" in name else "left"
        names = "2.weight, 2.bias" if "fsdp2" in name else "module.2.weight, module.2.bias"
        said = f"the parameters that train are not those that this AdaptiveBatch was made for ({names} {verb})"
        assert error.startswith(f"{CHANGES_AT} steps: {said}"), (name, error)
        assert other[name].startswith(f"{CHANGES_AT} steps: on rank 1, {said}"), (name, other[name])
        # DDP goes on reducing a layer that left the optimizer only, but not one that was frozen
        assert ("wrap the model in DistributedDataParallel again" in error) == (name == "other frozen, ddp"), name


def test_gradients_that_one_rank_leaves_are_an_error_on_all(tmp_path: Path) -> None:
    other, own = run_ranks(gradients_left_on_one_rank, 2, tmp_path)
    for name in ("ddp", "fsdp2"):
        said = f"left when its first backward begins, among them that of {'module.' * (name == 'ddp')}0.weight"
        assert said in own[name]
        assert other[name].startswith("on rank 1, gradients from before the step")


def check_said_on_both(other: dict[str, str], own: dict[str, str]) -> None:
    assert own
    for name, error in own.items():
        assert error.startswith(f"{CHANGES_AT} steps: the parameters that train are not those"), (name, error)
        assert other[name].startswith(f"{CHANGES_AT} steps: on rank 1, the parameters that train are not"), (
            name,
            error,
        )
        assert "left" in error, (name, error)
