"""What a run left behind in its journal: the applied steps as arrays. Pure: it is given lines, and opens no file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from adabatch.lr.rules import NOISE_RULES, LRRule, lr_factor
from adabatch.lr.shapes import FloatArray

Clock = Literal["examples", "steps", "gain_steps"]
Norm = Literal["l2", "l1"]

JOURNAL_FORMAT = 1
"""The format of journal lines that is read here, which ``adabatch.journal`` writes."""

_HOW_TO_RECORD = {
    "l2": "it measured no gradients; run it again with --measure.monitor=true",
    "l1": "run it again with Measure(l1=True) (AdaptiveBatch) or --measure.l1=true (train), or use the l2 norms, "
    "which every probe records",
}


class OneRun:
    """Sees to it that the lines which a reader takes for one run are of one, and that no step is among them twice.

    A run that goes on without its checkpoint's token, its state having been saved by hand, goes on where the lines end.

    Args:
        name: of the journal, for messages.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._run: str | None = None
        self._begins = -math.inf
        self._end: float | None = None

    def see(self, number: int, entry: Mapping[str, Any]) -> None:
        """The next line of a step.

        Args:
            number: of the line, from 1.
            entry: the line; where it does not say which examples it took, it is let pass.

        Raises:
            ValueError: it is of another run than those before, or of a step that they hold.
        """
        plan = entry.get("plan")
        begins, size = entry.get("examples"), plan.get("global_batch_size") if isinstance(plan, Mapping) else None
        if not (isinstance(begins, int | float) and isinstance(size, int | float)):
            return
        run = entry.get("run")
        if run is None:  # of a release that wrote none
            wrong = begins <= self._begins
        else:
            wrong = self._end is not None and begins != self._end and (begins < self._end or run != self._run)
        if wrong:
            other = run is not None and self._run is not None and run != self._run
            what = f"begins another run ({run} after {self._run})" if other else "begins again"
            raise ValueError(
                f"{self._name}, line {number}, {what} at {begins:,} examples, where the lines before end at "
                f"{self._end or 0:,}: give one run at a time, in a copy of the journal that holds its lines only"
            )
        self._run, self._begins, self._end = run, begins, begins + size


class Measured(NamedTuple):
    """Gradient norms where they were measured.

    Args:
        at: which of the applied steps, shape (num_measured,).
        norms: before clipping, reduced over ranks, at the batch size of the step; shape (num_measured,).
    """

    at: NDArray[np.int64]
    norms: FloatArray

    def for_each(self, num_steps: int) -> FloatArray:
        """One norm a step: the steps between two measured ones are interpolated, shape (num_steps,)."""
        return np.interp(np.arange(num_steps), self.at, self.norms)


class Recorded(NamedTuple):
    """The applied steps of a run, in their order; updates that were left out are not among them.

    Args:
        source: what errors call the journal, such as its path.
        base_lrs: base learning rate of each parameter group.
        line: line of the journal, from 1, shape (num_steps,); so are all others.
        batch: examples that the step took.
        shape: warm-up times shape, of the first parameter group; NaN where the journal does not say.
        factor: batch factor on the learning rate.
        l2, l1: norm of the gradient; NaN where it was not measured, infinite where it was not finite.
        noise, signal: averages with this step's measurement in them; NaN where there are none yet.
    """

    source: str
    base_lrs: tuple[float, ...]
    line: NDArray[np.int64]
    batch: FloatArray
    shape: FloatArray
    factor: FloatArray
    l2: FloatArray
    l1: FloatArray
    noise: FloatArray
    signal: FloatArray

    @property
    def num_steps(self) -> int:
        """Applied steps."""
        return len(self.batch)

    def norms(self, which: Norm) -> Measured:
        """The norms that a schedule or a bound can be made of.

        Raises:
            ValueError: norms that were not measured, only one, or one that is zero or not finite; says what to do.
        """
        values = {"l2": self.l2, "l1": self.l1}[which]
        index = np.flatnonzero(~np.isnan(values))
        if not np.isfinite(values[index]).any():
            raise ValueError(f"{self.source} holds no {which} norms of the gradient: {_HOW_TO_RECORD[which]}")
        norms = values[index]
        bad = ~(np.isfinite(norms) & (norms > 0))
        if bad.any():
            first = int(np.argmax(bad))
            raise ValueError(
                f"{self.source}, line {self.line[index[first]]}: the {which} norm of the gradient is {norms[first]:g} "
                f"({bad.sum()} such of {bad.size}), and a schedule needs positive, finite ones: leave these lines out "
                f"of a copy of the journal, and give that"
            )
        if norms.size < 2:
            raise ValueError(f"{self.source} holds one {which} norm of the gradient: a schedule needs two at least")
        return Measured(index, norms)

    def factors(self, rule: LRRule, reference: float) -> FloatArray:
        """The batch factor that a rule would have given at each step, shape (num_steps,).

        Raises:
            ValueError: a rule that reads the noise, where the journal has none.
        """
        if rule in NOISE_RULES and np.isnan(self.noise).all():
            raise ValueError(
                f"{self.source} holds no averages of noise and signal, which the rule {rule!r} reads: "
                f"{_HOW_TO_RECORD['l2']}"
            )
        numbers = zip(self.batch.tolist(), self.noise.tolist(), self.signal.tolist(), strict=True)
        return np.array([lr_factor(rule, b, reference=reference, noise=n, signal=s) for b, n, s in numbers])

    def edges(self, clock: Clock, reference: float) -> FloatArray:
        """What was consumed before each step and after the last, from 0, shape (num_steps + 1,).

        Args:
            clock: what counts: examples, steps, or gain-steps (as much as a step gains over one of the reference size).
            reference: the reference batch size, read for gain-steps only.
        """
        if clock == "gain_steps":
            taken = self.factors("gain", reference)
        else:
            taken = self.batch if clock == "examples" else np.ones(self.num_steps)
        return np.concatenate([[0.0], np.cumsum(taken)])


def read_recorded(lines: Iterable[str], source: str = "the journal") -> Recorded:
    """The applied steps of a run, given the lines of its journal: an open file, or ``text.splitlines()``.

    Args:
        lines: JSON lines in format 1, as ``AdaptiveBatch(journal=)`` writes them. The last may be unfinished, and is
            left out then; empty ones are skipped.
        source: what errors call the journal.

    Raises:
        ValueError: a journal that is damaged before its last line, of another format, or without applied steps.
    """
    rows: list[tuple[float, ...]] = []
    base_lrs: tuple[float, ...] = ()
    for number, entry in _entries(lines, source):
        if entry.get("applied") is False:
            continue
        batch = _number(_part(entry, "plan").get("global_batch_size"))
        if not batch > 0:
            raise ValueError(
                f"{source}, line {number}, is not a step of a run: it has no plan with a global_batch_size"
            )
        lr, averages = _part(entry, "lr"), _part(entry, "averages")
        base_lrs = tuple(_numbers(lr.get("base"))) or base_lrs
        factor = _number(lr.get("factor", 1.0))
        if not factor > 0:
            raise ValueError(f"{source}, line {number}: the batch factor must be positive, got {lr['factor']}")
        shape = next(iter(_numbers(lr.get("shape"))), math.nan)
        noise, signal = _number(averages.get("noise")), _number(averages.get("signal"))
        rows.append((number, batch, shape, factor, *_norms_in(entry), noise, signal))
    if not rows:
        raise ValueError(f"{source} holds no applied step")
    line, *columns = np.array(rows, dtype=np.float64).T
    return Recorded(source, base_lrs, line.astype(np.int64), *columns)


def _entries(lines: Iterable[str], source: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The lines with their numbers; the last may be unfinished, and is left out then."""
    damaged, run = "", OneRun(source)
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        if damaged:
            raise ValueError(damaged)
        try:
            entry = json.loads(text)
        except ValueError as error:
            damaged = f"{source}, line {number}, is not JSON and not the last line: {error}"
            continue
        if not isinstance(entry, dict):
            raise ValueError(f"{source}, line {number}, is not a line of a journal: {text.strip():.80}")
        if entry.get("format") != JOURNAL_FORMAT:
            raise ValueError(
                f"{source}, line {number}, has format {entry.get('format')!r}, this version of adabatch reads "
                f"format {JOURNAL_FORMAT}: use the version that wrote it"
            )
        run.see(number, entry)
        yield number, entry


def _norms_in(entry: Mapping[str, Any]) -> tuple[float, float]:
    """The l2 and l1 norm of a step; journals without the norms have the square of the first."""
    moments, norms = entry.get("moments"), _part(entry, "norms")
    if not isinstance(moments, Mapping):
        return math.nan, math.nan
    l2 = _number(norms["l2"]) if "l2" in norms else math.sqrt(max(_number(moments.get("grad_sq")), 0.0))
    # what was measured and is not finite is null in the journal
    return (math.inf, math.inf) if math.isnan(l2) else (l2, _number(norms.get("l1")))


def _part(entry: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = entry.get(key)
    return value if isinstance(value, Mapping) else {}


def _numbers(values: Any) -> list[float]:
    return [_number(value) for value in values] if isinstance(values, list) else []


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
