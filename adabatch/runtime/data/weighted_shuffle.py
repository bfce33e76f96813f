"""A shuffle in which some examples come more often, or earlier, than others."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from adabatch.arguments import allowed_by, checked, conform, require, whole
from adabatch.runtime.data.permutation import Integers, key_of, uniforms
from adabatch.runtime.data.shuffles import Epoch

MOST_DRAWS = 2**40
"""Most draws per epoch; more than any data set needs."""


class WeightedShuffle:
    """Draws examples with probabilities proportional to weights, with or without replacement.

    With replacement, every place of the order is an independent draw: example ``i`` has probability ``w_i / sum(w)``,
    and comes ``n w_i / sum(w)`` times on average in an epoch of ``n`` places; some come twice, some not at all.

    Without replacement, no example comes twice in an epoch: each place is drawn with probabilities proportional to the
    weights of the remaining examples. An epoch over all examples holds each once, the heavy ones early; a shorter epoch
    (``length=``) is a weighted choice.

    Examples of weight 0 are never drawn. Both ways take 8 bytes per example on every rank, and so do the weights.

    Args:
        weights: one per example (of the subset, if there is one), shape (num_examples,).
        replacement: see above.
        length: places in an epoch; by default the number of examples (without replacement, of weight above 0).

    Raises:
        ValueError: if weights are negative, not finite, or all 0, or an epoch is longer than the number of examples
            that can be drawn.

    Source: Efraimidis and Spirakis 2006, "Weighted random sampling with a reservoir" (keys without replacement).
    """

    @checked
    def __init__(
        self,
        weights: Sequence[float] | NDArray[np.float64] | Tensor,
        *,
        replacement: bool = True,
        length: int | None = None,
    ) -> None:
        if isinstance(weights, Tensor):
            weights = weights.detach().cpu()
        self._weights = conform("weights", weights, allowed_by(ArrayLike)).ravel()
        require(np.ndim(weights) == 1, "weights must be a flat array or list, one number per example", weights)
        if not (np.isfinite(self._weights).all() and (self._weights >= 0).all() and self._weights.any()):
            raise ValueError("weights must be finite, not negative, and not all 0")
        drawn = int(np.count_nonzero(self._weights))
        if length is None:
            length = len(self._weights) if replacement else drawn
        self._length = whole(
            "length",
            length,
            at_least=1,
            at_most=MOST_DRAWS if replacement else drawn,
            why="" if replacement else "the examples of weight above 0, as none comes twice",
        )
        self._replacement = replacement
        digest = hashlib.sha256(self._weights.tobytes()).hexdigest()[:12]
        self.name = f"{self._length} draws with{'' if replacement else 'out'} replacement, weights {digest}"

    def length(self, num_examples: int) -> int:
        """Places in an epoch.

        Raises:
            ValueError: if the number of examples differs from that of the weights.
        """
        if num_examples != len(self._weights):
            raise ValueError(
                f"{len(self._weights)} weights were given for {num_examples} examples: give each one weight"
            )
        return self._length

    def epoch(self, num_examples: int, *, seed: int, epoch: int) -> Epoch:
        """The draws of one epoch."""
        key = key_of(seed, epoch)
        if self._replacement:
            bounds = np.cumsum(self._weights)
            # side="right" never finds an example of weight 0, whose bound is that of the example before it.
            last = int(np.flatnonzero(self._weights)[-1])
            # Rounding may lift the largest number to the sum itself, past the last example.
            return lambda begin, end: np.minimum(
                np.searchsorted(bounds, uniforms(key, np.arange(begin, end)) * bounds[-1], side="right"), last
            )
        order = self._race(key)
        return lambda begin, end: order[begin:end]

    def _race(self, key: int) -> Integers:
        """Each example gets an exponential time of rate w_i; the shortest is that of i with probability w_i /
        sum(w)."""
        with np.errstate(divide="ignore", invalid="ignore"):  # weights of 0
            # log1p(-u) and not log(u): u may be 0, but it is never 1.
            times = -np.log1p(-uniforms(key, np.arange(len(self._weights)))) / self._weights
        times[self._weights == 0] = np.inf
        # Stable, so that equal times give the same order on every machine.
        return np.argsort(times, kind="stable")[: self._length]
