"""Batch sizes that grow with the noise of the gradient, and learning rates that follow.

What everyday code uses is here; the rest is one module down: ``adabatch.batch``, ``adabatch.data``,
``adabatch.probes``, ``adabatch.guards``, ``adabatch.checkpointing``, ``adabatch.optim``.
"""

from adabatch.runtime.launch import interrupts  # first, since it is there for the time of the imports

# isort: split
from adabatch import batch, data, local_sgd, lr, probes
from adabatch.adaptive import AdaptiveBatch
from adabatch.adaptive.monitoring import monitor
from adabatch.adaptive.options import EngineOptions, Guard, Measure
from adabatch.adaptive.pairs import AdAdaGrad, AdAdaGradNorm
from adabatch.batch.control import Control, Limits
from adabatch.batch.criteria import (
    NoiseScale,
    NormTest,
    StepPrice,
)
from adabatch.batch.goodput import Goodput
from adabatch.batch.plan import examples, gain_steps, steps, tokens
from adabatch.batch.schedules import Constant, LinearRamp, Seesaw, Stage, Stages
from adabatch.checkpointing import Checkpoints, load, save
from adabatch.guards import EXIT_PREEMPTED, Preemption, Watchdog
from adabatch.runtime.data import GlobalOrder, WholeSteps
from adabatch.runtime.local_sgd.averaging import LocalSGD
from adabatch.runtime.optimizers.matrix_owners import across_ranks
from adabatch.runtime.optimizers.scheduler import ProgressLR
from adabatch.runtime.probes.micro_batch import MicroBatchProbe
from adabatch.runtime.probes.per_example import PerExampleProbe

__version__ = "0.1.0.dev0"

__all__ = [
    "EXIT_PREEMPTED",
    "AdAdaGrad",
    "AdAdaGradNorm",
    "AdaptiveBatch",
    "Checkpoints",
    "Constant",
    "Control",
    "EngineOptions",
    "GlobalOrder",
    "Goodput",
    "Guard",
    "Limits",
    "LinearRamp",
    "LocalSGD",
    "Measure",
    "MicroBatchProbe",
    "NoiseScale",
    "NormTest",
    "PerExampleProbe",
    "Preemption",
    "ProgressLR",
    "Seesaw",
    "Stage",
    "Stages",
    "StepPrice",
    "Watchdog",
    "WholeSteps",
    "across_ranks",
    "batch",
    "data",
    "examples",
    "gain_steps",
    "load",
    "local_sgd",
    "lr",
    "monitor",
    "probes",
    "save",
    "steps",
    "tokens",
]

interrupts.over()
