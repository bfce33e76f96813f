"""The state of a process's random numbers as one row of bytes, so that the rows of all ranks form a tensor."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

_WORDS = 625  # of the Mersenne Twister of Python and of numpy, including its position


def random_state(device: torch.device) -> Tensor:
    """The states of Python's ``random``, numpy's global generator, torch on the CPU and torch on ``device``.

    Returns:
        uint8, shape (num_bytes,), on the CPU; as many bytes on each rank with the same kind of device.
    """
    _, words, gauss = random.getstate()
    # numpy's legacy global generator, because user code draws from it.
    _, keys, position, has_gauss, cached = cast("Any", np.random.get_state())  # noqa: NPY002
    # Numbers become bytes by reinterpretation, not by conversion, so that a state is restored to the bit.
    whole = torch.tensor([*words, *keys.tolist(), position, has_gauss], dtype=torch.int64)
    # NaN stands for "none": Python's generator keeps the second of two normal numbers, or nothing.
    real = torch.tensor([math.nan if gauss is None else gauss, cached], dtype=torch.float64)
    pieces = [whole.view(torch.uint8), real.view(torch.uint8), torch.get_rng_state()]
    if device.type == "cuda":
        pieces.append(torch.cuda.get_rng_state(device))
    return torch.cat(pieces)


def restore_random_state(rows: Tensor, rank: int, device: torch.device) -> bool:
    """Restores the random numbers of a rank; a rank that was not saved gets new ones.

    Args:
        rows: of all ranks that were saved, shape (num_ranks, num_bytes).
        rank: of this process.
        device: as in ``random_state``.

    Returns:
        Whether this rank's own numbers were restored.
    """
    # more ranks than before, or another kind of device
    if rank >= len(rows) or rows.shape[1] != len(random_state(device)):
        # Seeded by the first rank's state and the rank: the same at each attempt, and different on each rank.
        digest = hashlib.sha256(rows[0].numpy().tobytes() + rank.to_bytes(8)).digest()
        seed = int.from_bytes(digest[:4])
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        return False
    set_random_state(rows[rank], device)
    return True


@contextmanager
def drawing_again(row: Tensor, device: torch.device) -> Iterator[None]:
    """A block that draws the random numbers that followed a state, ``row``; after it the present ones go on."""
    before = random_state(device)
    set_random_state(row, device)
    try:
        yield
    finally:
        set_random_state(before, device)


def set_random_state(row: Tensor, device: torch.device) -> None:
    """Restores the random numbers of this process.

    Args:
        row: what ``random_state`` returned for the same device, shape (num_bytes,).
        device: as in ``random_state``.
    """
    num_whole = 8 * (_WORDS + _WORDS + 1)
    num_real = num_whole + 16
    num_cpu = num_real + len(torch.get_rng_state())
    # Cloned, because torch views bytes as int64 only if they begin at a multiple of eight, which a row need not do.
    whole = row[:num_whole].clone().view(torch.int64).tolist()
    gauss, cached = row[num_whole:num_real].clone().view(torch.float64).tolist()
    random.setstate((3, tuple(whole[:_WORDS]), None if math.isnan(gauss) else gauss))
    keys, position, has_gauss = whole[_WORDS:-2], whole[-2], whole[-1]
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(row[num_real:num_cpu].clone())
    if device.type == "cuda":
        torch.cuda.set_rng_state(row[num_cpu:].clone(), device)
