"""Steps from any loader that yields micro-batches of this rank."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from adabatch.batch.plan import BatchPlan
from adabatch.runtime.collectives import Collectives
from adabatch.runtime.data.portions import Portion


class LoaderFeed:
    """Portions from any loader, by accumulation alone: one pass over it.

    The micro-batches of a step are fetched before it begins, and the ranks agree (16 bytes) on how many each has. So a
    loader that runs dry in the middle of a step makes a last, shorter step on all ranks at once; what a rank has
    beyond the others is left out.

    Args:
        loader: yields micro-batches of this rank.
        collectives: the data-parallel ranks.
        count: examples in a micro-batch.

    Raises:
        ValueError: nothing comes out of the loader on some rank, or more than the plan says, or a micro-batch without
            examples; on all ranks at once.
    """

    def __init__(self, loader: Iterable[Any], collectives: Collectives, *, count: Callable[[Any], int]) -> None:
        self._batches = iter(loader)
        self._collectives = collectives
        self._count = count
        self._any = False

    def take(self, plan: BatchPlan) -> Portion | None:
        """As many micro-batches as the plan accumulates, fewer at the end of the loader, then None."""
        batches = list(itertools.islice(self._batches, plan.accumulation_steps))
        sizes = [self._count(batch) for batch in batches]
        # Not a number where a count is impossible: then all ranks see it, and raise together.
        local = sum(sizes) if all(size >= 1 for size in sizes) else math.nan
        full, num_examples = self._collectives.sum_of(len(batches) == plan.accumulation_steps, local)
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


def advance_epoch(loader: Iterable[Any]) -> None:
    """After a pass: a ``DistributedSampler`` inside a ``DataLoader`` goes to its next epoch, and shuffles anew."""
    if isinstance(loader, DataLoader) and isinstance(loader.sampler, DistributedSampler):
        loader.sampler.set_epoch(loader.sampler.epoch + 1)
