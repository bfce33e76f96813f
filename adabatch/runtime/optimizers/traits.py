"""Optional protocols of an optimizer; one that implements none is treated like torch's own."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from adabatch.runtime.optimizers.measured_norm import MeasuredNorm


@runtime_checkable
class PrefersLRRule(Protocol):
    """An optimizer with its own default for the rule by which its learning rate follows the batch."""

    preferred_lr_rule: str


@runtime_checkable
class ChecksRanks(Protocol):
    """An optimizer that must know how the ranks of a model share its statistics."""

    def check_ranks(self, num_ranks: int) -> None:
        """Raises a ``ValueError`` if each of the ranks would step by its own statistics."""
        ...


@runtime_checkable
class NeedsWholeGradients(Protocol):
    """An optimizer that needs whole gradients or layers, which some engines cut into flat pieces."""

    needs_whole_gradients: bool


@runtime_checkable
class ChecksStep(Protocol):
    """An optimizer that checks its settings before each step."""

    def check_before_step(self) -> None:
        """Raises a ``ValueError`` that says what is wrong."""
        ...


@runtime_checkable
class TakesNorm(Protocol):
    """An optimizer that needs the norm of the gradient, and does not read it again if a probe has just measured it."""

    def take_norm(self, measured: MeasuredNorm) -> None:
        """Called before a step. The step uses the norm if the gradients are still those that were measured."""
        ...
