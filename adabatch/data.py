"""Data in one order for all ranks and batch sizes: ``GlobalOrder``, and the ways to shuffle it."""

from adabatch.runtime.data import (
    BlockShuffle,
    FullShuffle,
    GlobalOrder,
    InOrder,
    ScatteredShuffle,
    Shuffle,
    WeightedShuffle,
    num_examples_in,
)

__all__ = [
    "BlockShuffle",
    "FullShuffle",
    "GlobalOrder",
    "InOrder",
    "ScatteredShuffle",
    "Shuffle",
    "WeightedShuffle",
    "num_examples_in",
]
