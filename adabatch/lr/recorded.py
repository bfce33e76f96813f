"""The applied steps of a run as arrays, from the lines of its journal. Pure: it does not open files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from adabatch.arguments import checked
from adabatch.lr.journal_lines import entries, finite_number, number_of, numbers_of, part_of
from adabatch.lr.rules import NOISE_RULES, LRRule, lr_factor
from adabatch.lr.shapes import FloatArray

RecordedUnit = Literal["examples", "steps", "gain_steps"]
"""What a journal counts, in which a horizon can be measured. Tokens go in proportion to examples."""

GradientNorm = Literal["l2", "l1"]
"""The norms of the whole gradient that journals hold."""

_HOW_TO_RECORD = {
    "l2": "it measured no gradients; run it again with --measure.monitor=true",
    "l1": "run it again with Measure(l1=True) (AdaptiveBatch) or --measure.l1=true (train), or use the l2 norms, "
    "which every probe records",
}


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
        # by steps, not by examples, since a schedule weighs steps; beyond both ends the nearest norm holds
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
    def norms(self, which: GradientNorm) -> MeasuredNorms:
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
            raise ValueError(f"{self.source} holds one {which} norm of the gradient: a schedule needs at least two")
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
        # one by one through the rule itself: a second form of it for arrays could differ from what the run applied
        numbers = zip(self.batch.tolist(), self.noise.tolist(), self.signal.tolist(), strict=True)
        return np.array([lr_factor(rule, b, reference=reference, noise=n, signal=s) for b, n, s in numbers])

    @checked
    def edges(self, clock: RecordedUnit, reference: float) -> FloatArray:
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
        lines: JSON lines as ``AdaptiveBatch(journal=)`` writes them. The last is left out if it is unfinished; empty
            lines are skipped.
        source: the name of the journal in errors.

    Raises:
        ValueError: if the journal is damaged before its last line, has another format, or no applied steps.
    """
    rows: list[tuple[float, ...]] = []
    base_lrs: tuple[float, ...] = ()
    for number, entry in entries(lines, source):
        # the gradient of an update that was left out moved nothing, so the bound and the schedule do not see it
        if entry.get("applied") is False or "evaluation" in entry:
            continue
        batch = number_of(part_of(entry, "plan"), "global_batch_size")
        if not batch > 0:
            raise ValueError(
                f"{source}, line {number}, is not a step of a run: it has no plan with a global_batch_size"
            )
        lr, averages = part_of(entry, "lr"), part_of(entry, "averages")
        # the last: a resume may have changed them
        base_lrs = tuple(numbers_of(lr, "base")) or base_lrs
        factor = finite_number(lr.get("factor", 1.0))
        if not factor > 0:
            raise ValueError(f"{source}, line {number}: the batch factor must be positive, got {lr['factor']}")
        shape = next(iter(numbers_of(lr, "shape")), math.nan)
        noise, signal = number_of(averages, "noise"), number_of(averages, "signal")
        rows.append((number, batch, shape, factor, *_norms_in(entry), noise, signal))
    if not rows:
        raise ValueError(f"{source} holds no applied step in its lines")
    # one array for all columns: line numbers below 2 ** 53 are exact in it
    line, *columns = np.array(rows, dtype=np.float64).T
    return Recorded(source, base_lrs, line.astype(np.int64), *columns)


def _norms_in(entry: Mapping[str, Any]) -> tuple[float, float]:
    """The l2 and l1 norm of a step; journals without norms contain the square of the first."""
    moments, norms = entry.get("moments"), part_of(entry, "norms")
    if not isinstance(moments, Mapping):
        return math.nan, math.nan
    # max: from inner products, the square of a gradient near zero may be slightly negative
    l2 = number_of(norms, "l2") if "l2" in norms else math.sqrt(max(number_of(moments, "grad_sq"), 0.0))
    # the journal has null for a measurement that is not finite
    return (math.inf, math.inf) if math.isnan(l2) else (l2, number_of(norms, "l1"))
