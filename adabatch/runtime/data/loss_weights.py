"""Weights of micro-batches whose losses are means over unequal numbers of terms, such as tokens.

A loss that is a mean over tokens must be weighted by their number, or a micro-batch of short examples has the same
weight as one of long examples. The gradient of the step can be ``sum_j w_j g_j / sum_j w_j`` over the micro-batches of
all ranks only if the sum of the weights is known before the first backward, so the micro-batches of a step are fetched
before it begins.

In the moments a micro-batch of weight ``w`` counts for ``w N / W`` of the step's ``N`` examples, where ``W`` is the sum
of the weights, because a mean over that share of the terms reduces the noise accordingly. The noise is then that of an
example of ``W / N`` terms (tokens); divided by ``W / N`` it is the noise of a single term.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NoReturn

from adabatch.batch.plan import BatchPlan
from adabatch.runtime.collectives import Collectives
from adabatch.runtime.data import Feed, LossWeights, Portion


class LossWeightedFeed:
    """The portions of another feed, with the weights of their micro-batches and the sum of them over all ranks.

    It costs 16 bytes per step and rank, and a host sync if the collectives run on an accelerator.

    Args:
        feed: gives the micro-batches.
        weigh: micro-batch -> the number of terms (tokens) that its mean loss is taken over.
        collectives: the data-parallel ranks.

    A micro-batch of weight 0 counts for nothing: its loss is a mean over no terms. Such micro-batches come first,
    because the ranks reduce their gradients in the last micro-batch of a step.

    Raises:
        ValueError: on all ranks at once, if a weight is negative or not finite on some rank.
        RuntimeError: if ``weigh`` or the data set raised an error on another rank, which raises that error itself.
    """

    def __init__(self, feed: Feed, weigh: Callable[[Any], float], collectives: Collectives) -> None:
        self._feed = feed
        self._weigh = weigh
        self._collectives = collectives

    def take(self, plan: BatchPlan) -> Portion | None:
        """The portion of the next step, all its micro-batches fetched."""
        portion = self._feed.take(plan)
        if portion is None:
            return None
        batches, weights, error = self._weighed(portion)
        # NaN for an impossible weight survives the sum over the ranks, so that all of them see it and raise together.
        local = sum(weights) if all(0 <= weight < math.inf for weight in weights) else math.nan
        total, failed = self._collectives.sum_of(local, error is not None)
        if failed:
            self._raise_together(error)
        if math.isnan(total):
            raise ValueError(
                "weigh= gave a micro-batch a weight that is negative or not finite, on at least one rank: it is the "
                "number of terms that the mean loss is taken over, and 0 if there are none"
            )
        if 0 in weights:
            # Stable: the others keep their order.
            order = sorted(range(len(batches)), key=lambda index: weights[index] != 0)
            batches, weights = [batches[index] for index in order], [weights[index] for index in order]
            portion = replace(portion, sizes=[portion.sizes[index] for index in order])
        return replace(portion, batches=batches, weights=LossWeights(weights, total))

    def _weighed(self, portion: Portion) -> tuple[list[Any], list[float], Exception | None]:
        """The micro-batches and their weights, or an error, which is raised after the exchange with the other ranks."""
        try:
            batches = list(portion.batches)
            return batches, [float(self._weigh(batch)) for batch in batches], None
        except Exception as error:
            return [], [], error

    def _raise_together(self, error: Exception | None) -> NoReturn:
        rank, message = self._collectives.first_message(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        raise RuntimeError(f"the micro-batches of rank {rank} could not be fetched or weighed: {message}")

    def consumed(self, portion: Portion) -> None:
        """The step has run."""
        self._feed.consumed(portion)
