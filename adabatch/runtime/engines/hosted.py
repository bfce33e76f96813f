"""An engine inside a host, which it informs about the progress of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Unpack, final

from torch import Tensor, nn
from torch.optim import Optimizer

from adabatch.batch.plan import BatchPlan, Progress
from adabatch.runtime.engines.engine import Engine
from adabatch.runtime.probes.protocol import Probe, ProbeOptions


@final
class HostedEngine(Engine):
    """Behaves as another engine, and tells the host what the host would otherwise count itself.

    Args:
        inner: how the model runs.
        synchronizes: called before each micro-batch of a step, with whether the step ends with it.
        ended: called after a step's micro-batches and, if its gradient is reduced by then, after its decision. A host
            that updates by itself after the last backward does so here.
    """

    def __init__(self, inner: Engine, *, synchronizes: Callable[[bool], None], ended: Callable[[], None]) -> None:
        super().__init__(inner.model, inner.collectives, inner.backward)
        self.shards = inner.shards
        self.copies = inner.copies
        self.runs_alone = inner.runs_alone
        self.holds_gradients = inner.holds_gradients
        self.gives_closures = inner.gives_closures
        self.reduced = inner.reduced
        self.stand_in = inner.stand_in
        self._inner = inner
        self._synchronizes = synchronizes
        self._ended = ended

    def inner_model(self) -> nn.Module:
        """That of the inner engine, like everything below."""
        return self._inner.inner_model()

    def trained(self, optimizer: Optimizer) -> list[Tensor]:
        return self._inner.trained(optimizer)

    def before_step(self) -> None:
        self._inner.before_step()

    def commits(self) -> bool:
        return self._inner.commits()

    def begin(self, plan: BatchPlan) -> None:
        """Also tells the host: a step of one micro-batch never enters ``no_sync``."""
        self._inner.begin(plan)
        self._synchronizes(True)

    def no_sync(self) -> AbstractContextManager[Any]:
        """Also tells the host, before the micro-batch and after it."""
        return self._told(self._inner.no_sync())

    @contextmanager
    def _told(self, off: AbstractContextManager[Any]) -> Iterator[None]:
        self._synchronizes(False)
        try:
            with off:
                yield
        finally:
            self._synchronizes(True)

    def unreduced(self) -> AbstractContextManager[Any]:
        return self._inner.unreduced()

    def switched_off(self, *, last: bool) -> str | None:
        return self._inner.switched_off(last=last)

    def alone(self) -> AbstractContextManager[Any]:
        return self._inner.alone()

    def gradient_ready(self, weight: float) -> None:
        self._inner.gradient_ready(weight)

    def inner_loop_ended(self) -> None:
        self._inner.inner_loop_ended()
        self._ended()

    def steps_alone(self) -> bool:
        return self._inner.steps_alone()

    def left_out(self) -> bool:
        return self._inner.left_out()

    def leaves_out(self) -> None:
        self._inner.leaves_out()

    def update_missed(self) -> None:
        self._inner.update_missed()

    def stands_at(self, applied: Progress, consumed: Progress, lr_factor: float) -> None:
        self._inner.stands_at(applied, consumed, lr_factor)

    def journal_entry(self) -> dict[str, Any]:
        return self._inner.journal_entry()

    def make_probe(self, parameters: Sequence[Tensor], **options: Unpack[ProbeOptions]) -> Probe:
        return self._inner.make_probe(parameters, **options)

    def fit_probe(self, probe: Probe) -> Probe:
        return self._inner.fit_probe(probe)

    def measures_next(self) -> bool:
        return self._inner.measures_next()

    @property
    def num_compared(self) -> int:
        return self._inner.num_compared
