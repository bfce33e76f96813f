"""Exact statistics of single examples: squared norms of their gradients, and inner products with the mean.

`PerExampleNorms` measures them. A `Rule`, made of `Contribution`, adds support for your own layers.
"""

from adabatch.runtime.per_example.contributions import Contribution, Correlation, Dense, Lookup, OuterProduct
from adabatch.runtime.per_example.norms import ExampleGradients, PerExampleNorms
from adabatch.runtime.per_example.products import (
    example_moments,
    products_by_jvp,
    without_own_share,
)
from adabatch.runtime.per_example.rules import Rule

__all__ = [
    "Contribution",
    "Correlation",
    "Dense",
    "ExampleGradients",
    "Lookup",
    "OuterProduct",
    "PerExampleNorms",
    "Rule",
    "example_moments",
    "products_by_jvp",
    "without_own_share",
]
