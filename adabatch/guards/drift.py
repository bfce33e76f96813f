"""Whether ranks still hold the same weights and plans, and which of them have drifted."""

from __future__ import annotations

from typing import Literal, Protocol

from torch import nn
from torch.optim import Optimizer

from adabatch.batch.plan import BatchPlan
from adabatch.runtime.collectives import Collectives
from adabatch.runtime.engines.copies import WHOLE, gather_held, groups_of, held_by_this_rank
from adabatch.runtime.engines.engine import Engine
from adabatch.runtime.observers.protocol import Moment, Phase, StepObserver
from adabatch.runtime.optimizers.step_hooks import host_value

AUTOMATIC = 1000
"""Default number of steps from one check to the next. A check takes about a fifth of the time of a small step
(4.8 M parameters, 512 tokens, on a CPU), so 0.02 % of a run, and less of larger steps."""


_ENDS = 10
"""Ends of loops that are checked in any case: together they take the time of two small steps at most."""

_BEFORE_THE_END = 20
"""Steps since the last check from which further ends are checked, for a hundredth of their time at most."""


class RanksDrifted(RuntimeError):
    """Ranks that should hold the same weights or plans do not; the message names them."""


class ComparedRun(Protocol):
    """The run whose plans are compared."""

    @property
    def plan(self) -> BatchPlan:
        """The plan of the next step."""
        ...

    def held(self) -> object:
        """What must be equal on all ranks beside the weights, compared by its ``repr``."""
        ...


def check_interval(asked: int | Literal["auto"] | None, engine: Engine) -> int | None:
    """Steps from one check to the next; None for no checks.

    Raises:
        ValueError: if checks are asked for, and the engine lets copies differ, as local SGD does.
    """
    if asked == "auto":
        return AUTOMATIC if engine.copies and engine.collectives.size > 1 else None
    if asked is not None and not engine.copies:
        raise ValueError(
            "check_every compares weights, which differ between the workers of local_sgd: leave one of the two out"
        )
    return asked


class DriftCheck(StepObserver):
    """Checks every ``every`` steps that no rank has drifted.

    Args:
        engine: says which ranks hold copies of the same weights.
        optimizer: whose learning rates are compared.
        run: whose plans are compared.
        every: number of steps between checks.
        observers: are told that a check begins.
    """

    def __init__(
        self, engine: Engine, optimizer: Optimizer, run: ComparedRun, *, every: int, observers: StepObserver
    ) -> None:
        self._engine = engine
        self._optimizer = optimizer
        self._run = run
        self._every = every
        self._observers = observers
        self._checked = 0  # the step before which the last check was made
        self._num_ends = 0  # of loops, that were checked

    def before(self, step: int) -> None:
        """Runs the check if it is due.

        Raises:
            RanksDrifted: on all ranks, if some have drifted.
        """
        if step % self._every == 0:
            self._check(step)

    def end(self, step: int) -> None:
        """The loop over the steps is over: runs the check if some steps have passed since the last one.

        Raises:
            RanksDrifted: on all ranks, if some have drifted.
        """
        # Else a run of less than `every` steps, or the last steps of any run, would end without a word. Not in each of
        # many short loops, where the checks would take a fifth of the time of small steps.
        due = step - self._checked >= min(_BEFORE_THE_END, self._every)
        if due or (step != self._checked and self._num_ends < _ENDS):
            self._num_ends += 1
            self._check(step)
            # what follows the loop may take any time
            self._observers.at(Phase.BETWEEN, Moment(step, self._run.plan))

    def _check(self, step: int) -> None:
        self._checked = step
        self._observers.at(Phase.DRIFT_CHECK, Moment(step, self._run.plan))
        # Learning rates too: ranks with different schedules drift in the next update, which is easier to find here.
        rates = [host_value(group["lr"]) for group in self._optimizer.param_groups]
        held = (self._run.held(), rates)
        check_same(self._engine.collectives, self._engine.model, plan=held, when=f"before step {step}")


def check_same(collectives: Collectives, model: nn.Module, *, plan: object, when: str) -> None:
    """Checks that all ranks hold the same plan, and that copies of the same weights have the same bits.

    If a model is sharded over all ranks, each weight exists once, and only the plans can be compared. If shards are
    replicated (HSDP), the copies of each shard are compared. It costs a pass over the weights, and 16 bytes where ranks
    hold whole copies that agree; else 24 bytes per rank, of all ranks on each of them.

    Args:
        collectives: the ranks.
        model: as it is trained.
        plan: what must be equal on all ranks, compared by its ``repr``.
        when: for the message, such as "before step 100".

    Raises:
        RanksDrifted: on all ranks, if some have drifted.
    """
    own = held_by_this_rank(model, plan)
    # Of 10,000 ranks the rows of all are 240 kB on each; if they are the same, one digest of them shows it.
    if own.shard == WHOLE and collectives.agree(own):
        return
    rows, copies = gather_held(collectives, own)
    compared = [
        ({rank: row[0] for rank, row in enumerate(rows)}, "plans"),
        *((held, "weights") for held in copies),
    ]
    found = [_apart(held, what) for held, what in compared if len(set(held.values())) > 1]
    if found:
        raise RanksDrifted(
            f"{when}, {'; '.join(found)}: go back to a checkpoint, and look for what only some ranks do (an update, a "
            f"load, a random draw) or have (another version of a library, a faulty device); if ranks may hold "
            f"different weights, give Guard(check_every=None)"
        )


def _apart(held: dict[int, float], what: str) -> str:
    """Which ranks differ from the majority; all of them if there is no majority."""
    largest, *others = groups_of(held)
    if 2 * len(largest) <= len(held):
        names = " and ".join(str(ranks)[1:-1] for ranks in (largest, *others))
        return f"ranks {names} hold different {what}, and there is no majority to say which are right"
    drifted = sorted(rank for ranks in others for rank in ranks)
    name = f"rank {drifted[0]} holds" if len(drifted) == 1 else f"ranks {str(drifted)[1:-1]} hold"
    return f"{name} other {what} than ranks {str(largest)[1:-1]}"
