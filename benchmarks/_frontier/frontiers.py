"""What tuned constants cost at a loss: pure arithmetic on points of cost and loss, in logarithms of both."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

REACH = 1.5  # how far past the longest run a time to a loss is extrapolated, in examples


class Point(NamedTuple):
    """A run, or the mean of some."""

    cost: float
    loss: float


class Cost(NamedTuple):
    """A cost, or a bound of it.

    Args:
        bound: "" where the loss lies between two points, ">" where it is below every constant's, so that the cost is
            that of the best one at least, "<" where it is above every constant's.
    """

    value: float
    bound: str = ""

    def over(self, mine: float) -> Cost:
        """The ratio to a cost of ours."""
        return Cost(self.value / mine, self.bound)

    def show(self) -> str:
        return f"{self.bound}{self.value:.2f}"


def pareto(points: Iterable[Point]) -> list[Point]:
    """The points that no other beats in both, by rising cost and falling loss; a failed run is none of them."""
    kept: list[Point] = []
    for point in sorted(points):
        if math.isfinite(point.loss) and (not kept or point.loss < kept[-1].loss):
            kept.append(point)
    return kept


def cost_at(frontier: Sequence[Point], loss: float) -> Cost:
    """What the frontier pays for a loss: straight lines between its points in log cost and log loss."""
    if loss > frontier[0].loss:
        return Cost(frontier[0].cost, "<")
    if loss < frontier[-1].loss:
        return Cost(frontier[-1].cost, ">")
    for left, right in itertools.pairwise(frontier):
        if left.loss >= loss >= right.loss:
            return Cost(_between(left, right, loss))
    return Cost(frontier[-1].cost)


def loss_at(frontier: Sequence[Point], cost: float) -> float:
    """The frontier's loss at a cost; that of its ends beyond them."""
    inside = min(max(cost, frontier[0].cost), frontier[-1].cost)
    for left, right in itertools.pairwise(frontier):
        if left.cost <= inside <= right.cost:
            share = math.log(inside / left.cost) / math.log(right.cost / left.cost)
            return left.loss * (right.loss / left.loss) ** share
    return frontier[0].loss


def time_to(short: Point, long: Point, loss: float) -> float:
    """Cost at which one method reaches a loss, from a short and a long run: a power law through both.

    Infinite where the law needs more than ``REACH`` times the long run, or where more examples did not help.
    """
    if not (math.isfinite(short.loss) and long.loss < short.loss):
        return math.inf
    cost = _between(short, long, loss)
    return cost if cost <= REACH * long.cost else math.inf


def _between(left: Point, right: Point, loss: float) -> float:
    share = math.log(left.loss / loss) / math.log(left.loss / right.loss)
    return left.cost * (right.cost / left.cost) ** share
