"""Whether the probe agrees with gradients that are computed part by part."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from adabatch.arguments import checked, require
from adabatch.batch.moments import GradientMoments
from adabatch.batch.schedules import Constant
from adabatch.runtime.collectives import Collectives
from adabatch.runtime.random_state import random_state, set_random_state
from adabatch.runtime.wrappers.fsdp2 import is_sharded, own_piece
from adabatch.verification.equality import largest_of
from adabatch.verification.running import (
    ACCUMULATION,
    Part,
    adaptive,
    backward,
    begin_training,
    nothing_fits,
    size_of,
    steps_of,
    unreduced,
    update,
)
from adabatch.verification.training import Check, Make, Training

PROBED_STEPS = 3

MOST_OVERFLOWS = 20
"""Largest number of overflows: after as many halvings of 2 ** 16, the scale is too small to be of use."""

PROBE_TOLERANCE = 1e-4
"""Relative tolerance for float32: sums of a million squares in another order differ by 1e-6 to 1e-5."""

ROUNDINGS = 4
"""Error that a probe may have in roundings of the coarsest parameter type, if that is more than the tolerance."""


@checked
def probe_agrees(make: Make, *, allowed: float | None = None) -> Check:
    """Whether the probe's moments are those of gradients computed part by part, in separate backward passes.

    It measures the largest relative error of the moments in three steps, each with the weights and the random numbers
    (dropout) of the step itself. The gradients are added up in float64, which takes twice to four times the memory of
    the gradient. With FSDP2 every rank runs every part, with weight zero except on one rank. With a scaler the
    gradients are scaled as in the step and then unscaled; for a step that overflows the probe must report numbers that
    are not finite, and another step is checked instead.

    Args:
        make: builds a new training.
        allowed: largest relative error; by default 1e-4, or 4 roundings of the coarsest type among the parameters.

    Raises:
        ValueError: if the data set is smaller than the step, the parts of the probe are single examples, or more than
            20 steps overflow.
    """
    require(allowed is None or 0 < allowed < math.inf, "allowed must be positive and finite", allowed)
    training, ranks = begin_training(make)
    if training.probe is not None and training.probe.gives.examples:
        raise ValueError(
            f"the parts of {type(training.probe).__name__} are single examples, and this check takes micro-batches "
            f"apart: check with another probe, or with none for the one that suits the model"
        )
    parameters = _trained(training)
    if allowed is None:
        allowed = max(PROBE_TOLERANCE, ROUNDINGS * max(torch.finfo(p.dtype).eps for p in parameters))
    batches = adaptive(training, Constant(size_of(training, ranks, ACCUMULATION)), probed=True)
    by_parts = _sharded_moments if is_sharded(training.model) else _local_moments
    worst, worst_name = 0.0, "grad_sq"
    num_parts = compared = overflowed = 0
    for step, parts in steps_of(training, batches, PROBED_STEPS + (MOST_OVERFLOWS if training.scales else 0)):
        assert step.moments is not None
        if training.scales and not step.finite:
            overflowed += 1
            if not update(training):  # the scaler found the gradient finite
                worst = math.inf
            continue
        # The reference runs the parts again, with their own random numbers and gradients; both are put back afterwards,
        # so that the update is that of the step.
        after = random_state(training.device)
        gradient = [p.grad for p in parameters]
        expected = by_parts(training, parts, parameters, ranks)
        for parameter, grad in zip(parameters, gradient, strict=True):
            parameter.grad = grad
        set_random_state(after, training.device)
        for name in ("part_sq", "grad_sq", "part_size", "num_examples", "num_parts"):
            error = _relative_error(getattr(step.moments, name), getattr(expected, name))
            # not >, which a NaN would pass
            if not error <= worst:
                worst, worst_name = error, name
        num_parts = expected.num_parts
        update(training)
        compared += 1
        if compared == PROBED_STEPS:
            break
    batches.remove()
    worst = largest_of(worst, ranks)
    if compared < PROBED_STEPS and math.isfinite(worst):
        raise nothing_fits(overflowed)
    passed = worst <= allowed
    text = (
        f"moments of {PROBED_STEPS} steps of {num_parts} parts as computed part by part"
        + (f"; {overflowed} more overflowed" if overflowed else "")
        if passed
        else f"{worst_name} is off by {worst:.2g} of what gradients computed part by part give"
    )
    return Check("probe", passed, worst, allowed, text)


def _trained(training: Training) -> list[Tensor]:
    """The model's parameters that the optimizer trains."""
    held = {id(p) for group in training.optimizer.param_groups for p in group["params"]}
    return [p for p in training.model.parameters() if p.requires_grad and id(p) in held]


def _gradient(training: Training, part: Part, parameters: Sequence[Tensor], share: float) -> list[Tensor]:
    """The gradient of a share of the loss in each parameter, this rank's piece in float64, shape (n,)."""
    for parameter in training.model.parameters():
        parameter.grad = None
    part.rewind(training)
    # weighted before the backward, as in the step: in float16 the gradient of the whole loss might overflow
    backward(training, part.loss(training) * share)
    scale = 1.0 if training.scaler is None else training.scaler.get_scale()
    return [_flat(torch.zeros_like(p) if p.grad is None else p.grad) / scale for p in parameters]


def _flat(grad: Tensor) -> Tensor:
    piece = own_piece(grad.detach())[0]
    dense = piece.to_dense() if piece.is_sparse else piece
    real = torch.view_as_real(dense.resolve_conj()) if dense.is_complex() else dense
    return real.double().reshape(-1)


def _local_moments(
    training: Training, parts: Sequence[Part], parameters: Sequence[Tensor], ranks: Collectives
) -> GradientMoments:
    """Each rank runs its own parts, and the ranks add up their gradients; plain models and DDP."""
    total, num_examples = ranks.sum_of(sum(part.weight for part in parts), sum(part.size for part in parts))
    mean: Tensor | None = None
    part_sq = 0.0
    for part in parts:
        weight = part.weight / total
        share = weight * ranks.size
        with unreduced(training.model):
            # Back to the gradient of the part's own mean loss. DDP would average over the ranks, hence their number in
            # the share.
            grad = torch.cat(_gradient(training, part, parameters, share)) / share
        mean = weight * grad if mean is None else mean.add_(grad, alpha=weight)
        part_sq += weight * float(grad.square().sum())
    assert mean is not None
    (part_sq,) = ranks.sum_of(part_sq)
    return _moments_of(part_sq, float(ranks.sum(mean).square().sum()), num_examples, len(parts) * ranks.size)


def _sharded_moments(
    training: Training, parts: Sequence[Part], parameters: Sequence[Tensor], ranks: Collectives
) -> GradientMoments:
    """Every rank runs a pass for each part of each rank, with weight zero on all but one; FSDP2."""
    # Parameters that are not sharded are whole on several ranks, and must count once.
    holders = [own_piece(p.detach())[1] for p in parameters]
    (num_examples,) = ranks.sum_of(sum(part.size for part in parts))
    table = ranks.sum_of(*(p.weight if rank == ranks.rank else 0 for rank in range(ranks.size) for p in parts))
    mean: list[Tensor] | None = None
    part_sq = 0.0
    for index, weight in enumerate(table):
        owner, number = divmod(index, len(parts))
        # weights of all ranks' parts, so that all ranks go through the same passes in the same order
        weight /= sum(table)
        # The reduction averages over the ranks; all but one contribute zero.
        share = weight * ranks.size if owner == ranks.rank else 0.0
        grads = [grad / weight for grad in _gradient(training, parts[number], parameters, share)]
        part_sq += weight * sum(float(g.square().sum()) / held for g, held in zip(grads, holders, strict=True))
        weighted = [weight * grad for grad in grads]
        mean = weighted if mean is None else [m.add_(g) for m, g in zip(mean, weighted, strict=True)]
    assert mean is not None
    own_sq = sum(float(m.square().sum()) / held for m, held in zip(mean, holders, strict=True))
    part_sq, grad_sq = ranks.sum_of(part_sq, own_sq)
    return _moments_of(part_sq, grad_sq, num_examples, len(table))


def _moments_of(part_sq: float, grad_sq: float, num_examples: float, num_parts: int) -> GradientMoments:
    """The moments; each part has as many examples as its weight says, so the weighted harmonic mean is the plain
    mean."""
    return GradientMoments(part_sq, num_examples / num_parts, grad_sq, num_examples, num_parts)


def _relative_error(found: float, expected: float) -> float:
    """The relative error; infinite if either number is NaN."""
    error = abs(found - expected)
    if error == 0:
        return 0.0
    return error / max(abs(found), abs(expected)) if math.isfinite(error) else math.inf
