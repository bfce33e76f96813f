"""A tensor as a matrix, cut into equal blocks."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Size, Tensor
from torch.nn.functional import pad


class Blocks(NamedTuple):
    """How a tensor is cut: a ``rows x columns`` matrix is covered by blocks of one size, the last ones zero-padded.

    The first dimension of the tensor is the rows, and all others together are the columns; a vector is a column. The
    padding does not change statistics and updates of the other elements.

    Args:
        rows, columns: size of the matrix.
        height, width: size of a block.
    """

    rows: int
    columns: int
    height: int
    width: int

    @classmethod
    def of(cls, shape: Size, longest: int | None) -> Blocks:
        """The blocks of a tensor of this shape: one block, or several with sides of at most ``longest``."""
        rows = shape[0] if shape else 1
        columns = math.prod(shape[1:])
        # At least 1, for parameters without elements, whose grid would be divided by zero.
        height, width = (max(1, min(side, longest or side)) for side in (rows, columns))
        return cls(rows, columns, height, width)

    @property
    def grid(self) -> tuple[int, int]:
        """Number of blocks down and across."""
        return math.ceil(self.rows / self.height), math.ceil(self.columns / self.width)

    def cut(self, tensor: Tensor) -> Tensor:
        """Cuts a tensor into blocks, row by row, shape (num_blocks, height, width)."""
        matrix = tensor.reshape(self.rows, self.columns)
        down, across = self.grid
        if down * across == 1:
            return matrix[None]
        # pad() begins with the last dimension.
        whole = pad(matrix, (0, across * self.width - self.columns, 0, down * self.height - self.rows))
        return whole.reshape(down, self.height, across, self.width).transpose(1, 2).flatten(0, 1)

    def join(self, blocks: Tensor, shape: Size) -> Tensor:
        """The inverse of ``cut``."""
        down, across = self.grid
        grid = blocks.reshape(down, across, self.height, self.width)
        whole = grid.transpose(1, 2).reshape(down * self.height, across * self.width)
        return whole[: self.rows, : self.columns].reshape(shape)
