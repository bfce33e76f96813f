"""An exact quantile of very many numbers that lie in pieces, on several ranks, without sorting or a host sync."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from adabatch.runtime.collectives import Collectives

DIGIT = 11
"""Bits that one pass decides: three passes for float32, six for float64."""

CHUNK = 1 << 22
"""Numbers whose digits are written down at a time: 64 MiB of scratch."""

LEFT_OUT = -1.0
"""What stands for a number that does not count."""


@torch.no_grad()
def quantile_of(pieces: Callable[[], Iterable[Tensor]], quantile: float, *, collectives: Collectives) -> Tensor:
    """The smallest of the numbers that a share ``quantile`` of them does not exceed; zero where none counts.

    Floating-point numbers that are not negative are ordered like their bits read as whole numbers. So the quantile is
    found digit by digit: count the first digits, keep the numbers with that of the quantile, count their second digits.

    Args:
        pieces: gives the numbers anew on each call: tensors of one type (float32 or float64) and device, not negative,
            or ``LEFT_OUT``. At least one tensor, which may be empty.
        quantile: above 0 and up to 1.0, the largest.
        collectives: the ranks over which the numbers lie; 16 KiB a pass.

    Returns:
        Shape (), the same on all ranks, in the type of the numbers.
    """
    first = next(iter(pieces()))
    whole = torch.int64 if first.dtype is torch.float64 else torch.int32
    left = 8 * first.element_size() - 1  # bits without the sign
    prefix = torch.zeros(1, dtype=torch.int64, device=first.device)
    count = torch.zeros(1, dtype=torch.float64, device=first.device)
    rank: Tensor | None = None
    while left:
        width = min(DIGIT, left)
        left -= width
        # float64 counts to 2^53, and all backends add it up.
        local = torch.zeros(1 << width, dtype=torch.float64, device=first.device)
        for piece in pieces():
            for values in torch.split(piece.flatten(), CHUNK):
                bits = values.view(whole).long()
                counts = (bits >= 0) & (bits >> (left + width) == prefix)
                local.index_add_(0, bits >> left & (1 << width) - 1, counts.to(local.dtype))
        of_digit = collectives.sum(local)
        up_to = of_digit.cumsum(0)
        if rank is None:
            count = up_to[-1:]
            # A little less, so that a share that was rounded up is not taken for one number more.
            rank = (quantile * count * (1 - 2**-40)).ceil().clamp_(min=1)
        digit = torch.searchsorted(up_to, rank).clamp_(max=len(up_to) - 1)
        rank = rank - (up_to - of_digit).gather(0, digit)
        prefix = prefix << width | digit
    found = prefix.to(whole).view(first.dtype)
    return torch.where(count > 0, found, torch.zeros_like(found)).view(())
