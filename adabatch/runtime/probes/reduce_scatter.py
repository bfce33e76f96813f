"""The reduce-scatter probe, for FSDP2: the squared norm of this rank's gradient as it enters the reduction.

Under ``fully_shard`` no tensor hook sees the gradient of one rank: ``p.grad`` receives a shard of the mean. The whole
local gradient exists only briefly, unit by unit, in the input buffer of the reduce-scatter. FSDP2 allows this operation
to be replaced (``FSDPModule.set_custom_reduce_scatter``, torch 2.9). The replacement reads the norm and then does what
the default does.
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
from adabatch.runtime.optimizers.ownership import called_weakly, remove_all, take_over
from adabatch.runtime.probes.gauge import Gauge
from adabatch.runtime.probes.layers import Layers
from adabatch.runtime.probes.metrics import ProbeNorm
from adabatch.runtime.probes.norms import column_norms, gradients_of, norms
from adabatch.runtime.probes.protocol import Probe
from adabatch.runtime.wrappers.fsdp2 import data_parallel_mesh, own_piece, padded_length, shards_in, units_of

TOO_LONG = 1.05
"""How far the squared norm of the mean may exceed the mean squared norm of the parts. Mathematically it never exceeds
it; the rest is for reductions in low precision."""


@runtime_checkable
class ReduceScatter(Protocol):
    """How FSDP2 reduces the gradient of a unit; the interface of ``FSDPModule.set_custom_reduce_scatter``."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A buffer. Called first for the input of a reduction, then for its output."""
        ...

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> Any:
        """Reduces ``input_tensor`` into ``output_tensor``."""
        ...


class PlainReduceScatter:
    """FSDP2's default: a new buffer for each call, and torch's reduce-scatter."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A new buffer."""
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> Any:
        """torch's own reduction."""
        return reduce_scatter(output_tensor, input_tensor, op=op, group=group, async_op=async_op)


@dataclass(frozen=True)
class Reduction:
    """Measurements of a gradient that enters a reduction. One column of it holds one element of each rank's shard.

    Args:
        num_columns: elements per shard.
        norms: norms of the gradient, shape (num_blocks,), or of its columns, shape (num_columns,), if parameters have
            to be distinguished; None if norms of the parts are not needed.
        squares: squares of the elements of this rank's shard, summed over the ranks of the shards, shape
            (num_columns,); None if coordinates are not measured.
        numbers: numbers of the parameters in the buffer, in their order there; empty if they are not distinguished.
    """

    num_columns: int
    norms: Tensor | None
    squares: Tensor | None
    numbers: list[int]


class _MeasuredScatter:
    """The reduce-scatter of one unit, which measures the input."""

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
                f"FSDP2 reduces a gradient of {filled.numel()} elements to {buffer.numel()}, but {self._num_shards} "
                f"shards were expected: this way of sharding, or torch {torch.__version__}, is not known to the probe"
            )
        else:
            # The input is read when the output buffer is allocated, not in __call__: by now the gradient has been
            # copied in and padded with zeros, but not yet divided, as it is before a reduction in float16 or float64.
            # And with a single shard, __call__ never comes. On an accelerator this runs on the stream of the
            # reduce-scatter, beside the backward; the step's own stream waits for it before the backward returns.
            self.reductions.append(self._see(filled))
        return buffer

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> Any:
        return self._inner(output_tensor, input_tensor, group, op, async_op)

    def listen(self, listening: bool) -> None:
        """Starts to measure, forgetting earlier reductions, or stops."""
        self.listening = listening
        self._filling = None
        if listening:
            self.reductions.clear()


class ReduceScatterProbe(Probe):
    """Noise and signal under FSDP2 (``torch.distributed.fsdp.fully_shard``), including HSDP.

    A part is the gradient that this rank reduces at once: that of one micro-batch if gradients are synchronized in each
    micro-batch, that of the whole step if only in the last (``EngineOptions(gradient_sync=)``). The probe makes one
    pass over each reduced buffer and one over this rank's shard of the step's gradient. All trainable parameters are
    measured before clipping, in the precision of the reduction (``MixedPrecisionPolicy.reduce_dtype``); norms are taken
    in at least float32.

    FSDP2 does not reveal what was set on it, so the probe must be told of a custom reduce-scatter (``inner``) and of a
    divide factor other than the number of ranks (``gradient_divide_factor``).

    Args:
        model: the module that ``fully_shard`` was applied to, or one that contains such modules.
        record_l1: also measure the l1 norm of the step's gradient, in another pass over this rank's shard.
        layers: also measure each of these layers. Norms of the columns of each buffer are then kept until the
            micro-batch ends, at 4 bytes per element of this rank's shards.
        norm: the norm of noise and signal: "sign", or a diagonal ``Metric`` such as ``AdamMetric(optimizer)``; by
            default the Euclidean norm. ``NoiseScale`` states the costs.
        quantile: also measure this quantile over coordinates, for ``CoordinateNormTest``, which states the cost.
        gradient_divide_factor: the argument of ``FSDPModule.set_gradient_divide_factor``, the same on every unit.
        inner: the reduce-scatter that was set with ``set_custom_reduce_scatter``. Buffers from the process group's own
            allocator (``set_allocate_memory_from_process_group_for_comm``) are not supported.

    Raises:
        ValueError: if torch is older than 2.9, if the model is not sharded, or not by data parallelism alone, if a unit
            has several parameter groups (``shard_placement_fn`` with different meshes), if the factor is not positive,
            if a trainable parameter is in no layer, or if the metric is not diagonal.
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
        # With a factor, FSDP2 divides by it instead of the number of ranks. Parts are rescaled so that the gradient is
        # again their mean.
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
        # The predecessor goes first: when it is removed, it sets the units' previous reduce-scatter again.
        take_over(self, self._units, kind="ReduceScatterProbe")
        see = called_weakly(self._see)
        self._measured = {name: _MeasuredScatter(self._inner, self._num_shards, see) for name in units}
        self._open: Reduction | None = None
        # All units or none: a unit that refuses must not leave the others measured by a probe that was never built.
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
            # FSDP2 runs these hooks after each reduction, in the order of the parameters in its buffer: the only way
            # to learn, without private attributes, which parameter lies where.
            was_in = called_weakly(self._was_in)
            self._handles = [
                p.register_post_accumulate_grad_hook(partial(was_in, number))  # type: ignore[no-untyped-call]
                for number, p in enumerate(self._parameters)
            ]
        # Runs once only, in remove() or when the probe is dropped, so it never overwrites a successor's reduce-scatter.
        self._give_back = finalize(self, _give_back, list(self._units), self._inner, self._handles)
        self._give_back.atexit = False

    def _see(self, filled: Tensor) -> Reduction:
        num_columns = filled.numel() // self._num_shards
        if not self._handles:
            return Reduction(num_columns, norms(filled), None, [])
        columns = squares = None
        if self._gauge.parts_are_norms:
            # Row r of the buffer holds the shards of rank r of all parameters, one after the other: a parameter is a
            # run of columns.
            columns = column_norms(filled.view(self._num_shards, -1))
        if self._gauge.coordinates is not None:
            # Every rank issues this next to the gradient's own reduction, so the order of collectives is the same.
            dtype = torch.promote_types(filled.dtype, torch.float32)
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
        """Called after the backward of a micro-batch; see `Probe.end_part`.

        Raises:
            RuntimeError: if a unit reduced its gradient in several pieces.
        """
        self._open = None
        reductions: list[Reduction] = []
        for name, unit in self._measured.items():
            unit.listen(False)
            if len(unit.reductions) > 1:
                raise RuntimeError(
                    f"FSDP2 reduced the gradient of {name or 'the root'} in {len(unit.reductions)} pieces in one "
                    f"micro-batch, whose norms do not add up: modules that are one unit must run together in one "
                    f"forward, so make a head that is called once per chunk a separate unit"
                )
            reductions += unit.reductions
            unit.reductions.clear()
        self._gauge.sums.join(num_examples, weight)
        # Without a reduction, the micro-batch joins the part that the next reduction ends.
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
        """How many columns each parameter has in a reduction; empty if they are not distinguished."""
        lengths = [padded_length(self._parameters[number], self._num_shards) for number in reduction.numbers]
        if lengths and sum(lengths) != reduction.num_columns:
            raise RuntimeError(
                f"FSDP2 reduced {reduction.num_columns} elements per rank, but its {len(lengths)} parameters have "
                f"{sum(lengths)}: this way of sharding, or torch {torch.__version__}, is not known to the probe"
            )
        return lengths

    def _add(self, numbers: Sequence[int], squares: Sequence[Tensor]) -> None:
        """Adds squares of parameters, without their padding, to those of the step."""
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
            RuntimeError: if the gradient cannot be the mean of the measured parts.
        """
        moments = self._gauge.moments(totals)
        # A reduction in float16 may overflow although its parts do not. That is no mistake: the update is skipped.
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
        """Sets every unit's previous reduce-scatter again."""
        self._give_back()
        self._units.clear()
        self._measured.clear()

    def give_way(self) -> None:
        """Called when a newer probe takes over these units."""
        self.remove()


def _give_back(units: list[FSDPModule], inner: ReduceScatter, handles: list[Any]) -> None:
    for unit in units:
        _set(unit, inner)
    remove_all(handles)


def _set(unit: FSDPModule, comm: Any, name: str = "") -> None:
    """Calls ``set_custom_reduce_scatter``; its errors then say which unit, and what to do."""
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
