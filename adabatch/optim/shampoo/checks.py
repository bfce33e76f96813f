"""Checks of the arguments of Shampoo."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from adabatch.arguments import require


def check_group(options: Mapping[str, Any]) -> None:
    """Raises ``ValueError`` if an option of a parameter group is out of its range."""
    lr = options["lr"]
    if lr is None:
        raise ValueError("a group has no learning rate: give lr to the optimizer or to every group")
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr must be a number or a tensor of one element, got shape {tuple(lr.shape)}")
    for name in ("lr", "weight_decay"):
        require(0 <= options[name] < math.inf, f"{name} must be finite and not negative", options[name])
    if not 0 < options["exponent"] <= 0.5:
        raise ValueError(f"exponent must be in (0, 0.5], 0.25 for classical Shampoo, got {options['exponent']}")
    epsilon = options["epsilon"]
    if epsilon is None and not options["relative"]:
        raise ValueError("an absolute epsilon (relative=False) has no default: give epsilon=")
    require(epsilon is None or 0 <= epsilon < math.inf, "epsilon must be finite and not negative", epsilon)
    for name in ("beta", "momentum"):
        require(0 <= options[name] < 1, f"{name} must be in [0, 1)", options[name])
    require(options["observe_parts"] >= 1, "observe_parts must be at least 1", options["observe_parts"])
    require(options["refresh_every"] >= 1, "refresh_every must be at least 1 step", options["refresh_every"])
    require(options["refresh_warmup"] >= 0, "refresh_warmup cannot be negative", options["refresh_warmup"])
    if options["block_size"] is not None and options["block_size"] < 1:
        raise ValueError(f"block_size must be 1 or more, or None for no blocks, got {options['block_size']}")
