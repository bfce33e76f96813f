"""``LocalSGD``: workers step on their own, and average every ``sync_every`` steps."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self
from weakref import finalize

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from adabatch.arguments import checked_but
from adabatch.batch.plan import Duration
from adabatch.runtime.collectives import Collectives, collectives_of, workers_of
from adabatch.runtime.engines.choice import engine_for
from adabatch.runtime.engines.engine import GradientSync
from adabatch.runtime.engines.plain import PlainEngine
from adabatch.runtime.local_sgd.compression import Compression
from adabatch.runtime.local_sgd.engine import LocalWorkers
from adabatch.runtime.local_sgd.meetings import Purpose
from adabatch.runtime.local_sgd.memory import Memory
from adabatch.runtime.local_sgd.outer import Average, OuterOptimizer
from adabatch.runtime.local_sgd.periods import Period
from adabatch.runtime.local_sgd.probe import Spread
from adabatch.runtime.local_sgd.replica import Replica
from adabatch.runtime.local_sgd.rounds import Rounds
from adabatch.runtime.local_sgd.settings import AverageWeights, LocalSGDSettings, MeasuredStep, period_of
from adabatch.runtime.observers.trained_parameters import TrainedParameters
from adabatch.runtime.optimizers.joined import each_of, joined, without_rate
from adabatch.runtime.optimizers.ownership import remove_all, take_over
from adabatch.runtime.optimizers.step_hooks import hook_step
from adabatch.runtime.wrappers.fsdp2 import is_sharded

_log = logging.getLogger("adabatch")

_REMOVED = (
    "this LocalSGD has left its `with` block, or was removed, so that the workers would drift apart: run the loop "
    "inside the block, or make a new LocalSGD"
)
_REPLACED = "this LocalSGD was replaced by a newer one on the same optimizer or model: use that one"


class LocalSGD:
    """Local SGD around your own loop: workers step on their own, and average every ``sync_every`` steps.

        with LocalSGD(model, optimizer, sync_every=8) as local:
            batches = AdaptiveBatch(model, optimizer, NormTest(eta=0.8), local_sgd=local, ...)
            for step in batches.steps(order):
                for x, y in step:
                    step.backward(loss_fn(model(x), y))
                optimizer.step(); optimizer.zero_grad()

    The constructor gives all workers the weights of the first. From then on, and as long as the object exists, it works
    with any loop that calls ``optimizer.step()``. A second one on the same optimizer replaces the first. A round is
    ``sync_every`` steps; the last of them averages parameters and real-valued buffers. Leaving the block averages once
    more if a round is unfinished. After an exception nothing is sent, since other ranks may be gone.

    A round of one step that ends in a plain average (``sync_every=1``, and the warm-up) averages the gradient before
    the step instead. For every optimizer this is the same as ``DistributedDataParallel``. With ``AdaptiveBatch`` the
    gradient is averaged at the end of the inner loop, as by DDP; without it, at the beginning of ``optimizer.step()``,
    that is, after you clip.

    Args:
        model: a plain model, of which each worker holds a copy; or one that ``fully_shard`` sharded over the ranks of a
            worker (a node), with ``workers`` the other dimension of the mesh.
        optimizer: each ``step()`` is a local step, and its parameters are averaged. Or a list of optimizers, whose
            steps together are one local step.
        sync_every: number of local steps in a round: an integer, or ``Fixed``, ``Table`` or ``Quadratic``.
        fragments: into how many parts of nearly the same size to deal the model's layers. Each is averaged every
            ``sync_every`` steps, at a step of its own, so that ``fragments`` times fewer bytes are sent at once; the
            last one at the end of the round.
        overlap: how many steps an average may take. It is started after the last step of a round as always, from the
            parameters and the anchor of that step, and applied that many steps later, mixed with the parameters that
            have moved on since. Must be below ``sync_every``. With compression, whose second half begins half way, at
            least 2. 0 waits.
        mix: the share of the worker's own parameters when a late average is applied, in [0, 1): ``mix own + (1 - mix)
            average``. 0 forgets the steps during the exchange. The source compares 0 and 0.5 (figure 8).
        warmup: how long to average at every step first (post-local SGD). The outer optimizer and compression are off
            until it is over.
        outer: the outer optimizer: ``Average``, ``Nesterov`` (DiLoCo) or ``SlowMo``.
        average_state: whether to average the optimizer's state too. This sends as many bytes again for momentum, and
            twice as many for Adam.
        compression: encoding of the exchange: "none", "bf16" or "int8". The latter two send the change since
            the round began, with error feedback.
        weights: "examples" weighs each worker in the average by the examples that it consumed in the round, if they are
            counted (``AdaptiveBatch`` counts them, or tokens if it weighs by tokens; otherwise call ``count``).
            "equal" gives all workers the same weight.
        measure: when ``AdaptiveBatch`` measures the gradient: at the "first" local step of a round, when all workers
            hold the same parameters, or at the "last", as in Lau et al. 2024, when their drift counts as noise.
        spread: which parts are compared: "across" compares those of all workers, which needs the mean of their
            gradients (as many bytes as one average). "within" compares those of each worker separately, which sends
            only a few numbers, and needs at least two micro-batches on each worker.
        by_speed: whether slower workers take fewer local steps in a round, so that all reach the average at the same
            time. ``sync_every`` is then the number of steps of the fastest worker. Let the loop end after a number of
            rounds, not of steps. Not with ``AdaptiveBatch``, which gives all workers the same steps, nor with
            ``overlap``.
        workers: process group or one-dimensional mesh of the ranks that average with each other; by default all ranks.

    Raises:
        ValueError: if a number is out of its range, there are more fragments than steps in a round or layers in the
            model, ``overlap`` comes with ``average_state`` or ``by_speed``, ``by_speed`` with a period that changes, a
            word is unknown, the model is in ``DistributedDataParallel``, a sharded model has no ``workers`` or they
            hold other shards, the optimizer belongs to another model, or the settings differ between ranks.
        TypeError: if the optimizer, a duration, the period or the outer optimizer is of another type.

    Source: Stich 2019 (local SGD); Lin et al. 2020 (post-local SGD); Lau, Li, Xu, Liu, Kolar 2024, arXiv:2406.13936
    (adaptive local batch sizes); Douillard et al. 2025, arXiv:2501.18512 (fragments, overlap); Liu et al. 2024,
    arXiv:2401.09135 (local steps by speed).
    """

    @checked_but("optimizer", "sync_every", "outer", "warmup")
    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        sync_every: int | Period,
        fragments: int = 1,
        overlap: int = 0,
        mix: float = 0.5,
        warmup: Duration | None = None,
        outer: OuterOptimizer | None = None,
        average_state: bool = False,
        compression: Compression = "none",
        weights: AverageWeights = "examples",
        measure: MeasuredStep = "first",
        spread: Spread = "across",
        by_speed: bool = False,
        workers: ProcessGroup | DeviceMesh | None = None,
    ) -> None:
        settings = LocalSGDSettings(
            period=period_of(sync_every),
            outer=Average() if outer is None else outer,
            warmup=warmup,
            average_state=average_state,
            compression=compression,
            weights=weights,
            measure=measure,
            spread=spread,
            fragments=fragments,
            overlap=overlap,
            mix=mix,
            by_speed=by_speed,
        )
        optimizer = joined(optimizer)
        self._model, self._optimizer = model, optimizer
        replica = Replica(model, optimizer)
        group, node = _who(model, workers, replica.device)
        self._rounds = Rounds(settings, replica, optimizer, workers=group, node=node)
        # before anything else is sent: ranks with other periods would wait for each other in different exchanges
        words = ", ".join(settings.texts().values())
        if not self._rounds.everyone.agree(words):
            raise ValueError(
                f"the ranks were given different settings of local SGD (this one: {words}), and would average at "
                f"different steps: give all ranks the same"
            )
        kind = without_rate(optimizer)
        if kind is not None and not settings.without_rate:
            raise ValueError(
                f"{kind} sets its learning rate itself (lr=None), but the period or the outer optimizer reads it: use "
                f"a number of steps as sync_every and outer=Average(), or give the optimizer a learning rate"
            )
        self._trained = TrainedParameters(model, optimizer)
        self._ended: str | None = None  # why nothing is averaged any more
        # On the parameters too: two objects on different optimizers of one model would average it twice.
        take_over(self, [*each_of(optimizer), *replica.parameters], kind="LocalSGD")
        # All workers begin with the weights of the first, as DDP does it: with different seeds the average would be
        # meaningless.
        for tensor in replica.everything():
            group.copy_from_first(tensor)
        # last, so that a constructor that raises leaves no hook on the optimizer
        self._handles = hook_step(optimizer, self._before_step, self._after_step)
        self._dropped = finalize(self, _warn_if_apart, self._rounds)

    @property
    def collectives(self) -> Collectives:
        """All ranks of all workers."""
        return self._rounds.everyone

    @property
    def settings(self) -> Mapping[str, str]:
        """What it was given, as text by name."""
        return self._rounds.settings.texts()

    # --- what a log or a test reads ---------------------------------------------------------------------------------

    @property
    def rounds(self) -> int:
        """Number of rounds so far, in each of which every fragment was averaged once; including the warm-up."""
        return self._rounds.memory.rounds

    @property
    def steps(self) -> int:
        """Number of local steps so far."""
        return self._rounds.memory.steps

    @property
    def step_in_round(self) -> int:
        """Number of local steps in the present round so far; at 0 all workers hold the same parameters, if there is
        one fragment."""
        return self._rounds.memory.step_in_round

    @property
    def sync_every(self) -> int:
        """Number of local steps in the present round, or in the one that the next step begins."""
        return self._rounds.present().local_steps

    @property
    def bytes_sent(self) -> int:
        """Bytes that this rank has sent to other workers so far, including gradients that were measured."""
        return self._rounds.exchange.traffic.bytes_sent

    @property
    def seconds_waited(self) -> float:
        """Seconds in which this rank has waited for the exchange with other workers so far. On an accelerator its
        stream waits, and these are the seconds of the host."""
        return self._rounds.exchange.traffic.seconds_waited

    @property
    def bytes_saved(self) -> int:
        """Bytes that averaging the gradient at every step would have sent in addition to those."""
        return self._rounds.memory.bytes_synchronous - self.bytes_sent

    # --- the loop ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and self._ended == _REMOVED:
                # nothing is averaged any more, but a worker that did not remove its own is told
                self._rounds.come(Purpose.LEAVE)
            elif kind is None:
                self._check_in_place()
                self._rounds.leave()
        finally:
            self.remove()

    def count(self, num_examples: float) -> None:
        """Counts examples (or tokens) that this rank consumed; ``AdaptiveBatch`` does it by itself."""
        self._rounds.memory.examples += num_examples

    def synchronize(self) -> None:
        """Averages everything now, on all workers, and ends the round; does nothing if they have just done so.

        Raises:
            RuntimeError: if a newer ``LocalSGD`` has replaced this one, or it was removed.
        """
        self._check_in_place()
        self._rounds.end_round()

    def meet(self, purpose: Purpose) -> None:
        """Waits until all workers come for the same; ``Checkpoints`` asks for it.

        Raises:
            RuntimeError: on all workers, if others take steps, or have made other steps.
        """
        self._rounds.come(purpose)

    def remove(self) -> None:
        """Removes the hooks from the optimizer. Nothing is averaged any more."""
        # the first reason stays: an object that was replaced leaves its block, too
        self._ended = self._ended or _REMOVED
        self._dropped.detach()
        remove_all(self._handles)

    def give_way(self) -> None:
        """Stops averaging, because a newer object averages these workers."""
        self._ended = _REPLACED
        self.remove()

    def _check_in_place(self) -> None:
        if self._ended is not None:
            raise RuntimeError(self._ended)

    def _before_step(self, optimizer: Optimizer, _: object) -> None:
        # Once per update: several optimizers make one local step.
        changes = None if self._rounds.in_step else self._trained.changes("LocalSGD")
        if changes is not None:
            self._rounds.meetings.note(changes)
        self._rounds.before_step(optimizer)

    def _after_step(self, optimizer: Optimizer) -> None:
        self._rounds.after_step(optimizer)

    # --- what AdaptiveBatch reads -----------------------------------------------------------------------------------

    def engine(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        gradient_sync: GradientSync | None = None,
        scaler: GradScaler | None = None,
    ) -> LocalWorkers:
        """The engine with which ``AdaptiveBatch`` runs the model while the workers step on their own.

        Args:
            model, optimizer: those that this object was given.
            gradient_sync: for the ranks of a sharded worker.
            scaler: must be None.

        Raises:
            ValueError: if model or optimizer differ, a gradient scaler is given, or the workers step by their speed.
        """
        if self._rounds.settings.by_speed:
            raise ValueError(
                "by_speed=True gives the workers different numbers of steps, and AdaptiveBatch the same plans and the "
                "same progress: use it in a loop of your own, or leave it out"
            )
        if scaler is not None:
            raise ValueError(
                "local SGD cannot be combined with a GradScaler: each worker would leave out different updates, and "
                "reach the average after different numbers of steps. Use bfloat16, which needs no scaler"
            )
        self._check_in_place()
        if model is not self._model or {*each_of(optimizer)} != {*each_of(self._optimizer)}:
            raise ValueError(
                "local_sgd belongs to another model or optimizer: give AdaptiveBatch and LocalSGD the same"
            )
        # Not by engine_for(), which refuses a plain model on several processes: here nothing is to reduce its
        # gradients.
        alone = PlainEngine(model, self.collectives)
        inner = engine_for(model, gradient_sync) if is_sharded(model) else alone
        return LocalWorkers(inner, self._rounds, check=self._check_in_place)

    # --- state ------------------------------------------------------------------------------------------------------

    def __getstate__(self) -> Any:
        raise TypeError(
            "a LocalSGD cannot be copied or pickled, since it has hooks on an optimizer and groups of ranks: save its "
            "state_dict(), and load it into a new one"
        )

    def state_dict(self) -> dict[str, Any]:
        """The place in the round, the state of the outer optimizer and the compression, and the counts. Averages that
        are under way are waited for, and saved to be applied when they are due.

        Call it between steps. In the middle of a round, and always with compression, the state belongs to this rank
        only, and so do those of the model and the optimizer: each rank must save its own. Without ``average_state``,
        that of the optimizer always does.
        """
        return {
            **self._rounds.state_dict(),
            "bytes_sent": self.bytes_sent,
            "seconds_waited": self.seconds_waited,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where the state was taken. Load the states of model and optimizer after the construction, too.

        Raises:
            ValueError: if the state has a newer format, or is that of another model or outer optimizer; or that of
                another number of workers, if it was taken in the middle of a round or holds compression errors.
        """
        # replaced as a whole, once it was read without an error: half of two states would be worse than either
        self._rounds.averages.memory = Memory.from_state_dict(
            state,
            num_workers=self._rounds.workers.size,
            dealt=self._rounds.dealt,
            pieces=self._rounds.replica.pieces(),
            settings=self._rounds.settings,
        )
        # counts of the run, not of this process
        traffic = self._rounds.exchange.traffic
        traffic.bytes_sent, traffic.seconds_waited = state["bytes_sent"], state["seconds_waited"]


def _warn_if_apart(rounds: Rounds) -> None:
    """Warns, when a ``LocalSGD`` is dropped or the process ends, of workers that were not averaged last."""
    if rounds.workers.size > 1 and rounds.memory.apart:
        _log.warning(
            "the workers of LocalSGD hold different parameters at its end: the last %d step(s) were not averaged. Run "
            "the loop inside `with LocalSGD(...)`, or call synchronize() after it",
            rounds.memory.step_in_round,
        )


def _who(
    model: nn.Module, place: ProcessGroup | DeviceMesh | None, device: torch.device
) -> tuple[Collectives, Collectives]:
    """The workers, and the ranks that share this worker's model."""
    if not is_sharded(model):
        # a worker of one rank, which shares its model with nobody
        return workers_of(place, device=device), Collectives(device=device)
    node = collectives_of(model)
    if place is None:
        raise ValueError(
            "the model is sharded, so LocalSGD needs to know which ranks average with each other: shard it over one "
            'dimension of a mesh, fully_shard(model, mesh=mesh["shard"]), and give the other dimension, '
            'LocalSGD(..., workers=mesh["node"])'
        )
    workers = workers_of(place, device=device)
    # This rank is in both, and no other may be.
    if len(workers.members & node.members) > 1:
        raise ValueError(
            f"ranks {sorted(workers.members & node.members)} average with each other but hold different shards of the "
            f"model: give workers= the dimension of the mesh over which the model is not sharded"
        )
    return workers, node
