"""Evaluations that a host makes by itself, written into the journal of its run."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor

_log = logging.getLogger("adabatch")


class RecordsEvaluations(Protocol):
    """An ``AdaptiveBatch`` or a ``NoiseMonitor``."""

    def record_evaluation(self, metrics: Mapping[str, Any]) -> None:
        """Writes numbers of an evaluation into the journal."""


def record_numbers(target: RecordsEvaluations, metrics: Mapping[str, Any], *, prefixes: Sequence[str]) -> None:
    """Writes the numbers of a host's evaluation into the journal, if there are any.

    A host's evaluation must never stop a run: what is not one number is left out, and an evaluation in the middle of a
    step, of which it cannot be said after how many examples it was, is logged as a warning instead.

    Args:
        target: of the run.
        metrics: what the host reports.
        prefixes: by which the host marks an evaluation. A name loses the first one that it has, so that the report
            draws ``eval_loss`` beside the training loss; it keeps it if the rest is the name of another metric.
    """
    numbers = {name: value for name, value in metrics.items() if _is_number(value)}
    short = {name: _without(name, prefixes) for name in numbers}
    taken = list(short.values())
    found = {short[name] if taken.count(short[name]) == 1 else name: value for name, value in numbers.items()}
    if not found:
        return
    try:
        target.record_evaluation(found)
    except RuntimeError as error:
        _log.warning("the host's evaluation is not in the journal: %s", error)


def _without(name: str, prefixes: Sequence[str]) -> str:
    return next((name[len(prefix) :] for prefix in prefixes if name.startswith(prefix) and name != prefix), name)


def _is_number(value: object) -> bool:
    if isinstance(value, Tensor | np.ndarray):
        return value.ndim == 0
    return isinstance(value, int | float | np.generic) and not isinstance(value, bool | np.str_ | np.bytes_)
