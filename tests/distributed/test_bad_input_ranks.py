"""Bad input on several ranks: each error on every rank at once, and no hang (the helper's timeout bounds all)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from loops import network, regression
from ranks import run_ranks
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.utils.data import DataLoader, Subset

from adabatch import AdaptiveBatch, Constant, GlobalOrder, Limits, NormTest

pytestmark = pytest.mark.distributed


def adaptive(model: torch.nn.Module | None = None, criterion: Any = None, **options: Any) -> AdaptiveBatch:
    model = model or DistributedDataParallel(network())
    options = {"micro_batch_size": 4, "limits": Limits(min=12, max=48), **options}
    return AdaptiveBatch(model, SGD(model.parameters(), lr=0.1), criterion or NormTest(eta=0.5), **options)


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

    def steps(order: GlobalOrder, **options: Any) -> Any:
        return next(adaptive(**options).steps(order))

    loader = DataLoader(data, batch_size=4)
    moved = GlobalOrder(data)
    moved.load_state_dict({"format": 1, "seed": 0, "epoch": 0, "examples": 12 * rank})
    return {
        "seeds": message(lambda: steps(GlobalOrder(data, seed=rank))),
        "large seeds": message(lambda: steps(GlobalOrder(data, seed=2**60 + rank))),
        "places": message(lambda: steps(moved)),
        "lengths": message(lambda: steps(GlobalOrder(Subset(data, range(36 + 24 * rank))))),
        "shuffle": message(lambda: steps(GlobalOrder(data, shuffle=rank == 1))),
        "plans": message(lambda: steps(GlobalOrder(data), criterion=Constant(12 * (rank + 1)))),
        "loader": message(lambda: next(adaptive(criterion=Constant(12 * (rank + 1))).steps(loader))),
        "rules": message(lambda: next(adaptive(lr_rule=("none", "sqrt", "sqrt")[rank]).steps(loader))),
        "agree": message(lambda: steps(GlobalOrder(data, seed=2**60 + 1))),
    }


def test_ranks_that_disagree_all_say_so(tmp_path):
    results = run_ranks(errors_of_three, 3, tmp_path, timeout=30)
    for result in results:
        for case in ("seeds", "large seeds", "places", "lengths", "shuffle", "plans", "loader", "rules"):
            assert "the ranks hold different data orders" in result[case], case
        assert result["agree"] == ""
