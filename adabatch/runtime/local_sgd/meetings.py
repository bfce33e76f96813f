"""What the workers tell each other whenever they meet, and the errors if they have not done the same since.

Between two averages the workers do not communicate, so a mistake that only one of them makes (another learning rate, an
update that it leaves out) must be noticed when they meet. Every meeting sends the same few numbers, whatever it is for:
workers that meet for different things learn it from these numbers, and do not wait for each other.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import IntEnum
from itertools import chain
from typing import NamedTuple, NoReturn

from torch.optim import Optimizer

from adabatch.batch.plan import Progress
from adabatch.runtime.collectives import Collectives, Started
from adabatch.runtime.differences import rank_differences
from adabatch.runtime.local_sgd.exchange import Exchange
from adabatch.runtime.observers.trained_parameters import raise_first
from adabatch.runtime.optimizers.group_numbers import digest_of_numbers, numbers_of_groups, numbers_text, setting_name
from adabatch.runtime.optimizers.joined import each_of

_BITS = 24
"""Bits of the digest that ride on a gradient: in each such round a difference is missed once in 2^24."""

_CHANGED_BY_THE_BATCH = ("lr", "betas", "eps", "weight_decay")
"""Settings that are others while an update runs, and its own again afterwards."""


class LocalSteps:
    """What must be the same in the local steps of all workers: the settings of the optimizer when each step began.

    A setting that an optimizer changes itself, such as the distance that Prodigy estimates from a worker's own
    gradients, is not compared from the first such step on.

    Args:
        optimizer: of this worker, or several.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizers = each_of(optimizer)
        self._digests = [0] * len(self._optimizers)  # of all steps so far
        self._numbers: list[dict[tuple[int, str], list[float]]] = [
            numbers_of_groups(o.param_groups) for o in self._optimizers
        ]
        self._changes_itself: set[tuple[int, int, str]] = set()

    def before(self, optimizer: Optimizer) -> None:
        """One of the optimizers is about to step."""
        which = self._optimizers.index(optimizer)
        self._numbers[which] = self._now(which)
        # chained: one number tells at the next meeting of every step since the first, and none has to be kept
        self._digests[which] = digest_of_numbers(_flat(self._numbers[which]), self._digests[which])

    def after(self, optimizer: Optimizer) -> None:
        """One of the optimizers has stepped."""
        which = self._optimizers.index(optimizer)
        for (index, key), numbers in numbers_of_groups(optimizer.param_groups).items():
            if key not in _CHANGED_BY_THE_BATCH and self._numbers[which].get((index, key)) != numbers:
                self._changes_itself.add((which, index, key))

    def digest(self) -> int:
        """Of all steps so far."""
        return digest_of_numbers(self._digests)

    def digest_with_present(self) -> int:
        """Of all steps so far, and of the settings with which the next one would begin."""
        whole = [digest_of_numbers(_flat(self._now(which)), digest) for which, digest in enumerate(self._digests)]
        return digest_of_numbers(whole)

    def texts(self, *, present: bool) -> dict[str, str]:
        """The settings as an error shows them: the present ones, or those with which the last step began."""
        held = [self._now(which) for which in range(len(self._optimizers))] if present else self._numbers
        return {
            setting_name(which, index, key): numbers_text(numbers)
            for which, settings in enumerate(held)
            for (index, key), numbers in settings.items()
            if (which, index, key) not in self._changes_itself
        }

    def _now(self, which: int) -> dict[tuple[int, str], list[float]]:
        held = numbers_of_groups(self._optimizers[which].param_groups)
        if self._changes_itself:
            return {at: numbers for at, numbers in held.items() if (which, *at) not in self._changes_itself}
        return held


class Purpose(IntEnum):
    """What workers meet for."""

    BEGIN, AVERAGE, LEAVE, SAVE, LOAD, MAKE, CLOSE = range(7)


_DOES = {
    Purpose.BEGIN: "begins a round",
    Purpose.AVERAGE: "reaches an average",
    Purpose.LEAVE: "leaves the block",
    Purpose.SAVE: "saves a checkpoint",
    Purpose.LOAD: "loads a checkpoint",
    Purpose.MAKE: "makes a Checkpoints",
    Purpose.CLOSE: "closes its Checkpoints",
}


class Place(NamedTuple):
    """Where a worker stands when it meets the others; the same for all if nothing is wrong.

    Args:
        rounds, steps: how many it has ended.
        fragment: which it averages.
        local_steps: of the present round.
        by_gradient: whether the round averages the gradient.
        lr: its learning rate, if something reads it.
    """

    rounds: int
    steps: int
    fragment: int = 0
    local_steps: int = 0
    by_gradient: bool = False
    lr: float = 0.0


# Numbers only, whatever they count: a row travels as float64 in one small reduction, which holds a digest exactly.
class Row(NamedTuple):
    """What one worker tells.

    Args:
        weight: in an average.
        seconds: of a step; 0 if they are not timed.
    """

    weight: float
    seconds: float
    mistake: float
    purpose: float
    rounds: float
    steps: float
    fragment: float
    local_steps: float
    by_gradient: float
    lr: float
    updates: float
    examples: float
    missed: float
    digest: float

    @property
    def present_round(self) -> tuple[float, ...]:
        """What must be the same in a round of all workers."""
        return self.local_steps, self.by_gradient, self.lr

    @property
    def past(self) -> tuple[float, ...]:
        """What must be the same in all steps since they met."""
        return self.updates, self.examples, self.missed, self.digest


class Meetings:
    """The meetings of one worker with the others.

    Attributes:
        applied: what the updates consumed so far, if ``AdaptiveBatch`` counts it.
        num_missed: steps so far whose ``optimizer.step()`` was forgotten, as far as ``AdaptiveBatch`` has seen it.

    Args:
        optimizer: of this worker.
        exchange: with the other workers.
        workers: the ranks that average with each other.
        everyone: all ranks of all workers.
        by_speed: whether workers take steps of their own number, which are then not compared.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        exchange: Exchange,
        *,
        workers: Collectives,
        everyone: Collectives,
        by_speed: bool = False,
    ) -> None:
        self.applied = Progress()
        self.num_missed = 0
        self.local_steps = LocalSteps(optimizer)
        self.place = Place(0, 0)  # for the message of a failed exchange
        self._exchange = exchange
        self._workers = workers
        self._everyone = everyone
        self._by_speed = by_speed
        self._mistake: str | None = None

    # --- mistakes of this worker ------------------------------------------------------------------------------------

    def note(self, mistake: str) -> None:
        """Keeps a mistake of this worker, which is raised on all workers when they meet. The first one counts.

        Raises:
            RuntimeError: at once, if there are no others.
        """
        if self._workers.size == 1:
            raise RuntimeError(mistake)
        self._mistake = self._mistake or mistake

    def check_noted(self) -> None:
        """Raises the mistake of this worker, if there is one, before its state is saved.

        Raises:
            RuntimeError: see there.
        """
        if self._mistake is not None:
            raise RuntimeError(self._mistake)

    # --- in an exchange of their own --------------------------------------------------------------------------------

    def begin(self, place: Place) -> None:
        """All ranks of all workers are about to begin a round.

        Raises:
            ValueError: on all of them, if they begin different ones.
            RuntimeError: on all of them, if they have made different steps since they met.
        """
        # all ranks of all workers: those that share a sharded model begin its round together
        if self._everyone.size > 1:
            row = self._row(0.0, Purpose.BEGIN, place, self.local_steps.digest_with_present())
            with self.reporting(place):
                rows = self._everyone.gather_of(*row)
            self._check([Row(*each) for each in rows], self._everyone)

    def come(self, place: Place, purpose: Purpose) -> None:
        """This worker comes for something that all do, and that is none of a round.

        Raises:
            RuntimeError: as in ``begin``.
        """
        self.told(self.tell(0.0, place, purpose))

    def tell(self, count: float, place: Place, purpose: Purpose = Purpose.AVERAGE, *, seconds: float = 0.0) -> Started:
        """Starts to tell the other workers where this one stands.

        Args:
            count: its weight in the average.
            place: see there.
            purpose: what it comes for.
            seconds: of a step of this worker; 0 if they are not timed.
        """
        with self.reporting(place):
            return self._exchange.tell(*self._row(count, purpose, place, self.local_steps.digest(), seconds))

    def told(self, started: Started) -> list[Row]:
        """Waits for what the workers tell.

        Raises:
            RuntimeError: on all of them, if they come for different things or from different steps, if they have made
                different steps, or if one has made a mistake.
        """
        with self.reporting(self.place):
            rows = [Row(*row) for row in self._exchange.told(started)]
        self._check(rows, self._workers)
        return rows

    # --- on the gradient --------------------------------------------------------------------------------------------

    def bits(self, place: Place, purpose: Purpose = Purpose.AVERAGE) -> list[float]:
        """What rides on a gradient that is averaged: this worker's digest, as numbers that any data type holds.

        Args:
            place: see there.
            purpose: what this worker comes for; the gradient is none of a step if that is no average.
        """
        self.place = place
        counts = self.applied.steps, self.applied.examples, self.num_missed
        steps_now = purpose == Purpose.AVERAGE
        # a worker that comes for something else takes no step with its present settings
        steps = self.local_steps.digest_with_present() if steps_now else self.local_steps.digest()
        digest = digest_of_numbers([steps, *counts, purpose])
        ones = [float(not steps_now), *(float(digest >> place & 1) for place in range(_BITS))]
        # Of each bit its opposite, too: only if all agree, one of the two is zero in the sum, whatever is rounded.
        return [*ones, *(1 - one for one in ones), float(self._mistake is not None)]

    def check_bits(self, means: Sequence[float], purpose: Purpose = Purpose.AVERAGE) -> None:
        """Checks the means of the bits of all workers.

        Args:
            means: of each bit.
            purpose: as for ``bits``.

        Raises:
            RuntimeError: on all of them, if they differ, or if one has made a mistake.
        """
        half = len(means) // 2
        ones, zeros, mistake = means[:half], means[half:-1], means[-1]
        if mistake:
            raise_first(self._mistake, self._workers)
        differ = [bool(one and zero) for one, zero in zip(ones, zeros, strict=True)]
        if any(differ):
            row = self._row(0.0, purpose, self.place, 0)
            _check_purposes([Row(*each) for each in self._workers.gather_of(*row)])
            self._raise_difference(self._workers, present=purpose == Purpose.AVERAGE)

    # --- errors -----------------------------------------------------------------------------------------------------

    def _row(self, count: float, purpose: Purpose, place: Place, digest: int, seconds: float = 0.0) -> Row:
        self.place = place
        counts = self.applied.steps, self.applied.examples, self.num_missed
        return Row(count, seconds, *map(float, (self._mistake is not None, purpose, *place, *counts, digest)))

    def _check(self, rows: Sequence[Row], ranks: Collectives) -> None:
        first = rows[0]
        # From the cause to its effects: a worker that made a mistake often differs in all that is compared below, too.
        if any(row.mistake for row in rows):
            raise_first(self._mistake, ranks)
        _check_purposes(rows)
        if self._by_speed:
            self._check_rounds(rows)
            return
        if any((row.rounds, row.steps, row.fragment) != (first.rounds, first.steps, first.fragment) for row in rows):
            places = "; ".join(f"worker {index}: {row.steps:.0f}" for index, row in enumerate(rows))
            raise RuntimeError(f"workers reached the average after different numbers of steps ({places}): {_ALL_MUST}")
        if any(row.present_round != first.present_round for row in rows):
            _raise_rounds(rows)
        if any(row.past != first.past for row in rows):
            self._raise_difference(ranks, present=first.purpose == Purpose.BEGIN)

    def _check_rounds(self, rows: Sequence[Row]) -> None:
        """If workers take steps of their own number: only their rounds can be compared."""
        first = rows[0]
        if any((row.rounds, row.fragment) != (first.rounds, first.fragment) for row in rows):
            rounds = "; ".join(f"worker {index}: {row.rounds:.0f}" for index, row in enumerate(rows))
            raise RuntimeError(f"workers reached the average after different numbers of rounds ({rounds})")
        # they begin a round with one number of steps, of which each then takes its own share
        alike = [row if row.purpose == Purpose.BEGIN else row._replace(local_steps=0) for row in rows]
        if any(row.present_round != alike[0].present_round for row in alike):
            _raise_rounds(rows)

    def _raise_difference(self, ranks: Collectives, *, present: bool) -> NoReturn:
        mine = {
            "the number of applied updates": repr(self.applied.steps),
            "their number of examples": repr(self.applied.examples),
            "the number of steps without optimizer.step()": repr(self.num_missed),
            **self.local_steps.texts(present=present),
        }
        held = [json.loads(sent) for sent in ranks.gather_bytes(json.dumps(mine).encode())]
        told = rank_differences(held, "worker") or (
            "in a step since they met, settings of their optimizers differed, which are the same again now"
        )
        raise RuntimeError(
            f"the workers have not made the same steps (after step {self.place.steps}): {told}. Look for what only "
            f"some of them do: step a scheduler (such as ReduceLROnPlateau on a loss of their own), call leave_out(), "
            f"or leave optimizer.step() out"
        )

    @contextmanager
    def reporting(self, place: Place) -> Iterator[None]:
        """Explains the error of a failed exchange."""
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"local SGD could not finish round {place.rounds + 1} (step {place.steps}): a worker ended, which its "
                f"own output explains, or the network failed; start all workers again from the last checkpoint "
                f"({error})"
            ) from error


_ALL_MUST = "all must call optimizer.step() equally often (a GradScaler leaves calls out)"

_ALL_SAVE = (
    "All must save, load and close after the same step, and not under `if rank == 0`; with by_speed=True after the "
    "same round, when local.step_in_round is 0"
)


def _check_purposes(rows: Sequence[Row]) -> None:
    purposes = {Purpose(int(row.purpose)) for row in rows}
    if len(purposes) == 1:
        return
    doing = "; ".join(
        f"worker {index} {_DOES[Purpose(int(row.purpose))]} after {row.steps:.0f} steps"
        for index, row in enumerate(rows)
    )
    steps_only = purposes <= {Purpose.BEGIN, Purpose.AVERAGE, Purpose.LEAVE}
    raise RuntimeError(f"the workers are doing different things: {doing}. {_ALL_MUST if steps_only else _ALL_SAVE}")


def _raise_rounds(rows: Sequence[Row]) -> NoReturn:
    rounds = "; ".join(f"worker {index}: {row.local_steps:.0f} steps at {row.lr:.6g}" for index, row in enumerate(rows))
    must = "their learning rates must be the same at every step"
    if rows[0].purpose == Purpose.BEGIN:
        raise ValueError(f"the workers begin different rounds ({rounds}): {must}")
    raise RuntimeError(f"the workers are in rounds of different lengths or learning rates ({rounds}): {must}")


def _flat(settings: Mapping[tuple[int, str], list[float]]) -> Iterator[float]:
    return chain.from_iterable(settings.values())
