"""Norms of gradients of any shape, precision and layout, without syncing with the host."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

BLOCK = 65_536
"""How many squares are added in float32. Longer tensors are cut into blocks, which are added in float64. In one
``vector_norm`` on the CPU, the squares of 10 million normal numbers come out 0.07 % too small."""


def gradients_of(parameters: Iterable[Tensor]) -> list[tuple[int, Tensor]]:
    """The gradients of a step, each with the number of its parameter.

    Raises:
        RuntimeError: if no parameter has a gradient.
    """
    grads = [(number, p.grad) for number, p in enumerate(parameters) if p.grad is not None]
    if not grads:
        raise RuntimeError(
            "no gradient is left after the step's last backward: call optimizer.step() and zero_grad() after the inner "
            "loop, let no optimizer step in the backward, and make a probe of your own from the model that is trained"
        )
    return grads


def real(tensor: Tensor) -> Tensor:
    """The tensor as real numbers: complex ones become pairs, in another dimension."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def sum_dtype(parameters: Iterable[Tensor]) -> torch.dtype:
    """The dtype in which squares of gradients of these parameters are summed: float64 if any of them has it."""
    wide = any(p.dtype in (torch.float64, torch.complex128) for p in parameters)
    return torch.float64 if wide else torch.float32


def norms(grad: Tensor, order: int = 2) -> Tensor:
    """Norms (Euclidean, or l1) of the rows or blocks of one gradient, in at least float32; shape (num_blocks,)."""
    # An uncoalesced sparse gradient holds several values for one row, whose squares must not be added separately.
    values = real(grad.coalesce().values() if grad.is_sparse else grad)
    dtype = torch.float64 if values.dtype is torch.float64 else torch.float32
    if values.numel() <= BLOCK:
        whole: Tensor = torch.linalg.vector_norm(values, order, dtype=dtype).view(1)
        return whole
    # Rows are half as slow again as blocks on small matrices (benchmarks/LOG.md), so they are used only where reshape()
    # would copy the whole gradient.
    if values.dim() > 1 and not values.is_contiguous() and values[0].numel() <= BLOCK:
        rows: Tensor = torch.linalg.vector_norm(values, order, dim=tuple(range(1, values.dim())), dtype=dtype)
        return rows
    flat = values.reshape(-1)
    rest = flat.numel() % BLOCK
    blocks: Tensor = torch.linalg.vector_norm(flat[: flat.numel() - rest].view(-1, BLOCK), order, dim=1, dtype=dtype)
    if rest == 0:
        return blocks
    return torch.cat([blocks, torch.linalg.vector_norm(flat[-rest:], order, dtype=dtype).view(1)])


def column_norms(matrix: Tensor) -> Tensor:
    """Euclidean norms of the columns of a matrix of real numbers, in at least float32; shape (num_columns,)."""
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    if not matrix.is_cpu:
        columns: Tensor = torch.linalg.vector_norm(matrix, dim=0, dtype=dtype)
        return columns
    # On the CPU vector_norm takes a hundred times as long for two rows of 2 million numbers.
    first, *others = (row.to(dtype) for row in matrix.unbind())
    squares = first.square()
    for row in others:
        squares.addcmul_(row, row)
    return squares.sqrt_()


def gathered(pieces: list[Tensor], device: torch.device) -> Tensor:
    """Norms of many gradients in one float64 tensor; shape (num_blocks,)."""
    if not pieces:
        return torch.zeros(0, dtype=torch.float64, device=device)
    # Only a model on several devices pays for a copy of each; otherwise one copy of all of them is enough.
    if len({piece.device for piece in pieces}) > 1:
        pieces = [piece.to(device) for piece in pieces]
    return torch.cat(pieces).to(device=device, dtype=torch.float64)


def sum_of_squares(pieces: list[Tensor], device: torch.device) -> Tensor:
    """Sum of the squares of norms in float64; shape ()."""
    return gathered(pieces, device).square().sum()
