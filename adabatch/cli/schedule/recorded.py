"""What a run left behind: the applied steps of its journal as arrays, and the schedule of its checkpoint."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from adabatch.batch.plan import Duration, Progress
from adabatch.checkpointing.newest import newest_checkpoint
from adabatch.checkpointing.run_state import STATE
from adabatch.journal import LINE_FORMAT, OneRun
from adabatch.lr.rules import NOISE_RULES, LRRule, lr_factor
from adabatch.lr.shapes import Shape
from adabatch.runtime.collectives import Collectives

FloatArray: TypeAlias = NDArray[np.float64]
Clock = Literal["examples", "steps", "gain_steps"]
Norm = Literal["l2", "l1"]

JOURNAL, CHECKPOINTS = "journal.jsonl", "checkpoints"

_HOW_TO_RECORD = {
    "l2": "it measured no gradients; run it again with --monitor=true",
    "l1": "run it again with record_l1=True (AdaptiveBatch) or --record_l1=true (train), or use the l2 norms, "
    "which every probe records",
}


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
        path: the journal.
        base_lrs: base learning rate of each parameter group.
        line: line of the journal, from 1, shape (num_steps,); so are all others.
        batch: examples that the step took.
        shape: warm-up times shape, of the first parameter group; NaN where the journal does not say.
        factor: batch factor on the learning rate.
        l2, l1: norm of the gradient; NaN where it was not measured, infinite where it was not finite.
        noise, signal: averages with this step's measurement in them; NaN where there are none yet.
    """

    path: Path
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
            raise ValueError(f"{self.path} holds no {which} norms of the gradient: {_HOW_TO_RECORD[which]}")
        norms = values[index]
        bad = ~(np.isfinite(norms) & (norms > 0))
        if bad.any():
            first = int(np.argmax(bad))
            raise ValueError(
                f"{self.path}, line {self.line[index[first]]}: the {which} norm of the gradient is {norms[first]:g} "
                f"({bad.sum()} such of {bad.size}), and a schedule needs positive, finite ones: leave these lines out "
                f"of a copy of the journal, and give that"
            )
        if norms.size < 2:
            raise ValueError(f"{self.path} holds one {which} norm of the gradient: a schedule needs two at least")
        return Measured(index, norms)

    def factors(self, rule: LRRule, reference: float) -> FloatArray:
        """The batch factor that a rule would have given at each step, shape (num_steps,).

        Raises:
            ValueError: a rule that reads the noise, where the journal has none.
        """
        if rule in NOISE_RULES and np.isnan(self.noise).all():
            raise ValueError(
                f"{self.path} holds no averages of noise and signal, which the rule {rule!r} reads: "
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


class Saved(NamedTuple):
    """The schedule of a run, from its checkpoint.

    Args:
        path: the checkpoint.
        shape: what the learning rate followed after its warm-up.
        base_lrs: base learning rate of each parameter group.
        total: length of the run.
        warmup: progress at which the shape began, in the unit of the total; 0 without a warm-up, None while in it.
        changed: whether the total was changed on the way.
        clock: what the shape's progress counted.
        progress: what the applied updates had consumed.
        reference: the reference batch size.
    """

    path: Path
    shape: Shape
    base_lrs: tuple[float, ...]
    total: Duration
    warmup: float | None
    changed: bool
    clock: Clock
    progress: Progress
    reference: int


def journal_of(run: Path) -> Path:
    """The journal of a run: of its folder, or the file itself.

    Raises:
        ValueError: neither of these.
    """
    journal = run / JOURNAL if run.is_dir() else run
    if not journal.is_file():
        raise ValueError(
            f"{run} has no journal: give the folder of a run of `adabatch train`, which holds {JOURNAL}, or such a file"
        )
    return journal


def read_recorded(run: Path) -> Recorded:
    """The applied steps of a run, given its folder or its journal.

    Raises:
        ValueError: no journal, one that is damaged before its last line, of another format, of two runs, with a step
            that is there twice, or without applied steps.
    """
    path = journal_of(run)
    rows: list[tuple[float, ...]] = []
    base_lrs: tuple[float, ...] = ()
    for number, entry in _entries(path):
        if entry.get("applied") is False:
            continue
        batch = _number(_part(entry, "plan").get("global_batch_size"))
        if not batch > 0:
            raise ValueError(f"{path}, line {number}, is no step of a run: it has no plan with a global_batch_size")
        lr, averages = _part(entry, "lr"), _part(entry, "averages")
        base_lrs = tuple(_numbers(lr.get("base"))) or base_lrs
        factor = _number(lr.get("factor", 1.0))
        if not factor > 0:
            raise ValueError(f"{path}, line {number}: the batch factor must be positive, got {lr['factor']}")
        shape = next(iter(_numbers(lr.get("shape"))), math.nan)
        noise, signal = _number(averages.get("noise")), _number(averages.get("signal"))
        rows.append((number, batch, shape, factor, *_norms_in(entry), noise, signal))
    if not rows:
        raise ValueError(f"{path} holds no applied step")
    line, *columns = np.array(rows, dtype=np.float64).T
    return Recorded(path, base_lrs, line.astype(np.int64), *columns)


def read_saved(run: Path) -> Saved | None:
    """The schedule of a run, given its folder; None where that holds no checkpoint, or is a journal.

    Raises:
        ValueError: as ``read_checkpoint`` does.
        CheckpointError: all checkpoints are damaged.
    """
    found = newest_checkpoint(run / CHECKPOINTS, Collectives())
    return None if found is None else read_checkpoint(found.path)


def read_checkpoint(path: Path) -> Saved:
    """The schedule in a checkpoint.

    Raises:
        ValueError: a checkpoint that cannot be read, or that holds no schedule of ``ProgressLR``.
    """
    if not (path / STATE).is_file():
        raise ValueError(
            f"there is no checkpoint {path}: give a folder such as runs/first/{CHECKPOINTS}/000012-step-3400"
        )
    try:
        state = torch.load(path / STATE, map_location="cpu", weights_only=True)
        schedule, batches = state["schedule"], state["batches"]
        total = Duration(*schedule["total"])
        shape = Shape.from_dict(schedule["shape"])
        base_lrs = tuple(map(float, schedule["base_lrs"]))
        progress, reference = Progress(**batches["progress"]), int(batches["reference_batch_size"])
        gain = schedule.get("clock") == "gain"
        anchor = schedule["anchor"]
    except (RuntimeError, EOFError, pickle.UnpicklingError, LookupError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split()):.200}"
        raise ValueError(
            f"{path} is no checkpoint of `adabatch train` ({reason}); a journal may be given alone"
        ) from None
    # the first releases wrote the anchor as a number
    start, changed = (anchor[0], anchor[1] > 0) if isinstance(anchor, list) else (anchor, False)
    clock: Clock = "steps" if total.unit == "steps" else "examples"
    if gain or total.unit == "gain_steps":
        clock = "gain_steps"
    return Saved(path, shape, base_lrs, total, start, changed, clock, progress, reference)


def reference_of(recorded: Recorded, saved: Saved | None) -> float:
    """The reference batch size of a run; without a checkpoint the size of its first step."""
    return float(recorded.batch[0]) if saved is None else float(saved.reference)


def _entries(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The lines with their numbers; the last may be unfinished, and is left out then."""
    damaged, run = "", OneRun(str(path))
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, text in enumerate(file, 1):
            if not text.strip():
                continue
            if damaged:
                raise ValueError(damaged)
            try:
                entry = json.loads(text)
            except ValueError as error:
                damaged = f"{path}, line {number}, is not JSON and not the last line: {error}"
                continue
            if not isinstance(entry, dict):
                raise ValueError(f"{path}, line {number}, is not a line of a journal: {text.strip():.80}")
            if entry.get("format") != LINE_FORMAT:
                raise ValueError(
                    f"{path}, line {number}, has format {entry.get('format')!r}, this version of adabatch reads "
                    f"format {LINE_FORMAT}: use the version that wrote it"
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
