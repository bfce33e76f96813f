"""An exact quantile of very many numbers, in pieces and on several ranks, without sorting and without a host sync."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from adabatch.runtime.collectives import Collectives

DIGIT = 11
"""Bits per pass: three passes for float32, six for float64."""

CHUNK = 1 << 22
"""Numbers that are processed at a time, with 64 MiB of scratch memory."""

LEFT_OUT = -1.0
"""Marks a number that is not counted."""


@torch.no_grad()
def quantile_of(pieces: Callable[[], Iterable[Tensor]], quantile: float, *, collectives: Collectives) -> Tensor:
    """The smallest number that at least a share ``quantile`` of the numbers does not exceed; zero if there are none.

    Non-negative floating-point numbers have the same order as their bits read as integers. So the quantile is found
    digit by digit: count the first digits, keep the numbers whose first digit is that of the quantile, count their
    second digits, and so on.

    Args:
        pieces: returns all numbers on each call, as tensors of one type (float32 or float64) on one device. Numbers are
            non-negative, or ``LEFT_OUT``. At least one tensor, which may be empty.
        quantile: above 0, up to 1.0 for the largest number.
        collectives: the ranks that hold the numbers. They exchange 16 KiB per pass.

    Returns:
        Shape (), the same on all ranks, in the type of the numbers.
    """
    first = next(iter(pieces()))
    # The integer type with as many bits: the numbers are reinterpreted, not converted.
    whole = torch.int64 if first.dtype is torch.float64 else torch.int32
    left = 8 * first.element_size() - 1  # bits without the sign
    prefix = torch.zeros(1, dtype=torch.int64, device=first.device)
    count = torch.zeros(1, dtype=torch.float64, device=first.device)
    rank: Tensor | None = None
    while left:
        width = min(DIGIT, left)
        left -= width
        # Counts in float64 are exact up to 2^53, and all backends can sum them.
        local = torch.zeros(1 << width, dtype=torch.float64, device=first.device)
        for piece in pieces():
            for values in torch.split(piece.flatten(), CHUNK):
                bits = values.view(whole).long()
                # LEFT_OUT has the sign bit, so it reads as a negative integer. Each pass looks at all numbers: to pick
                # those with the right prefix, the host would have to know how many there are.
                counts = (bits >= 0) & (bits >> (left + width) == prefix)
                local.index_add_(0, bits >> left & (1 << width) - 1, counts.to(local.dtype))
        of_digit = collectives.sum(local)
        up_to = of_digit.cumsum(0)
        if rank is None:
            count = up_to[-1:]
            # Slightly less, so that a product that was rounded up does not select the next number.
            rank = (quantile * count * (1 - 2**-40)).ceil().clamp_(min=1)
        # If there are no numbers, no count reaches the rank; the clamp keeps the index inside.
        digit = torch.searchsorted(up_to, rank).clamp_(max=len(up_to) - 1)
        rank = rank - (up_to - of_digit).gather(0, digit)
        prefix = prefix << width | digit
    found = prefix.to(whole).view(first.dtype)
    return torch.where(count > 0, found, torch.zeros_like(found)).view(())
