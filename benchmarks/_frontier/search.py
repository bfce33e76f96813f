"""The search for a learning rate and a warm-up, by whatever loss it is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

WARMUPS = (0.02, 0.1, 0.25, 0.5)  # shares of the examples
MOST_EXTENSIONS = 12


class Setting(NamedTuple):
    """A base learning rate, and a warm-up as a share of the examples."""

    lr: float
    warmup: float


def tune(loss: Callable[[Setting], float], start: Setting) -> Setting:
    """The best setting by a search along one coordinate at a time: rate, warm-up, rate, warm-up.

    Rates lie on a grid of factor 2 that grows until its best is not at an edge. What a search asks for twice costs
    nothing, as the store remembers it.
    """
    best = start
    for _ in range(2):
        before = best
        best = best_rate(loss, best)
        best = best_warmup(loss, best)
        if best.warmup == before.warmup:
            return best
    return best_rate(loss, best)


def best_rate(loss: Callable[[Setting], float], start: Setting) -> Setting:
    """The best rate at the warm-up of ``start``."""
    tried = {lr: loss(start._replace(lr=lr)) for lr in (start.lr / 2, start.lr, start.lr * 2)}
    for _ in range(MOST_EXTENSIONS):
        best = min(tried, key=lambda lr: (tried[lr], lr))
        if min(tried) < best < max(tried):
            break
        new = best / 2 if best == min(tried) else best * 2  # where all failed, the lowest counts as the best
        tried[new] = loss(start._replace(lr=new))
    return start._replace(lr=min(tried, key=lambda lr: (tried[lr], lr)))


def best_warmup(loss: Callable[[Setting], float], start: Setting) -> Setting:
    """The best warm-up at the rate of ``start``; all are tried, as a climb from one to the next stops at noise."""
    return min((start._replace(warmup=warmup) for warmup in WARMUPS), key=loss)
