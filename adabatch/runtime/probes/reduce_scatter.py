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
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from adabatch.batch.moments import GRAD_L1, LAYERS, NOISE, GradientMoments
from adabatch.runtime.collectives import reduce_scatter
from adabatch.runtime.layers import Layers, LayerSums
from adabatch.runtime.probes.norms import gathered, gradients_of, norms
from adabatch.runtime.probes.parts import PartSums
from adabatch.runtime.sharding import data_parallel_mesh, own_piece, padded_length, shards_in, units_of

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


@dataclass(frozen=True)
class Reduction:
    """What was seen of a gradient on its way into a reduction.

    Args:
        norms: its norms, shape (num_blocks,); those of its columns, one an element of a shard, where parameters are
            told apart.
        numbers: the parameters in it, in the order in which they lie there; empty where they are not told apart.
    """

    norms: Tensor
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
        layers: measure each of them as well. Norms of the columns of each buffer are then held until the micro-batch is
            over, 4 bytes for each element of this rank's shards.
        gradient_divide_factor: what ``FSDPModule.set_gradient_divide_factor`` was called with, the same on every unit.
        inner: the reduce-scatter that the model had, where it was set with ``set_custom_reduce_scatter``. Buffers from
            the process group's own allocator (``set_allocate_memory_from_process_group_for_comm``) are not supported.

    Raises:
        ValueError: a torch older than 2.9, a model that is not sharded, or not by data parallelism alone, a unit with
            several parameter groups (``shard_placement_fn`` with meshes of its own), a factor that is not positive, or
            a trainable parameter in no layer.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        record_l1: bool = False,
        layers: Layers | None = None,
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
        self.gives = frozenset({NOISE, *([GRAD_L1] if record_l1 else []), *([LAYERS] if layers else [])})
        self._record_l1 = record_l1
        self._layer_sums = LayerSums(self._parameters, layers, device=self._device)
        self._units = list(units.values())
        self._inner = PlainReduceScatter() if inner is None else inner
        self._num_shards = shards_in(mesh, self._parameters)
        self._measured = {name: _Measured(self._inner, self._num_shards, self._see) for name in units}
        self._sums = PartSums(mesh.size(), device=self._device)
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
        if layers is not None:  # FSDP2 runs these hooks after each reduction, in the order of the parameters in it
            self._handles = [
                p.register_post_accumulate_grad_hook(partial(self._was_in, number))  # type: ignore[no-untyped-call]
                for number, p in enumerate(self._parameters)
            ]

    def _see(self, filled: Tensor) -> Reduction:
        if not self._handles:
            return Reduction(norms(filled), [])
        dtype = torch.float64 if filled.dtype is torch.float64 else torch.float32
        columns = torch.linalg.vector_norm(filled.view(self._num_shards, -1), dim=0, dtype=dtype)
        self._open = Reduction(columns, [])
        return self._open

    def _was_in(self, number: int, _: Tensor) -> None:
        if self._open is not None:
            self._open.numbers.append(number)

    def start(self, dp_size: int) -> None:
        """A probed step begins."""
        self._sums = PartSums(dp_size, device=self._device, layers=self._layer_sums.names)

    def begin_part(self) -> None:
        """The backward of a micro-batch begins."""
        for unit in self._measured.values():
            unit.listen(True)

    def end_part(self, num_examples: float, weight: float) -> None:
        """It has ended. ``weight`` is the micro-batch's share of this rank's gradient.

        Raises:
            RuntimeError: a unit reduced its gradient in several pieces.
        """
        self._open = None
        seen: list[tuple[int, Tensor]] = []
        for name, unit in self._measured.items():
            unit.listen(False)
            if len(unit.reductions) > 1:
                raise RuntimeError(
                    f"FSDP2 reduced the gradient of {name or 'the root'} in {len(unit.reductions)} pieces in one "
                    f"micro-batch, whose norms do not add up: modules that are one unit must run together in one "
                    f"forward, so give a head that is called once a chunk a unit of its own"
                )
            for reduction in unit.reductions:
                seen += self._by_parameter(reduction)
            unit.reductions.clear()
        self._sums.join(num_examples, weight)
        if seen:
            self._sums.close(self._layer_sums.of(seen) * self._scale**2)

    def _by_parameter(self, reduction: Reduction) -> list[tuple[int, Tensor]]:
        """Norms with the numbers of their parameters; all under 0 where they are not told apart."""
        if not reduction.numbers:
            return [(0, reduction.norms)]
        lengths = [padded_length(self._parameters[number], self._num_shards) for number in reduction.numbers]
        if sum(lengths) != len(reduction.norms):
            raise RuntimeError(
                f"FSDP2 reduced {len(reduction.norms)} elements a rank, where its {len(lengths)} parameters have "
                f"{sum(lengths)}: this way of sharding, or torch {torch.__version__}, is not known to the probe"
            )
        pieces = torch.split(reduction.norms, lengths)
        return [(number, norms(piece)) for number, piece in zip(reduction.numbers, pieces, strict=True)]

    def collect(self) -> Tensor:
        """This rank's share of the sums."""
        pieces = [(number, *own_piece(grad)) for number, grad in gradients_of(self._parameters)]
        shares = [(number, norms(piece) / math.sqrt(holders)) for number, piece, holders in pieces]
        l1 = None
        if self._record_l1:
            l1 = gathered([norms(piece, 1) / holders for _, piece, holders in pieces], self._device).sum()
        return self._sums.numbers(self._layer_sums.of(shares), grad_l1=l1)

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
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
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
