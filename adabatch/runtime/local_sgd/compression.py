"""Compression of the exchange between workers: encodings of float32 numbers as bytes."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

Compression = Literal["none", "bf16", "int8"]
"""Encoding of the exchange."""

BLOCK = 256
"""Numbers that share one scale in int8: the scales add 1.6 % to the bytes."""


class Encoding(Protocol):
    """An encoding of float32 numbers as bytes; each row has a multiple of ``BLOCK`` numbers."""

    def encode(self, rows: Tensor) -> Tensor:
        """Bytes, shape (num_rows, num_bytes), uint8, of ``rows``, shape (num_rows, n), float32."""
        ...

    def decode(self, encoded: Tensor) -> Tensor:
        """The numbers that the bytes stand for, shape (num_rows, n), float32."""
        ...


class BFloat16:
    """Half the bytes: 8 bits of the mantissa are kept."""

    def encode(self, rows: Tensor) -> Tensor:
        """Rounded to bfloat16."""
        return rows.to(torch.bfloat16).view(torch.uint8)

    def decode(self, encoded: Tensor) -> Tensor:
        """Back to float32."""
        return encoded.view(torch.bfloat16).float()


class Int8:
    """A quarter of the bytes: whole numbers from -127 to 127, times a scale for each block.

    A block that holds a number that is not finite is decoded as NaN throughout.
    """

    def encode(self, rows: Tensor) -> Tensor:
        """The scales of a row's blocks, float32, then its numbers."""
        blocks = rows.view(len(rows), -1, BLOCK)
        scales = blocks.abs().amax(2) / 127
        # clamped, for blocks of zeros; nan_to_num, since casting NaN to int8 is undefined: such a block's scale is not
        # finite, and says so
        whole = (blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[..., None]).round().nan_to_num(0, 0, 0)
        return torch.cat([scales.view(torch.uint8), whole.to(torch.int8).view(torch.uint8).flatten(1)], dim=1)

    def decode(self, encoded: Tensor) -> Tensor:
        """Whole numbers times their scale."""
        num_blocks = encoded.shape[1] // (BLOCK + 4)
        # A copy, since torch views bytes as floats only if every row begins at a multiple of four.
        scales = encoded[:, : 4 * num_blocks].contiguous().view(torch.float32)
        whole = encoded[:, 4 * num_blocks :].contiguous().view(torch.int8).view(len(encoded), num_blocks, BLOCK)
        return (whole * scales[..., None]).flatten(1)


ENCODINGS: dict[Compression, Encoding] = {"bf16": BFloat16(), "int8": Int8()}
