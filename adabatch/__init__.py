"""Batch sizes that grow with the noise of the gradient, and learning rates that follow."""

__version__ = "0.1.0.dev0"
