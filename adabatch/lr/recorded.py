"""The applied steps of a run as arrays, from the lines of its journal. Pure: it does not open files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from adabatch.arguments import checked
from adabatch.lr.rules import NOISE_RULES, LRRule, lr_factor
from adabatch.lr.shapes import FloatArray

Clock = Literal["examples", "steps", "gain_steps"]
Norm = Literal["l2", "l1"]

# not imported from `adabatch.journal`, which needs torch; a test holds the two together
JOURNAL_FORMAT = 1
"""The format of journal lines that is read here, which ``adabatch.journal`` writes."""

_HOW_TO_RECORD = {
    "l2": "it measured no gradients; run it again with --measure.monitor=true",
    "l1": "run it again with Measure(l1=True) (AdaptiveBatch) or --measure.l1=true (train), or use the l2 norms, "
    "which every probe records",
}


class OneRun:
    """Checks that lines belong to one run, and that no step is among them twice.

    A run that was resumed without the token of its checkpoint, because its state was saved by hand, must continue where
    the lines end.

    Args:
        name: of the journal, for messages.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._run: str | None = None
        self._begins = -math.inf
        self._end: float | None = None

    def see(self, number: int, entry: Mapping[str, Any]) -> None:
        """Checks the next line of a step.

        Args:
            number: of the line, from 1.
            entry: the line; it is not checked if it does not say which examples it took.

        Raises:
            ValueError: if it belongs to another run than the lines before, or to a step that they contain.
        """
        plan = entry.get("plan")
        begins, size = entry.get("examples"), plan.get("global_batch_size") if isinstance(plan, Mapping) else None
        if not (isinstance(begins, int | float) and isinstance(size, int | float)):
            return
        run = entry.get("run")
        if run is None:  # written by a release without tokens
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


class MeasuredNorms(NamedTuple):
    """The gradient norms of the steps that measured them.

    Args:
        at: which of the applied steps, shape (num_measured,).
        norms: before clipping, reduced over ranks, at the batch size of the step; shape (num_measured,).
    """

    at: NDArray[np.int64]
    norms: FloatArray

    def for_each(self, num_steps: int) -> FloatArray:
        """One norm per step, shape (num_steps,); steps between two measured ones are interpolated."""
        return np.interp(np.arange(num_steps), self.at, self.norms)


class Recorded(NamedTuple):
    """The applied steps of a run, in their order; updates that were left out are not among them.

    Args:
        source: the name of the journal in errors, such as its path.
        base_lrs: base learning rate of each parameter group.
        line: line of the journal, from 1, shape (num_steps,), as of all the following.
        batch: examples that the step took.
        shape: warm-up times shape, of the first parameter group; NaN if it is not in the journal.
        factor: batch factor on the learning rate.
        l2, l1: norm of the gradient; NaN if it was not measured, infinite if it was not finite.
        noise, signal: averages that include this step's measurement; NaN if there are none yet.
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

    @checked
    def norms(self, which: Norm) -> MeasuredNorms:
        """The norms for a schedule or a bound.

        Raises:
            ValueError: if there are fewer than two, or one is zero or not finite; says what to do.
        """
        values = {"l2": self.l2, "l1": self.l1}[which]
        # NaN was not measured; what was measured and is not finite is infinite, and must not be left out silently
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
        return MeasuredNorms(index, norms)

    @checked
    def factors(self, rule: LRRule, reference: float) -> FloatArray:
        """The batch factor that a rule would have given at each step, shape (num_steps,).

        Raises:
            ValueError: if the rule reads the noise, and the journal has none.
        """
        if rule in NOISE_RULES and np.isnan(self.noise).all():
            raise ValueError(
                f"{self.source} holds no averages of noise and signal, which the rule {rule!r} reads: "
                f"{_HOW_TO_RECORD['l2']}"
            )
        numbers = zip(self.batch.tolist(), self.noise.tolist(), self.signal.tolist(), strict=True)
        return np.array([lr_factor(rule, b, reference=reference, noise=n, signal=s) for b, n, s in numbers])

    @checked
    def edges(self, clock: Clock, reference: float) -> FloatArray:
        """What was consumed before each step and after the last, from 0, shape (num_steps + 1,).

        Args:
            clock: what is counted: examples, steps, or gain-steps.
            reference: the reference batch size, read for gain-steps only.
        """
        if clock == "gain_steps":
            taken = self.factors("gain", reference)
        else:
            taken = self.batch if clock == "examples" else np.ones(self.num_steps)
        return np.concatenate([[0.0], np.cumsum(taken)])


@checked
def read_recorded(lines: Iterable[str], source: str = "the journal") -> Recorded:
    """The applied steps of a run, from the lines of its journal: an open file, or ``text.splitlines()``.

    Args:
        lines: JSON lines in format 1, as ``AdaptiveBatch(journal=)`` writes them. The last is left out if it is
            unfinished; empty lines are skipped.
        source: the name of the journal in errors.

    Raises:
        ValueError: if the journal is damaged before its last line, has another format, or no applied steps.
    """
    rows: list[tuple[float, ...]] = []
    base_lrs: tuple[float, ...] = ()
    for number, entry in _entries(lines, source):
        # the gradient of an update that was left out moved nothing, so the bound and the schedule do not see it
        if entry.get("applied") is False or "evaluation" in entry:
            continue
        batch = _number(_part(entry, "plan").get("global_batch_size"))
        if not batch > 0:
            raise ValueError(
                f"{source}, line {number}, is not a step of a run: it has no plan with a global_batch_size"
            )
        lr, averages = _part(entry, "lr"), _part(entry, "averages")
        # the last: a resume may have changed them
        base_lrs = tuple(_numbers(lr.get("base"))) or base_lrs
        factor = _number(lr.get("factor", 1.0))
        if not factor > 0:
            raise ValueError(f"{source}, line {number}: the batch factor must be positive, got {lr['factor']}")
        shape = next(iter(_numbers(lr.get("shape"))), math.nan)
        noise, signal = _number(averages.get("noise")), _number(averages.get("signal"))
        rows.append((number, batch, shape, factor, *_norms_in(entry), noise, signal))
    if not rows:
        raise ValueError(f"{source} holds no applied step in its lines")
    # one array for all columns: line numbers below 2 ** 53 are exact in it
    line, *columns = np.array(rows, dtype=np.float64).T
    return Recorded(source, base_lrs, line.astype(np.int64), *columns)


def _entries(lines: Iterable[str], source: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The lines with their numbers; the last is left out if it is unfinished."""
    damaged, run = "", OneRun(source)
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        if damaged:
            raise ValueError(damaged)
        try:
            entry = json.loads(text)
        except ValueError as error:
            # Raised at the next line only: the last line of a run that still writes, or was killed, may be incomplete.
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
    """The l2 and l1 norm of a step; journals without norms contain the square of the first."""
    moments, norms = entry.get("moments"), _part(entry, "norms")
    if not isinstance(moments, Mapping):
        return math.nan, math.nan
    # max: from inner products, the square of a gradient near zero may be slightly negative
    l2 = _number(norms["l2"]) if "l2" in norms else math.sqrt(max(_number(moments.get("grad_sq")), 0.0))
    # the journal has null for a measurement that is not finite
    return (math.inf, math.inf) if math.isnan(l2) else (l2, _number(norms.get("l1")))


def _part(entry: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = entry.get(key)
    return value if isinstance(value, Mapping) else {}


def _numbers(values: Any) -> list[float]:
    return [_number(value) for value in values] if isinstance(values, list) else []


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
