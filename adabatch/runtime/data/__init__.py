"""Feeding steps: one global order of examples for all ranks and batch sizes, and the user's own loaders."""

from adabatch.runtime.data.counting import num_examples_in
from adabatch.runtime.data.epochs import EpochCounters
from adabatch.runtime.data.loader_feed import LoaderFeed
from adabatch.runtime.data.order import GlobalOrder
from adabatch.runtime.data.portions import Feed, LossWeights, Portion
from adabatch.runtime.data.shuffles import BlockShuffle, FullShuffle, InOrder, ScatteredShuffle, Shuffle
from adabatch.runtime.data.weighted_shuffle import WeightedShuffle
from adabatch.runtime.data.whole_steps import WholeSteps, WholeStepsFeed

__all__ = [
    "BlockShuffle",
    "EpochCounters",
    "Feed",
    "FullShuffle",
    "GlobalOrder",
    "InOrder",
    "LoaderFeed",
    "LossWeights",
    "Portion",
    "ScatteredShuffle",
    "Shuffle",
    "WeightedShuffle",
    "WholeSteps",
    "WholeStepsFeed",
    "num_examples_in",
]
