"""Per-example gradients of one parameter, in factored form, expanded only where that is cheaper.

One call of a module adds a term ``g_i`` to the gradient of a parameter for every example i of a micro-batch. A
`Contribution` represents all those terms in the cheapest form that determines them: the factors of a sum of outer
products, the looked-up rows of a table, the two signals that a convolution correlates, or the terms themselves. It
computes what the exact tests need, ``|g_i|^2`` and ``<g_i, d>``.

The squared norm of a sum of T outer products of lengths K and L costs T^2 (K + L) multiplications without the gradient,
by the identity ``|R^T C|^2 = sum(R R^T * C C^T)``, and T K L multiplications with it (Goodfellow 2015 for T = 1; Li et
al. 2022, section 4, for sequences; choosing the cheaper per layer: Bu et al. 2022). The factors hold T (K + L) numbers
and the gradient K L numbers. So the form that is cheaper to compute with is also the smaller one to keep, and one
comparison decides both.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

# Numbers of scratch memory that one contraction may use at a time: 1 MB in float32. On a CPU there was no clear
# difference in time between 0.25 and 16 MB. On an accelerator each run is a few kernels, so runs are longer there.
SCRATCH = 1 << 18
SCRATCH_OF_ACCELERATORS = 1 << 20


def chunks(num_examples: int, numbers_each: int, device: torch.device) -> Iterator[slice]:
    """Runs of examples whose scratch memory on the device, ``numbers_each`` per example, stays within a bound."""
    bound = SCRATCH if device.type == "cpu" else SCRATCH_OF_ACCELERATORS
    length = max(1, bound // max(1, numbers_each))
    for start in range(0, num_examples, length):
        yield slice(start, min(start + length, num_examples))


def wide(tensor: Tensor) -> Tensor:
    """The tensor in the dtype of sums: float64 stays, all others become float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)


def squared_sums(values: Tensor) -> Tensor:
    """Sum of squares of each example, (num_examples, ...) -> (num_examples,)."""
    flat = by_row(values)
    pieces = [wide(flat[part]) for part in chunks(flat.shape[0], flat.shape[1], flat.device)]
    # sum() adds pairwise. vector_norm() and a batched product do not, and lose 4e-6 and 5e-5 on 200,000 numbers.
    return torch.cat([(piece * piece).sum(1) for piece in pieces])


def by_row(values: Tensor) -> Tensor:
    """One row per example, (num_examples, ...) -> (num_examples, d); d is 1 for a parameter without dimensions."""
    return values.flatten(1) if values.dim() > 1 else values[:, None]


def gradients_are_cheaper(num_positions: int, num_rows: int, num_cols: int) -> bool:
    """Whether a sum of outer products is smaller, and its norm cheaper, once the products are summed."""
    return num_rows * num_cols <= num_positions * (num_rows + num_cols)


class Contribution(ABC):
    """What one call of a module adds to every example's gradient of one parameter."""

    @property
    @abstractmethod
    def num_examples(self) -> int:
        """Examples in the micro-batch."""

    @property
    @abstractmethod
    def dense_is_smaller(self) -> bool:
        """Whether the gradients themselves hold at most as many numbers as this form."""

    @abstractmethod
    def squares(self) -> Tensor:
        """``|g_i|^2``, shape (num_examples,), in float32 or float64."""

    @abstractmethod
    def products(self, direction: Tensor) -> Tensor:
        """``<g_i, direction>``, shape (num_examples,); ``direction`` has the parameter's shape."""

    @abstractmethod
    def dense(self, part: slice) -> Tensor:
        """The gradients ``g_i`` of the examples in ``part``, shape (length of part, *parameter.shape)."""

    def coordinate_squares(self) -> Tensor | None:
        """``sum_i g_i^2`` of each coordinate, shape (*parameter.shape); None if it needs the gradients themselves."""
        return None


@dataclass(frozen=True)
class Dense(Contribution):
    """The gradients themselves, for parameters that are smaller than the layer's signals (biases, gains).

    Args:
        values: ``g_i``, shape (num_examples, *parameter.shape).
    """

    values: Tensor

    @property
    def num_examples(self) -> int:
        return self.values.shape[0]

    @property
    def dense_is_smaller(self) -> bool:
        return True

    def squares(self) -> Tensor:
        return squared_sums(self.values)

    def products(self, direction: Tensor) -> Tensor:
        flat, along = by_row(self.values), wide(direction).flatten()
        # Multiplied and summed, not a matrix-vector product, for the same precision as in squared_sums().
        return torch.cat(
            [(wide(flat[part]) * along).sum(1) for part in chunks(flat.shape[0], flat.shape[1], flat.device)]
        )

    def dense(self, part: slice) -> Tensor:
        return wide(self.values[part])


@dataclass(frozen=True)
class OuterProduct(Contribution):
    """A sum over positions of outer products, ``g_i = sum_t rows[i, t] (x) cols[i, t]``: a linear map.

    Args:
        rows: gradient at the outputs, shape (num_examples, num_positions, K).
        cols: inputs, shape (num_examples, num_positions, L).
    """

    rows: Tensor
    cols: Tensor

    @property
    def num_examples(self) -> int:
        return self.rows.shape[0]

    @property
    def dense_is_smaller(self) -> bool:
        return gradients_are_cheaper(self.rows.shape[1], self.rows.shape[2], self.cols.shape[2])

    def squares(self) -> Tensor:
        num_positions = self.rows.shape[1]
        if num_positions == 1:
            return squared_sums(self.rows) * squared_sums(self.cols)
        if self.dense_is_smaller:
            numbers = self.rows.shape[2] * self.cols.shape[2]
            return torch.cat([squared_sums(each) for each in gradient_runs([self], numbers, self.rows.device)])
        sums = []
        for part in chunks(self.num_examples, 2 * num_positions**2, self.rows.device):
            rows, cols = wide(self.rows[part]), wide(self.cols[part])
            # In place, so that two Gram matrices are all the scratch memory, as chunks() was told.
            gram = torch.bmm(rows, rows.mT).mul_(torch.bmm(cols, cols.mT))
            sums.append(gram.flatten(1).sum(1))
        return torch.cat(sums)

    def products(self, direction: Tensor) -> Tensor:
        along = wide(direction)
        first, last = self.rows, self.cols
        if last.shape[2] > first.shape[2]:  # the smaller of the two images of the direction is the scratch
            first, last, along = last, first, along.mT
        sums = []
        for part in chunks(self.num_examples, first.shape[1] * last.shape[2], first.device):
            image = torch.matmul(wide(first[part]), along)
            sums.append(image.mul_(wide(last[part])).flatten(1).sum(1))
        return torch.cat(sums)

    def dense(self, part: slice) -> Tensor:
        return torch.bmm(wide(self.rows[part]).mT, wide(self.cols[part]))

    def coordinate_squares(self) -> Tensor | None:
        if self.rows.shape[1] > 1:
            return None
        # Only if there is one position: the square of a sum over positions has cross terms.
        return wide(self.rows[:, 0]).square().mT @ wide(self.cols[:, 0]).square()


@dataclass(frozen=True)
class Lookup(Contribution):
    """A sum of rows of a table, ``g_i[index[i, t]] += values[i, t]``: an embedding.

    Args:
        index: the rows looked up, shape (num_examples, num_positions).
        values: gradient at the rows, shape (num_examples, num_positions, width); zero for positions to ignore.
        num_rows: rows of the table.
    """

    index: Tensor
    values: Tensor
    num_rows: int

    @property
    def num_examples(self) -> int:
        return self.index.shape[0]

    @property
    def dense_is_smaller(self) -> bool:
        return self.num_rows <= self.index.shape[1]

    def squares(self) -> Tensor:
        """Computed from a table as long as the sequence, in which positions with the same row are summed."""
        return squared_sums(self._row_sums()[0])

    def coordinate_squares(self) -> Tensor | None:
        sums, rows = self._row_sums()
        table = sums.new_zeros(self.num_rows, sums.shape[2])
        return table.index_add_(0, rows.flatten(), sums.flatten(0, 1).square())

    def _row_sums(self) -> tuple[Tensor, Tensor]:
        """For each example and each distinct row, the sum over the row's positions, and the row's index.

        Shapes (num_examples, num_positions, width) and (num_examples, num_positions). An example with fewer distinct
        rows than positions is padded by zeros and row 0.
        """
        num_examples, num_positions = self.index.shape
        # Sorting numbers the distinct rows of each example without asking the device how many there are, as unique()
        # would.
        ordered, order = self.index.sort(dim=1)
        is_new = torch.ones_like(ordered)
        is_new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        # Each example gets as many slots as it has positions, of which it may leave some empty.
        first = num_positions * torch.arange(num_examples, device=order.device)
        number = is_new.cumsum(1) - 1 + first[:, None]
        slot = torch.empty_like(order).scatter_(1, order, number)
        sums = wide(torch.zeros_like(self.values)).flatten(0, 1)
        sums.index_add_(0, slot.flatten(), wide(self.values).flatten(0, 1))
        rows = torch.zeros_like(ordered).flatten().scatter_(0, number.flatten(), ordered.flatten())
        return sums.view(num_examples, num_positions, -1), rows.view_as(ordered)

    def products(self, direction: Tensor) -> Tensor:
        along = F.embedding(self.index, wide(direction))
        return along.mul_(wide(self.values)).flatten(1).sum(1)

    def dense(self, part: slice) -> Tensor:
        index, values = self.index[part], wide(self.values[part])
        tables = values.new_zeros(index.shape[0], self.num_rows, values.shape[2])
        # Adds up, because a row may be looked up at several positions.
        return tables.scatter_add_(1, index[:, :, None].expand_as(values), values)


@dataclass(frozen=True)
class Correlation(Contribution):
    """The correlation of a convolution's input with the gradient at its output, in 1, 2 or 3 dimensions.

    Args:
        grad: gradient at the output, shape (num_examples, out_channels, *output_size).
        inputs: input, shape (num_examples, in_channels, *input_size).
        kernel_size, stride, dilation: one number per dimension.
        groups: groups of channels that are convolved separately.
        pads, mode: how the convolution pads the input, as `torch.nn.functional.pad` takes it; no padding by default.
            The padded input is formed for a few examples at a time.
    """

    grad: Tensor
    inputs: Tensor
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    pads: tuple[int, ...] = ()
    mode: str = "constant"

    @property
    def num_examples(self) -> int:
        return self.grad.shape[0]

    @property
    def _dense_numbers(self) -> int:
        return self.grad.shape[1] * (self.inputs.shape[1] // self.groups) * math.prod(self.kernel_size)

    @property
    def dense_is_smaller(self) -> bool:
        return self._dense_numbers <= math.prod(self.grad.shape[1:]) + math.prod(self.inputs.shape[1:])

    def squares(self) -> Tensor:
        """Computed from Gram matrices of patches if there are few positions and many channels, else from gradients."""
        num_positions = math.prod(self.grad.shape[2:])
        num_rows = self.grad.shape[1] // self.groups
        num_cols = self.inputs.shape[1] // self.groups * math.prod(self.kernel_size)
        if gradients_are_cheaper(num_positions, num_rows, num_cols):
            runs = gradient_runs([self], self._dense_numbers, self.grad.device)
            return torch.cat([squared_sums(each) for each in runs])
        sums = []
        for part in chunks(self.num_examples, self.groups * num_positions * num_cols, self.grad.device):
            length = part.stop - part.start
            rows = self.grad[part].reshape(length * self.groups, num_rows, num_positions).mT
            cols = self._patches(part).reshape(length * self.groups, num_positions, num_cols)
            sums.append(OuterProduct(rows, cols).squares().view(length, self.groups).sum(1))
        return torch.cat(sums)

    def products(self, direction: Tensor) -> Tensor:
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel_size) - 1]
        along = wide(direction)
        sums = []
        for part in chunks(self.num_examples, math.prod(self.grad.shape[1:]), self.grad.device):
            inputs, padding = self._inputs(part)
            # <grad, conv(inputs, d)> is <correlation of both, d>, so no example's gradient is formed.
            image = convolve(wide(inputs), along, None, self.stride, padding, self.dilation, self.groups)
            sums.append(image.mul_(wide(self.grad[part])).flatten(1).sum(1))
        return torch.cat(sums)

    def dense(self, part: slice) -> Tensor:
        """One convolution whose groups are the examples (Rochette et al. 2019)."""
        # As fast as the mean gradient. unfold() and bmm() take 2 to 4 times as long if there are many positions.
        differentiate = (conv1d_weight, conv2d_weight, conv3d_weight)
        inputs, padding = self._inputs(part)
        inputs, grad = wide(inputs), wide(self.grad[part])
        length, in_channels, out_channels = inputs.shape[0], inputs.shape[1], grad.shape[1]
        shape = (in_channels // self.groups, *self.kernel_size)
        weights: Tensor = differentiate[
            len(self.kernel_size) - 1
        ](  # type: ignore[no-untyped-call]
            # The examples become channels of one image, and a group of channels sees its own example only.
            inputs.reshape(1, length * in_channels, *inputs.shape[2:]),
            (length * out_channels, *shape),
            grad.reshape(1, length * out_channels, *grad.shape[2:]),
            self.stride,
            padding,
            self.dilation,
            length * self.groups,
        )
        return weights.reshape(length, out_channels, *shape)

    def _inputs(self, part: slice) -> tuple[Tensor, tuple[int, ...]]:
        """Inputs of some examples, and how many zeros the convolution itself has to put on both sides of them."""
        before, after = self.pads[::2], self.pads[1::2]
        if self.mode == "constant" and before == after and before:
            return self.inputs[part], before[::-1]  # pads begin with the last dimension
        return self._padded(part), (0,) * len(self.kernel_size)

    def _padded(self, part: slice) -> Tensor:
        return F.pad(self.inputs[part], self.pads, self.mode) if any(self.pads) else self.inputs[part]

    def _patches(self, part: slice) -> Tensor:
        """The patches of the inputs, shape (length, groups, *positions, channels of a group, *kernel)."""
        inputs = self._padded(part)
        windows = inputs.reshape(inputs.shape[0], self.groups, -1, *inputs.shape[2:])
        num_dims = len(self.kernel_size)
        for dim, (size, stride, dilation) in enumerate(
            zip(self.kernel_size, self.stride, self.dilation, strict=True), start=3
        ):
            windows = windows.unfold(dim, dilation * (size - 1) + 1, stride)[..., ::dilation]
        positions = range(3, 3 + num_dims)
        return windows.permute(0, 1, *positions, 2, *range(3 + num_dims, 3 + 2 * num_dims))


def gradient_runs(contributions: Sequence[Contribution], parameter_size: int, device: torch.device) -> Iterator[Tensor]:
    """The gradients of successive runs of examples, (length of the run, *parameter.shape).

    Args:
        contributions: the micro-batch's contributions to one parameter, at least one, which are added up.
        parameter_size: numbers in the parameter.
        device: where the contributions are.
    """
    first, *others = contributions
    for part in chunks(first.num_examples, parameter_size, device):
        yield sum((one.dense(part) for one in others), start=first.dense(part))


def combined_squares(contributions: Sequence[Contribution], parameter_size: int, device: torch.device) -> Tensor:
    """``|g_i|^2`` of a parameter that several calls may share: the norm of the sum, including cross terms.

    For a weight that is tied between an embedding and an output head, no gradient of the table's size is formed: the
    cross term follows from the two factored forms.

    Args:
        contributions: all of the micro-batch's contributions to one parameter, at least one.
        parameter_size: numbers in the parameter.
        device: where the contributions are.

    Returns:
        Squared norms, shape (num_examples,).
    """
    # Contributions of one kind merge by joining their positions: the sum over positions includes the cross terms.
    outers = [one for one in contributions if isinstance(one, OuterProduct)]
    lookups = [one for one in contributions if isinstance(one, Lookup)]
    others = [one for one in contributions if not isinstance(one, OuterProduct | Lookup)]
    merged: list[Contribution] = list(others)
    if outers:
        merged.append(
            OuterProduct(torch.cat([one.rows for one in outers], 1), torch.cat([one.cols for one in outers], 1))
            if len(outers) > 1
            else outers[0]
        )
    if lookups:
        merged.append(
            Lookup(
                torch.cat([one.index for one in lookups], 1),
                torch.cat([one.values for one in lookups], 1),
                lookups[0].num_rows,
            )
            if len(lookups) > 1
            else lookups[0]
        )
    if len(merged) == 1:
        return merged[0].squares()
    if not others:
        outer, lookup = merged
        assert isinstance(outer, OuterProduct)
        assert isinstance(lookup, Lookup)
        return outer.squares() + lookup.squares() + 2 * _inner(outer, lookup)
    # Other pairs have no cheap cross term: the gradients are formed, a few examples at a time.
    return torch.cat([squared_sums(each) for each in gradient_runs(merged, parameter_size, device)])


def coordinate_squares(contributions: Sequence[Contribution], shape: torch.Size, device: torch.device) -> Tensor:
    """``sum_i g_i^2`` of each coordinate of a parameter that several calls may share.

    Args:
        contributions: all of the micro-batch's contributions to one parameter, at least one.
        shape: the shape of the parameter.
        device: where the contributions are.
    """
    if len(contributions) == 1:
        directly = contributions[0].coordinate_squares()
        if directly is not None:
            return directly.view(shape)
    total: Tensor | None = None
    for gradients in gradient_runs(contributions, shape.numel(), device):
        squares = gradients.square().sum(0)
        total = squares if total is None else total + squares
    assert total is not None
    return total.view(shape)


def _inner(outer: OuterProduct, lookup: Lookup) -> Tensor:
    """``<g_i, h_i>`` of the contributions of a linear map and an embedding to one table, shape (num_examples,)."""
    sums = []
    num_positions, num_lookups = outer.rows.shape[1], lookup.index.shape[1]
    for part in chunks(outer.num_examples, 2 * num_positions * num_lookups, outer.rows.device):
        index = lookup.index[part, None, :].expand(-1, num_positions, -1)
        # <rows (x) cols, value at row k> is rows[k] <cols, value>: of the rows only the looked-up entries are needed.
        rows = wide(outer.rows[part].gather(2, index))
        cross = torch.bmm(wide(outer.cols[part]), wide(lookup.values[part]).mT)
        sums.append(cross.mul_(rows).flatten(1).sum(1))
    return torch.cat(sums)
