"""Feeding steps: one global order of examples for all ranks and batch sizes, and loaders of the user's own.

``GlobalOrder`` deals the examples of a data set in one order that depends on a seed alone. Step by step, each rank
takes its slice of the next examples; how many those are changes nothing about the order, so batch sizes, ranks and
resumes can change while every example is still seen exactly once an epoch.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torch.utils.data.distributed import DistributedSampler

from adabatch.batch.plan import BatchPlan
from adabatch.runtime.collectives import Collectives

STATE_FORMAT = 1


class Weights(NamedTuple):
    """How much micro-batches count for in the step's gradient, in one unit.

    Args:
        of_each: micro-batch of this rank.
        total: of all ranks and micro-batches.
    """

    of_each: Sequence[float]
    total: float


@dataclass(frozen=True)
class Portion:
    """What one step takes on this rank.

    Args:
        batches: the micro-batches, to be iterated once.
        sizes: examples in each, known before the first is run.
        num_examples: examples of the whole step, over all ranks.
        weights: of the micro-batches in the step's gradient, where those are not their examples.
    """

    batches: Iterable[Any]
    sizes: Sequence[int]
    num_examples: int
    weights: Weights | None = None


class Feed(Protocol):
    """Hands out the portions of steps; None when the pass over the data is over, on all ranks at once."""

    def take(self, plan: BatchPlan) -> Portion | None:
        """The portion of the next step."""
        ...

    def consumed(self, portion: Portion) -> None:
        """The step has run: what it took counts as seen."""
        ...


class GlobalOrder:
    """One order of examples for all ranks, batch sizes and world sizes; given to ``AdaptiveBatch.steps`` as the loader.

    Position g of the order is example ``permutation(seed, g // n)[g % n]``: epochs are joined, so no batch is cut short
    by the end of an epoch. A step of B examples takes the next B positions, micro-batch by micro-batch, and of each the
    ranks take consecutive slices. The micro-batch may grow (``AdaptiveBatch(max_micro_batch_size=)``), which makes a
    growing batch cheap; with loaders of your own only the number of accumulation steps can grow.

    Args:
        dataset: map-style, with ``__len__`` and ``__getitem__`` (or ``__getitems__``); no sampler of its own.
        seed: of the order; must be the same on all ranks.
        shuffle: a new permutation each epoch; False keeps the data set's order.
        collate_fn: as in ``torch.utils.data.DataLoader``.
        num_workers: loading processes a rank. They prefetch, so a larger micro-batch arrives only after what is under
            way; what arrives is what is counted.
        loader_options: more keyword arguments for ``DataLoader`` (``pin_memory``, ``prefetch_factor``,
            ``persistent_workers``, ``worker_init_fn``, ``timeout``, ``multiprocessing_context``).

    Raises:
        ValueError: an empty data set, or loader options that would order the data anew.
        TypeError: a data set without a length, or one that is only iterable.
    """

    _FORBIDDEN = frozenset({"batch_size", "shuffle", "sampler", "batch_sampler", "drop_last", "generator", "in_order"})

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        seed: int = 0,
        shuffle: bool = True,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        num_workers: int = 0,
        **loader_options: Any,
    ) -> None:
        if isinstance(dataset, IterableDataset) or not isinstance(dataset, Sized):
            raise TypeError(
                f"GlobalOrder needs a map-style data set with a length, got {type(dataset).__name__}: "
                f"give an iterable data set to AdaptiveBatch.steps in a DataLoader of its own"
            )
        if len(dataset) == 0:
            raise ValueError(f"the data set {type(dataset).__name__} is empty: a step needs at least one example")
        misplaced = self._FORBIDDEN & loader_options.keys()
        if misplaced:
            raise ValueError(f"GlobalOrder itself decides {', '.join(sorted(misplaced))}: leave them out")
        if seed < 0:
            raise ValueError(f"the seed must not be negative, got {seed}")
        self.dataset = dataset
        self.seed = seed
        self.shuffle = shuffle
        self._loader_options = {**loader_options, "collate_fn": collate_fn, "num_workers": num_workers}
        self._num_examples = len(dataset)
        self._seen = 0
        self._loads = 0

    def __len__(self) -> int:
        """Examples in an epoch."""
        return self._num_examples

    @property
    def epoch(self) -> int:
        """Epochs completed."""
        return self._seen // self._num_examples

    @property
    def examples_seen(self) -> int:
        """Examples of the present epoch that all ranks together have consumed."""
        return self._seen % self._num_examples

    def state_dict(self) -> dict[str, int]:
        """The place in the data: three numbers and a format; equal on all ranks, valid at any batch and world size."""
        return {"format": STATE_FORMAT, "seed": self.seed, "epoch": self.epoch, "examples": self.examples_seen}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes to a saved place.

        Raises:
            ValueError: a state of a newer format, or a place that this data set does not have.
        """
        if state["format"] > STATE_FORMAT:
            raise ValueError(
                f"the data order was saved in format {state['format']}, this version reads up to {STATE_FORMAT}: "
                f"upgrade adabatch"
            )
        if not 0 <= state["examples"] < self._num_examples:
            raise ValueError(
                f"the saved place is example {state['examples']} of its epoch, but the data set has only "
                f"{self._num_examples}: resume with the data set that the run began with"
            )
        self.seed = state["seed"]
        self._seen = state["epoch"] * self._num_examples + state["examples"]
        self._loads += 1

    def permutation(self, epoch: int) -> Tensor:
        """The order of an epoch, shape (num_examples,), int64; the same on every rank and machine of one torch."""
        if not self.shuffle:
            return torch.arange(self._num_examples)
        return torch.randperm(self._num_examples, generator=self.generator(epoch))

    def generator(self, stream: int) -> torch.Generator:
        """Random numbers of the order's seed: one stream an epoch, and negative ones for loading processes."""
        return torch.Generator().manual_seed((self.seed * 0x9E3779B97F4A7C15 + stream) % 2**63)

    def feed(self, rank: int, dp_size: int) -> OrderFeed:
        """The portions of one rank, from the present place on."""
        return OrderFeed(self, rank, dp_size)


class _Indices:
    """The batch sampler inside a ``DataLoader``: lists of this rank's indices, without end.

    It deals micro-batches of the present ``micro_batch_size`` and notes the size of each, because with workers a few
    are under way when the size changes.
    """

    def __init__(self, order: GlobalOrder, rank: int, dp_size: int) -> None:
        self._order = order
        self._rank = rank
        self._dp_size = dp_size
        self._next = order.epoch * len(order) + order.examples_seen
        self._permutations: dict[int, Tensor] = {}
        self.micro_batch_size = 0
        self.under_way: deque[int] = deque()

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            size = self.micro_batch_size
            first = self._next + self._rank * size
            self._next += size * self._dp_size
            self.under_way.append(size)
            yield self._at(first, first + size)

    def _at(self, begin: int, end: int) -> list[int]:
        """The examples at positions ``begin`` to ``end``, which may lie in several epochs."""
        n = len(self._order)
        pieces: list[int] = []
        while begin < end:
            epoch, offset = divmod(begin, n)
            if epoch not in self._permutations:
                self._permutations = {e: p for e, p in self._permutations.items() if e >= epoch - 1}
                self._permutations[epoch] = self._order.permutation(epoch)
            stop = min(n, offset + end - begin)
            pieces += self._permutations[epoch][offset:stop].tolist()
            begin += stop - offset
        return pieces


class OrderFeed:
    """Portions of a ``GlobalOrder`` for one rank. Endless: the caller says when an epoch is enough."""

    def __init__(self, order: GlobalOrder, rank: int, dp_size: int) -> None:
        self._order = order
        self._rank = rank
        self._dp_size = dp_size
        self._loads = -1

    def _restart(self) -> None:
        self._loads = self._order._loads
        self._indices = _Indices(self._order, self._rank, self._dp_size)
        # A generator of its own keeps torch's global one untouched: the loader draws the seeds of its workers from it,
        # which must differ between ranks and passes, or all would augment alike.
        generator = self._order.generator(-1 - self._order._seen * self._dp_size - self._rank)
        self._loader = DataLoader(
            self._order.dataset,
            batch_sampler=cast("Any", self._indices),
            generator=generator,
            **self._order._loader_options,
        )
        self._batches: Iterator[Any] | None = None

    def take(self, plan: BatchPlan) -> Portion:
        """The next ``plan.global_batch_size`` examples, or a few more where prefetched sizes do not add up to it."""
        if self._loads != self._order._loads:
            self._restart()
        self._indices.micro_batch_size = plan.micro_batch_size
        if self._batches is None:
            self._batches = iter(self._loader)
        quota = plan.micro_batch_size * plan.accumulation_steps
        sizes: list[int] = []
        ahead = iter(tuple(self._indices.under_way))
        while sum(sizes) < quota:
            sizes.append(next(ahead, plan.micro_batch_size))
        return Portion(self._deal(len(sizes)), sizes, sum(sizes) * self._dp_size)

    def _deal(self, count: int) -> Iterator[Any]:
        assert self._batches is not None
        for _ in range(count):
            batch = next(self._batches)
            self._indices.under_way.popleft()
            yield batch

    def consumed(self, portion: Portion) -> None:
        """Moves the order's place past the step."""
        self._order._seen += portion.num_examples


def num_examples_in(batch: Any) -> int:
    """Examples in a micro-batch: the first dimension of the first tensor found in it that has one.

    Raises:
        TypeError: no such tensor is in it.
    """
    found = _first_tensor(batch)
    if found is None:
        raise TypeError(
            f"cannot tell how many examples a micro-batch of type {type(batch).__name__} holds: "
            f"pass count=, a function from micro-batch to number of examples, to AdaptiveBatch.steps"
        )
    return found.shape[0]


def _first_tensor(batch: Any) -> Tensor | None:
    if isinstance(batch, Tensor):
        return batch if batch.dim() else None
    if isinstance(batch, Mapping):
        batch = batch.values()
    if isinstance(batch, Iterable) and not isinstance(batch, str | bytes):
        for item in batch:
            found = _first_tensor(item)
            if found is not None:
                return found
    return None


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
