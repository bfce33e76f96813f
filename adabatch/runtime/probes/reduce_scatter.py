"""The reduce-scatter probe, for FSDP2: the squared norm of this rank's gradient on its way into the reduction.

Under ``fully_shard`` no tensor hook sees the gradient of one rank: what reaches ``p.grad`` is a shard of the mean. The
whole local gradient exists for a moment, unit by unit, in the buffer that goes into the reduce-scatter. FSDP2 lets
that step be replaced (``FSDPModule.set_custom_reduce_scatter``, torch 2.9); the replacement reads the norm and then
does what the default does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from adabatch.batch.moments import GRAD_L1, NOISE, GradientMoments
from adabatch.runtime.collectives import reduce_scatter
from adabatch.runtime.probes.micro_batch import gathered, norms, sum_of_squares
from adabatch.runtime.probes.parts import PartSums
from adabatch.runtime.sharding import data_parallel_mesh, own_piece, shards_in, units_of

TOO_LONG = 1.05
"""A mean is never longer than its parts are on average. Rounding to a low precision may add a little."""


class ReduceScatter(Protocol):
    """How FSDP2 reduces the gradient of a unit; the interface of ``FSDPModule.set_custom_reduce_scatter``."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A buffer, first for the gradient that goes in, then for the piece that comes out."""
        ...

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> Any:
        """The reduction."""
        ...


class PlainReduceScatter:
    """What FSDP2 does by itself: a new buffer for each call, and torch's reduce-scatter."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A new buffer."""
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> Any:
        """torch's own reduction."""
        return reduce_scatter(output_tensor, input_tensor, op=op, group=group, async_op=async_op)


class _Measured:
    """The reduce-scatter of one unit, which reads the norm of what goes in.

    It is read when the buffer for the output is asked for: the gradient is copied in by then, padded with zeros, and
    not yet divided, as it is afterwards where the reduction runs in float16 or float64. The call itself would be too
    late for that, and does not come at all where there is one shard only. On an accelerator this runs on the stream of
    the reduce-scatter, beside the backward, and the step's own stream waits for that before the backward returns.
    """

    def __init__(self, inner: ReduceScatter, num_shards: int) -> None:
        self._inner = inner
        self._num_shards = num_shards
        self._filling: Tensor | None = None
        self.listening = False
        self.reductions: list[Tensor] = []

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        if not self.listening:
            return self._inner.allocate(size, dtype=dtype, device=device)
        filled, self._filling = self._filling, None
        buffer = self._inner.allocate(size, dtype=dtype, device=device)
        if filled is None:
            self._filling = buffer
        elif filled.numel() != buffer.numel() * self._num_shards:
            raise RuntimeError(
                f"FSDP2 reduces a gradient of {filled.numel()} elements to {buffer.numel()}, where {self._num_shards} "
                f"shards were expected: this way of sharding, or torch {torch.__version__}, is not known to the probe"
            )
        else:
            self.reductions.append(norms(filled))
        return buffer

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> Any:
        return self._inner(output_tensor, input_tensor, group, op, async_op)

    def listen(self, listening: bool) -> None:
        """Starts anew, or stops."""
        self.listening = listening
        self._filling = None
        if listening:
            self.reductions.clear()


class ReduceScatterProbe:
    """Noise and signal under FSDP2 (``torch.distributed.fsdp.fully_shard``), HSDP among it.

    A part is what this rank reduces at once: each micro-batch where gradients are synchronized in each of them, all of
    the step's where only in the last (``AdaptiveBatch(gradient_sync=)``). It costs one pass over each buffer that is
    reduced and one over this rank's shard of the step's gradient. All trainable parameters are measured, before
    clipping, in the precision in which they are reduced (``MixedPrecisionPolicy.reduce_dtype``); the norms themselves
    are taken in float32 at least.

    FSDP2 does not tell what was set on it, so two things have to be said here if they were set: a reduce-scatter of
    your own, and a divide factor other than the number of ranks.

    Args:
        model: what ``fully_shard`` was applied to, or the module that holds it.
        record_l1: measure the l1 norm of the step's gradient too, in one more pass over this rank's shard.
        gradient_divide_factor: what ``FSDPModule.set_gradient_divide_factor`` was called with, the same on every unit.
        inner: the reduce-scatter that the model had, where it was set with ``set_custom_reduce_scatter``. Buffers from
            the process group's own allocator (``set_allocate_memory_from_process_group_for_comm``) are not supported.

    Raises:
        ValueError: a torch older than 2.9, a model that is not sharded, or not by data parallelism alone, a unit with
            several parameter groups (``shard_placement_fn`` with meshes of its own), or a factor that is not positive.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        record_l1: bool = False,
        gradient_divide_factor: float | None = None,
        inner: ReduceScatter | None = None,
    ) -> None:
        units = units_of(model)
        if not units:
            raise ValueError(
                f"the {type(model).__name__} is not sharded: apply torch.distributed.fsdp.fully_shard first, or use "
                f"another probe"
            )
        if gradient_divide_factor is not None and not gradient_divide_factor > 0:
            raise ValueError(f"gradient_divide_factor must be positive, got {gradient_divide_factor}")
        mesh = data_parallel_mesh(model)
        self._parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        self._device = torch.device(mesh.device_type)
        self._scale = 1.0 if gradient_divide_factor is None else mesh.size() / gradient_divide_factor
        self.gives = frozenset({NOISE, GRAD_L1} if record_l1 else {NOISE})
        self._record_l1 = record_l1
        self._units = list(units.values())
        self._inner = PlainReduceScatter() if inner is None else inner
        num_shards = shards_in(mesh, self._parameters)
        self._measured = {name: _Measured(self._inner, num_shards) for name in units}
        self._sums = PartSums(mesh.size(), device=self._device)
        set_so_far = []
        try:
            for name, unit in units.items():
                _set(unit, self._measured[name], name)
                set_so_far.append(unit)
        except ValueError:
            for unit in set_so_far:
                _set(unit, self._inner)
            raise

    def start(self, dp_size: int) -> None:
        """A probed step begins."""
        self._sums = PartSums(dp_size, device=self._device)

    def begin_part(self) -> None:
        """The backward of a micro-batch begins."""
        for unit in self._measured.values():
            unit.listen(True)

    def end_part(self, num_examples: float, weight: float) -> None:
        """It has ended. ``weight`` is the micro-batch's share of this rank's gradient.

        Raises:
            RuntimeError: a unit reduced its gradient in several pieces.
        """
        seen: list[Tensor] = []
        for name, unit in self._measured.items():
            unit.listen(False)
            if len(unit.reductions) > 1:
                raise RuntimeError(
                    f"FSDP2 reduced the gradient of {name or 'the root'} in {len(unit.reductions)} pieces in one "
                    f"micro-batch, whose norms do not add up: modules that are one unit must run together in one "
                    f"forward, so give a head that is called once a chunk a unit of its own"
                )
            seen += unit.reductions
            unit.reductions.clear()
        self._sums.join(num_examples, weight)
        if seen:
            self._sums.close(sum_of_squares(seen, self._device) * self._scale**2)

    def collect(self) -> Tensor:
        """This rank's share of the sums, shape (4,), or (5,) with the l1 norm."""
        pieces = [own_piece(p.grad) for p in self._parameters if p.grad is not None]
        grad_sq = self._sum([norms(piece) / math.sqrt(holders) for piece, holders in pieces], 2)
        l1 = self._sum([norms(piece, 1) / holders for piece, holders in pieces], 1) if self._record_l1 else None
        return self._sums.numbers(grad_sq, l1)

    def _sum(self, pieces: list[Tensor], power: int) -> Tensor:
        """Sum of a power of norms, shape (); zero where this rank has no gradient."""
        return gathered(pieces, self._device).pow(power).sum() if pieces else torch.zeros((), dtype=torch.float64)

    def moments(self, totals: list[float]) -> GradientMoments:
        """The step's moments from the sums over all ranks.

        Raises:
            RuntimeError: a gradient that cannot be the mean of the parts that were measured.
        """
        moments = self._sums.moments(totals)
        # A reduction in float16 may overflow where its parts do not: then the update is left out.
        if math.isfinite(moments.grad_sq) and moments.grad_sq > TOO_LONG * moments.part_sq:
            raise RuntimeError(
                f"the gradient's squared norm, {moments.grad_sq:.6g}, is above the mean of its parts', "
                f"{moments.part_sq:.6g}, so it is not their mean: if set_gradient_divide_factor was called, give the "
                f"factor to ReduceScatterProbe(gradient_divide_factor=); if gradients of an earlier step are left, "
                f"call optimizer.zero_grad()"
            )
        return moments

    def remove(self) -> None:
        """Gives every unit back the reduce-scatter it had."""
        for unit in self._units:
            _set(unit, self._inner)
        self._units.clear()
        self._measured.clear()


def _set(unit: FSDPModule, comm: Any, name: str = "") -> None:
    """``set_custom_reduce_scatter``, with errors that say which unit and what to do."""
    try:
        setter = unit.set_custom_reduce_scatter
    except AttributeError as error:
        raise ValueError(
            f"torch {torch.__version__} has no FSDPModule.set_custom_reduce_scatter, through which gradients are "
            f"measured under FSDP2: use torch 2.9 or newer, or a schedule as criterion, which needs no probe"
        ) from error
    try:
        setter(comm)
    except ValueError as error:
        raise ValueError(
            f"the unit {name or 'at the root'} ({type(unit).__name__}) has several parameter groups, on meshes of "
            f"their own, whose reductions cannot be told apart: leave the meshes out of its shard_placement_fn"
        ) from error
