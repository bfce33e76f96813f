"""Data in one order for all ranks and batch sizes (``GlobalOrder``), the ways to shuffle it, and ``WholeSteps``."""

from adabatch.runtime.data import (
    BlockShuffle,
    FullShuffle,
    GlobalOrder,
    InOrder,
    ScatteredShuffle,
    Shuffle,
    WeightedShuffle,
    WholeSteps,
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
    "WholeSteps",
    "num_examples_in",
]
