"""From a place in the sequence of examples to this rank's micro-batches, through loading processes that run ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from adabatch.batch.plan import BatchPlan
from adabatch.runtime.data.portions import Portion
from adabatch.runtime.data.sequence import ExampleSequence
from adabatch.runtime.data.shuffles import generator

MakeLoader = Callable[["Dealer", torch.Generator], "DataLoader[Any]"]
"""A loader of the data set around a batch sampler and a source of seeds for its loading processes."""


@dataclass
class DataPosition:
    """How far all ranks together are in a sequence of examples.

    Args:
        sequence: the examples.
        seen: number of places consumed since the beginning of the first epoch.
        moves: how often the place was set from outside.
    """

    sequence: ExampleSequence
    seen: int = 0
    moves: int = 0


class Dealer:
    """The batch sampler inside a ``DataLoader``: endless lists of this rank's examples.

    It cuts the sequence into micro-batches, of which the ranks take consecutive slices. If epochs are not joined, the
    last micro-batch of each epoch is shorter. The cuts depend only on the place, so they are known however far the
    loading processes run ahead.
    """

    def __init__(self, sequence: ExampleSequence, rank: int, dp_size: int, *, join_epochs: bool) -> None:
        self._sequence = sequence
        self._rank = rank
        self._dp_size = dp_size
        self._join_epochs = join_epochs
        self.place = 0  # of the next micro-batch that the loader will request
        self.micro_batch_size = 0
        self.in_flight = 0

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            size = self.size_at(self.place)
            first = self.place + self._rank * size
            self.place += size * self._dp_size
            self.in_flight += 1
            yield self._sequence.at(first, first + size).tolist()

    def size_at(self, place: int) -> int:
        """Examples that each rank takes in the micro-batch at ``place``."""
        if self._join_epochs:
            return self.micro_batch_size
        left = self._sequence.length - place % self._sequence.length
        return min(self.micro_batch_size, -(-left // self._dp_size))

    def sizes_from(self, place: int, count: int) -> list[int]:
        """The sizes of a step of ``count`` micro-batches, or of fewer at the end of an epoch."""
        sizes: list[int] = []
        epoch = place // self._sequence.length
        while len(sizes) < count and (self._join_epochs or place // self._sequence.length == epoch):
            sizes.append(self.size_at(place))
            place += sizes[-1] * self._dp_size
        return sizes


class OrderFeed:
    """Portions of a ``GlobalOrder`` for one rank. Endless: the caller decides where a pass ends.

    A step is exactly its plan, whatever the loading processes have prefetched: micro-batches of an old size are dropped
    when they arrive, and their examples are loaded again. Limits and reproducibility therefore do not depend on how
    much was prefetched; a change of the micro-batch costs one filling of the loading queue.
    """

    def __init__(
        self, place: DataPosition, make_loader: MakeLoader, *, rank: int, dp_size: int, join_epochs: bool
    ) -> None:
        self._place = place
        self._make_loader = make_loader
        self._rank = rank
        self._dp_size = dp_size
        self._join_epochs = join_epochs
        self._moves = -1
        self._arriving = 0  # the place of the next micro-batch that the loader will hand over

    def _restart(self) -> None:
        self._moves = self._place.moves
        sequence = self._place.sequence
        self._dealer = Dealer(sequence, self._rank, self._dp_size, join_epochs=self._join_epochs)
        # A separate generator keeps torch's global one untouched. The loader draws the seeds of its workers from it,
        # which must differ between ranks and passes, or all would augment in the same way.
        seeds = generator(sequence.seed, -1 - self._place.seen * self._dp_size - self._rank)
        self._loader = self._make_loader(self._dealer, seeds)
        self._batches: Iterator[Any] | None = None

    def take(self, plan: BatchPlan) -> Portion:
        """The next ``plan.global_batch_size`` examples; fewer at the end of an epoch that is not joined to the next.

        If called again before the step is consumed, it begins at the same examples, whatever the plan.
        """
        if self._moves != self._place.moves:
            self._restart()
        if (self._arriving, self._dealer.micro_batch_size) != (self._place.seen, plan.micro_batch_size):
            self._redeal(plan.micro_batch_size)
        if self._batches is None:
            self._batches = iter(self._loader)
        sizes = self._dealer.sizes_from(self._place.seen, plan.accumulation_steps)
        return Portion(self._arrivals(sizes), sizes, sum(sizes) * self._dp_size)

    def _redeal(self, micro_batch_size: int) -> None:
        """Requests micro-batches from the current place on; those requested before are dropped when they arrive."""
        self._dealer.place = self._arriving = self._place.seen
        self._dealer.micro_batch_size = micro_batch_size
        for _ in range(self._dealer.in_flight):
            self._next()

    def _next(self) -> Any:
        assert self._batches is not None
        batch = next(self._batches)
        self._dealer.in_flight -= 1
        return batch

    def _arrivals(self, sizes: list[int]) -> Iterator[Any]:
        for size in sizes:
            batch = self._next()
            self._arriving += size * self._dp_size
            yield batch

    def consumed(self, portion: Portion) -> None:
        """Moves the order's place past the step."""
        self._place.seen += portion.num_examples
