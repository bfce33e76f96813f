"""The communication-hook probe, for DDP: squared norms of buckets before and after their reduction.

DDP hands its hook the flat buckets in which gradients are reduced, while the backward goes on. So both norms are read
from a few long tensors instead of many short ones, overlapped with the backward and the network, and no pass over
``p.grad`` follows.
"""

# No `from __future__ import annotations`: DDP reads the annotations of its hook, and knows them as types only.

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
from adabatch.runtime.compiled import uncompiled
from adabatch.runtime.probes.layers import Layers, LayerSums
from adabatch.runtime.probes.micro_batch import IN_PIECES
from adabatch.runtime.probes.norms import gathered, norms
from adabatch.runtime.probes.parts import PartSums
from adabatch.runtime.probes.protocol import Probe, given_with

Hook = Callable[[Any, dist.GradBucket], Future[Tensor]]
"""How DDP reduces a bucket: the second argument of ``DistributedDataParallel.register_comm_hook``."""


class Cut(NamedTuple):
    """The gradient of a parameter in a flat bucket."""

    number: int
    offset: int
    length: int


def _norms_of(flat: Tensor, cuts: list[Cut] | None) -> list[tuple[int, Tensor]]:
    """Norms of a bucket, or of the gradients in it, each with the number of its parameter."""
    if cuts is None:
        return [(0, norms(flat))]
    return [(cut.number, norms(flat[cut.offset : cut.offset + cut.length])) for cut in cuts]


class CommHookProbe(Probe):
    """Noise and signal under DDP from its buckets: one part a rank, the mean gradient of all its micro-batches.

    DDP reduces once a step, so accumulation steps are not told apart: with ``k`` of them the spread is measured among
    ``dp_size`` parts of ``k`` micro-batches, not among ``k * dp_size`` (``MicroBatchProbe`` does that). The estimate is
    unbiased all the same, and has a larger variance; the cost is lower, one pass over each bucket before and one after.

    A DDP model takes one communication hook, for good: ``remove()`` makes the probe deaf, but its hook stays and
    reduces as before. To measure again, hand the same probe to the next ``AdaptiveBatch``.

    Args:
        model: in ``DistributedDataParallel``, without a communication hook. All its trainable parameters are measured.
        hook: a hook of your own (``fp16_compress_hook``, say) that reduces in the place of the plain mean. It must give
            the mean up to rounding, or ``plain_when_probed`` be set.
        state: what the hook takes as its first argument; the model's process group by default.
        plain_when_probed: reduce probed steps by the plain mean, past ``hook``. Needed for hooks that approximate it
            (PowerSGD), as the norm of their result says nothing about that of the mean. An error that such a hook
            feeds back waits for the next step that it reduces.
        record_l1: measure the l1 norm of the step's gradient too, in one more pass.
        layers: measure each of them as well. Norms are then taken of each gradient in a bucket, not of the bucket.

    Raises:
        ValueError: a model that is not in DDP, or has a hook already, or PowerSGD without ``plain_when_probed``, or a
            trainable parameter in no layer.
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
        # The model itself is not kept: its reducer, which Python's garbage collector does not see, keeps this hook.
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
        # DDP reduces the first piece of a gradient and forgets the rest. Counted in the first part only, as it costs a
        # Python call a parameter.
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
            cuts = self._cuts_of(bucket)
            self._before += _norms_of(bucket.buffer(), cuts)
        if self._hook is None or (listening and self._plain_when_probed):
            reduced = mean_future(bucket.buffer(), self._group)
        else:
            reduced = self._hook(self._state, bucket)
        return reduced.then(partial(self._note, cuts)) if listening else reduced

    def _count(self, number: int, _: Tensor) -> None:
        self._pieces[number] += self._listening

    def _cuts_of(self, bucket: dist.GradBucket) -> list[Cut] | None:
        """Where each parameter's gradient lies in the bucket; None where that does not matter."""
        if self._number is None:
            return None
        start = bucket.buffer().storage_offset()
        pairs = zip(bucket.parameters(), bucket.gradients(), strict=True)
        return [Cut(self._number[p], int(grad.storage_offset() - start), int(grad.numel())) for p, grad in pairs]

    def _note(self, cuts: list[Cut] | None, reduced: Future[Tensor]) -> Tensor:
        grad: Tensor = reduced.value()
        self._after += _norms_of(grad, cuts)
        if self._record_l1:
            self._after_l1.append(norms(grad, 1))
        return grad

    def start(self, dp_size: int) -> None:
        self._sums = PartSums(dp_size, device=self._device, layers=self._layer_sums.names)

    def begin_part(self, num_examples: int | None = None) -> None:
        self._forget()
        self._listening = True

    def end_part(self, num_examples: float, weight: float) -> None:
        """It has ended. ``weight`` is the micro-batch's share of this rank's gradient.

        Raises:
            RuntimeError: a gradient came in several pieces.
        """
        self._listening = False
        self._count_no_more()
        if max(self._pieces) > 1:
            raise RuntimeError(IN_PIECES)
        self._sums.join(num_examples, weight)
        if self._before:
            self._sums.close(self._layer_sums.of(self._before))

    def collect(self) -> Tensor:
        dp_size = self._sums.dp_size
        # Every rank sees the reduced gradient; a dp-th of each one's norm makes all ranks use the same bits.
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
        """Stops measuring; the hook stays on the model, which has no way to give it back."""
        self._listening = False
        self._count_no_more()
        self._forget()
