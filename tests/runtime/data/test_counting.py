"""How many examples a micro-batch holds: told where its structure says so in one way, asked for elsewhere."""

from __future__ import annotations

from collections import UserDict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from adabatch.runtime.data import num_examples_in

Columns = namedtuple("Columns", "x lengths")


def images(*heights: int) -> list[Any]:
    return [torch.zeros(3, height, 8) for height in heights]


def boxes(*counts: int) -> list[Any]:
    return [{"boxes": torch.zeros(count, 4), "labels": torch.zeros(count)} for count in counts]


@pytest.mark.parametrize(
    "batch",
    [
        torch.zeros(4, 2),
        (torch.zeros(4, 2), torch.zeros(4)),
        {"x": torch.zeros(4, 2), "y": torch.zeros(4)},
        UserDict(input_ids=torch.zeros(4, 9), attention_mask=torch.zeros(4, 9)),
        {"task": torch.tensor(1), "x": torch.zeros(4, 2)},
        Columns(torch.zeros(4, 2), torch.zeros(4)),
        ["a name", {"x": torch.zeros(4)}, None, 0.5],
        [[torch.zeros(4, 3), torch.zeros(4, 3)], torch.zeros(4)],
        [torch.zeros(4, 3), [("cat",) * 4, ("dog",) * 4]],
        (torch.zeros(4, 3), ("a", "b", "c", "d")),
        (images(8, 8, 8, 8), [1, 2, 3, 4]),
        (images(8, 9, 7, 8), boxes(2, 1, 5, 2)),
        (images(8, 8, 8, 8), boxes(2, 2, 1, 2)),
        {"text": ["a", "b", "c", "d"]},
        np.zeros((4, 2)),
        torch.nested.nested_tensor([torch.zeros(size) for size in (2, 3, 2, 1)], layout=torch.jagged),
        torch.zeros(4, 2).to_sparse(),
    ],
    ids=[
        "tensor", "tuple", "dict", "BatchEncoding", "scalar first", "named tuple", "nested", "two views",
        "transposed words", "words", "images and classes", "detection", "detection, alike", "text", "array", "ragged",
        "sparse",
    ],
)  # fmt: skip
def test_examples_are_what_all_entries_agree_on(batch: Any) -> None:
    assert num_examples_in(batch) == 4


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ((torch.zeros(7, 4, 3), torch.zeros(4)), r"differ from entry to entry.*shape \(7, 4, 3\).*shape \(4,\)"),
        ({"class_weights": torch.zeros(10), "x": torch.zeros(4, 2)}, "differ.*'class_weights'"),
        ({"position": torch.zeros(1, 9), "x": torch.zeros(4, 9)}, "differ"),
        ({"views": [torch.zeros(4, 3), torch.zeros(4, 3)]}, "may be 2 or 4"),
        ({"images": images(8, 8, 8, 8)}, "may be 3 or 4"),
        ([*images(8, 8), torch.zeros(1, 8, 8)], "differ"),
        ([(torch.zeros(3, 8), 1), (torch.zeros(3, 8), 0)], "may be 2 or 3"),
    ],
    ids=["time-major", "weights", "positions", "views", "images", "grey and colour", "not collated"],
)
def test_what_is_not_sure_asks_for_a_count(batch: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"{words}.*pass count="):
        num_examples_in(batch)


@pytest.mark.parametrize("batch", [["a", "b"], 3, torch.tensor(1.0), {}, "text", None], ids=str)
def test_a_batch_that_says_nothing_asks_for_a_count(batch: Any) -> None:
    with pytest.raises(TypeError, match="pass count="):
        num_examples_in(batch)


def test_packed_sequences_are_counted_as_sequences() -> None:
    sequences = [torch.zeros(length, 3) for length in (5, 4, 1)]
    for packed in (pack_sequence(sequences), pack_sequence(sequences[::-1], enforce_sorted=False)):
        assert num_examples_in(packed) == num_examples_in((packed, torch.zeros(3))) == 3
    assert num_examples_in(pack_sequence([torch.zeros(4, 3)])) == 1  # of which all entries but one have four rows
