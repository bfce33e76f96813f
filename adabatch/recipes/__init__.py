"""The few small models and data sets that configs, tests and benchmarks share.

The handwritten digits stand apart, in ``adabatch.recipes.digits``: they need scikit-learn, and nothing else
here does.
"""

from adabatch.recipes.data import InMemory, Mnist, Text, collate
from adabatch.recipes.models import MLP, DigitsCNN, LogisticRegression, MnistCNN, NextTokenLoss, Transformer

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
