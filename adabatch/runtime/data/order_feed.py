"""Deals this rank's micro-batches from a place in the sequence of examples, through loading processes that prefetch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple, final

import torch
from torch.utils.data import DataLoader

from adabatch.batch.plan import BatchPlan
from adabatch.runtime.collectives import Collectives
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


class Cut(NamedTuple):
    """The part of the sequence that a step takes.

    Args:
        sizes: sizes of this rank's micro-batches, in examples.
        num_examples: examples of the step, over all ranks.
        plan: the actual composition of the step, if it differs from the planned one.
    """

    sizes: list[int]
    num_examples: int
    plan: BatchPlan | None = None


class Dealer(ABC):
    """The batch sampler inside a ``DataLoader``: an endless iterator over lists of this rank's examples.

    Attributes:
        place: the place of the next micro-batches to be dealt.
        in_flight: number of micro-batches that were dealt but have not arrived.
    """

    def __init__(self, sequence: ExampleSequence, *, join_epochs: bool) -> None:
        self.sequence = sequence
        self.place = 0
        self.in_flight = 0
        self._join_epochs = join_epochs

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            first, size = self.next_piece()
            self.in_flight += 1
            yield self.sequence.at(first, first + size).tolist()

    def left_in_epoch(self, place: int) -> int:
        """Examples from ``place`` to the end of its epoch."""
        return self.sequence.length - place % self.sequence.length

    @abstractmethod
    def next_piece(self) -> tuple[int, int]:
        """The first example of this rank's next micro-batch, and its size."""

    @abstractmethod
    def rule(self, plan: BatchPlan) -> Hashable:
        """What the cuts depend on besides the place. If it changes, micro-batches must be dealt again."""

    @abstractmethod
    def aim(self, place: int, plan: BatchPlan) -> None:
        """Deals from this place on, for this plan."""

    @abstractmethod
    def cut(self, place: int, plan: BatchPlan) -> Cut:
        """The cut of the step at ``place``."""


@final
class SliceDealer(Dealer):
    """Cuts the sequence into micro-batches, of which the ranks take consecutive slices.

    If epochs are not joined, the last micro-batch of each is shorter. The cuts depend only on the place and on the size
    of the micro-batch, so they are known however far loading processes have prefetched.
    """

    def __init__(self, sequence: ExampleSequence, rank: int, dp_size: int, *, join_epochs: bool) -> None:
        super().__init__(sequence, join_epochs=join_epochs)
        self._rank = rank
        self._dp_size = dp_size
        self._micro_batch_size = 0

    def next_piece(self) -> tuple[int, int]:
        size = self._size_at(self.place)
        first = self.place + self._rank * size
        self.place += size * self._dp_size
        return first, size

    def rule(self, plan: BatchPlan) -> Hashable:
        # not the whole plan: while only the accumulation grows, what has been prefetched stays right
        return plan.micro_batch_size

    def aim(self, place: int, plan: BatchPlan) -> None:
        self.place, self._micro_batch_size = place, plan.micro_batch_size

    def cut(self, place: int, plan: BatchPlan) -> Cut:
        """The cut of the plan, with fewer micro-batches at the end of an epoch."""
        sizes: list[int] = []
        start, epoch = place, place // self.sequence.length
        while len(sizes) < plan.accumulation_steps and (self._join_epochs or place // self.sequence.length == epoch):
            sizes.append(self._size_at(place))
            place += sizes[-1] * self._dp_size
        return Cut(sizes, place - start)

    def _size_at(self, place: int) -> int:
        """Examples that each rank takes in the micro-batch at ``place``."""
        if self._join_epochs:
            return self._micro_batch_size
        # Rounded up, since no example may be left out; the last ranks then take the first few of the next epoch.
        return min(self._micro_batch_size, -(-self.left_in_epoch(place) // self._dp_size))


@final
class ShareDealer(Dealer):
    """Cuts the sequence into steps, and those into micro-batches, of which each rank takes a consecutive share.

    It is meant for ranks that come and go: plans are made for a single rank, and the present ranks share its
    micro-batches. Shares differ by one micro-batch at most, and together make up the plan's global batch. Only if a
    step has fewer micro-batches than there are ranks, it is cut into smaller ones, one for each rank.

    Args:
        sequence: the examples.
        ranks: the present ranks, whose number may change.
        join_epochs: whether a step may contain examples of two epochs.
    """

    def __init__(self, sequence: ExampleSequence, ranks: Collectives, *, join_epochs: bool) -> None:
        super().__init__(sequence, join_epochs=join_epochs)
        self._ranks = ranks
        self._plan: BatchPlan | None = None
        self._pieces: deque[tuple[int, int]] = deque()  # of the step whose micro-batches are being dealt

    def next_piece(self) -> tuple[int, int]:
        if not self._pieces:
            assert self._plan is not None, "aim() comes first"
            sizes = self._sizes(self.place, self._plan)
            starts = list(accumulate(sizes, initial=self.place))
            self._pieces += [(starts[index], sizes[index]) for index in self._share(len(sizes))]
            self.place = starts[-1]
        return self._pieces.popleft()

    def rule(self, plan: BatchPlan) -> Hashable:
        return plan, self._ranks.rank, self._ranks.size

    def aim(self, place: int, plan: BatchPlan) -> None:
        self.place, self._plan = place, plan
        self._pieces.clear()

    def cut(self, place: int, plan: BatchPlan) -> Cut:
        sizes = self._sizes(place, plan)
        # The plan tells of the rank with the most micro-batches, for which the others wait.
        largest = -(-len(sizes) // self._ranks.size)
        made_of = BatchPlan(
            micro_batch_size=plan.micro_batch_size, accumulation_steps=largest, dp_size=self._ranks.size
        )
        return Cut([sizes[index] for index in self._share(len(sizes))], sum(sizes), made_of)

    def _sizes(self, place: int, plan: BatchPlan) -> list[int]:
        """Examples in each micro-batch of the step at ``place``, over all ranks."""
        num_examples, num_ranks = plan.global_batch_size, self._ranks.size
        if not self._join_epochs:  # a few of the next epoch if there is less than one for each rank
            num_examples = min(num_examples, max(self.left_in_epoch(place), num_ranks))
        if num_examples < num_ranks:
            raise ValueError(
                f"a step of {num_examples} examples cannot be shared by {num_ranks} ranks: raise the lower limit of "
                f"the batch to as many examples as there may be ranks"
            )
        full, rest = divmod(num_examples, plan.micro_batch_size)
        sizes = [plan.micro_batch_size] * full + [rest] * (rest > 0)
        if len(sizes) < num_ranks:
            least, more = divmod(num_examples, num_ranks)
            sizes = [least + (index < more) for index in range(num_ranks)]
        return sizes

    def _share(self, count: int) -> range:
        """The indices of this rank's micro-batches among those of a step."""
        rank = self._ranks.rank
        least, more = divmod(count, self._ranks.size)
        first = rank * least + min(rank, more)
        return range(first, first + least + (rank < more))


class OrderFeed:
    """Portions of a ``GlobalOrder`` for one rank. Endless: the caller decides where a pass ends.

    A step is exactly its plan, whatever loading processes have prefetched: micro-batches of an outdated cut are
    discarded when they arrive, and their examples are dealt again. So neither limits nor the reproduction of a run
    depend on how much was prefetched. A change of the micro-batch costs one filling of the loading queue.

    Args:
        place: the position of all ranks in the data.
        make_loader: makes a loader around a dealer.
        make_dealer: makes the dealer of a sequence.
        ranks: rank and number of ranks, which the seeds of the loading processes depend on.
    """

    def __init__(
        self,
        place: DataPosition,
        make_loader: MakeLoader,
        *,
        make_dealer: Callable[[ExampleSequence], Dealer],
        ranks: tuple[int, int],
    ) -> None:
        self._place = place
        self._make_loader = make_loader
        self._make_dealer = make_dealer
        self._rank, self._dp_size = ranks
        self._moves = -1
        self._rule: Hashable = None
        self._arriving = 0  # the place of the step whose micro-batches the loader hands over next

    def _restart(self) -> None:
        self._moves = self._place.moves
        sequence = self._place.sequence
        self._dealer = self._make_dealer(sequence)
        self._rule = None
        # The loader draws the seeds of its workers from this generator, so torch's global one is not changed. The seeds
        # must differ between ranks and passes, or all would draw the same augmentations.
        seeds = generator(sequence.seed, -1 - self._place.seen * self._dp_size - self._rank)
        self._loader = self._make_loader(self._dealer, seeds)
        self._batches: Iterator[Any] | None = None

    def take(self, plan: BatchPlan) -> Portion:
        """The next ``plan.global_batch_size`` examples; fewer at the end of an epoch that is not joined to the next.

        If called again before the step is consumed, it begins at the same examples, whatever the plan.
        """
        if self._moves != self._place.moves:
            self._restart()
        # another cut, or a step that was broken off: what is under way in the loading processes is not what comes next
        if (self._arriving, self._rule) != (self._place.seen, self._dealer.rule(plan)):
            self._redeal(plan)
        if self._batches is None:
            # Only now that the dealer has its aim: loading processes are given micro-batches as soon as they exist.
            self._batches = iter(self._loader)
        cut = self._dealer.cut(self._place.seen, plan)
        return Portion(self._arrivals(cut), cut.sizes, cut.num_examples, plan=cut.plan)

    def _redeal(self, plan: BatchPlan) -> None:
        """Deals from the present place on, and discards the micro-batches that were dealt before."""
        self._arriving, self._rule = self._place.seen, self._dealer.rule(plan)
        self._dealer.aim(self._place.seen, plan)
        # A DataLoader cannot take back what its workers have been given, so it is received and dropped.
        for _ in range(self._dealer.in_flight):
            self._next()

    def _next(self) -> Any:
        assert self._batches is not None
        batch = next(self._batches)
        self._dealer.in_flight -= 1
        return batch

    def _arrivals(self, cut: Cut) -> Iterator[Any]:
        self._arriving += cut.num_examples  # before the first arrives, so that an interrupted step is dealt again
        for _ in cut.sizes:
            yield self._next()

    def consumed(self, portion: Portion) -> None:
        """Moves the order's place past the step."""
        self._place.seen += portion.num_examples
