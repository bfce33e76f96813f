"""Criteria: the global batch size that a measured disagreement of gradients asks for.

All are pure functions of an ``Observation``. They return a size in examples *before* rounding, and never raise on a
measurement: ``inf`` where the denominator is not positive (no signal was seen), zero or less where no noise was seen,
NaN where something was not measured or not finite. ``control.decide`` names these cases and holds the plan.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

from adabatch.batch.moments import INNER_PRODUCTS, NOISE, GradientMoments
from adabatch.batch.plan import Progress


class Observation(NamedTuple):
    """What is known at the end of a step; None where it was not measured.

    Args:
        moments: squared norms of the gradient and its parts, averaged over steps by the control.
        progress: what the run's applied updates consumed so far.
        loss: mean training loss of the step.
        seconds: duration of the step.
    """

    moments: GradientMoments | None
    progress: Progress
    loss: float | None = None
    seconds: float | None = None


@runtime_checkable
class Criterion(Protocol):
    """Says which global batch size the observation asks for."""

    @property
    def needs(self) -> frozenset[str]:
        """What the probe must give; empty for a schedule, which reads only progress."""
        ...

    def wanted(self, observation: Observation) -> float:
        """The global batch size asked for, in examples, before rounding and limits."""
        ...


def _ratio(noise: float, allowed: float) -> float:
    """``noise / allowed``: the batch at which the noise of the mean gradient falls to what is allowed."""
    if math.isnan(noise) or math.isnan(allowed):
        return math.nan
    if allowed <= 0:
        return math.inf if noise > 0 else 0.0
    return noise / allowed


def _check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a positive number, got {value}")


@dataclass(frozen=True)
class NormTest:
    """The norm test: the noise of the batch gradient must not exceed ``eta`` times its length.

        noise / b <= eta^2 |g|^2        wanted: b = noise / (eta^2 |g|^2)

    ``|g|^2`` is the squared norm of the batch gradient itself (the plug-in form of the papers), not the unbiased
    signal: where noise dominates, one test multiplies the batch by at most ``1 / eta^2``, and the batch settles near
    ``noise_scale * (1 - eta^2) / eta^2``. ``eta=0.1`` therefore runs 99 times above the noise scale; ``eta=0.7`` at it.

    Args:
        eta: tolerated ratio of noise to gradient, positive; below 1 for the batch to stop growing. 0.1 (MNIST) and 0.5
            (ResNet-18 on CIFAR-10) in Lau et al. 2024.
        population: number of examples in the data set, for the form that counts sampling without replacement,
            ``b = n noise / (noise + (n - 1) eta^2 |g|^2)``, which never exceeds n. None leaves the factor out, as the
            papers do.

    Raises:
        ValueError: ``eta`` not positive, or a population below 2.

    Source: Byrd et al. 2012, section 2; Bollapragada et al. 2018, section 1; Lau, Liu, Kolar 2024 (AdAdaGrad).
    """

    eta: float
    population: int | None = None
    needs: ClassVar[frozenset[str]] = frozenset({NOISE})

    def __post_init__(self) -> None:
        _check_positive("eta", self.eta)
        if self.population is not None and not self.population >= 2:
            raise ValueError(f"population must be the size of the data set, at least 2, got {self.population}")

    def wanted(self, observation: Observation) -> float:
        """The smallest batch that would pass the test."""
        moments = observation.moments
        if moments is None:
            return math.nan
        noise, allowed = moments.noise, self.eta * self.eta * moments.grad_sq
        if self.population is None or allowed <= 0:
            return _ratio(noise, allowed)
        n = self.population
        return float(min(_ratio(n * noise, noise + (n - 1) * allowed), n))  # min: rounding; NaN stays


@dataclass(frozen=True)
class NoiseScale:
    """A multiple of the simple noise scale, ``b = multiple * noise / signal``, with the unbiased signal.

    At one times the noise scale a step makes about half the progress of a noiseless one, at about twice the fewest
    possible examples.

    Args:
        multiple: batch size in units of the noise scale, positive.

    Raises:
        ValueError: ``multiple`` not positive.

    Source: McCandlish et al. 2018, section 2.2 and appendix A.1.
    """

    multiple: float = 1.0
    needs: ClassVar[frozenset[str]] = frozenset({NOISE})

    def __post_init__(self) -> None:
        _check_positive("multiple", self.multiple)

    def wanted(self, observation: Observation) -> float:
        """``multiple`` times the noise scale."""
        moments = observation.moments
        return math.nan if moments is None else _ratio(self.multiple * moments.noise, moments.signal)


@dataclass(frozen=True)
class InnerProductTest:
    """The inner-product test: the batch gradient must point downhill often enough.

        Var_i <g_i, g> / b <= theta^2 |g|^4        wanted: b = noise_along / (theta^2 |g|^2)

    Only the noise along the gradient counts, so in high dimension it asks for far smaller batches than the norm test.

    Args:
        theta: tolerated ratio, positive (0.9 in Bollapragada et al. 2018).

    Raises:
        ValueError: ``theta`` not positive.

    Source: Bollapragada, Byrd, Nocedal 2018, section 2.
    """

    theta: float
    needs: ClassVar[frozenset[str]] = frozenset({INNER_PRODUCTS})

    def __post_init__(self) -> None:
        _check_positive("theta", self.theta)

    def wanted(self, observation: Observation) -> float:
        """The smallest batch that would pass the test."""
        moments = observation.moments
        if moments is None or moments.noise_along is None:
            return math.nan
        return _ratio(moments.noise_along, self.theta * self.theta * moments.grad_sq)


@dataclass(frozen=True)
class OrthogonalityTest:
    """The orthogonality test: the gradient's noise across its own direction must stay bounded.

        trace Var_i (g_i - (<g_i, g> / |g|^2) g) / b <= nu^2 |g|^2        wanted: b = noise_across / (nu^2 |g|^2)

    Args:
        nu: tolerated ratio, positive (tan 80 degrees = 5.84 in Bollapragada et al. 2018).

    Raises:
        ValueError: ``nu`` not positive.

    Source: Bollapragada, Byrd, Nocedal 2018, section 3.1.
    """

    nu: float
    needs: ClassVar[frozenset[str]] = frozenset({INNER_PRODUCTS})

    def __post_init__(self) -> None:
        _check_positive("nu", self.nu)

    def wanted(self, observation: Observation) -> float:
        """The smallest batch that would pass the test."""
        moments = observation.moments
        if moments is None or moments.noise_along is None:
            return math.nan
        return _ratio(moments.noise_across, self.nu * self.nu * moments.grad_sq)


@dataclass(frozen=True)
class AugmentedInnerProductTest:
    """Inner-product and orthogonality test together: the larger of the two sizes.

    Args:
        theta: tolerance of the inner-product test, positive.
        nu: tolerance of the orthogonality test, positive.

    Raises:
        ValueError: a tolerance that is not positive.

    Source: Bollapragada, Byrd, Nocedal 2018, section 3.
    """

    theta: float
    nu: float
    needs: ClassVar[frozenset[str]] = frozenset({INNER_PRODUCTS})

    def __post_init__(self) -> None:
        _check_positive("theta", self.theta)
        _check_positive("nu", self.nu)

    def wanted(self, observation: Observation) -> float:
        """The smallest batch that would pass both tests."""
        along = InnerProductTest(self.theta).wanted(observation)
        across = OrthogonalityTest(self.nu).wanted(observation)
        return math.nan if math.isnan(along) or math.isnan(across) else max(along, across)
