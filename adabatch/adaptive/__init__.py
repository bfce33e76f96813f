"""The shell, where pure and running code meet: ``AdaptiveBatch``, its steps, and what it is told."""

from adabatch.adaptive.adaptive_batch import AdaptiveBatch
from adabatch.adaptive.monitoring import NoiseMonitor

__all__ = ["AdaptiveBatch", "NoiseMonitor"]
