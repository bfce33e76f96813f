"""What a width plan requires of a model before training: standard deviations, and the scale of attention."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from adabatch.arguments import checked
from adabatch.optim.mup.plans import Plan, matching


@torch.no_grad()
@checked
def init_(model: nn.Module, plan: Plan, *, std: Mapping[str, float] | None = None) -> None:
    """Gives the readout, and the weights that ``std`` names, the standard deviation of the plan.

    A weight is scaled to the root mean square ``deviation at the base width x entry.init``; if it is zero, it is drawn
    from a normal distribution first. A second call changes nothing. At the base width, a model that starts with these
    deviations is not changed.

    Readouts that ``std`` does not name get 1/sqrt(fan_in) at the base width. All other weights are left alone: torch's
    layers, and those of most models, start them in proportion to 1/sqrt(fan_in), as the plan requires. If a model
    starts them with one deviation at every width (0.02, as GPT-2 does), name them: ``std={"*.weight": 0.02}``.

    Args:
        model: of the plan's width, wrapped or not; before training.
        plan: its plan.
        std: name or pattern -> deviation at the base width; if several match a name, the last one is used. Vectors that
            it matches are left alone: gains and biases start equally at every width.

    Raises:
        ValueError: if the model is not that of the plan, a pattern has no match, or a deviation is not positive.
    """
    named = plan.parameters_of(model)
    deviations = {
        name: 1 / math.sqrt(entry.base_fan_in) for name, entry in plan.entries.items() if entry.role == "output"
    }
    for pattern, value in (std or {}).items():
        if not 0 < value < math.inf:
            raise ValueError(f"std of {pattern} must be positive and finite, got {value}; K-FAC takes no zero readout")
        deviations |= {name: value for name in matching(named, [pattern]) if plan.entries[name].role != "vector"}
    for name, deviation in deviations.items():
        _scale_to(named[name], deviation * plan.entries[name].init)


def _scale_to(weight: Tensor, deviation: float) -> None:
    """Scales a weight to a root mean square."""
    if not torch.any(weight):
        nn.init.normal_(weight)
    rms = torch.linalg.vector_norm(weight.double()) / math.sqrt(weight.numel())
    weight.mul_(deviation / float(rms))


@checked
def attention_scale(head_width: int, base_head_width: int) -> float:
    """The factor on attention's logits if heads grow with width: ``sqrt(base) / width``, 1/sqrt(width) at the base.

    For ``scaled_dot_product_attention(scale=...)``. Queries and keys that have learnt are correlated, so their product
    grows like the width of a head and not like its square root (Yang et al. 2021, section 4). If width adds heads of
    the same width, nothing changes.

    Raises:
        ValueError: if a width is below 1.
    """
    if head_width < 1 or base_head_width < 1:
        raise ValueError(f"heads are 1 or more wide, got head_width={head_width} and base_head_width={base_head_width}")
    return math.sqrt(base_head_width) / head_width
