"""``GlobalOrder``: one order of examples for all ranks and batch sizes, around a data set of the user's own.

Step by step, each rank takes its slice of the next examples; how many those are changes nothing about the order, so
batch sizes, ranks and resumes can change while every example is still seen exactly once an epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Sized
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from adabatch.runtime.collectives import Collectives
from adabatch.runtime.data.counts import checked_count
from adabatch.runtime.data.order_feed import DataPosition, Dealer, OrderFeed, ShareDealer, SliceDealer
from adabatch.runtime.data.sequence import ExampleSequence, Subset, shuffle_of
from adabatch.runtime.data.shuffles import Shuffle

STATE_FORMAT = 2

MOST_WORKERS = 1024
"""Loading processes of a rank; a number above it was meant for something else."""

MOST_SEED = 2**64 - 1
MOST_EPOCH = 2**31 - 1


class GlobalOrder:
    """One order of examples for all ranks, batch sizes and world sizes; given to ``AdaptiveBatch.steps`` as the loader.

    Position g of the order is place ``g % n`` of epoch ``g // n``: epochs are joined, so no batch is cut short by the
    end of an epoch. A step of B examples takes the next B positions, micro-batch by micro-batch, and of each the ranks
    take consecutive slices. The micro-batch may grow (``AdaptiveBatch(max_micro_batch_size=)``), which makes a growing
    batch cheap; with loaders of your own only the number of accumulation steps can grow.

    Args:
        dataset: map-style, with ``__len__`` and ``__getitem__`` (or ``__getitems__``); no sampler of its own.
        seed: of the order; must be the same on all ranks.
        shuffle: a new order each epoch, or False for the data set's own; or how to make one: ``FullShuffle()``,
            ``ScatteredShuffle()`` and ``BlockShuffle(size=, mixed=)`` (constant memory), ``WeightedShuffle(weights)``.
        subset: the examples that take part, each once; all by default.
        join_epochs: False makes the last step of an epoch shorter, so that the next begins with a new one. Where the
            ranks cannot share what is left equally, it takes the first few of the next epoch too, fewer than there are
            ranks.
        collate_fn: as in ``torch.utils.data.DataLoader``.
        num_workers: loading processes a rank. What they prefetched in a size that is no longer wanted is loaded anew;
            steps are the same as without them.
        loader_options: more keyword arguments for ``DataLoader`` (``pin_memory``, ``prefetch_factor``,
            ``persistent_workers``, ``worker_init_fn``, ``timeout``, ``multiprocessing_context``).

    Raises:
        ValueError: an empty data set, a subset or weights that do not fit it, loader options that would order the
            data anew, or a seed or number of workers out of bounds (0 to 2^64 - 1, 0 to 1,024).
        TypeError: a data set without a length, or one that is only iterable; a shuffle that is none; a number that is
            not whole.
    """

    _FORBIDDEN = frozenset({"batch_size", "sampler", "batch_sampler", "drop_last", "generator", "in_order"})

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        seed: int = 0,
        shuffle: bool | Shuffle = True,
        subset: Sequence[int] | None = None,
        join_epochs: bool = True,
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
        seed = checked_count("seed", seed, least=0, most=MOST_SEED)
        num_workers = checked_count("num_workers", num_workers, least=0, most=MOST_WORKERS, why="processes per rank")
        if not isinstance(join_epochs, bool):
            raise TypeError(f"join_epochs must be True or False, got {join_epochs!r}")
        self.dataset = dataset
        self._join_epochs = join_epochs
        self._loader_options = {**loader_options, "collate_fn": collate_fn, "num_workers": num_workers}
        chosen = None if subset is None else Subset(subset, len(dataset))
        taking_part = len(dataset if chosen is None else chosen)
        self._place = DataPosition(
            ExampleSequence(len(dataset), seed=seed, shuffle=shuffle_of(shuffle, taking_part), subset=chosen)
        )

    def __len__(self) -> int:
        """Examples in an epoch."""
        return self._place.sequence.length

    @property
    def seed(self) -> int:
        """The seed of the order: the one given, or that of the state loaded."""
        return self._place.sequence.seed

    @property
    def epoch(self) -> int:
        """Epochs completed."""
        return self._place.seen // len(self)

    @property
    def examples_seen(self) -> int:
        """Examples of the present epoch that all ranks together have consumed."""
        return self._place.seen % len(self)

    def state_dict(self) -> dict[str, int | str]:
        """The place in the data, valid at any batch, world size and number of workers; equal on all ranks.

        Three numbers (seed, epoch, examples), and what they count in: the length of the data set and the kind of order.
        """
        sequence = self._place.sequence
        return {
            "format": STATE_FORMAT,
            "seed": sequence.seed,
            "epoch": self.epoch,
            "examples": self.examples_seen,
            "length": sequence.num_examples,
            "order": sequence.name,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to a saved place, and takes over its seed.

        Raises:
            ValueError: a state of a newer format, or of another data set or kind of order, in which the place would be
                another one.
        """
        if state["format"] > STATE_FORMAT:
            raise ValueError(
                f"the data order was saved in format {state['format']}, this version reads up to {STATE_FORMAT}: "
                f"upgrade adabatch"
            )
        sequence = self._place.sequence
        here = {"length": sequence.num_examples, "order": sequence.name}
        saved = {**here, **state}  # format 1 says nothing of them
        other = [f"{name} {saved[name]!r}, now {value!r}" for name, value in here.items() if saved[name] != value]
        if other:
            raise ValueError(
                f"the place in the data was saved with {' and '.join(other)}: resume with the data set and the shuffle "
                f"that the run began with, or begin a new epoch with start_epoch({state['epoch'] + 1})"
            )
        if not 0 <= state["examples"] < sequence.length:
            raise ValueError(
                f"the saved place is example {state['examples']} of an epoch, which has only {sequence.length}: resume "
                f"with the data set that the run began with"
            )
        self._move(sequence.seeded(state["seed"]), state["epoch"], state["examples"])

    def start_epoch(self, epoch: int) -> None:
        """Goes to the beginning of an epoch: for a run that goes on with other data than it began with.

        Raises:
            ValueError: a negative epoch.
        """
        epoch = checked_count("epoch", epoch, least=0, most=MOST_EPOCH)
        self._move(self._place.sequence, epoch, 0)

    def _move(self, sequence: ExampleSequence, epoch: int, examples: int) -> None:
        self._place.sequence = sequence
        self._place.seen = epoch * sequence.length + examples
        self._place.moves += 1

    def permutation(self, epoch: int) -> Tensor:
        """The examples of an epoch in their order, shape (length,), int64; the same on every rank."""
        return torch.from_numpy(self._place.sequence.at(epoch * len(self), (epoch + 1) * len(self)).copy())

    def feed(self, rank: int, dp_size: int) -> OrderFeed:
        """The portions of one rank, from the present place on."""
        return self._feed(
            lambda sequence: SliceDealer(sequence, rank, dp_size, join_epochs=self._join_epochs), rank, dp_size
        )

    def shared_feed(self, ranks: Collectives) -> OrderFeed:
        """The portions of one rank of those that come and go: its share of each step, from the present place on."""
        return self._feed(
            lambda sequence: ShareDealer(sequence, ranks, join_epochs=self._join_epochs), ranks.rank, ranks.size
        )

    def _feed(self, make_dealer: Callable[[ExampleSequence], Dealer], rank: int, dp_size: int) -> OrderFeed:
        return OrderFeed(self._place, self._loader, make_dealer=make_dealer, ranks=(rank, dp_size))

    def _loader(self, dealer: Dealer, seeds: torch.Generator) -> DataLoader[Any]:
        return DataLoader(self.dataset, batch_sampler=cast("Any", dealer), generator=seeds, **self._loader_options)
