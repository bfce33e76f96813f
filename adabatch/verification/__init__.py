"""Checks that adaptive batches work on your model, loader and ranks as they do in this library's own tests.

Each check is a function of ``make``, which builds a new ``Training`` with the same weights every time. On several ranks
all call the same checks in the same order, and all get the same result. Nothing is written to disk.
"""

from adabatch.verification.checks import all_checks
from adabatch.verification.constant import constant_policy
from adabatch.verification.drifting import drift
from adabatch.verification.probing import probe_agrees
from adabatch.verification.resuming import resume
from adabatch.verification.timing import cost
from adabatch.verification.training import Check, Make, Training

__all__ = ["Check", "Make", "Training", "all_checks", "constant_policy", "cost", "drift", "probe_agrees", "resume"]
