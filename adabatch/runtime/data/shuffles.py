"""The order of the examples in an epoch: a function of a seed and the number of the epoch, the same on every rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from adabatch.arguments import check_fields, whole
from adabatch.runtime.data.permutation import GOLDEN, Integers, Permutation, key_of

MOST_IN_BLOCKS = 2**40
"""Examples in a block, and blocks that are mixed; above any data set."""

Epoch = Callable[[int, int], Integers]
"""The examples at places ``begin`` to ``end - 1`` of one epoch, by their numbers, shape (end - begin,)."""


@runtime_checkable
class Shuffle(Protocol):
    """A way to order the examples of an epoch. A function of seed and epoch, without state.

    Attributes:
        name: identifies the kind of order; saved with the place in the data, and compared at loading.
    """

    @property
    def name(self) -> str:
        """Identifies the kind of order."""
        ...

    def length(self, num_examples: int) -> int:
        """Places in an epoch over ``num_examples`` examples."""
        ...

    def epoch(self, num_examples: int, *, seed: int, epoch: int) -> Epoch:
        """The order of one epoch."""
        ...


@dataclass(frozen=True)
class InOrder:
    """The order of the data set itself, in every epoch; what ``shuffle=False`` means."""

    @property
    def name(self) -> str:
        """Identifies this kind of order."""
        return "in order"

    def length(self, num_examples: int) -> int:
        """Places in an epoch: one for each example."""
        return num_examples

    def epoch(self, num_examples: int, *, seed: int, epoch: int) -> Epoch:
        """The order of one epoch."""
        return lambda begin, end: np.arange(begin, end)


@dataclass(frozen=True)
class FullShuffle:
    """A uniformly random permutation, drawn by ``torch.randperm``: 8 bytes per example on every rank.

    ``shuffle=True`` uses it up to 16,777,216 examples. torch guarantees the same draws on all machines for one of its
    versions; use a ``ScatteredShuffle`` for a run that will be resumed across versions.
    """

    @property
    def name(self) -> str:
        """Identifies this kind of order."""
        return "full shuffle"

    def length(self, num_examples: int) -> int:
        """Places in an epoch: one for each example."""
        return num_examples

    def epoch(self, num_examples: int, *, seed: int, epoch: int) -> Epoch:
        """The order of one epoch, drawn here."""
        order = torch.randperm(num_examples, generator=generator(seed, epoch)).numpy()
        return lambda begin, end: order[begin:end]


@dataclass(frozen=True)
class ScatteredShuffle:
    """A pseudo-random permutation in constant memory; ``shuffle=True`` uses it above 16,777,216 examples.

    Each place is computed independently (a Feistel network of 8 rounds), so neither the size of the data set nor a
    resume costs anything. Neighbours in the order lie anywhere in the data set, which the measurement of the noise
    needs, but which is slow on storage that reads in long stretches: see ``BlockShuffle``.
    """

    @property
    def name(self) -> str:
        """Identifies this kind of order."""
        return "scattered shuffle"

    def length(self, num_examples: int) -> int:
        """Places in an epoch: one for each example."""
        return num_examples

    def epoch(self, num_examples: int, *, seed: int, epoch: int) -> Epoch:
        """The order of one epoch."""
        permutation = Permutation(num_examples, key=key_of(seed, epoch))
        return lambda begin, end: permutation(np.arange(begin, end))


@dataclass(frozen=True, kw_only=True)
class BlockShuffle:
    """Blocks of neighbouring examples in random order, a few of them shuffled into each other; constant memory.

    For storage that reads in stretches (shards, memory maps, disks). The data set is cut into blocks of ``size``
    examples, the last of which may be shorter. The blocks are permuted, and every ``mixed`` consecutive blocks are
    shuffled together, example by example, so that reading stays within ``mixed`` blocks at any time.

    It mixes less than the other shuffles. If neighbours in the data set are similar (sorted by class, document or
    day), so are the examples of a batch, and the noise in the batch is not that of the whole data set: choose ``mixed``
    so large that ``mixed`` random blocks represent the data set, and ``size * mixed`` several times the largest batch.

    Args:
        size: examples in a block.
        mixed: blocks that are shuffled together.

    Raises:
        ValueError: if a number is below 1, or above 2^40.
        TypeError: if a number is not whole.
    """

    size: int
    mixed: int

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("size", "mixed"):
            checked = whole(f"BlockShuffle({name}=)", getattr(self, name), at_least=1, at_most=MOST_IN_BLOCKS)
            object.__setattr__(self, name, checked)

    @property
    def name(self) -> str:
        """Identifies this kind of order."""
        return f"shuffle of blocks of {self.size}, {self.mixed} mixed"

    def length(self, num_examples: int) -> int:
        """Places in an epoch: one for each example."""
        return num_examples

    def epoch(self, num_examples: int, *, seed: int, epoch: int) -> Epoch:
        """The order of one epoch."""
        return _BlockEpoch(num_examples, self.size, self.mixed, seed=seed, epoch=epoch)


class _BlockEpoch:
    """One epoch of a ``BlockShuffle``: windows of ``mixed`` blocks, one of which contains the shorter block."""

    def __init__(self, num_examples: int, size: int, mixed: int, *, seed: int, epoch: int) -> None:
        self._num_examples = num_examples
        self._size = size
        self._span = size * mixed
        self._mixed = mixed
        self._key = key_of(seed, epoch)
        self._num_blocks = -(-num_examples // size)
        self._blocks = Permutation(self._num_blocks, key=self._key)
        self._lacking = self._num_blocks * size - num_examples  # examples missing in the last block
        self._short = int(self._blocks.inverse(np.array([self._num_blocks - 1]))[0])  # its place after the permutation

    def _begin(self, window: int) -> int:
        """The first place of a window."""
        # Windows after the shorter block begin earlier by what it lacks.
        return min(
            window * self._span - (self._lacking if window * self._mixed > self._short else 0), self._num_examples
        )

    def __call__(self, begin: int, end: int) -> Integers:
        pieces = [np.arange(0)]
        while begin < end:
            window = begin // self._span
            # Places after the shorter block lie `_lacking` further on in blocks that are counted as full.
            if begin >= self._begin(window + 1):
                window = (begin + self._lacking) // self._span
            first, last = self._begin(window), self._begin(window + 1)
            stop = min(end, last)
            pieces.append(self._inside(window, last - first, np.arange(begin - first, stop - first)))
            begin = stop
        return np.concatenate(pieces)

    def _inside(self, window: int, length: int, places: Integers) -> Integers:
        """The examples at places of a window, counted from its begin."""
        places = Permutation(length, key=key_of(self._key, window))(places)
        short = self._short - window * self._mixed
        if 0 <= short < self._mixed:  # blocks after the shorter one are shifted, as if that block were full
            places[places >= (short + 1) * self._size - self._lacking] += self._lacking
        number, offset = np.divmod(places, self._size)
        return self._blocks(window * self._mixed + number) * self._size + offset


def generator(seed: int, stream: int) -> torch.Generator:
    """torch's random numbers for a seed: one stream per epoch, and negative streams for loading processes."""
    # The factor keeps the streams of neighbouring seeds apart: seed + stream would be the same for many pairs.
    return torch.Generator().manual_seed((seed * GOLDEN + stream) % 2**63)
