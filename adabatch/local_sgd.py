"""The options of ``LocalSGD``: how often to average (``Fixed``, ``Table``, ``Quadratic``), and how to use the average
(``Average``, ``Nesterov``, ``SlowMo``)."""

from adabatch.runtime.local_sgd.averaging import LocalSGD
from adabatch.runtime.local_sgd.compression import Compression
from adabatch.runtime.local_sgd.outer import Average, Nesterov, OuterOptimizer, SlowMo
from adabatch.runtime.local_sgd.periods import Change, Fixed, Period, Quadratic, RoundStart, Table
from adabatch.runtime.local_sgd.probe import Spread
from adabatch.runtime.local_sgd.settings import AverageWeights, MeasuredStep

__all__ = [
    "Average",
    "AverageWeights",
    "Change",
    "Compression",
    "Fixed",
    "LocalSGD",
    "MeasuredStep",
    "Nesterov",
    "OuterOptimizer",
    "Period",
    "Quadratic",
    "RoundStart",
    "SlowMo",
    "Spread",
    "Table",
]
