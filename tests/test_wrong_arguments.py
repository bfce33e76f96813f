"""Wrong values of every argument of every public function: the error is ours and names the argument, or there is none.

The full product of arguments and values is in ``benchmarks/arguments.py``; here a seeded part of it.
"""

from __future__ import annotations

import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from support.wrong_arguments import CALLS, VALUES, Case, answer, calls, fits, hints_of, public

import adabatch
from adabatch import Control, Limits, NormTest, Stage

VALUES_PER_ARGUMENT = 6


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A text is a path to whoever asks for one, so that files are made."""
    monkeypatch.chdir(tmp_path)


def test_every_public_name_has_a_call_that_works_or_says_that_it_has_none() -> None:
    assert public().keys() == CALLS.keys()


@pytest.mark.parametrize("name", calls())
def test_wrong_values_give_our_errors(name: str) -> None:
    function, arguments = calls()[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        function(**arguments())  # works, so that an error below comes from the one value
    chance = random.Random(name)
    cases = [
        Case(name, argument, value)
        for argument in hints_of(name)
        for value in chance.sample(sorted(VALUES), VALUES_PER_ARGUMENT)
    ]
    unclear = [(case, found.told) for case in cases if (found := answer(case)).kind == "unclear"]
    assert not unclear


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (3, int, True), (np.int64(3), int, True), (torch.tensor(3), int, True), (3.0, int, False), (True, int, False),
        (3, float, True), (np.float32(0.5), float, True), (float("nan"), float, False), ("3", float, False),
        (np.bool_(True), bool, True), (1, bool, False), (None, int | None, True), ([1, 2], list[int], True),
        ([1, "x"], list[int], False), (10**400, int, False),
    ],
)  # fmt: skip
def test_the_judge_reads_annotations(value: object, hint: object, expected: bool) -> None:
    assert fits(value, hint) is expected


def test_numbers_of_numpy_and_torch_become_those_of_python() -> None:
    assert type(NormTest(eta=np.float64(0.5)).eta) is float
    assert type(Control(interval=np.int64(3)).interval) is int
    assert type(Stage(adabatch.steps(np.int64(3)), torch.tensor(4)).global_batch_size) is int
    limits = Limits(min=np.int32(2), max=torch.tensor(8))
    assert (type(limits.min), type(limits.max)) == (int, int)
    assert Control(monotone=np.bool_(True)).monotone is True


@pytest.mark.parametrize(
    ("make", "error", "told"),
    [
        (
            lambda: adabatch.Constant(4.0),
            TypeError,
            r"global_batch_size must be a whole number, got 4.0 \(of type float",
        ),
        (lambda: NormTest(eta="0.5"), TypeError, r"eta must be a number, got '0.5' \(of type str\)"),
        (lambda: NormTest(eta=True), TypeError, r"eta must be a number, got True \(of type bool\)"),
        (lambda: Control(monotone=1), TypeError, r"monotone must be True or False, got 1 \(of type int\)"),
        (lambda: Control(interval=10**12), ValueError, r"interval must be at least 1 step \(at most 100,000,000\)"),
        (lambda: adabatch.NoiseScale(norm="adm"), ValueError, "norm must be one of euclidean, adam, .*, got 'adm'"),
        (lambda: adabatch.steps("5"), TypeError, r"the count of a duration must be a number, got '5' \(of type str\)"),
    ],
)
def test_errors_tell_the_rule_the_value_and_its_type(make: object, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        make()  # type: ignore[operator]
