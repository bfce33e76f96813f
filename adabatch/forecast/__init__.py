"""The cost of a run on a cluster: steps, time, money and bytes, from a noise scale and step times. Pure."""

from adabatch.forecast.costs import Evidence, Forecast, Range, StepCost, forecast, knee
from adabatch.forecast.first_guess import FirstGuess, kaplan, power_lines
from adabatch.forecast.network import Cluster, all_reduce_seconds

__all__ = [
    "Cluster",
    "Evidence",
    "FirstGuess",
    "Forecast",
    "Range",
    "StepCost",
    "all_reduce_seconds",
    "forecast",
    "kaplan",
    "knee",
    "power_lines",
]
