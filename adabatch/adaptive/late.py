"""``LateNumbers``: what a step measured, read and decided upon one step later (``Measure(late=True)``)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from torch.optim import Optimizer

from adabatch.adaptive.options import Guard, Measure
from adabatch.adaptive.step import Step
from adabatch.batch.criteria import Criterion
from adabatch.batch.moments import GradientMoments
from adabatch.guards.finite import nonfinite_search
from adabatch.journal.writer import Journal, measurements
from adabatch.runtime.engines.engine import Engine
from adabatch.runtime.local_sgd.averaging import LocalSGD


class Numbers(NamedTuple):
    """What was measured of a step.

    Args:
        step: its number; None if nothing was measured.
        loss: mean loss.
        moments: of its gradient.
        finite: whether both are finite on all ranks.
    """

    step: int | None
    loss: float | None
    moments: GradientMoments | None
    finite: bool


NOTHING = Numbers(None, None, None, True)


def check_late(
    optimizer: Optimizer,
    criterion: Criterion,
    engine: Engine,
    local_sgd: LocalSGD | None,
    *,
    measure: Measure,
    guard: Guard,
) -> None:
    """Checks that the numbers of a step may be read after its update.

    Raises:
        ValueError: if not.
    """
    if not measure.late:
        return
    if guard.skip_nonfinite:
        raise ValueError(
            f"Measure(late=True) reads loss and gradient norm after the update, and "
            f"Guard(skip_nonfinite={guard.skip_nonfinite!r}) leaves out an update for them: give "
            f"Guard(skip_nonfinite=False), or leave late out"
        )
    if nonfinite_search(optimizer, guard.skip_nonfinite, engine) is not None:
        raise ValueError(
            "Measure(late=True) cannot be combined with a GradScaler and several optimizers, whose update is left out "
            "as a whole if a gradient is not finite: leave late out"
        )
    if criterion.needs.seconds:
        raise ValueError(
            f"{type(criterion).__name__} times steps when the host waits for the device, which Measure(late=True) is "
            f"there to avoid: leave late out"
        )
    if local_sgd is not None or engine.reduced != "backward" or not engine.collectives.fixed:
        raise ValueError(
            "Measure(late=True) is for plain models, DistributedDataParallel and FSDP2, and not for local SGD (which "
            "measures once per round), DeepSpeed and torchft: leave late out"
        )


class LateNumbers:
    """The numbers of the last measured step, until the step after it has ended, and the journal's line of that step.

    Args:
        journal: gets the line of a step once its numbers are there.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._step: Step | None = None  # measured, but not decided upon
        self._numbers: Numbers | None = None  # those of that step, or of a state that was loaded
        self._entry: dict[str, Any] | None = None  # its line, without them

    @property
    def waiting(self) -> bool:
        """Whether a step was measured whose numbers have not taken part in a decision yet."""
        return self._step is not None or self._numbers is not None

    def exchange(self, step: Step) -> Numbers:
        """The numbers of the step before, to decide upon at the end of ``step``; its own wait for the next one.

        Raises:
            RuntimeError: if a rank made a mistake in the step before; on all ranks.
        """
        self.read()
        if self._step is not None:
            self._step.check_read()
        numbers, self._numbers = self._numbers or NOTHING, None
        self._step = step if step.unread else None
        return numbers

    def write(self, entry: dict[str, Any], step: int) -> None:
        """Writes the line of a step: at once, or once its numbers are there."""
        if self._step is None or self._step.number != step:
            self._journal.write(entry)
            return
        self._entry = entry
        if not self._step.unread:  # read before the update was over
            self._write_entry()

    def read(self) -> None:
        """Waits for the numbers of the last measured step, if they were not read."""
        step = self._step
        if step is None or not step.unread:
            return
        step.read()
        self._numbers = Numbers(step.number, step.loss, step.moments, step.finite)
        self._write_entry()

    def read_if_there(self) -> None:
        """Reads the numbers if that needs no wait."""
        if self._step is not None and self._step.is_there:
            with suppress(RuntimeError):  # of a lost rank; the error that ends the loop is the one to show
                self.read()

    def close(self) -> None:
        """Nothing is decided any more: reads what is there, and writes the last line."""
        with suppress(RuntimeError):  # another rank is gone, and the sums with it
            self.read()
        self._write_entry()
        self._step = None

    def check_last(self) -> None:
        """Reads the numbers at the end of a loop, and raises what ranks told each other with them.

        Raises:
            RuntimeError: if a rank made a mistake in the last step; on all ranks.
        """
        self.read()
        if self._step is not None:
            self._step.check_read()

    def _write_entry(self) -> None:
        entry, self._entry = self._entry, None
        if entry is not None and self._step is not None:
            self._journal.write({**entry, **measurements(self._step.loss, self._step.moments)})

    # --- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any] | None:
        """The numbers that were not decided upon, as plain numbers; None if there are none. Waits for them."""
        self.read()
        if self._numbers is None:
            return None
        moments = self._numbers.moments
        return {**self._numbers._asdict(), "moments": None if moments is None else _plain(moments)}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Restores them. A step that was measured before belongs to the state that is replaced."""
        self._step = self._entry = self._numbers = None
        if state is not None:
            moments = state["moments"]
            self._numbers = Numbers(**{**state, "moments": None if moments is None else _moments(moments)})


def _plain(moments: GradientMoments) -> dict[str, Any]:
    layers = moments.layers
    return {
        **moments._asdict(),
        "layers": None if layers is None else {name: _plain(layer) for name, layer in layers.items()},
    }


def _moments(plain: Mapping[str, Any]) -> GradientMoments:
    layers = plain["layers"]
    return GradientMoments(
        **{**plain, "layers": None if layers is None else {name: _moments(layer) for name, layer in layers.items()}}
    )
