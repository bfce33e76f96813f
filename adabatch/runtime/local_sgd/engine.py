"""The engine of local SGD: workers that step on their own, each with its own engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Unpack, final

from torch import Tensor, nn

from adabatch.batch.moments import EUCLIDEAN
from adabatch.batch.needs import Needs
from adabatch.batch.plan import Progress
from adabatch.runtime.engines.engine import Engine
from adabatch.runtime.local_sgd.probe import WorkerProbe
from adabatch.runtime.local_sgd.rounds import Rounds
from adabatch.runtime.probes.protocol import Probe, ProbeOptions, given_with


@final
class LocalWorkers(Engine):
    """The engine of workers that average every few steps; ``LocalSGD.engine`` makes it.

    Args:
        inner: the engine of one worker.
        rounds: of the worker.
        check: raises if nothing is averaged any more.
    """

    # between two averages the workers' weights differ on purpose, so nothing may compare them
    copies = False

    def __init__(self, inner: Engine, rounds: Rounds, *, check: Callable[[], None]) -> None:
        super().__init__(inner.model, rounds.everyone, inner.backward)
        self.shards = inner.shards
        self.runs_alone = inner.runs_alone
        self.holds_gradients = inner.holds_gradients
        # no stand_in: in local steps nobody waits for this worker, which tells of its mistakes at the next meeting
        self._inner = inner
        self._rounds = rounds
        self._check = check

    def before_step(self) -> None:
        """Checks that the steps are averaged.

        Raises:
            RuntimeError: if not.
        """
        self._check()

    def inner_model(self) -> nn.Module:
        """That of the worker."""
        return self._inner.inner_model()

    def no_sync(self) -> AbstractContextManager[Any]:
        """Between the ranks of a worker."""
        return self._inner.no_sync()

    def unreduced(self) -> AbstractContextManager[Any]:
        """Between the ranks of a worker."""
        return self._inner.unreduced()

    def switched_off(self, *, last: bool) -> str | None:
        """Between the ranks of a worker."""
        return self._inner.switched_off(last=last)

    def gradient_ready(self, weight: float) -> None:
        """Counts what was consumed, and averages the gradient in a round of one step."""
        # The step knows its weight, so a loop with AdaptiveBatch must not call LocalSGD.count() as well.
        self._rounds.memory.examples += weight
        self._rounds.average_gradient()

    def steps_alone(self) -> bool:
        """True except in rounds of one step, which average the gradient."""
        return not self._rounds.present().by_gradient

    def leaves_out(self) -> None:
        """The local step changes nothing."""
        self._rounds.leaves_out = True

    def update_missed(self) -> None:
        """Counts a local step all the same."""
        # the others have taken this step: without it this worker would come to the average one step late
        self._rounds.miss_step()

    def stands_at(self, applied: Progress, consumed: Progress, lr_factor: float) -> None:
        """Rounds are counted in the run's units from now on."""
        self._rounds.stands_at(applied, consumed, lr_factor)

    def journal_entry(self) -> dict[str, Any]:
        """The worker's place in the round, after a step."""
        memory, traffic = self._rounds.memory, self._rounds.exchange.traffic
        return {
            "local_sgd": {
                "rounds": memory.rounds,
                "step_in_round": memory.step_in_round,
                "bytes_sent": traffic.bytes_sent,
                "bytes_saved": memory.bytes_synchronous - traffic.bytes_sent,
            }
        }

    def make_probe(self, parameters: Sequence[Tensor], **options: Unpack[ProbeOptions]) -> Probe:
        """The probe of one worker, adapted to measure all of them.

        Raises:
            ValueError: if something cannot be measured over workers.
        """
        self._check_gives(given_with(**options))
        return self.fit_probe(self._inner.make_probe(parameters, **options))

    def fit_probe(self, probe: Probe) -> Probe:
        """Adapts a probe of one worker, so that it measures all of them.

        Raises:
            ValueError: if the probe gives something that cannot be measured over workers.
        """
        self._check_gives(probe.gives)
        rounds = self._rounds
        return WorkerProbe(
            probe,
            rounds.replica,
            rounds.exchange,
            num_workers=rounds.workers.size,
            worker_size=rounds.node.size,
            # In a round of one step the mean of all gradients is formed anyway, so comparing across workers costs
            # nothing more.
            across=lambda: rounds.settings.spread == "across" or rounds.present().by_gradient,
            averaged=lambda: rounds.gradient_averaged,
        )

    def measures_next(self) -> bool:
        """Once a round."""
        return self._rounds.measures_next()

    @property
    def num_compared(self) -> int:
        """All ranks, or those of one worker (``spread="within"``)."""
        rounds = self._rounds
        return rounds.everyone.size if rounds.settings.spread == "across" else rounds.node.size

    def _check_gives(self, gives: Needs) -> None:
        """Checks that the measurements of single workers can be combined into that of all workers."""
        if gives.noise != EUCLIDEAN or gives.quantile is not None:
            said = Needs(quantile=gives.quantile) or Needs(noise=gives.noise)
            raise ValueError(
                f"local SGD does not measure {', '.join(said.words())}: the optimizers of the workers hold states of "
                f"their own, and no gradient of all is formed coordinate by coordinate; use a criterion in the "
                f"Euclidean norm, such as NormTest or NoiseScale()"
            )
        settings = self._rounds.settings
        if not settings.comes_together and (settings.spread, settings.measure) == ("across", "first"):
            raise ValueError(
                "the gradient can be measured across workers only while all hold the same parameters, and with "
                'fragments or overlap they never do: use LocalSGD(spread="within"), which compares the micro-batches '
                'of each worker, or measure="last", which counts the drift of the workers as noise'
            )
