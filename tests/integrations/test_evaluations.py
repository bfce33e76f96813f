"""What of a host's evaluation is written into the journal, and under which names."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch

from adabatch.integrations.evaluations import record_numbers

PREFIXES = ("eval_", "val_", "val/")


class Kept:
    """A run that keeps what it is told, or is in the middle of a step."""

    def __init__(self, error: Exception | None = None) -> None:
        self.told: list[dict[str, Any]] = []
        self.error = error

    def record_evaluation(self, metrics: Any) -> None:
        if self.error is not None:
            raise self.error
        self.told.append(dict(metrics))


@pytest.mark.parametrize(
    ("metrics", "told"),
    [
        ({"eval_loss": 1.0, "val/accuracy": 2, "other": 3.0}, {"loss": 1.0, "accuracy": 2, "other": 3.0}),
        ({"eval_loss": 1.0, "loss": 2.0, "val_loss": 3.0}, {"eval_loss": 1.0, "loss": 2.0, "val_loss": 3.0}),
        ({"eval_": 1.0, "evaluation": 2.0}, {"eval_": 1.0, "evaluation": 2.0}),
        ({"eval_val_loss": 1.0}, {"val_loss": 1.0}),
    ],
    ids=["prefixes", "two of one name", "nothing but a prefix", "two prefixes"],
)
def test_names(metrics: dict[str, Any], told: dict[str, Any]) -> None:
    run = Kept()
    record_numbers(run, metrics, prefixes=PREFIXES)
    assert run.told == [told]


def test_what_is_not_one_number_is_left_out() -> None:
    numbers = {"a": 1, "b": 0.5, "c": np.float32(2), "d": torch.tensor(3.0), "e": np.array(4.0), "f": float("nan")}
    others = {"g": True, "h": "word", "i": None, "j": [1.0], "k": torch.ones(2), "l": {"x": 1.0}, "m": np.str_("w")}
    run = Kept()
    record_numbers(run, numbers | others, prefixes=PREFIXES)
    assert [list(told) for told in run.told] == [list(numbers)]
    record_numbers(run, others, prefixes=PREFIXES)
    record_numbers(run, {}, prefixes=PREFIXES)
    assert len(run.told) == 1, "an evaluation without numbers is none"


def test_an_evaluation_in_the_middle_of_a_step_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="adabatch"):
        record_numbers(Kept(RuntimeError("a step is not over")), {"eval_loss": 1.0}, prefixes=PREFIXES)
    assert "the host's evaluation is not in the journal: a step is not over" in caplog.text
