"""The options of ``LocalSGD``: how often to average (``Fixed``, ``Table``, ``Quadratic``), and how to use the average
(``Average``, ``Nesterov``, ``SlowMo``)."""

from adabatch.runtime.local_sgd import (
    Average,
    AverageWeights,
    Change,
    Compression,
    Fixed,
    LocalSGD,
    MeasuredStep,
    Nesterov,
    OuterOptimizer,
    Period,
    Quadratic,
    RoundStart,
    SlowMo,
    Spread,
    Table,
)

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
