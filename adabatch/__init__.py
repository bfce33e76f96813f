"""Batch sizes that grow with the noise of the gradient, and learning rates that follow."""

from adabatch import lr
from adabatch.adaptive import AdaptiveBatch
from adabatch.batch.control import Control, Decision, Limits, Reason
from adabatch.batch.criteria import (
    AugmentedInnerProductTest,
    CoordinateNormTest,
    Criterion,
    InnerProductTest,
    NoiseScale,
    NormTest,
    Observation,
    OrthogonalityTest,
    StepPrice,
)
from adabatch.batch.efficiency import adaptive_limit, efficiency
from adabatch.batch.goodput import Goodput
from adabatch.batch.moments import GradientMoments
from adabatch.batch.plan import BatchPlan, Duration, Progress, examples, gain_steps, steps, tokens
from adabatch.batch.schedules import Constant, LinearRamp, Schedule, Seesaw, Stage, Stages
from adabatch.checkpointing.checkpoints import Checkpoints, Loaded, load, save
from adabatch.checkpointing.differences import Difference
from adabatch.checkpointing.files import CheckpointError
from adabatch.checkpointing.settings import KeptSetting
from adabatch.guards.drift import RanksDrifted
from adabatch.guards.preemption import EXIT_PREEMPTED, Preemption
from adabatch.guards.watchdog import EXIT_RANK_LOST, RankLost, Watchdog
from adabatch.optim import AdaGradNorm
from adabatch.pairs import AdAdaGrad, AdAdaGradNorm, Pair
from adabatch.runtime import local_sgd
from adabatch.runtime.data import BlockShuffle, FullShuffle, GlobalOrder, ScatteredShuffle, WeightedShuffle
from adabatch.runtime.local_sgd import LocalSGD
from adabatch.runtime.matrix_owners import across_ranks
from adabatch.runtime.probes.comm_hook import CommHookProbe
from adabatch.runtime.probes.micro_batch import MicroBatchProbe
from adabatch.runtime.probes.per_example import PerExampleProbe
from adabatch.runtime.probes.reduce_scatter import ReduceScatterProbe
from adabatch.runtime.scheduler import ProgressLR
from adabatch.step import Step

__version__ = "0.1.0.dev0"

__all__ = [
    "EXIT_PREEMPTED",
    "EXIT_RANK_LOST",
    "AdAdaGrad",
    "AdAdaGradNorm",
    "AdaGradNorm",
    "AdaptiveBatch",
    "AugmentedInnerProductTest",
    "BatchPlan",
    "BlockShuffle",
    "CheckpointError",
    "Checkpoints",
    "CommHookProbe",
    "Constant",
    "Control",
    "CoordinateNormTest",
    "Criterion",
    "Decision",
    "Difference",
    "Duration",
    "FullShuffle",
    "GlobalOrder",
    "Goodput",
    "GradientMoments",
    "InnerProductTest",
    "KeptSetting",
    "Limits",
    "LinearRamp",
    "Loaded",
    "LocalSGD",
    "MicroBatchProbe",
    "NoiseScale",
    "NormTest",
    "Observation",
    "OrthogonalityTest",
    "Pair",
    "PerExampleProbe",
    "Preemption",
    "Progress",
    "ProgressLR",
    "RankLost",
    "RanksDrifted",
    "Reason",
    "ReduceScatterProbe",
    "ScatteredShuffle",
    "Schedule",
    "Seesaw",
    "Stage",
    "Stages",
    "Step",
    "StepPrice",
    "Watchdog",
    "WeightedShuffle",
    "across_ranks",
    "adaptive_limit",
    "efficiency",
    "examples",
    "gain_steps",
    "load",
    "local_sgd",
    "lr",
    "save",
    "steps",
    "tokens",
]
