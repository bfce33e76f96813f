"""``GlobalOrder``: one order of examples for all ranks and batch sizes, around the user's data set.

In each step, each rank takes its slice of the next examples. Their number does not affect the order, so batch sizes and
ranks can change, and a run can be resumed, while every example is still seen exactly once per epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Sized
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from adabatch.arguments import checked, checked_but, require_format, require_state, whole
from adabatch.runtime.collectives import Collectives
from adabatch.runtime.data.order_feed import DataPosition, Dealer, OrderFeed, ShareDealer, SliceDealer
from adabatch.runtime.data.sequence import ExampleSequence, Subset, shuffle_of
from adabatch.runtime.data.shuffles import Shuffle

STATE_FORMAT = 2

MOST_WORKERS = 1024
"""Most loading processes per rank; a larger number must be a mistake."""

MOST_SEED = 2**64 - 1
MOST_EPOCH = 2**31 - 1


class GlobalOrder:
    """One order of examples for all ranks, batch sizes and world sizes; passed to ``AdaptiveBatch.steps`` as the
    loader.

    Position g of the order is place ``g % n`` of epoch ``g // n``: epochs are joined, so that the end of an epoch does
    not shorten a batch. A step of B examples takes the next B positions, micro-batch by micro-batch, and the ranks take
    consecutive slices of each micro-batch. The micro-batch may grow (``AdaptiveBatch(max_micro_batch_size=)``), which
    makes a growing batch cheap; with your own loader only the number of accumulation steps can grow.

    Args:
        dataset: map-style, with ``__len__`` and ``__getitem__`` (or ``__getitems__``), and without a sampler.
        seed: of the order; must be the same on all ranks.
        shuffle: True for a new order in each epoch, False for the order of the data set; or a shuffle:
            ``FullShuffle()``, ``ScatteredShuffle()`` and ``BlockShuffle(size=, mixed=)`` (constant memory),
            ``WeightedShuffle(weights)``.
        subset: the examples that take part, each once; all by default.
        join_epochs: False makes the last step of an epoch shorter, so that the next step begins a new epoch. If the
            ranks cannot share the rest equally, the step also takes the first few examples of the next epoch, fewer
            than there are ranks.
        collate_fn: as in ``torch.utils.data.DataLoader``.
        num_workers: loading processes per rank. Micro-batches that they prefetched in an old size are loaded again;
            steps are the same as without them.
        loader_options: more keyword arguments for ``DataLoader`` (``pin_memory``, ``prefetch_factor``,
            ``persistent_workers``, ``worker_init_fn``, ``timeout``, ``multiprocessing_context``).

    Raises:
        ValueError: if the data set is empty, a subset or weights do not fit it, loader options would change the order,
            or a seed or number of workers is out of bounds (0 to 2^64 - 1, 0 to 1,024).
        TypeError: if the data set has no length or is only iterable, ``shuffle`` is not a shuffle, or a number is not
            whole.
    """

    # With these, a DataLoader would choose sizes or examples itself.
    _FORBIDDEN = frozenset({"batch_size", "sampler", "batch_sampler", "drop_last", "generator", "in_order"})

    @checked_but("dataset", "subset", "shuffle")
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
        unusual: Any = dataset  # text, or a tensor without dimensions, whose length cannot be asked for
        no_items = isinstance(unusual, str | bytes) or getattr(unusual, "shape", True) == ()
        if no_items or isinstance(dataset, IterableDataset) or not isinstance(dataset, Sized):
            raise TypeError(
                f"GlobalOrder needs a map-style data set with a length, got {type(dataset).__name__}: "
                f"give an iterable data set to AdaptiveBatch.steps in a DataLoader of its own"
            )
        if len(dataset) == 0:
            raise ValueError(f"the data set {type(dataset).__name__} is empty: a step needs at least one example")
        misplaced = self._FORBIDDEN & loader_options.keys()
        if misplaced:
            raise ValueError(f"GlobalOrder itself decides {', '.join(sorted(misplaced))}: leave them out")
        seed = whole("seed", seed, at_least=0, at_most=MOST_SEED)
        num_workers = whole("num_workers", num_workers, at_least=0, at_most=MOST_WORKERS, why="processes per rank")
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
        """The seed of the order, or that of a loaded state."""
        return self._place.sequence.seed

    @property
    def epoch(self) -> int:
        """Epochs completed."""
        return self._place.seen // len(self)

    @property
    def examples_seen(self) -> int:
        """Examples of the current epoch that all ranks together have consumed."""
        return self._place.seen % len(self)

    def state_dict(self) -> dict[str, int | str]:
        """The place in the data, valid at any batch, world size and number of workers; equal on all ranks.

        It holds three numbers (seed, epoch, examples), and the length of the data set and the kind of order.
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
        """Restores a saved place and its seed.

        Raises:
            ValueError: if the state has a newer format, or belongs to another data set or kind of order, in which the
                same numbers would be a different place.
        """
        require_state(state, "format", "seed", "epoch", "examples", of="a GlobalOrder")
        require_format("the data order", state["format"], STATE_FORMAT)
        sequence = self._place.sequence
        here = {"length": sequence.num_examples, "order": sequence.name}
        saved = {**here, **state}  # format 1 does not contain them
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

    @checked
    def start_epoch(self, epoch: int) -> None:
        """Sets the place to the beginning of an epoch: for a run that continues with other data than before.

        Raises:
            ValueError: if the epoch is negative.
        """
        epoch = whole("epoch", epoch, at_least=0, at_most=MOST_EPOCH)
        self._move(self._place.sequence, epoch, 0)

    def _move(self, sequence: ExampleSequence, epoch: int, examples: int) -> None:
        self._place.sequence = sequence
        self._place.seen = epoch * sequence.length + examples
        # Feeds compare this number, and begin again if it has changed.
        self._place.moves += 1

    @checked
    def permutation(self, epoch: int) -> Tensor:
        """The examples of an epoch in their order, shape (length,), int64; the same on every rank."""
        epoch = whole("epoch", epoch, at_least=0, at_most=MOST_EPOCH)
        return torch.from_numpy(self._place.sequence.at(epoch * len(self), (epoch + 1) * len(self)))

    def feed(self, rank: int, dp_size: int) -> OrderFeed:
        """The portions of one rank, from the current place on."""
        return self._feed(
            lambda sequence: SliceDealer(sequence, rank, dp_size, join_epochs=self._join_epochs), rank, dp_size
        )

    def shared_feed(self, ranks: Collectives) -> OrderFeed:
        """The portions of one rank if ranks come and go: its share of each step, from the current place on."""
        return self._feed(
            lambda sequence: ShareDealer(sequence, ranks, join_epochs=self._join_epochs), ranks.rank, ranks.size
        )

    def _feed(self, make_dealer: Callable[[ExampleSequence], Dealer], rank: int, dp_size: int) -> OrderFeed:
        return OrderFeed(self._place, self._loader, make_dealer=make_dealer, ranks=(rank, dp_size))

    def _loader(self, dealer: Dealer, seeds: torch.Generator) -> DataLoader[Any]:
        # A DataLoader takes any iterable of lists of indices as its batch sampler; its annotations ask for a Sampler.
        return DataLoader(self.dataset, batch_sampler=cast("Any", dealer), generator=seeds, **self._loader_options)
