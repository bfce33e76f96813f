"""``DistributedDataParallel``: every rank holds the whole model, and gradients are averaged in the last backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Unpack, final

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from adabatch.runtime.collectives import collectives_of
from adabatch.runtime.engines.engine import Engine, GradientSync
from adabatch.runtime.probes.micro_batch import MicroBatchProbe
from adabatch.runtime.probes.protocol import Probe, ProbeOptions
from adabatch.runtime.wrappers.backward import PLAIN, Backward
from adabatch.runtime.wrappers.compiled import uncompiled


@final
class DDPEngine(Engine):
    """A model in ``DistributedDataParallel``, compiled or not.

    Raises:
        ValueError: if ``gradient_sync`` is "each".
    """

    def __init__(self, model: nn.Module, *, gradient_sync: GradientSync = "last", backward: Backward = PLAIN) -> None:
        if gradient_sync == "each":
            raise ValueError(
                "gradient_sync='each' is for FSDP2: DistributedDataParallel would reduce the whole sum again at every "
                "micro-batch, and save no memory: leave it out"
            )
        super().__init__(model, collectives_of(model), backward)
        # torch.compile may be outside of DDP, which alone has no_sync and the switch.
        inner = uncompiled(model)
        assert isinstance(inner, DistributedDataParallel)
        self._ddp = inner
        self._learns = bool(inner.static_graph)
        # With find_unused_parameters DDP itself looks for the parameters that take part.
        self.stand_in = "backward" if inner.find_unused_parameters and not inner.static_graph else "zeros"

    def inner_model(self) -> nn.Module:
        """The module inside DDP."""
        inner = self._ddp.module
        assert isinstance(inner, nn.Module)
        return uncompiled(inner)

    def no_sync(self) -> AbstractContextManager[Any]:
        """DDP's own ``no_sync``, except in the first backward of a model with a static graph.

        DDP learns the graph in that backward, and must reduce in it. The gradient is still right: the mean that this
        leaves is equal on all ranks, so that the reduction of the last micro-batch does not change it.
        """
        learns, self._learns = self._learns, False
        return nullcontext() if learns else self._ddp.no_sync()

    def switched_off(self, *, last: bool) -> str | None:
        """DDP's own switch, which its ``no_sync`` turns too."""
        off = last and not self._ddp.require_backward_grad_sync
        return "require_backward_grad_sync of DistributedDataParallel is False at the last micro-batch" if off else None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Bypasses DDP's own forward, which broadcasts buffers, for which all ranks are needed."""
        module = self._ddp.module
        # On the instance, and removed afterwards: the class keeps its forward for other models.
        vars(self._ddp)["forward"] = lambda *inputs, **options: module(*inputs, **options)
        try:
            yield
        finally:
            del vars(self._ddp)["forward"]

    def make_probe(self, parameters: Sequence[Tensor], **options: Unpack[ProbeOptions]) -> Probe:
        """``MicroBatchProbe``."""
        return MicroBatchProbe(parameters, collectives=self.collectives, **options)
