"""Micro-batches that weigh what their losses are means over: tokens, where examples are of unequal length.

A loss that is a mean over tokens must count for as many tokens as it has, or a micro-batch of short examples pulls as
hard as one of long ones. The step's gradient is ``sum_j w_j g_j / sum_j w_j`` over the micro-batches of all ranks only
where the sum of weights is known before the first backward, so a step's micro-batches are fetched before it begins.

In the moments a micro-batch of weight ``w`` counts for ``w N / W`` of the step's ``N`` examples, ``W`` being the sum of
weights: what a mean over so many terms averages away. So the noise is that of an example of ``W / N`` terms (tokens),
and divided by them it is the noise of a single term.
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

    It costs 16 bytes a step and rank, and a host sync where the collectives run on an accelerator.

    Args:
        feed: deals the micro-batches.
        weigh: micro-batch -> the number of terms (tokens) that its mean loss is taken over.
        collectives: the data-parallel ranks.

    A micro-batch of weight 0 counts for nothing: its loss is a mean over no terms. Such ones are dealt first, since the
    last micro-batch of a step is the one in which ranks reduce their gradients.

    Raises:
        ValueError: a weight that is negative or not finite on some rank; on all ranks at once.
        RuntimeError: ``weigh`` or the data set raised an error on another rank, which raises that error itself.
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
        # Not a number where a weight is impossible: then all ranks see it, and raise together.
        local = sum(weights) if all(0 <= weight < math.inf for weight in weights) else math.nan
        total, failed = self._collectives.sum_of(local, error is not None)
        if failed:
            self._raise_together(error)
        if math.isnan(total):
            raise ValueError(
                "weigh= gave a micro-batch a weight that is negative or not finite, on at least one rank: it is the "
                "number of terms that the mean loss is taken over, and 0 where there are none"
            )
        if 0 in weights:
            order = sorted(range(len(batches)), key=lambda index: weights[index] != 0)
            batches, weights = [batches[index] for index in order], [weights[index] for index in order]
            portion = replace(portion, sizes=[portion.sizes[index] for index in order])
        return replace(portion, batches=batches, weights=LossWeights(weights, total))

    def _weighed(self, portion: Portion) -> tuple[list[Any], list[float], Exception | None]:
        """The micro-batches and their weights, or what was raised, which must not leave the other ranks waiting."""
        try:
            batches = list(portion.batches)
            return batches, [float(self._weigh(batch)) for batch in batches], None
        except Exception as error:
            return [], [], error

    def _raise_together(self, error: Exception | None) -> NoReturn:
        said = "" if error is None else f"{type(error).__name__}: {error}"
        told = [each.decode() for each in self._collectives.gather_bytes(said.encode())]
        if error is not None:
            raise error
        rank = next(rank for rank, each in enumerate(told) if each)
        raise RuntimeError(f"the micro-batches of rank {rank} could not be fetched or weighed: {told[rank]}")

    def consumed(self, portion: Portion) -> None:
        """The step has run."""
        self._feed.consumed(portion)
