"""Random configs through parser and planner: a plan that can be run, or an error that names what is wrong.

`benchmarks/faults.py --only configs` takes 10,000 of them.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from support.random_configs import outcome, random_config, sound_fields

CONFIGS = 60


@pytest.mark.filterwarnings("ignore:lr_rule='linear' multiplies")  # a warning is neither of the two
def test_random_configs_make_a_plan_or_a_clear_error() -> None:
    rng = random.Random(0)
    kinds: Counter[str] = Counter()
    for number in range(CONFIGS):
        config = random_config(rng)
        kind, message = outcome(config)
        kinds[kind] += 1
        assert kind in ("planned", "refused"), f"config {number} is {kind}: {message}\n{config}"
    assert kinds["planned"] > CONFIGS / 10
    assert kinds["refused"] > CONFIGS / 4


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"model": {}}, "model needs a class_path"),
        ({"loss": {}}, "loss needs a class_path"),
        ({"train_data": {}}, "train_data needs a class_path"),
        ({"model": {"class_path": "support.random_configs.Tiny", "init_args": {"width": -1}}}, "Tiny: "),
        (
            {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": -0.5}}},
            "SGD: Invalid learning rate: -0.5",
        ),
        (
            {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": float("nan")}}},
            "rate of SGD must be finite",
        ),
        ({"seed": None}, "seed must not be null"),
        ({"seed": -1}, "seed must be a whole number from 0 to 2**64 - 1, got -1"),
        ({"seed": 2**64}, "seed must be a whole number"),
        ({"total": "a\0b"}, "neither a path nor the value of a field: embedded null byte"),
        ({"checkpoint": 5}, "checkpoint has fields of its own, as --help-all lists them, got 5"),
        ({"hang_timeout": 0}, "hang_timeout must be a positive number of seconds"),
    ],
    ids=str,
)
def test_what_random_configs_found_is_named(wrong: dict[str, Any], words: str) -> None:
    sound = {
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
        "criterion": {"class_path": "adabatch.NormTest", "init_args": {"eta": 0.5}},
        "micro_batch_size": 4,
        "limits": {"min": 16, "max": 32},
        "total": {"count": 10**9, "unit": "examples"},
    }
    needed = {name: sound_fields(random.Random(0))[name] for name in ("model", "loss", "train_data")}
    assert outcome(needed | sound).kind == "planned"
    kind, message = outcome(needed | sound | wrong)
    assert kind == "refused"
    assert words in message
