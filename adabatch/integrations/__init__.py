"""Thin layers between ``AdaptiveBatch`` and the engines and trainers of others; each needs its own package."""
