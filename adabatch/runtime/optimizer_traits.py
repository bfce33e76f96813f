"""What an optimizer may say of itself; one that says nothing is an optimizer like torch's own."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from adabatch.runtime.measured_norm import MeasuredNorm


@runtime_checkable
class PrefersLRRule(Protocol):
    """An optimizer that names the rule by which its learning rate follows the batch, where its user names none."""

    preferred_lr_rule: str


@runtime_checkable
class ChecksRanks(Protocol):
    """An optimizer that has to be told how ranks that share a model share its statistics."""

    def check_ranks(self, num_ranks: int) -> None:
        """Raises a ``ValueError`` if each of so many ranks would step by statistics of its own."""
        ...


@runtime_checkable
class NeedsWholeGradients(Protocol):
    """An optimizer that looks at whole gradients or layers, of which some engines have flat pieces only."""

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
        """Told before a step. The step uses the norm if the gradients are still those that were measured."""
        ...
