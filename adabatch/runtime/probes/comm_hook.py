"""The communication-hook probe, for DDP: squared norms of buckets before and after their reduction.

DDP passes its hook the flat buckets in which gradients are reduced, while the backward continues. Both norms are then
taken of a few long tensors instead of many short ones, overlapped with the backward and the communication, and no pass
over ``p.grad`` is needed.
"""

# No `from __future__ import annotations`: DDP checks the annotations of its hook, and expects types, not strings.

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from adabatch.arguments import checked
from adabatch.batch.moments import GradientMoments
from adabatch.runtime.collectives import mean_future
from adabatch.runtime.probes.layers import Layers, LayerSums
from adabatch.runtime.probes.micro_batch import IN_PIECES
from adabatch.runtime.probes.norms import gathered, norms
from adabatch.runtime.probes.parts import PartSums
from adabatch.runtime.probes.protocol import Probe, given_with
from adabatch.runtime.wrappers.compiled import uncompiled

Hook = Callable[[Any, dist.GradBucket], Future[Tensor]]
"""How DDP reduces a bucket: the second argument of ``DistributedDataParallel.register_comm_hook``."""


class BucketSlice(NamedTuple):
    """Where the gradient of a parameter lies in a flat bucket."""

    number: int
    offset: int
    length: int


def _norms_of(flat: Tensor, slices: list[BucketSlice] | None) -> list[tuple[int, Tensor]]:
    """Norms of a bucket (as that of parameter 0), or of each gradient in it, with the numbers of the parameters."""
    if slices is None:
        return [(0, norms(flat))]
    return [(piece.number, norms(flat[piece.offset : piece.offset + piece.length])) for piece in slices]


class CommHookProbe(Probe):
    """Noise and signal under DDP from its buckets: one part per rank, the mean gradient of all its micro-batches.

    DDP reduces once per step, so accumulation steps cannot be distinguished: with ``k`` of them the spread is measured
    among ``dp_size`` parts of ``k`` micro-batches, not among ``k * dp_size`` parts as ``MicroBatchProbe`` does. The
    estimate is still unbiased, but has a larger variance. The cost is lower: one pass over each bucket before the
    reduction and one after it.

    A DDP model takes one communication hook and keeps it. ``remove()`` stops the measurement, but the hook stays and
    reduces as before. To measure again, pass the same probe to the next ``AdaptiveBatch``.

    Args:
        model: a ``DistributedDataParallel`` model without a communication hook. All trainable parameters are measured.
        hook: your own hook (``fp16_compress_hook``, for instance), which reduces instead of the plain mean. Its result
            must be the mean up to rounding, unless ``plain_when_probed`` is set.
        state: the first argument of the hook; by default the model's process group.
        plain_when_probed: reduce probed steps by the plain mean instead of ``hook``. Needed for hooks that approximate
            the mean (PowerSGD), since the norm of their result is not that of the mean. Error feedback of such a hook
            is then applied in the next step that it reduces.
        record_l1: also measure the l1 norm of the step's gradient, in another pass.
        layers: also measure each of these layers. Norms are then taken of each gradient in a bucket.

    Raises:
        ValueError: if the model is not in DDP or has a hook already, if PowerSGD is used without ``plain_when_probed``,
            or if a trainable parameter is in no layer.
    """

    @checked
    def __init__(
        self,
        model: nn.Module,
        *,
        hook: Hook | None = None,
        state: object = None,
        plain_when_probed: bool = False,
        record_l1: bool = False,
        layers: Layers | None = None,
    ) -> None:
        model = uncompiled(model)
        if not isinstance(model, DistributedDataParallel):
            raise ValueError(
                f"CommHookProbe needs a model in DistributedDataParallel, got a {type(model).__name__}: wrap it first, "
                f"or leave the probe to AdaptiveBatch"
            )
        if isinstance(state, PowerSGDState) and not plain_when_probed:
            raise ValueError(
                "the norm of a gradient that PowerSGD approximated is not that of the mean, from which the noise "
                "follows: use plain_when_probed=True, and Control(interval=) above 1 for a gain from the compression"
            )
        # The model itself is not stored: its reducer holds this hook from C++, where Python's garbage collector cannot
        # see the cycle, so neither would ever be freed.
        self._group: dist.ProcessGroup = model.process_group
        self.measured = parameters = [p for p in model.parameters() if p.requires_grad]
        self._device = parameters[0].device
        self._number: dict[Tensor, int] | None = None
        if layers is not None:
            self._number = {p: number for number, p in enumerate(parameters)}
        self._layer_sums = LayerSums(parameters, layers, device=self._device)
        self._hook = hook
        self._state = self._group if state is None else state
        self._plain_when_probed = plain_when_probed
        self.gives = given_with(record_l1=record_l1, layers=layers)
        self._record_l1 = record_l1
        self._listening = False
        # Appended to from the threads of the backward and of the process group; a step's norms are all there once its
        # backward has returned, which waits for every bucket.
        self._before: list[tuple[int, Tensor]] = []
        self._after: list[tuple[int, Tensor]] = []
        self._after_l1: list[Tensor] = []
        self._sums = PartSums(dist.get_world_size(self._group), device=self._device)
        try:
            model.register_comm_hook(None, self._reduce)
        except RuntimeError as error:
            raise ValueError(
                "the DDP model has a communication hook already, and takes one only: give your hook to "
                "CommHookProbe(model, hook=..., state=...) instead of registering it, and a probe that exists to the "
                "next AdaptiveBatch"
            ) from error
        # If a gradient comes in pieces, DDP reduces the first and silently drops the others. This is checked in the
        # first part only, because it costs one Python call per parameter.
        self._pieces = [0] * len(parameters)
        self._counting = [
            p.register_hook(partial(self._count, number))  # type: ignore[no-untyped-call]
            for number, p in enumerate(parameters)
        ]

    def _reduce(self, _: object, bucket: dist.GradBucket) -> Future[Tensor]:
        listening = self._listening
        if listening:
            if bucket.buffer().is_sparse:
                raise RuntimeError("CommHookProbe does not measure sparse gradients: use MicroBatchProbe")
            slices = self._slices_of(bucket)
            self._before += _norms_of(bucket.buffer(), slices)
        if self._hook is None or (listening and self._plain_when_probed):
            reduced = mean_future(bucket.buffer(), self._group)
        else:
            reduced = self._hook(self._state, bucket)
        # In the future's callback, and not after a wait: waiting here would end the overlap with the backward.
        return reduced.then(partial(self._note, slices)) if listening else reduced

    def _count(self, number: int, _: Tensor) -> None:
        self._pieces[number] += self._listening

    def _slices_of(self, bucket: dist.GradBucket) -> list[BucketSlice] | None:
        """Where each parameter's gradient lies in the bucket; None without layers."""
        if self._number is None:
            return None
        start = bucket.buffer().storage_offset()
        pairs = zip(bucket.parameters(), bucket.gradients(), strict=True)
        return [
            BucketSlice(self._number[p], int(grad.storage_offset() - start), int(grad.numel())) for p, grad in pairs
        ]

    def _note(self, slices: list[BucketSlice] | None, reduced: Future[Tensor]) -> Tensor:
        grad: Tensor = reduced.value()
        self._after += _norms_of(grad, slices)
        if self._record_l1:
            self._after_l1.append(norms(grad, 1))
        return grad

    def start(self, dp_size: int) -> None:
        lengths = self._sums.lengths
        self._sums = PartSums(dp_size, device=self._device, layers=self._layer_sums.names, lengths=lengths)

    def begin_part(self, num_examples: int | None = None) -> None:
        self._forget()
        self._listening = True

    def end_part(self, num_examples: float, weight: float) -> None:
        """Called after the backward of a micro-batch; see `Probe.end_part`.

        Raises:
            RuntimeError: if a gradient came in several pieces.
        """
        self._listening = False
        self._count_no_more()
        if max(self._pieces) > 1:
            raise RuntimeError(IN_PIECES)
        self._sums.join(num_examples, weight)
        # Without a reduction (no_sync), the micro-batch joins the part that the next reduction ends.
        if self._before:
            self._sums.close(self._layer_sums.of(self._before))

    def collect(self) -> Tensor:
        dp_size = self._sums.dp_size
        # All ranks see the same reduced gradient up to rounding. Each contributes 1 / dp_size of its norm, so that all
        # continue with the same bits.
        grad_sq = self._layer_sums.of(self._after) / dp_size
        l1 = gathered(self._after_l1, self._device).sum() / dp_size if self._record_l1 else None
        self._forget()
        return self._sums.numbers(grad_sq, grad_l1=l1)

    def _count_no_more(self) -> None:
        for handle in self._counting:
            handle.remove()
        self._counting.clear()

    def _forget(self) -> None:
        self._before.clear()
        self._after.clear()
        self._after_l1.clear()

    def moments(self, totals: list[float]) -> GradientMoments:
        return self._sums.moments(totals)

    def stop(self) -> None:
        self._listening = False
        self._pieces = [0] * len(self._pieces)
        self._forget()

    def remove(self) -> None:
        """Stops measuring."""
        # the hook stays on the model: DDP cannot remove one
        self._listening = False
        self._count_no_more()
        self._forget()
