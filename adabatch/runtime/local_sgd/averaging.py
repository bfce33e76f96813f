"""``LocalSGD``: workers step on their own, and average every ``sync_every`` steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from adabatch.batch.plan import Duration
from adabatch.runtime.collectives import Collectives, collectives_of, workers_of
from adabatch.runtime.engines.choice import engine_for
from adabatch.runtime.engines.engine import GradientSync
from adabatch.runtime.engines.plain import PlainEngine
from adabatch.runtime.fsdp2 import is_sharded
from adabatch.runtime.local_sgd.compression import Compression
from adabatch.runtime.local_sgd.engine import LocalWorkers
from adabatch.runtime.local_sgd.memory import Memory
from adabatch.runtime.local_sgd.outer import Average, OuterOptimizer
from adabatch.runtime.local_sgd.periods import Period
from adabatch.runtime.local_sgd.probe import Spread
from adabatch.runtime.local_sgd.replica import Replica
from adabatch.runtime.local_sgd.rounds import Rounds
from adabatch.runtime.local_sgd.settings import AverageWeights, MeasuredStep, Settings, period_of
from adabatch.runtime.optimizers import each_of, joined, without_rate
from adabatch.runtime.ownership import remove_all, take_over
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
        measure: MeasuredStep = "first",
        spread: Spread = "across",
        workers: ProcessGroup | DeviceMesh | None = None,
    ) -> None:
        settings = Settings(
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
        replica = Replica(model, optimizer)
        group, node = _who(model, workers, replica.device)
        self._rounds = Rounds(settings, replica, optimizer, workers=group, node=node)
        words = ", ".join(settings.words())
        if not self._rounds.everyone.agree(words):
            raise ValueError(
                f"the ranks were given different settings of local SGD (this one: {words}), and would average at "
                f"different steps: give all the same"
            )
        kind = without_rate(optimizer)
        if kind is not None and not settings.without_rate:
            raise ValueError(
                f"{kind} sets its learning rate itself (lr=None), which the period or the outer optimizer reads: use a "
                f"number of steps as sync_every and outer=Average(), or give the optimizer a learning rate"
            )
        self._trained = TrainedParameters(model, optimizer)
        self._stepped: set[Optimizer] = set()  # of several, since the last local step
        self._replaced = False
        take_over(self, [*each_of(optimizer), *replica.parameters], kind="LocalSGD")
        for tensor in replica.everything():
            group.copy_from_first(tensor)
        self._handles = hook_step(optimizer, self._before_step, self._after_step)

    @property
    def collectives(self) -> Collectives:
        """All ranks of all workers."""
        return self._rounds.everyone

    # --- what a log or a test reads ---------------------------------------------------------------------------------

    @property
    def rounds(self) -> int:
        """Averages so far, those of the warm-up among them."""
        return self._rounds.memory.rounds

    @property
    def steps(self) -> int:
        """Local steps so far."""
        return self._rounds.memory.steps

    @property
    def step_in_round(self) -> int:
        """Local steps since the last average; 0 where all workers hold the same parameters."""
        return self._rounds.memory.step_in_round

    @property
    def sync_every(self) -> int:
        """Local steps of the round under way, or of the one that begins with the next step."""
        return self._rounds.present().local_steps

    @property
    def bytes_sent(self) -> int:
        """Bytes that this rank sent to other workers so far, measured gradients among them."""
        return self._rounds.exchange.bytes_sent

    @property
    def bytes_saved(self) -> int:
        """Bytes that averaging the gradient at every step would have sent beyond those."""
        return self._rounds.memory.bytes_synchronous - self.bytes_sent

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
        self._rounds.memory.examples += num_examples

    def synchronize(self) -> None:
        """Ends the round under way now, on all workers; nothing where they have just averaged.

        Raises:
            RuntimeError: a newer ``LocalSGD`` averages these workers.
        """
        self._check_in_place()
        if self._rounds.memory.step_in_round:
            self._rounds.end_round()

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

    def _before_step(self, optimizer: Optimizer) -> None:
        if not self._stepped:
            self._trained.check("LocalSGD")
        self._rounds.before_step()

    def _after_step(self, optimizer: Optimizer) -> None:
        self._stepped.add(optimizer)
        if len(self._stepped) == len(each_of(self._optimizer)):
            self._stepped.clear()
            self._rounds.after_step()

    # --- what AdaptiveBatch reads -----------------------------------------------------------------------------------

    def engine(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        gradient_sync: GradientSync | None = None,
        scaler: GradScaler | None = None,
    ) -> LocalWorkers:
        """How ``AdaptiveBatch`` runs the model on all ranks while the workers step on their own.

        Args:
            model, optimizer: those that were given here.
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
        alone = PlainEngine(model, self.collectives)
        return LocalWorkers(engine_for(model, gradient_sync) if is_sharded(model) else alone, self._rounds)

    # --- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where in a round this worker is, what the outer optimizer and the compression remember, and the counts.

        Taken between steps. In the middle of a round, and with compression at any time, it is this rank's alone, as are
        then the model's and the optimizer's; every rank saves its own. Without ``average_state`` the optimizer's always
        is.
        """
        return {
            **self._rounds.memory.state_dict(self._rounds.workers.size, self._rounds.settings),
            "bytes_sent": self.bytes_sent,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where the state was taken; load the model's and the optimizer's after the construction too.

        Raises:
            ValueError: a state of a newer format, of another model or outer optimizer, or of another number of workers,
                where it is of the middle of a round or has compression errors in it.
        """
        self._rounds.memory = Memory.from_state_dict(
            state,
            num_workers=self._rounds.workers.size,
            pieces=self._rounds.replica.pieces(),
            settings=self._rounds.settings,
        )
        self._rounds.exchange.bytes_sent = state["bytes_sent"]


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
