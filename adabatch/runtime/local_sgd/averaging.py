"""``LocalSGD``: workers step on their own, and average every ``sync_every`` steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import TracebackType
from typing import Any, Self, Unpack

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from adabatch.batch.moments import EUCLIDEAN, norm_in, quantile_in
from adabatch.batch.plan import Duration, Progress
from adabatch.runtime.collectives import Collectives, collectives_of, workers_of
from adabatch.runtime.engines.engine import GradientSync, Wrapper, wrapper_of
from adabatch.runtime.fsdp2 import is_sharded
from adabatch.runtime.local_sgd.compression import Compression
from adabatch.runtime.local_sgd.exchange import Exchange
from adabatch.runtime.local_sgd.memory import Memory
from adabatch.runtime.local_sgd.outer import Average, OuterOptimizer
from adabatch.runtime.local_sgd.periods import Fixed, Period, RoundStart
from adabatch.runtime.local_sgd.probe import Spread, WorkerProbe
from adabatch.runtime.local_sgd.replica import Replica
from adabatch.runtime.local_sgd.settings import AverageWeights, Measure, Round, Settings, period_of
from adabatch.runtime.optimizers import each_of, joined, without_rate
from adabatch.runtime.ownership import remove_all, take_over
from adabatch.runtime.probes.micro_batch import MicroBatchProbe
from adabatch.runtime.probes.protocol import Probe, ProbeOptions, given_with
from adabatch.runtime.scheduler import ProgressSource
from adabatch.runtime.step_hooks import hook_step
from adabatch.runtime.trained_parameters import TrainedParameters


class LocalSGD:
    """Workers step on their own and average every ``sync_every`` steps, around a loop of yours.

    ::

        with LocalSGD(model, optimizer, sync_every=8) as local:
            batches = AdaptiveBatch(model, optimizer, NormTest(eta=0.8), local_sgd=local, ...)
            for step in batches.steps(order):
                for x, y in step:
                    step.backward(loss_fn(model(x), y))
                optimizer.step(); optimizer.zero_grad()

    It works from its construction on, when all workers are given the first one's weights, as long as you hold on to
    it, and with any loop that calls ``optimizer.step()``. A second one on the same optimizer takes the place of the
    first. A round is ``sync_every`` calls; in the last of them parameters and real-valued buffers are averaged. Leaving
    the block averages once more where a round is under way. After an exception nothing is sent, for others may be gone.

    A round of one step with nothing but the average at its end (``sync_every=1``, and the warm-up) averages the
    gradient before the step instead: for any optimizer that is ``DistributedDataParallel`` itself. With
    ``AdaptiveBatch`` this happens at the end of the inner loop, where DDP has done it too; without, at the beginning of
    ``optimizer.step()``, so after a clipping of yours.

    Args:
        model: plain, a copy on each worker; or sharded by ``fully_shard`` over the ranks of a worker (a node), with
            ``workers`` the other dimension of the mesh.
        optimizer: its ``step()`` is a local step; its parameters are averaged. Of several a list: once each has
            stepped, that is one local step.
        sync_every: local steps of a round: a number, or ``Fixed``, ``Table`` or ``Quadratic``.
        warmup: how long every step is averaged first (post-local SGD). Outer optimizer and compression rest meanwhile.
        outer: what becomes of the average: ``Average``, ``Nesterov`` (DiLoCo) or ``SlowMo``.
        average_state: average what the optimizer remembers, too: as many bytes again for momentum, twice for Adam.
        compression: of what is exchanged: "none", "bf16" or "int8", these two as the change since the round began,
            with error feedback.
        weights: a worker's share in the average follows the "examples" it consumed in the round, where they are
            counted (by ``AdaptiveBatch``, which counts tokens where it weighs by them, or by calls of ``count``), or
            is "equal".
        measure: when ``AdaptiveBatch`` measures the gradient: at the "first" local step of a round, where workers
            still agree, or at the "last", as Lau et al. 2024 do, where their drift counts as noise.
        spread: whose parts are compared then: those "across" workers, for which the mean of their gradients is formed
            (as many bytes as one average), or those "within" each worker by itself, which costs a few numbers only and
            takes two micro-batches at least on each worker.
        workers: process group or one-dimensional mesh of those who average with each other; by default all ranks.

    Raises:
        ValueError: a number of steps below 1, an unknown word, a model in ``DistributedDataParallel``, a sharded model
            without ``workers`` or with workers that hold other shards, an optimizer of another model, or settings that
            differ between ranks.
        TypeError: an optimizer, a duration, a period or an outer optimizer that is none.

    Source: Stich 2019 (local SGD); Lin et al. 2020 (post-local SGD); Lau, Li, Xu, Liu, Kolar 2024, arXiv:2406.13936
    (adaptive local batch sizes).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        sync_every: int | Period,
        warmup: Duration | None = None,
        outer: OuterOptimizer | None = None,
        average_state: bool = False,
        compression: Compression = "none",
        weights: AverageWeights = "examples",
        measure: Measure = "first",
        spread: Spread = "across",
        workers: ProcessGroup | DeviceMesh | None = None,
    ) -> None:
        self._settings = Settings(
            period=period_of(sync_every),
            outer=Average() if outer is None else outer,
            warmup=warmup,
            average_state=average_state,
            compression=compression,
            weights=weights,
            measure=measure,
            spread=spread,
        )
        optimizer = joined(optimizer)
        self._model, self._optimizer = model, optimizer
        self._replica = Replica(model, optimizer)
        self._workers, self._node = _who(model, workers, self._replica.device)
        self._everyone = self._workers.over(self._node)
        words = ", ".join(self._settings.words())
        if not self._everyone.agree(words):
            raise ValueError(
                f"the ranks were given different settings of local SGD (this one: {words}), and would average at "
                f"different steps: give all the same"
            )
        kind = without_rate(optimizer)
        if kind is not None and not self._settings.without_rate:
            raise ValueError(
                f"{kind} sets its learning rate itself (lr=None), which the period or the outer optimizer reads: use a "
                f"number of steps as sync_every and outer=Average(), or give the optimizer a learning rate"
            )
        self._exchange = Exchange(self._workers)
        self._memory = Memory()
        self._source: ProgressSource | None = None
        self._gradient_averaged = False
        self._stepped: set[Optimizer] = set()  # of several, since the last local step
        self._trained = TrainedParameters(model, optimizer)
        self._replaced = False
        take_over(self, [*each_of(optimizer), *self._replica.parameters], kind="LocalSGD")
        for tensor in self._replica.everything():
            self._workers.copy_from_first(tensor)
        self._handles = hook_step(optimizer, self._before_step, self._after_step)

    @property
    def collectives(self) -> Collectives:
        """All ranks of all workers."""
        return self._everyone

    # --- what a log or a test reads ---------------------------------------------------------------------------------

    @property
    def rounds(self) -> int:
        """Averages so far, those of the warm-up among them."""
        return self._memory.rounds

    @property
    def steps(self) -> int:
        """Local steps so far."""
        return self._memory.steps

    @property
    def step_in_round(self) -> int:
        """Local steps since the last average; 0 where all workers hold the same parameters."""
        return self._memory.step_in_round

    @property
    def sync_every(self) -> int:
        """Local steps of the round under way, or of the one that begins with the next step."""
        return self._present().local_steps

    @property
    def bytes_sent(self) -> int:
        """Bytes that this rank sent to other workers so far, measured gradients among them."""
        return self._exchange.bytes_sent

    @property
    def bytes_saved(self) -> int:
        """Bytes that averaging the gradient at every step would have sent beyond those."""
        return self._memory.bytes_synchronous - self.bytes_sent

    # --- the loop ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.synchronize()
        self.remove()

    def count(self, num_examples: float) -> None:
        """This rank consumed so many examples (or tokens); ``AdaptiveBatch`` counts what it takes by itself."""
        self._memory.examples += num_examples

    def synchronize(self) -> None:
        """Ends the round under way now, on all workers; nothing where they have just averaged.

        Raises:
            RuntimeError: a newer ``LocalSGD`` averages these workers.
        """
        self._check_in_place()
        if self._memory.step_in_round:
            self._end_round()

    def remove(self) -> None:
        """Takes the hooks off the optimizer: no more averages."""
        remove_all(self._handles)

    def give_way(self) -> None:
        """A newer one averages these workers."""
        self._replaced = True
        self.remove()

    def _check_in_place(self) -> None:
        if self._replaced:
            raise RuntimeError("this LocalSGD was replaced by a newer one on the same optimizer or model: use that one")

    def _present(self) -> Round:
        """The round under way; it begins when it is first asked for."""
        if self._memory.round is None:
            self._memory.round = self._begin_round()
        return self._memory.round

    def _begin_round(self) -> Round:
        source = self._source
        if source is None:
            self._check_units()
        progress = Progress(steps=self._memory.steps) if source is None else source.progress
        factor = 1.0 if source is None else source.lr_factor
        # Host sync where a rate lies on an accelerator, once a round.
        rates = [group for group in self._optimizer.param_groups if group.get("lr") is not None]
        lr = factor * max((float(group["lr"]) for group in rates), default=0.0)
        peak = factor * max((float(group.get("initial_lr", group["lr"])) for group in rates), default=0.0)
        begun = self._settings.begin(RoundStart(progress, lr, peak), states_agree=self._memory.states_agree)
        # Rounds of different lengths would send different things at the same time, and wait for each other for ever.
        told = (begun.local_steps, begun.by_gradient, lr if begun.needs_anchor else None)
        if not (isinstance(self._settings.period, Fixed) and begun.local_steps == 1) and not self._everyone.agree(told):
            raise ValueError(
                f"the workers begin different rounds (this one: {begun.local_steps} steps, at a learning rate of "
                f"{lr:.6g}): their learning rates must be the same at every step"
            )
        if begun.needs_anchor:
            self._memory.anchors = [piece.clone() for piece in self._replica.pieces()]
        return begun

    def _check_units(self) -> None:
        for duration in self._settings.durations:
            if duration.unit != "steps":
                raise ValueError(
                    f"local SGD cannot count {duration} by itself: give it to AdaptiveBatch(local_sgd=), or the "
                    f"duration in steps"
                )

    def _gradient_ready(self, weight: float) -> None:
        """The gradient of a step is complete on this worker, and is about to be measured, clipped and applied."""
        self.count(weight)
        self._average_gradient()

    def _average_gradient(self) -> None:
        if self._present().by_gradient:
            with self._reporting():
                mean = self._replica.mean_gradients(self._exchange, weight=1 / self._workers.size)
            self._replica.put_gradients(mean)
            self._gradient_averaged = True

    def _before_step(self, optimizer: Optimizer) -> None:
        if not self._stepped:
            self._trained.check("LocalSGD")
        if not self._gradient_averaged:
            self._average_gradient()

    def _after_step(self, optimizer: Optimizer) -> None:
        self._stepped.add(optimizer)
        if len(self._stepped) < len(each_of(self._optimizer)):
            return
        self._stepped.clear()
        self._gradient_averaged = False
        self._memory.steps += 1
        self._memory.step_in_round += 1
        self._memory.bytes_synchronous += self._exchange.ring_bytes(self._replica.pieces())
        if self._memory.step_in_round == self._present().local_steps:
            self._end_round()

    def _end_round(self) -> None:
        ended = self._present()
        weight = 1 / self._workers.size if ended.by_gradient else self._weight(ended)
        with self._reporting():
            if not ended.by_gradient:
                self._average(ended, weight)
            self._exchange.mean(self._replica.buffers(), weight=weight)
        self._memory.end_round()

    def _average(self, ended: Round, weight: float) -> None:
        """What the workers' parameters become at the end of a round of steps of their own."""
        pieces = self._replica.pieces()
        self._exchange.compressed_mean(
            pieces, self._memory.anchors, weight=weight, compression=ended.compression, errors=self._memory.errors
        )
        ended.outer.step(pieces, self._memory.anchors, self._memory.momenta, lr=ended.lr)
        state = self._replica.optimizer_state()
        if self._settings.average_state:
            if not self._workers.agree([(name, value.shape) for name, value in state.items()]):
                raise ValueError(
                    "the optimizer remembers other things on this worker than on others, so average_state cannot "
                    "average them: a parameter got a gradient on some workers only; leave average_state out"
                )
            self._exchange.mean(list(state.values()), weight=weight)
        self._memory.states_agree = self._settings.average_state or not state

    def _weight(self, ended: Round) -> float:
        """This worker's share; also checks that all workers are at the same step."""
        (examples,) = self._node.sum_of(self._memory.examples)
        with self._reporting():
            rows = self._workers.gather_of(examples, self._memory.rounds, self._memory.steps, ended.local_steps)
        if any(row[1:] != rows[0][1:] for row in rows):
            places = "; ".join(f"worker {index}: {row[2]:.0f}" for index, row in enumerate(rows))
            raise RuntimeError(
                f"workers came to the average after different numbers of steps ({places}): all must call "
                f"optimizer.step() equally often (a GradScaler leaves calls out)"
            )
        total = sum(row[0] for row in rows)
        if self._settings.weights == "equal" or total == 0:
            return 1 / self._workers.size
        return rows[self._workers.rank][0] / total

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        """Says what a failed exchange means."""
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"local SGD could not finish round {self._memory.rounds + 1} (step {self._memory.steps}): a worker "
                f"ended, or the network failed; start all again from the last checkpoint ({error})"
            ) from error

    # --- what AdaptiveBatch reads -----------------------------------------------------------------------------------

    def wrapper(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        source: ProgressSource,
        gradient_sync: GradientSync | None = None,
        scaler: GradScaler | None = None,
    ) -> Wrapper:
        """How ``AdaptiveBatch`` runs the model on all ranks while the workers step on their own.

        Args:
            model, optimizer: those that were given here.
            source: where progress and batch factor come from, from now on.
            gradient_sync: for the ranks of a sharded worker.
            scaler: refused.

        Raises:
            ValueError: another model or optimizer, or a gradient scaler.
        """
        if scaler is not None:
            raise ValueError(
                "local SGD does not go with a GradScaler: every worker would leave out updates of its own, and come to "
                "the average at another step; use bfloat16, which needs none"
            )
        self._check_in_place()
        if model is not self._model or {*each_of(optimizer)} != {*each_of(self._optimizer)}:
            raise ValueError(
                "local_sgd belongs to another model or optimizer: give AdaptiveBatch and LocalSGD the same"
            )
        if is_sharded(model):
            inner = wrapper_of(model, gradient_sync)
        else:
            inner = Wrapper(self._everyone, nullcontext, MicroBatchProbe)
        self._source = source

        def make_probe(parameters: Sequence[Tensor], **options: Unpack[ProbeOptions]) -> Probe:
            _check_gives(given_with(**options))
            return self._measured(inner.make_probe(parameters, **options))

        return inner._replace(
            collectives=self._everyone,
            make_probe=make_probe,
            fit_probe=self._measured,
            num_compared=self._everyone.size if self._settings.spread == "across" else self._node.size,
            measures_next=self._measures_next,
            steps_alone=lambda: not self._present().by_gradient,
            gradient_ready=self._gradient_ready,
            journal_entry=self._journal_entry,
        )

    def _measured(self, probe: Probe) -> Probe:
        _check_gives(probe.gives)
        return WorkerProbe(
            probe,
            self._replica,
            self._exchange,
            num_workers=self._workers.size,
            worker_size=self._node.size,
            across=lambda: self._settings.spread == "across" or self._present().by_gradient,
            averaged=lambda: self._gradient_averaged,
        )

    def _measures_next(self) -> bool:
        present = self._present()
        return self._memory.step_in_round == (0 if self._settings.measure == "first" else present.local_steps - 1)

    def _journal_entry(self) -> dict[str, Any]:
        """As things stand after a step."""
        return {
            "local_sgd": {
                "rounds": self._memory.rounds,
                "step_in_round": self._memory.step_in_round,
                "bytes_sent": self.bytes_sent,
                "bytes_saved": self.bytes_saved,
            }
        }

    # --- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where in a round this worker is, what the outer optimizer and the compression remember, and the counts.

        Taken between steps. In the middle of a round, and with compression at any time, it is this rank's alone, as are
        then the model's and the optimizer's; every rank saves its own. Without ``average_state`` the optimizer's always
        is.
        """
        return {**self._memory.state_dict(self._workers.size, self._settings), "bytes_sent": self.bytes_sent}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where the state was taken; load the model's and the optimizer's after the construction too.

        Raises:
            ValueError: a state of a newer format, of another model or outer optimizer, or of another number of workers,
                where it is of the middle of a round or has compression errors in it.
        """
        self._memory = Memory.from_state_dict(
            state, num_workers=self._workers.size, pieces=self._replica.pieces(), settings=self._settings
        )
        self._exchange.bytes_sent = state["bytes_sent"]


def _check_gives(gives: frozenset[str]) -> None:
    """That what a probe gives of one worker adds up to what it gives of all."""
    for need in gives:
        if norm_in([need]) != EUCLIDEAN or quantile_in([need]) is not None:
            raise ValueError(
                f"local SGD does not measure {need}: the optimizers of the workers hold states of their own, and no "
                f"gradient of all is formed coordinate by coordinate; use a criterion in the Euclidean norm, such as "
                f"NormTest or NoiseScale()"
            )


def _who(
    model: nn.Module, place: ProcessGroup | DeviceMesh | None, device: torch.device
) -> tuple[Collectives, Collectives]:
    """The workers, and the ranks that share this one's model."""
    if not is_sharded(model):
        return workers_of(place, device=device), Collectives(device=device)
    node = collectives_of(model)
    if place is None:
        raise ValueError(
            "the model is sharded, so it must be said who averages with whom: shard it over one dimension of a mesh, "
            'fully_shard(model, mesh=mesh["shard"]), and give the other, LocalSGD(..., workers=mesh["node"])'
        )
    workers = workers_of(place, device=device)
    if len(workers.members & node.members) > 1:
        raise ValueError(
            f"ranks {sorted(workers.members & node.members)} average with each other and hold different shards of the "
            f"model: workers must be the other dimension of the mesh than the one the model is sharded over"
        )
    return workers, node
