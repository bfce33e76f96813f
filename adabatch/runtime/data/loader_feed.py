"""Steps from any loader that yields micro-batches of this rank."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn, Protocol, runtime_checkable

from torch.utils.data import DataLoader

from adabatch.batch.plan import BatchPlan
from adabatch.runtime.collectives import Collectives
from adabatch.runtime.data.portions import Portion


class LoaderFeed:
    """Portions from any loader, by accumulation alone: one pass over it.

    The micro-batches of a step are fetched before it begins, none beyond it, and the ranks agree (16 bytes) on how many
    each has. So a loader that runs dry in the middle of a step makes a last, shorter step on all ranks at once; what a
    rank has beyond the others is left out. A loader with a ``state_dict`` of its own stands, between steps, exactly
    behind what was consumed.

    Args:
        loader: yields micro-batches of this rank.
        collectives: the data-parallel ranks.
        count: examples in a micro-batch.
        may_be_empty: whether nothing at all may come, as from a loader whose state was saved behind its last batch.

    Raises:
        ValueError: nothing comes out of the loader on some rank, or more than the plan says, or a micro-batch without
            examples; on all ranks at once.
        RuntimeError: the loader of another rank raised.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        collectives: Collectives,
        *,
        count: Callable[[Any], int],
        may_be_empty: bool = False,
    ) -> None:
        self._loader = loader
        self._batches: Iterator[Any] | None = None
        self._collectives = collectives
        self._count = count
        self._any = may_be_empty

    def take(self, plan: BatchPlan) -> Portion | None:
        """As many micro-batches as the plan accumulates, fewer at the end of the loader, then None."""
        batches, sizes, error = self._fetch(plan.accumulation_steps)
        # Not a number where a count is impossible: then all ranks see it, and raise together. Infinite where a loader
        # raised.
        local = sum(sizes) if all(size >= 1 for size in sizes) else math.nan
        full, num_examples = self._collectives.sum_of(
            len(batches) == plan.accumulation_steps if error is None else math.inf, local
        )
        if full == math.inf:
            self._raise_together(error)
        self._check(num_examples, plan)
        if full < self._collectives.size:
            common = int(self._collectives.minimum_of(len(batches))[0])
            batches, sizes = batches[:common], sizes[:common]
            if common == 0:
                if not self._any:
                    raise ValueError(
                        "the loader gave no micro-batch on at least one rank: is its data set too small, or is it an "
                        "iterator, which can be passed over only once?"
                    )
                return None
            (num_examples,) = self._collectives.sum_of(sum(sizes))
        self._any = True
        return Portion(batches, sizes, int(num_examples))

    def _fetch(self, count: int) -> tuple[list[Any], list[int], Exception | None]:
        """Up to ``count`` micro-batches and their sizes; and what the user's loader or count raised meanwhile."""
        batches: list[Any] = []
        try:
            self._batches = iter(self._loader) if self._batches is None else self._batches
            batches += itertools.islice(self._batches, count)
            return batches, [self._count(batch) for batch in batches], None
        except Exception as error:
            return [], [], error

    def _raise_together(self, error: Exception | None) -> NoReturn:
        """An error of one rank ends all, each with what it knows, rather than leave the others waiting."""
        mine = math.inf if error is None else self._collectives.rank
        (first,) = self._collectives.minimum_of(mine)
        if error is not None:
            raise error
        raise RuntimeError(f"the loader of rank {first:.0f} raised an error, which that rank shows")

    def _check(self, num_examples: float, plan: BatchPlan) -> None:
        if math.isnan(num_examples):
            raise ValueError("the loader gave a micro-batch without examples on at least one rank")
        if num_examples > plan.global_batch_size:
            raise ValueError(
                f"a step of {num_examples:.0f} examples came where {plan.global_batch_size} were planned: the loader's "
                f"micro-batches may hold micro_batch_size={plan.micro_batch_size} examples at most"
            )

    def consumed(self, portion: Portion) -> None:
        """Nothing to note: the loader's place is its own."""


@runtime_checkable
class _CountsEpochs(Protocol):
    """torch's ``DistributedSampler``, and streaming data sets of Hugging Face."""

    epoch: int

    def set_epoch(self, epoch: int) -> None: ...


def advance_epoch(loader: Iterable[Any]) -> None:
    """After a pass over a ``DataLoader``: a sampler or data set that counts epochs goes to its next one.

    A ``DistributedSampler`` shuffles anew; a streaming data set of Hugging Face too, and forgets the place that it was
    resumed at, to which it would return in every pass.
    """
    if isinstance(loader, DataLoader):
        for part in (loader.sampler, loader.dataset):
            if isinstance(part, _CountsEpochs):
                part.set_epoch(part.epoch + 1)
