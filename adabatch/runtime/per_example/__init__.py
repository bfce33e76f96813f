"""Exact statistics of single examples: squared norms of their gradients, and inner products with the mean."""

from adabatch.runtime.per_example.norms import ExampleGradients, PerExampleNorms
from adabatch.runtime.per_example.products import (
    RandomState,
    example_moments,
    leave_one_out,
    products_by_jvp,
)

__all__ = [
    "ExampleGradients",
    "PerExampleNorms",
    "RandomState",
    "example_moments",
    "leave_one_out",
    "products_by_jvp",
]
