"""The journal: one JSON line a step, with what was measured, what was asked for, and what was decided and why.

Of a step that was probed, ``moments`` holds noise, signal, their ratio, and the squared norms and sizes that they come
from; beside them ``noise_along`` where inner products were measured, ``noise_at_quantile`` where coordinates were, and
the ``norm`` where it is not the Euclidean one. ``layers`` holds the first three of each layer by its name
where they were (``Measure(layers=)``): noises add up to that of the whole, and so do signals.

``run`` says whose line it is: a token that is made when a run begins, and goes with it through its checkpoints. By it a
reader tells two runs in one file apart.

``wanted`` is the batch at which the criterion comes to rest, ``low`` and ``high`` its one-sided bounds, and ``freedom``
the degrees of freedom behind them: parts compared with each other, pooled over the probes in the average.

Lines hold no wall time and no machine, so the journals of two equal runs are equal but for that token. A criterion that
reads step times (`Goodput`) is the exception: ``seconds`` is how long a step lately took. Numbers that are not finite
are null.
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

from adabatch.batch.averages import Averages
from adabatch.batch.control import Decision
from adabatch.batch.moments import EUCLIDEAN, GradientMoments
from adabatch.batch.plan import BatchPlan, Progress
from adabatch.journal_parts import PART_BYTES, cut, last_token, rotate

LINE_FORMAT = 1

_log = logging.getLogger("adabatch")


@runtime_checkable
class JournalSink(Protocol):
    """Something that takes the lines of a journal too, such as a tracker (``adabatch.integrations.trackers``)."""

    def write(self, entry: Mapping[str, Any]) -> None:
        """Takes one line, in which numbers that are not finite are None. Called on the first rank only."""
        ...

    def close(self) -> None:
        """Writes down what is left; called when the run's ``AdaptiveBatch`` is removed."""
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
    seconds: float | None = None,
) -> dict[str, Any]:
    """What a step's end says, as the journal writes it; the learning rate joins it when the update is applied.

    Args:
        plan: the plan of the step.
        num_examples: examples it really took.
        before: what was consumed when it began.
        loss: its mean loss, None where it was not measured.
        moments: what it measured, None where it was not probed.
        averages: the control's averages with it in them.
        decision: the plan of the next step, and why.
        seconds: how long a step lately took, where that was timed.
    """
    asked = decision.estimate
    return {
        "format": LINE_FORMAT,
        "step": before.steps,
        "examples": before.examples,
        "plan": {
            "micro_batch_size": plan.micro_batch_size,
            "accumulation_steps": plan.accumulation_steps,
            "dp_size": plan.dp_size,
            "global_batch_size": num_examples,
        },
        "loss": loss,
        "moments": None if moments is None else _measured(moments),
        "norms": None if moments is None else {"l2": _l2(moments), "l1": moments.grad_l1},
        "averages": None
        if averages.weight == 0
        else {"noise": averages.noise, "signal": averages.signal, "noise_scale": averages.noise_scale},
        "wanted": None if asked is None else asked.wanted,
        "low": None if asked is None else asked.low,
        "high": None if asked is None else asked.high,
        **({} if asked is None or asked.freedom is None else {"freedom": asked.freedom}),
        "next": decision.plan.global_batch_size,
        "reason": str(decision.reason),
        **({} if moments is None or moments.layers is None else {"layers": _layers(moments.layers)}),
        **({} if seconds is None else {"seconds": seconds}),
    }


def _measured(moments: GradientMoments) -> dict[str, Any]:
    """The numbers of a probed step; those that only some probes give are there where they were measured."""
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
    """The Euclidean norm of the gradient, in whatever norm the noise was measured."""
    if moments.norm != EUCLIDEAN:
        return moments.grad_l2
    # A mean of inner products with a gradient of nearly zero may fall below zero.
    return math.sqrt(moments.grad_sq) if moments.grad_sq >= 0 else math.nan


def _layers(layers: Mapping[str, GradientMoments]) -> dict[str, Any]:
    return {name: _ratio(moments) for name, moments in layers.items()}


def _ratio(moments: GradientMoments) -> dict[str, Any]:
    return {"noise": moments.noise, "signal": moments.signal, "noise_scale": moments.noise_scale}


class Journal:
    """Appends lines to a JSONL file; each is complete when ``write`` returns, and no file stays open.

    From 256 MiB on the file is put aside as ``NAME.1``, ``NAME.2`` and so on, and the run goes on in an empty one. What
    reads journals in this package takes all of them.

    Args:
        target: the file, whose folder is made; or a sink; or a sequence of sinks with one file at most. None writes
            nothing, which is what all ranks but the first are given.
        part_bytes: size from which the file is put aside.

    Attributes:
        path: the file; None without one.
        run: the run whose lines are written; a new one, until a checkpoint says which goes on.
        guard: called before a line is written; raises where this process may not write any more.

    Raises:
        OSError: the folder cannot be made or the file not be written.
        TypeError: a target that is neither a path nor a sink.
        ValueError: more than one file.
    """

    def __init__(self, target: JournalTarget | Sequence[JournalTarget] | None, *, part_bytes: int = PART_BYTES) -> None:
        paths, sinks = _sorted_targets(target)
        self.path = paths[0] if paths else None
        self._sinks = sinks
        self._part_bytes = part_bytes
        self.run = secrets.token_hex(
            6
        )  # from the system: the seeds of a run move nothing here, nor does this move them
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.open("a", encoding="utf-8").close()  # what cannot be written fails here, not after a step

        self.guard: Callable[[], None] | None = None

    def cut(self, num_examples: int) -> int:
        """Takes out the lines of steps that began at ``num_examples`` or later: a resumed run writes them again.

        A last line that was not finished goes with them. They are appended to a file beside the journal, whose name
        ends in ``.cut``. A kill at any moment leaves the whole journal or the cut one.

        Returns:
            The examples that the lines left account for: fewer than ``num_examples`` where some are lost, or where this
            rank has no journal.

        Raises:
            ValueError: a line that is none of a journal, other than the last.
        """
        if self.path is None:
            return 0
        return cut(self.path, num_examples)

    def last_run(self) -> str | None:
        """Whose the last whole line of the journal is; None where it has none, or one without the token of a run."""
        return None if self.path is None else last_token(self.path)

    def sync(self) -> None:
        """Makes what was written last through a loss of power."""
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                os.fsync(file.fileno())

    def write(self, entry: Mapping[str, Any]) -> None:
        """Appends one line, and gives it to the sinks.

        A sink that raises is named in the log, and is given no more lines: it must never stop a run.

        Raises:
            OSError: a full disk, or another failure; the journal is then as it was before.
            Exception: what ``guard`` raises.
        """
        if self.path is None and not self._sinks:
            return
        if self.guard is not None:
            self.guard()
        said = _finite({**entry, "run": self.run})
        if self.path is not None:
            self._append(self.path, json.dumps(said, separators=(",", ":"), allow_nan=False))
        for sink in list(self._sinks):
            self._call(sink, partial(sink.write, said))

    def close(self) -> None:
        """Closes the sinks; what fails then is named in the log."""
        for sink in list(self._sinks):
            self._call(sink, sink.close)

    def _call(self, sink: JournalSink, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # whatever a service, a disk or a package comes up with
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
            with path.open("ab", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                left = memoryview(f"{text}\n".encode())
                end = size + len(left)
                while left:
                    left = left[file.write(left) :]
        except OSError as error:
            if size is not None:
                with suppress(OSError):
                    os.truncate(path, size)  # of a line that was cut short no reader could make anything
            raise OSError(error.errno, f"the journal could not be written: {error.strerror}", str(path)) from error
        if end >= self._part_bytes:
            rotate(path)


def _sorted_targets(target: JournalTarget | Sequence[JournalTarget] | None) -> tuple[list[Path], list[JournalSink]]:
    given = [] if target is None else [target] if isinstance(target, str | Path | JournalSink) else target
    paths: list[Path] = []
    sinks: list[JournalSink] = []
    if not isinstance(given, Sequence):
        raise TypeError(f"journal must be a path, a sink with write() and close(), or a list of them, got {target!r}")
    for each in given:
        if isinstance(each, str | Path):
            paths.append(Path(each))
        elif isinstance(each, JournalSink):
            sinks.append(each)
        else:
            raise TypeError(f"journal takes paths and sinks with write() and close(), got {each!r}")
    if len(paths) > 1:
        raise ValueError(f"a run has one journal, got {' and '.join(map(str, paths))}")
    return paths, sinks


def _finite(value: Any) -> Any:
    if isinstance(value, np.generic):  # of a user's learning rate or size
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
