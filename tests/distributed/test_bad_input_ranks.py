"""Bad input on several ranks: each error on every rank at once, and no hang (the helper's timeout bounds all)."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.loops import lines, network, regression, train, weights
from support.options import grouped
from support.ranks import run_ranks
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader, Subset

from adabatch import AdaptiveBatch, Constant, Control, GlobalOrder, Limits, NormTest, ProgressLR, examples, lr, steps
from adabatch.adaptive.options import Measure

pytestmark = pytest.mark.distributed


def adaptive(model: torch.nn.Module | None = None, criterion: Any = None, **options: Any) -> AdaptiveBatch:
    model = model or DistributedDataParallel(network())
    options = {"micro_batch_size": 4, "limits": Limits(min=12, max=48), **options}
    return AdaptiveBatch(model, SGD(model.parameters(), lr=0.1), criterion or NormTest(eta=0.5), **grouped(options))


def message(call: Callable[[], Any]) -> str:
    """The error of a call; empty where there was none."""
    try:
        call()
    except (ValueError, RuntimeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def errors_of_three(rank: int) -> dict[str, str]:
    """Three ranks: the middle one's numbers equal their mean, which a check of sums does not see."""
    data = regression(96)

    def first(order: GlobalOrder, **options: Any) -> Any:
        return next(adaptive(**options).steps(order))

    loader = DataLoader(data, batch_size=4)
    moved = GlobalOrder(data)
    moved.load_state_dict({"format": 1, "seed": 0, "epoch": 0, "examples": 12 * rank})
    return {
        "seeds": message(lambda: first(GlobalOrder(data, seed=rank))),
        "large seeds": message(lambda: first(GlobalOrder(data, seed=2**60 + rank))),
        "places": message(lambda: first(moved)),
        "lengths": message(lambda: first(GlobalOrder(Subset(data, range(36 + 24 * rank))))),
        "shuffle": message(lambda: first(GlobalOrder(data, shuffle=rank == 1))),
        "plans": message(lambda: first(GlobalOrder(data), criterion=Constant(12 * (rank + 1)))),
        "loader": message(lambda: next(adaptive(criterion=Constant(12 * (rank + 1))).steps(loader))),
        "rules": message(lambda: next(adaptive(lr_rule=("none", "sqrt", "sqrt")[rank]).steps(loader))),
        "agree": message(lambda: first(GlobalOrder(data, seed=2**60 + 1))),
    }


def test_ranks_that_disagree_all_say_so(tmp_path):
    results = run_ranks(errors_of_three, 3, tmp_path, timeout=30)
    for result in results:
        for case in ("seeds", "large seeds", "places", "lengths", "shuffle", "plans", "loader", "rules"):
            assert "the ranks were given different settings: " in result[case], case
        assert result["agree"] == ""


def errors_of_two(rank: int) -> dict[str, str]:
    """What each rank raises where the input is wrong on both, or on one only."""
    data = regression(64)
    plain = network()
    none: list[Any] = []
    # Micro-batches of 4 on one rank, of 8 on the other: more than planned.
    larger = list(zip(*(part.split(4 + 4 * rank) for part in data.tensors), strict=True))
    return {
        "min": message(lambda: adaptive(limits=Limits(min=9, max=48))),
        "max": message(lambda: adaptive(limits=Limits(min=8, max=49))),
        "micro": message(lambda: adaptive(limits=Limits(min=2, max=48))),
        "constant": message(lambda: adaptive(criterion=Constant(12), limits=None)),
        "unwrapped": message(lambda: adaptive(model=plain)),
        "empty": message(lambda: next(adaptive().steps(none if rank == 0 else DataLoader(data, batch_size=4)))),
        "larger": message(lambda: next(adaptive().steps(larger))),
        "uncounted": message(lambda: next(adaptive().steps(larger, count=lambda _: rank))),
        "small": message(lambda: next(adaptive().steps(GlobalOrder(Subset(data, range(40)))))),
    }


def test_what_two_ranks_cannot_carry_out_is_an_error_on_both(tmp_path):
    words = {
        "min": r"limits.min=9 cannot be shared equally by 2 ranks: use a multiple of 2",
        "max": r"limits.max=49 cannot be shared equally by 2 ranks",
        "micro": r"limits.min=2 is below the smallest step of 2 rank\(s\).* micro_batch_size=1 or less",
        "constant": r"Constant asks for batches of 12 examples, which 2 rank\(s\)",
        "unwrapped": r"2 processes are running, but the model is a plain Sequential .*DistributedDataParallel",
        "empty": r"no micro-batch on at least one rank",
        "larger": r"a micro-batch of 8 examples came .* but micro_batch_size=4",
        "uncounted": r"a micro-batch without examples on at least one rank",
        "small": r"a batch of 48 is above the 40 examples of the data set",
    }
    for result in run_ranks(errors_of_two, 2, tmp_path):
        assert result.keys() == words.keys()
        for case, pattern in words.items():
            assert re.search(
                "(ValueError|RuntimeError: the loader of rank 1 raised an error): .*" + pattern, result[case]
            ), (case, result[case])


def trained_with_loaders(rank: int) -> dict[str, Any]:
    """One rank has fewer micro-batches than the other, or a smaller last one."""
    found = {}
    cases = {"fewer": ([4] * 7, [4] * 5), "smaller": ([4] * 4, [4, 4, 4, 1]), "one": ([4] * 3, [2])}
    for name, counts in cases.items():
        x, y = regression(sum(counts[rank]), seed=rank).tensors
        loader = list(zip(x.split(counts[rank]), y.split(counts[rank]), strict=True))
        model = DistributedDataParallel(network())
        optimizer = SGD(model.parameters(), lr=0.05)
        batches = AdaptiveBatch(model, optimizer, Constant(24), micro_batch_size=4, measure=Measure(monitor=True))
        ran: list[tuple[int, int, float]] = []
        train(
            batches, model, optimizer, loader,
            each=lambda step, ran=ran: ran.append((step.global_batch_size, step.moments.num_parts, step.loss)),
        )  # fmt: skip
        found[name] = {"steps": ran, "weights": weights(model), "progress": batches.progress.examples}
    return found


def test_loaders_of_unequal_length_end_together(tmp_path):
    results = run_ranks(trained_with_loaders, 2, tmp_path)
    expected = {
        "fewer": [(24, 6), (16, 4)],  # of the third step's micro-batches two are on both ranks
        "smaller": [(24, 6), (5, 2)],
        "one": [(6, 2)],
    }
    for name, shapes in expected.items():
        mine, other = (result[name] for result in results)
        assert [step[:2] for step in mine["steps"]] == shapes, name
        assert mine["steps"] == other["steps"]
        assert torch.equal(mine["weights"], other["weights"])
        assert mine["progress"] == sum(size for size, _ in shapes)


def poisoned(rank: int, folder: str, poison: str) -> dict[str, Any]:
    """At step 3 something is not finite, on rank 1 only."""
    model = DistributedDataParallel(network())
    optimizer = Adam(model.parameters(), lr=0.01)
    batches = AdaptiveBatch(
        model,
        optimizer,
        NormTest(eta=0.4),
        micro_batch_size=2,
        limits=Limits(min=8, max=64),
        control=Control(memory=4, confidence=0.5, growth=1.5, pace=math.inf),
        lr_rule="sqrt",
        journal=f"{folder}/{poison}.jsonl",
    )
    schedule = ProgressLR(optimizer, lr.linear(), batches, total=examples(2000))
    found: dict[str, Any] = {"weights": [], "progress": [], "consumed": [], "averages": [], "next": [], "lr": []}
    for index, step in enumerate(batches.steps(GlobalOrder(regression(512)), until=steps(8))):
        for number, (x, y) in enumerate(step):
            loss = (model(x) - y).square().mean()
            if index == 3 and rank == 1 and number == 0:
                if poison == "loss":
                    loss = loss * math.nan
                elif poison == "gradient":  # the loss stays finite
                    loss.register_hook(lambda grad: grad * math.inf)
                else:
                    loss = loss + math.inf  # the gradient stays finite
            step.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        found["weights"].append(weights(model))
        found["progress"].append(batches.progress.examples)
        found["consumed"].append(batches.state_dict()["consumed"]["examples"])
        found["averages"].append(batches.state_dict()["control"]["window"])
        found["next"].append(batches.plan.global_batch_size)
        found["lr"].append(schedule.base_lrs[0] and optimizer.param_groups[0]["lr"])
        found["counted"] = [float(state["step"]) for state in optimizer.state.values()]
    return found


def all_poisons(rank: int, folder: str) -> dict[str, Any]:
    return {poison: poisoned(rank, folder, poison) for poison in ("loss", "gradient", "infinite loss")}


def test_what_is_not_finite_on_one_rank_is_left_out_on_all(tmp_path):
    results = run_ranks(all_poisons, 2, tmp_path, str(tmp_path))
    for poison in ("loss", "gradient", "infinite loss"):
        journal = lines(tmp_path / f"{poison}.jsonl")
        assert [line["reason"] == "not finite" for line in journal] == [index == 3 for index in range(8)], poison
        assert [line["applied"] for line in journal] == [index != 3 for index in range(8)], poison
        for result in (each[poison] for each in results):
            assert all(torch.isfinite(each).all() for each in result["weights"])
            assert torch.equal(result["weights"][3], result["weights"][2])  # the update was left out
            assert not torch.equal(result["weights"][4], result["weights"][3])  # and training went on
            assert set(result["counted"]) == {7.0}
            assert result["next"][3] == result["next"][2]  # the plan was held
            assert result["next"][-1] > result["next"][0]
            assert result["averages"][3] == result["averages"][2]
            assert result["progress"][3] == result["progress"][2]
            assert result["lr"][3] == result["lr"][2]
            assert result["consumed"][3] > result["consumed"][2]
        mine, other = (each[poison] for each in results)
        assert all(torch.equal(a, b) for a, b in zip(mine["weights"], other["weights"], strict=True))
        assert mine["next"] == other["next"]
        assert mine["averages"] == other["averages"]


def one_loader_raises(rank: int) -> str:
    def broken() -> Any:
        yield from DataLoader(regression(16, seed=1), batch_size=4)
        raise ValueError("the disk is gone")

    model = DistributedDataParallel(network())
    optimizer = SGD(model.parameters(), lr=0.1)
    batches = AdaptiveBatch(model, optimizer, Constant(16), micro_batch_size=4)
    loader = broken() if rank == 1 else DataLoader(regression(64), batch_size=4)
    return message(lambda: train(batches, model, optimizer, loader))


def test_a_loader_that_raises_on_one_rank_ends_all(tmp_path):
    assert run_ranks(one_loader_raises, 2, tmp_path) == [
        "RuntimeError: the loader of rank 1 raised an error: ValueError: the disk is gone",
        "ValueError: the disk is gone",
    ]


def one_rank_ends(rank: int, folder: Path, place: str) -> None:
    """Rank 1 ends in the loop, before or after the backward; the other waits in DDP's reduction, or in ours."""
    model = DistributedDataParallel(network())
    optimizer = SGD(model.parameters(), lr=0.1)
    batches = AdaptiveBatch(model, optimizer, NormTest(eta=0.5), micro_batch_size=4, limits=Limits(min=16, max=16))
    try:
        for step in batches.steps(GlobalOrder(regression(64))):
            for number, (x, y) in enumerate(step):
                loss = (model(x) - y).square().mean()
                if rank == 1 and number == 1 and place == "backward":
                    os._exit(0)
                step.backward(loss)
                if rank == 1 and number == 1:
                    os._exit(0)
    except RuntimeError as error:
        (folder / "said").write_text(" ".join(error.__notes__))


@pytest.mark.parametrize("place", ["backward", "measuring"])
def test_a_lost_connection_says_which_guard_names_the_rank(place: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):  # rank 1 leaves no result
        run_ranks(one_rank_ends, 2, tmp_path, tmp_path, place)
    assert "`with adabatch.Watchdog(batches):` names that rank" in (tmp_path / "said").read_text()
