"""Checks that adaptive batches do on your model, loader and ranks what they do in this library's own tests."""

from adabatch.verification.running import (
    Check,
    Make,
    Training,
    all_checks,
    constant_policy,
    cost,
    drift,
    probe_agrees,
    resume,
)

__all__ = ["Check", "Make", "Training", "all_checks", "constant_policy", "cost", "drift", "probe_agrees", "resume"]
