"""The few small models and data sets that configs, tests and benchmarks share.

The handwritten digits stand apart, in ``adabatch.recipes.digits``: they need scikit-learn, and nothing else
here does.
"""

from adabatch.recipes.data import Mnist, Text
from adabatch.recipes.models import MLP, DigitsCNN, LogisticRegression, MnistCNN, NextTokenLoss, Transformer
from adabatch.runtime.data.in_memory import InMemory, collate

__all__ = [
    "MLP",
    "DigitsCNN",
    "InMemory",
    "LogisticRegression",
    "Mnist",
    "MnistCNN",
    "NextTokenLoss",
    "Text",
    "Transformer",
    "collate",
]
