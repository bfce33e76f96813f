"""States as plain data: numbers of numpy are converted where that is exact, and all else is refused by its place."""

from __future__ import annotations

import enum
import io
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from adabatch.checkpointing.plain import NotPlain, plain


class Colour(enum.Enum):
    RED = 1


class Pair(NamedTuple):
    one: Any
    other: Any


def read_back(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float64(0.1), 0.1),
        (np.float32(0.1), float(np.float32(0.1))),
        (np.float16(0.1), float(np.float16(0.1))),
        (np.int64(-3), -3),
        (np.uint64(2**64 - 1), 2**64 - 1),
        (np.bool_(True), True),
        (np.str_("text"), "text"),
        (Pair(np.int8(1), 2.5), (1, 2.5)),
        ([np.float64("nan")], [float("nan")]),
        (defaultdict(list, {np.int64(4): [np.float64(1.0)]}), {4: [1.0]}),
        (1 + 2j, 1 + 2j),
    ],
)
def test_numbers_of_numpy_become_those_of_python_and_can_be_read(value: Any, expected: Any) -> None:
    converted = plain({"a": {"b": value}}, "part")["a"]["b"]
    assert repr(converted) == repr(expected)
    assert repr(read_back(converted)) == repr(expected)
    assert type(converted) is type(expected)


@pytest.mark.parametrize(
    "value",
    [
        np.arange(3),
        np.longdouble("0.1"),
        np.datetime64("2020-01-01", "ns"),
        Colour.RED,
        Path("somewhere"),
        object(),
        lambda: 1,
        slice(1, 2),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_could_not_be_read_is_refused_by_its_place(value: Any) -> None:
    with pytest.raises(NotPlain, match=r"^optimizer\.param_groups\[1\]\['lr'\] is .* could not read back"):
        plain({"param_groups": [{}, {"lr": value}]}, "optimizer")
    with pytest.raises(NotPlain, match=r"^average\[3\]\['x y'\]"):
        plain({3: {"x y": value}}, "average")


def test_a_key_is_named_too() -> None:
    with pytest.raises(NotPlain, match=r"^the key .*Colour.*RED.* of part\.state "):
        plain({"state": {Colour.RED: 1}}, "part")


def test_what_torch_reads_stays_as_it_is() -> None:
    for value in (torch.Size([2]), torch.float32, torch.device("cpu"), {1, 2}, bytearray(b"x"), b"bytes", None):
        assert plain({"a": value}, "part") == {"a": value}
        assert type(plain(value)) is type(value)


def test_tensors_are_copied_where_that_is_asked_for() -> None:
    weight = nn.Parameter(torch.ones(2))
    state = {"weight": weight, "twice": [weight.detach()]}
    copied, shared = plain(state, copy=True), plain(state)
    with torch.no_grad():
        weight.add_(1)
    assert copied["weight"].tolist() == copied["twice"][0].tolist() == [1, 1]
    assert shared["weight"] is weight


def test_the_versions_in_a_models_state_stay() -> None:
    state = nn.BatchNorm1d(2).state_dict()
    converted = plain(state, "model", copy=True)
    assert isinstance(converted, OrderedDict)
    assert converted._metadata == state._metadata == {"": {"version": 2}}  # type: ignore[attr-defined]
    assert read_back(converted)._metadata == state._metadata  # type: ignore[attr-defined]
