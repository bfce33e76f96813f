"""The curves of a run, read from its journal: one number per step, NaN if the journal has none."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from adabatch.journal.parts import lines_of
from adabatch.lr.journal_lines import entries, number_of, numbers_of, part_of

JournalSource = str | os.PathLike[str] | Iterable[str | Mapping[str, Any]]
"""A path to JSON lines, or the lines themselves, decoded or not."""


class Curves(NamedTuple):
    """The numbers of each step in a journal, in the order of the steps; missing numbers are NaN.

    Args:
        examples: examples consumed before the step, shape (num_steps,).
        batch: global batch size of the step, in examples, shape (num_steps,).
        lr: learning rate that the step applied, shape (num_steps, num_groups).
        noise_scale: noise scale of this step's gradient alone, in examples, shape (num_steps,).
        noise_scale_average: averaged noise divided by averaged signal, in examples, shape (num_steps,);
            infinite if that signal is not positive.
        loss: mean training loss of the step, shape (num_steps,).
        layers: names of the layers whose noise was measured separately, in the order of the journal; most runs have
            none.
        layer_noise: noise of this step's gradient in each layer, shape (num_steps, num_layers).
        layer_signal: signal of this step's gradient in each layer, same shape.
    """

    examples: NDArray[np.float64]
    batch: NDArray[np.float64]
    lr: NDArray[np.float64]
    noise_scale: NDArray[np.float64]
    noise_scale_average: NDArray[np.float64]
    loss: NDArray[np.float64]
    layers: tuple[str, ...]
    layer_noise: NDArray[np.float64]
    layer_signal: NDArray[np.float64]

    @property
    def end(self) -> float:
        """Examples consumed after the last step."""
        return float(self.examples[-1] + self.batch[-1])


def read_curves(journal: JournalSource) -> Curves:
    """The curves of one run.

    An unfinished last line is left out, as are lines without a number of examples or a plan (they are no
    steps); a step may lack anything else.

    Raises:
        ValueError: if a line before the last is damaged, or if the journal has a newer format, two runs, a step twice,
            or no steps at all.
    """
    rows = [row for row in map(_row, records(journal)) if row is not None]
    if not rows:
        raise ValueError(f"{_name(journal)} holds no complete step: nothing to draw")
    num_groups = max(len(row.lr) for row in rows)
    # a step whose update was left out has no rates, and a resume may change the number of groups
    padded = [(*row.lr, *[math.nan] * (num_groups - len(row.lr))) for row in rows]
    examples, batch, noise_scale, average, loss = np.array([row[:5] for row in rows], dtype=np.float64).T
    lr = np.array(padded, dtype=np.float64).reshape(len(rows), num_groups)
    names = tuple(dict.fromkeys(name for row in rows for name in row.layers))
    unknown = (math.nan, math.nan)
    by_layer = np.array([[row.layers.get(name, unknown) for name in names] for row in rows], dtype=np.float64)
    # reshaped, because without layers numpy makes it an array of fewer dimensions
    noise, signal = np.moveaxis(by_layer.reshape(len(rows), len(names), 2), -1, 0)
    return Curves(examples, batch, lr, noise_scale, average, loss, names, noise, signal)


class Consumption(Protocol):
    """What steps consumed: anything that knows where its steps begin and how many examples they took."""

    @property
    def examples(self) -> NDArray[np.float64]:
        """Consumed before each step, shape (num_steps,)."""
        ...

    @property
    def batch(self) -> NDArray[np.float64]:
        """Examples that each step took, shape (num_steps,)."""
        ...


def moving_mean(curves: Consumption, values: NDArray[np.float64], *, window: float) -> NDArray[np.float64]:
    """Mean of ``values`` over the steps that start within ``window / 2`` examples of each step's start.

    Each step weighs as many examples as it took; steps without a finite value weigh nothing. Where no step of
    the window has a value the mean is NaN.

    Args:
        values: one number per step, shape (num_steps,).
        window: length in examples.
    """
    finite = np.isfinite(values)
    weights = np.where(finite, curves.batch, 0.0)
    # prefix sums: any window takes two look-ups, and a journal has up to a million steps
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0) * weights)])
    totals = np.concatenate([[0.0], np.cumsum(weights)])
    # a window in examples, not in steps: late steps of a grown batch would otherwise average over far more data
    first = np.searchsorted(curves.examples, curves.examples - window / 2, side="left")
    last = np.searchsorted(curves.examples, curves.examples + window / 2, side="right")
    weight = totals[last] - totals[first]
    return np.where(weight > 0, (sums[last] - sums[first]) / np.where(weight > 0, weight, 1.0), np.nan)


class _Point(NamedTuple):
    examples: float
    batch: float
    noise_scale: float
    noise_scale_average: float
    loss: float
    lr: tuple[float, ...]
    layers: dict[str, tuple[float, float]]
    """Noise and signal by name."""


def _row(record: Mapping[str, Any]) -> _Point | None:
    plan = part_of(record, "plan")
    examples, batch = number_of(record, "examples"), number_of(plan, "global_batch_size")
    if not (math.isfinite(examples) and batch > 0):
        return None
    return _Point(
        examples=examples,
        batch=batch,
        noise_scale=number_of(part_of(record, "moments"), "noise_scale"),
        noise_scale_average=_average(part_of(record, "averages")),
        loss=number_of(record, "loss"),
        lr=tuple(numbers_of(part_of(record, "lr"), "applied")),
        layers={
            name: (number_of(layer, "noise"), number_of(layer, "signal"))
            for name, layer in part_of(record, "layers").items()
            if isinstance(layer, Mapping)
        },
    )


def records(journal: JournalSource) -> Iterator[Mapping[str, Any]]:
    """The decoded lines of one run, in order. The last line is ignored if it is unfinished.

    Raises:
        ValueError: for the same reasons as ``read_curves``.
    """
    return (entry for _, entry in entries(_lines(journal), _name(journal)))


def _lines(journal: JournalSource) -> Iterable[str | Mapping[str, Any]]:
    if isinstance(journal, str | os.PathLike):
        return lines_of(Path(journal))
    return journal


def _name(journal: JournalSource) -> str:
    return str(journal) if isinstance(journal, str | os.PathLike) else "the journal"


def _average(averages: Mapping[str, Any]) -> float:
    # the journal has null for the quotient then, which is not the same as "not measured"
    return math.inf if number_of(averages, "signal") <= 0 else number_of(averages, "noise_scale")
