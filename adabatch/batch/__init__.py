"""How many examples the next step takes. Pure: standard library and numpy, no torch."""

from adabatch.batch.control import Control, Decision, Limits, Reason
from adabatch.batch.criteria import (
    AugmentedInnerProductTest,
    CoordinateNormTest,
    Criterion,
    InnerProductTest,
    Observation,
    OrthogonalityTest,
)
from adabatch.batch.critical import CriticalBatch, critical_batch, measure_critical_batch, smoothed_losses
from adabatch.batch.efficiency import adaptive_limit, efficiency
from adabatch.batch.moments import GradientMoments
from adabatch.batch.needs import Needs
from adabatch.batch.plan import BatchPlan, Duration, PlanGrid, Progress
from adabatch.batch.schedules import Schedule

__all__ = [
    "AugmentedInnerProductTest",
    "BatchPlan",
    "Control",
    "CoordinateNormTest",
    "Criterion",
    "CriticalBatch",
    "Decision",
    "Duration",
    "GradientMoments",
    "InnerProductTest",
    "Limits",
    "Needs",
    "Observation",
    "OrthogonalityTest",
    "PlanGrid",
    "Progress",
    "Reason",
    "Schedule",
    "adaptive_limit",
    "critical_batch",
    "efficiency",
    "measure_critical_batch",
    "smoothed_losses",
]
