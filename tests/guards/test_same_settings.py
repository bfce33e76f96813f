"""What settings say of themselves, so that ranks can compare them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch.amp.grad_scaler import GradScaler
from torch.optim import SGD, AdamW

from adabatch import Control, Goodput, Limits, NormTest, Seesaw, examples, lr
from adabatch.guards.same_settings import (
    check_same_settings,
    failing_together,
    optimizer_settings,
    scaler_settings,
)
from adabatch.runtime.collectives import Collectives
from adabatch.runtime.nested import text_of
from adabatch.runtime.optimizers.joined import joined


class Own:
    """A criterion of a user's own, without a ``repr``."""

    def __init__(self, eta: float, inside: Any = None) -> None:
        self.eta = eta
        self.inside = inside


@dataclass
class Quiet:
    """Its ``repr`` leaves out what decides."""

    eta: float = field(repr=False)


def twice(value: float) -> float:
    return 2 * value


@pytest.mark.parametrize(
    ("one", "same", "other"),
    [
        (0.1, np.float64(0.1), 0.1 + 1e-16),
        (3, np.int64(3), 4),
        (math.nan, np.float32("nan"), 0.0),
        (True, True, 1),
        ("a", "a", "b"),
        (None, None, 0),
        (NormTest(eta=0.5), NormTest(eta=0.5), NormTest(eta=0.51)),
        (Limits(min=8, max=16), Limits(min=8, max=16), Limits(min=8, max=32)),
        (Control(memory=5), Control(memory=5), Control(memory=6)),
        (Goodput(), Goodput(), Goodput(min_speedup=0.1)),
        (examples(100), examples(100), examples(101)),
        (Own(0.5), Own(0.5), Own(0.6)),
        (Own(0.5, Own(1.0)), Own(0.5, Own(1.0)), Own(0.5, Own(2.0))),
        (Quiet(0.5), Quiet(0.5), Quiet(0.6)),
        ({"a": Own(1.0)}, {"a": Own(1.0)}, {"a": Own(2.0)}),
        ([1, Own(1.0)], [1, Own(1.0)], [1, Own(2.0)]),
        ({"x", "y"}, {"y", "x"}, {"x"}),
        (twice, twice, text_of),
        (torch.tensor(0.1), torch.tensor(0.1), torch.tensor(0.2)),
        (np.zeros(3), np.zeros(3), np.ones(3)),
        (torch.zeros(100), torch.zeros(100), torch.zeros(101)),
        (torch.float32, torch.float32, torch.float64),
    ],
)
def test_equal_values_say_the_same_and_others_do_not(one: Any, same: Any, other: Any) -> None:
    assert text_of(one) == text_of(same)
    assert text_of(one) != text_of(other)


def test_addresses_are_left_out_and_circles_end() -> None:
    assert text_of(partial(twice, 1)) == text_of(partial(twice, 1))
    assert "0x" not in text_of(partial(twice, 1))
    assert "0x" not in text_of([object(), lambda: 0])
    circle = Own(1.0)
    circle.inside = circle
    assert text_of(circle).count("eta") > 1


def test_all_of_an_optimizers_groups_is_there() -> None:
    weights = [torch.zeros(2, requires_grad=True) for _ in range(3)]
    one = AdamW([{"params": weights[:1], "lr": 0.1}, {"params": weights[1:], "betas": (0.8, 0.9)}], lr=0.2)
    found = optimizer_settings(one)
    assert found["optimizer"] == "AdamW"
    assert found["lr of optimizer group 0"] == 0.1
    assert found["betas of optimizer group 1"] == (0.8, 0.9)
    assert found["number of parameters of optimizer group 1"] == 2
    both = optimizer_settings(joined([SGD(weights[:1], lr=0.3), SGD(weights[1:], lr=0.4)]))
    assert both["lr of optimizer group 0"] == 0.3
    assert both["lr of optimizer 2 group 0"] == 0.4


def test_a_scaler_is_what_it_was_given() -> None:
    assert scaler_settings(None) is None
    assert scaler_settings(GradScaler("cpu", enabled=False)) is None
    assert scaler_settings(GradScaler("cpu", init_scale=2.0)) == scaler_settings(GradScaler("cpu", init_scale=4.0))
    assert scaler_settings(GradScaler("cpu")) != scaler_settings(GradScaler("cpu", growth_interval=7))


def test_a_single_process_has_nobody_to_ask() -> None:
    check_same_settings(Collectives(), {"a": 1})
    with failing_together(Collectives(), "nothing"):
        pass
    with pytest.raises(KeyError, match="own"), failing_together(Collectives(), "nothing"):
        raise KeyError("own")


@pytest.mark.parametrize(
    "make", [lambda cooldown: lr.wsd(cooldown=cooldown), lambda cooldown: lambda progress: 1 - progress * cooldown]
)
def test_a_decay_is_compared_by_what_it_was_given(make: Any) -> None:
    """A shape may be an object or a function that closed over its numbers."""
    one, same, other = (text_of(Seesaw(8, make(cooldown), examples(100))) for cooldown in (0.2, 0.2, 0.3))
    assert one == same != other
