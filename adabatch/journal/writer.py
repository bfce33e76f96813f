"""The journal: one JSON line per step, with what was measured, what the criterion wanted, the decision and its reason.

An evaluation has a line of its own, without a ``plan``: ``evaluation`` holds its numbers by name, ``step`` and
``examples`` what was consumed before it.

For a probed step, ``moments`` holds noise, signal, their ratio, and the squared norms and sizes behind them; also
``noise_along`` if inner products were measured, ``noise_at_quantile`` if coordinates were, and the ``norm`` if it is
not the Euclidean one. With ``Measure(layers=)``, ``layers`` holds noise, signal and their ratio for each layer by its
name; the noises add up to that of the whole model, and so do the signals.

``run`` identifies the run: a token that is made when a run begins, and saved in its checkpoints. With it a reader can
distinguish two runs in one file.

``wanted`` is the batch at which the criterion comes to rest, ``low`` and ``high`` are its one-sided bounds, and
``freedom`` is their number of degrees of freedom, pooled over the probes in the average.

With ``Measure(late=True)``, ``decided_by`` is the number of the step whose measurement led to the decision: an earlier
one than that of the line, or null if none did.

Lines contain neither wall time nor the machine, so the journals of two equal runs are equal except for that token. The
exception is a criterion that reads step times (`Goodput`): ``seconds`` is the recent time of a step, and ``timed_plan``
the plan of that step. A time is known one measured step late, so after a change it belongs to another plan than that of
its line. Numbers that are not finite are null.
"""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from torch import Tensor

from adabatch.arguments import require, shown
from adabatch.batch.averages import Averages
from adabatch.batch.control import Decision
from adabatch.batch.moments import EUCLIDEAN, GradientMoments
from adabatch.batch.plan import BatchPlan, Progress
from adabatch.journal.parts import PART_BYTES, cut, last_token, rotate

LINE_FORMAT = 1

_log = logging.getLogger("adabatch")


@runtime_checkable
class JournalSink(Protocol):
    """An object that also gets the lines of a journal, such as a tracker (``adabatch.integrations.trackers``)."""

    def write(self, entry: Mapping[str, Any]) -> None:
        """Takes one line, in which numbers that are not finite are None. Called on the first rank only."""
        ...

    def close(self) -> None:
        """Writes what is buffered; called when the run's ``AdaptiveBatch`` is removed."""
        ...


JournalTarget: TypeAlias = str | Path | JournalSink
"""Where lines go: a JSONL file, or a sink."""


def line(
    *,
    plan: BatchPlan,
    num_examples: int,
    before: Progress,
    loss: float | None,
    moments: GradientMoments | None,
    averages: Averages,
    decision: Decision,
    timed: tuple[BatchPlan, float] | None = None,
) -> dict[str, Any]:
    """The journal's entry at the end of a step; the learning rate is added when the update is applied.

    Args:
        plan: the plan of the step.
        num_examples: its actual number of examples.
        before: what was consumed when it began.
        loss: its mean loss; None if it was not measured.
        moments: its measurement; None if it was not probed.
        averages: the control's averages, including this step.
        decision: the plan of the next step, and the reason.
        timed: a plan and the seconds that a step of it took; None if nothing was timed.
    """
    asked = decision.estimate
    return {
        "format": LINE_FORMAT,
        "step": before.steps,
        "examples": before.examples,
        "plan": _plan(plan, num_examples),
        **measurements(loss, moments),
        "averages": None
        if averages.weight == 0
        else {"noise": averages.noise, "signal": averages.signal, "noise_scale": averages.noise_scale},
        "wanted": None if asked is None else asked.wanted,
        "low": None if asked is None else asked.low,
        "high": None if asked is None else asked.high,
        **({} if asked is None or asked.freedom is None else {"freedom": asked.freedom}),
        "next": decision.plan.global_batch_size,
        "reason": str(decision.reason),
        **({} if timed is None else _timed(*timed)),
    }


def measurements(loss: float | None, moments: GradientMoments | None) -> dict[str, Any]:
    """The part of a line that says what was measured of its step."""
    return {
        "loss": loss,
        "moments": None if moments is None else _measured(moments),
        "norms": None if moments is None else {"l2": _l2(moments), "l1": moments.grad_l1},
        **({} if moments is None or moments.layers is None else {"layers": _layers(moments.layers)}),
    }


def _plan(plan: BatchPlan, num_examples: int) -> dict[str, int]:
    return {
        "micro_batch_size": plan.micro_batch_size,
        "accumulation_steps": plan.accumulation_steps,
        "dp_size": plan.dp_size,
        "global_batch_size": num_examples,  # what the step held; its plan may have asked for more
    }


def _timed(plan: BatchPlan, seconds: float) -> dict[str, Any]:
    return {"seconds": seconds, "timed_plan": _plan(plan, plan.global_batch_size)}


def evaluation_line(metrics: Mapping[str, Any], after: Progress) -> dict[str, Any]:
    """The journal's entry of an evaluation.

    Args:
        metrics: numbers by name, such as ``{"loss": 0.31, "accuracy": 0.92}``; also tensors and arrays of one element.
        after: what was consumed before it.

    Raises:
        ValueError: if there are none, or a name is empty.
        TypeError: if a name is not a string, or a value is not a number.
    """
    if not metrics:
        raise ValueError('an evaluation needs at least one number by name, such as {"loss": 0.31}, got none')
    return {
        "format": LINE_FORMAT,
        "step": after.steps,
        "examples": after.examples,
        "evaluation": {_checked_name(name): _checked_number(name, value) for name, value in metrics.items()},
    }


def _checked_name(name: Any) -> str:
    if not isinstance(name, str):
        raise TypeError(f"the name of a metric must be a string, got {name!r}")
    if not name:
        raise ValueError("the name of a metric must not be empty")
    return name


def _checked_number(name: str, value: Any) -> float:
    try:
        # float() would take "0.3"
        if isinstance(value, str):
            raise TypeError
        return float(value.item() if isinstance(value, Tensor | np.ndarray) else value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"the metric {name!r} must be one number, got {value!r:.80}") from error


def _measured(moments: GradientMoments) -> dict[str, Any]:
    """The numbers of a probed step, including those that only some probes measure."""
    norm = None if moments.norm == EUCLIDEAN else moments.norm
    some = {"noise_along": moments.noise_along, "noise_at_quantile": moments.noise_at_quantile, "norm": norm}
    return {
        **_ratio(moments),
        "part_sq": moments.part_sq,
        "part_size": moments.part_size,
        "grad_sq": moments.grad_sq,
        "num_examples": moments.num_examples,
        "num_parts": moments.num_parts,
        **{name: value for name, value in some.items() if value is not None},
    }


def _l2(moments: GradientMoments) -> float | None:
    """The Euclidean norm of the gradient, even if the noise was measured in another norm."""
    if moments.norm != EUCLIDEAN:
        return moments.grad_l2
    # A mean of inner products with a gradient of nearly zero may be negative.
    return math.sqrt(moments.grad_sq) if moments.grad_sq >= 0 else math.nan


def _layers(layers: Mapping[str, GradientMoments]) -> dict[str, Any]:
    return {name: _ratio(moments) for name, moments in layers.items()}


def _ratio(moments: GradientMoments) -> dict[str, Any]:
    return {"noise": moments.noise, "signal": moments.signal, "noise_scale": moments.noise_scale}


class Journal:
    """Appends lines to a JSONL file; each is complete when ``write`` returns, and no file stays open.

    Once the file has 256 MiB, it is renamed to ``NAME.1``, the next one to ``NAME.2`` and so on, and the run continues
    in an empty file. All readers of this package read all of them.

    Args:
        target: the file, whose folder is created; or a sink; or a sequence of sinks with at most one file. None writes
            nothing; all ranks but the first get None.
        part_bytes: size from which the file is put aside.

    Attributes:
        path: the file; None without one.
        run: the token of the run; a new one, until a checkpoint of an earlier run is loaded.
        guard: called before a line is written; raises an error if this process may no longer write.

    Raises:
        OSError: if the folder cannot be created or the file cannot be written.
        TypeError: if a target is neither a path nor a sink.
        ValueError: if there is more than one file.
    """

    def __init__(self, target: JournalTarget | Sequence[JournalTarget] | None, *, part_bytes: int = PART_BYTES) -> None:
        paths, sinks = _sorted_targets(target)
        self.path = paths[0] if paths else None
        self._sinks = sinks
        self._part_bytes = part_bytes
        # from the system's randomness, so that it neither depends on the seeds of a run nor changes their state
        self.run = secrets.token_hex(6)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.open("a", encoding="utf-8").close()  # fails here rather than after a step

        self.guard: Callable[[], None] | None = None
        self._end: int | None = None  # of the file, as this object left it; None before its first line
        self._told: set[str] = set()

    def cut(self, num_examples: int) -> int:
        """Removes the lines of steps that began at ``num_examples`` or later, because a resumed run writes them again.

        Evaluations after more examples than that are removed too; one after exactly as many is of the resumed weights.
        An unfinished last line is removed too. The removed lines are appended to a file beside the journal, whose name
        ends in ``.cut``. If the process is killed at any moment, the journal is either whole or cut.

        Returns:
            The number of examples in the remaining lines: fewer than ``num_examples`` if lines are lost, or if this
            rank has no journal.

        Raises:
            ValueError: if a line other than the last one is not a line of a journal.
        """
        self._end = None
        return 0 if self.path is None else cut(self.path, num_examples)

    def last_run(self) -> str | None:
        """The token of the run that wrote the last whole line; None without a line, or if it has no token."""
        return None if self.path is None else last_token(self.path)

    def sync(self) -> None:
        """Syncs the written lines to the disk, so that they survive a loss of power."""
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                # any handle will do: fsync is about the file, not about what was written through this one
                os.fsync(file.fileno())

    def write(self, entry: Mapping[str, Any]) -> None:
        """Appends one line, and gives it to the sinks.

        If a sink raises an error, the log names it and it gets no more lines: a sink must never stop a run.

        Raises:
            OSError: if the disk is full or fails; the journal is then as it was before, or ends with this line if it
                is full and no new file could be begun.
            Exception: an error of ``guard``.
        """
        if self.path is None and not self._sinks:
            return
        if self.guard is not None:
            self.guard()
        said = finite_or_null({**entry, "run": self.run})
        if self.path is not None:
            self._append(self.path, json.dumps(said, separators=(",", ":"), allow_nan=False))
        # a copy, because a sink that fails is taken out of the list
        for sink in list(self._sinks):
            self._call(sink, partial(sink.write, said))

    def record_evaluation(self, metrics: Mapping[str, Any], *, after: Progress) -> None:
        """Appends the line of an evaluation, and gives it to the sinks; see ``evaluation_line``.

        Raises:
            ValueError: if there are no numbers, or a name is empty.
            TypeError: if a name is not a string, or a value is not a number.
            OSError: as ``write`` does.
        """
        self.write(evaluation_line(metrics, after))

    def close(self) -> None:
        """Closes the sinks, which are given no more lines; errors are logged."""
        for sink in list(self._sinks):
            self._call(sink, sink.close)
        self._sinks.clear()

    def _call(self, sink: JournalSink, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # any error of a service, a disk or a package
            self._sinks.remove(sink)
            _log.warning(
                "%s failed and is given no more lines (%s: %s); the run goes on",
                type(sink).__name__,
                type(error).__name__,
                error,
            )

    def _append(self, path: Path, text: str) -> None:
        size = None
        try:
            # opened for each line, so that a rotated or cut file is never written through an old handle; unbuffered, so
            # that a line is one write
            with path.open("ab", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                self._check_end(path, size)
                left = memoryview(f"{text}\n".encode())
                end = size + len(left)
                while left:
                    left = left[file.write(left) :]
            self._end = end
        except OSError as error:
            if size is not None:
                with suppress(OSError):
                    os.truncate(path, size)  # no reader could use an incomplete line
            raise _named(error, "the journal could not be written", path) from error
        if end >= self._part_bytes:
            self._end = None
            try:
                rotate(path)
            except OSError as error:  # the line itself is written
                raise _named(error, "the journal is full, and no new file could be begun", path) from error

    def _check_end(self, path: Path, size: int) -> None:
        """Says in the log, once for each, that somebody else has taken lines out of the file or written into it."""
        if self._end is None or size == self._end:
            return
        told = (
            f"the journal {path} was removed or emptied while the run goes on: its lines up to here are lost, and the "
            f"later ones do not begin at the run's beginning"
            if size < self._end
            else f"something else writes into the journal {path} too: give each run a journal of its own, since no "
            f"report can tell their lines apart"
        )
        if told not in self._told:
            self._told.add(told)
            _log.warning("%s", told)


def _named(error: OSError, what: str, path: Path) -> OSError:
    return OSError(error.errno, f"{what}: {error.strerror}", str(path))


def _sorted_targets(target: JournalTarget | Sequence[JournalTarget] | None) -> tuple[list[Path], list[JournalSink]]:
    given = [] if target is None else [target] if isinstance(target, str | Path | JournalSink) else target
    paths: list[Path] = []
    sinks: list[JournalSink] = []
    if not isinstance(given, Sequence):
        raise TypeError(
            f"journal must be a path, a sink with write() and close(), or a list of them, got {shown(target)}"
        )
    for each in given:
        if isinstance(each, str | Path):
            usable = str(each) not in ("", ".") and "\0" not in str(each)
            require(usable, "journal must be the path of a file, such as 'runs/noise.jsonl'", each)
            paths.append(Path(each))
        elif isinstance(each, JournalSink):
            sinks.append(each)
        else:
            raise TypeError(f"journal takes paths and sinks with write() and close(), got {shown(each)}")
    require(len(paths) <= 1, "a run has one journal", " and ".join(map(str, paths)))
    return paths, sinks


def finite_or_null(value: Any) -> Any:
    """The value for JSON, which has no infinity and no NaN: Python would write words that other readers reject."""
    if isinstance(value, np.generic):  # numpy's types, from a user's learning rate or size
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite_or_null(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_null(item) for item in value]
    return value
