"""The shell, where pure and running code meet: ``AdaptiveBatch``, its steps, and what it is told."""

from adabatch.adaptive.adaptive_batch import AdaptiveBatch

__all__ = ["AdaptiveBatch"]
