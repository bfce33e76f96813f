"""The reduce-scatter probe, for FSDP2: the squared norm of this rank's gradient on its way into the reduction.

Under ``fully_shard`` no tensor hook sees the gradient of one rank: what reaches ``p.grad`` is a shard of the mean. The
whole local gradient exists for a moment, unit by unit, in the buffer that goes into the reduce-scatter. FSDP2 lets
that step be replaced (``FSDPModule.set_custom_reduce_scatter``, torch 2.9); the replacement reads the norm and then
does what the default does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable
from weakref import finalize

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from adabatch.arguments import checked
from adabatch.batch.moments import GradientMoments
from adabatch.runtime.collectives import reduce_scatter, shards_and_replicas
from adabatch.runtime.fsdp2 import data_parallel_mesh, own_piece, padded_length, shards_in, units_of
from adabatch.runtime.ownership import called_weakly, remove_all, take_over
from adabatch.runtime.probes.gauge import Gauge
from adabatch.runtime.probes.layers import Layers
from adabatch.runtime.probes.metrics import ProbeNorm
from adabatch.runtime.probes.norms import gradients_of, norms
from adabatch.runtime.probes.protocol import Probe

TOO_LONG = 1.05
"""A mean is never longer than its parts are on average. Rounding to a low precision may add a little."""


@runtime_checkable
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


@dataclass(frozen=True)
class Reduction:
    """What was seen of a gradient on its way into a reduction. A column of it is one element of each rank's shard.

    Args:
        num_columns: elements of a shard.
        norms: its norms, shape (num_blocks,); those of its columns, where parameters are told apart; None where no norm
            of the parts is asked for.
        squares: of its columns' elements for this rank's shard, added up over the shards' ranks, shape (num_columns,);
            None where coordinates are not measured.
        numbers: the parameters in it, in the order in which they lie there; empty where they are not told apart.
    """

    num_columns: int
    norms: Tensor | None
    squares: Tensor | None
    numbers: list[int]


class _Measured:
    """The reduce-scatter of one unit, which shows what goes in.

    It is read when the buffer for the output is asked for: the gradient is copied in by then, padded with zeros, and
    not yet divided, as it is afterwards where the reduction runs in float16 or float64. The call itself would be too
    late for that, and does not come at all where there is one shard only. On an accelerator this runs on the stream of
    the reduce-scatter, beside the backward, and the step's own stream waits for that before the backward returns.
    """

    def __init__(self, inner: ReduceScatter, num_shards: int, see: Callable[[Tensor], Reduction]) -> None:
        self._inner = inner
        self._num_shards = num_shards
        self._see = see
        self._filling: Tensor | None = None
        self.listening = False
        self.reductions: list[Reduction] = []

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
            self.reductions.append(self._see(filled))
        return buffer

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> Any:
        return self._inner(output_tensor, input_tensor, group, op, async_op)

    def listen(self, listening: bool) -> None:
        """Starts anew, or stops."""
        self.listening = listening
        self._filling = None
        if listening:
            self.reductions.clear()


class ReduceScatterProbe(Probe):
    """Noise and signal under FSDP2 (``torch.distributed.fsdp.fully_shard``), HSDP among it.

    A part is what this rank reduces at once: each micro-batch where gradients are synchronized in each of them, all of
    the step's where only in the last (``EngineOptions(gradient_sync=)``). It costs one pass over each buffer that is
    reduced and one over this rank's shard of the step's gradient. All trainable parameters are measured, before
    clipping, in the precision in which they are reduced (``MixedPrecisionPolicy.reduce_dtype``); the norms themselves
    are taken in float32 at least.

    FSDP2 does not tell what was set on it, so two things have to be said here if they were set: a reduce-scatter of
    your own, and a divide factor other than the number of ranks.

    Args:
        model: what ``fully_shard`` was applied to, or the module that holds it.
        record_l1: measure the l1 norm of the step's gradient too, in one more pass over this rank's shard.
        layers: measure each of them as well. Norms of the columns of each buffer are then held until the micro-batch is
            over, 4 bytes for each element of this rank's shards.
        norm: of noise and signal, the Euclidean one by default: "sign", or a diagonal ``Metric`` such as
            ``AdamMetric(optimizer)``. What they cost is told by ``NoiseScale``.
        quantile: also measure this quantile over coordinates, for ``CoordinateNormTest``, which tells what it costs.
        gradient_divide_factor: what ``FSDPModule.set_gradient_divide_factor`` was called with, the same on every unit.
        inner: the reduce-scatter that the model had, where it was set with ``set_custom_reduce_scatter``. Buffers from
            the process group's own allocator (``set_allocate_memory_from_process_group_for_comm``) are not supported.

    Raises:
        ValueError: a torch older than 2.9, a model that is not sharded, or not by data parallelism alone, a unit with
            several parameter groups (``shard_placement_fn`` with meshes of its own), a factor that is not positive, a
            trainable parameter in no layer, or a metric that is not diagonal.
    """

    @checked
    def __init__(
        self,
        model: nn.Module,
        *,
        record_l1: bool = False,
        layers: Layers | None = None,
        norm: ProbeNorm | None = None,
        quantile: float | None = None,
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
        self._scale = 1.0 if gradient_divide_factor is None else mesh.size() / gradient_divide_factor
        self._num_shards = shards_in(mesh, self._parameters)
        self._shards, self._replicas = shards_and_replicas(mesh, self._num_shards)
        self._gauge = Gauge(
            self._parameters,
            owner=self,
            device=torch.device(mesh.device_type),
            same=self._replicas,
            others=self._shards,
            record_l1=record_l1,
            layers=layers,
            norm=norm,
            quantile=quantile,
        )
        self.gives = self._gauge.gives
        self.measured = self._parameters
        self._units = list(units.values())
        self._inner = PlainReduceScatter() if inner is None else inner
        # The predecessor goes first: it would give the units back a reduce-scatter of its own.
        take_over(self, self._units, kind="ReduceScatterProbe")
        see = called_weakly(self._see)
        self._measured = {name: _Measured(self._inner, self._num_shards, see) for name in units}
        self._open: Reduction | None = None
        set_so_far = []
        try:
            for name, unit in units.items():
                _set(unit, self._measured[name], name)
                set_so_far.append(unit)
        except ValueError:
            for unit in set_so_far:
                _set(unit, self._inner)
            raise
        self._handles: list[Any] = []
        if layers is not None or self._gauge.coordinates is not None:
            # FSDP2 runs these hooks after each reduction, in the order of the parameters in it.
            was_in = called_weakly(self._was_in)
            self._handles = [
                p.register_post_accumulate_grad_hook(partial(was_in, number))  # type: ignore[no-untyped-call]
                for number, p in enumerate(self._parameters)
            ]
        # Once, by remove() or when the probe is dropped: not over the one of a successor.
        self._give_back = finalize(self, _give_back, list(self._units), self._inner, self._handles)
        self._give_back.atexit = False

    def _see(self, filled: Tensor) -> Reduction:
        num_columns = filled.numel() // self._num_shards
        if not self._handles:
            return Reduction(num_columns, norms(filled), None, [])
        dtype = torch.float64 if filled.dtype is torch.float64 else torch.float32
        columns = squares = None
        if self._gauge.parts_are_norms:
            columns = torch.linalg.vector_norm(filled.view(self._num_shards, -1), dim=0, dtype=dtype)
        if self._gauge.coordinates is not None:
            # Beside the gradient's own reduction, so in the same order on all ranks.
            squares = self._shards.reduce_scatter(filled.to(dtype).square())
        self._open = Reduction(num_columns, columns, squares, [])
        return self._open

    def _was_in(self, number: int, _: Tensor) -> None:
        if self._open is not None:
            self._open.numbers.append(number)

    def start(self, dp_size: int) -> None:
        self._gauge.start(dp_size)

    def begin_part(self, num_examples: int | None = None) -> None:
        for unit in self._measured.values():
            unit.listen(True)

    def end_part(self, num_examples: float, weight: float) -> None:
        """It has ended. ``weight`` is the micro-batch's share of this rank's gradient.

        Raises:
            RuntimeError: a unit reduced its gradient in several pieces.
        """
        self._open = None
        reductions: list[Reduction] = []
        for name, unit in self._measured.items():
            unit.listen(False)
            if len(unit.reductions) > 1:
                raise RuntimeError(
                    f"FSDP2 reduced the gradient of {name or 'the root'} in {len(unit.reductions)} pieces in one "
                    f"micro-batch, whose norms do not add up: modules that are one unit must run together in one "
                    f"forward, so give a head that is called once a chunk a unit of its own"
                )
            reductions += unit.reductions
            unit.reductions.clear()
        self._gauge.sums.join(num_examples, weight)
        if not reductions:
            return
        seen: list[tuple[int, Tensor]] = []
        for reduction in reductions:
            lengths = self._lengths(reduction)
            if reduction.squares is not None:
                self._add(reduction.numbers, torch.split(reduction.squares, lengths))
            if reduction.norms is not None and lengths:
                pieces = torch.split(reduction.norms, lengths)
                seen += [(number, norms(piece)) for number, piece in zip(reduction.numbers, pieces, strict=True)]
            elif reduction.norms is not None:
                seen.append((0, reduction.norms))
        self._gauge.close(seen, factor=self._scale**2)

    def _lengths(self, reduction: Reduction) -> list[int]:
        """How many columns each parameter has in a reduction; none where they are not told apart."""
        lengths = [padded_length(self._parameters[number], self._num_shards) for number in reduction.numbers]
        if lengths and sum(lengths) != reduction.num_columns:
            raise RuntimeError(
                f"FSDP2 reduced {reduction.num_columns} elements a rank, where its {len(lengths)} parameters have "
                f"{sum(lengths)}: this way of sharding, or torch {torch.__version__}, is not known to the probe"
            )
        return lengths

    def _add(self, numbers: Sequence[int], squares: Sequence[Tensor]) -> None:
        """Adds the squares of parameters, without the zeros behind them, to those of the step."""
        coordinates, share = self._gauge.coordinates, self._gauge.sums.share
        assert coordinates is not None
        for number, padded in zip(numbers, squares, strict=True):
            length = own_piece(self._parameters[number])[0].numel()
            coordinates.add(number, padded[:length], share * self._scale**2)

    def collect(self) -> Tensor:
        grads = [(number, own_piece(grad)[0]) for number, grad in gradients_of(self._parameters)]
        return self._gauge.collect(grads, holders=self._replicas.size)

    def moments(self, totals: list[float]) -> GradientMoments:
        """The step's moments from the sums over all ranks.

        Raises:
            RuntimeError: a gradient that cannot be the mean of the parts that were measured.
        """
        moments = self._gauge.moments(totals)
        # A reduction in float16 may overflow where its parts do not: then the update is left out.
        if math.isfinite(moments.grad_sq) and moments.grad_sq > TOO_LONG * moments.part_sq:
            raise RuntimeError(
                f"the gradient's squared norm, {moments.grad_sq:.6g}, is above the mean of its parts', "
                f"{moments.part_sq:.6g}, so it is not their mean: if set_gradient_divide_factor was called, give the "
                f"factor to ReduceScatterProbe(gradient_divide_factor=); if gradients of an earlier step are left, "
                f"call optimizer.zero_grad()"
            )
        return moments

    def stop(self) -> None:
        self._open = None
        for unit in self._measured.values():
            unit.listen(False)
            unit.reductions.clear()

    def remove(self) -> None:
        """Gives every unit back the reduce-scatter it had."""
        self._give_back()
        self._units.clear()
        self._measured.clear()

    def give_way(self) -> None:
        """A newer probe measures these units."""
        self.remove()


def _give_back(units: list[FSDPModule], inner: ReduceScatter, handles: list[Any]) -> None:
    for unit in units:
        _set(unit, inner)
    remove_all(handles)


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
