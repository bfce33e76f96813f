"""Averages of noise and signal over probes, in which a single probe has bounded influence.

Noise and signal are averaged separately, in per-example units, so that the averages remain valid if the batch changes,
and are divided last. The last few probes are kept as they were measured, and weighted again at every new one: a probe
that lies far from the median of its neighbours, before and after it, loses its weight. One spike is therefore left out
whatever its size and wherever it comes, the first step included. Several probes in a row that agree are not a spike:
once they are the majority, they are the median. Older probes form one exponential window, whose length grows with the
run; if the last probes no longer agree with it, it is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

from adabatch.batch.moments import EUCLIDEAN, GradientMoments
from adabatch.batch.plan import BatchPlan

RECENT = 7
"""Probes that are kept as they were measured. Four of them that agree are the majority."""

OUTLIER = 4.0
"""Standard deviations from the median, on the scale of cube roots, up to which a probe has its full weight; at twice as
many its weight is zero."""

CHANGED = 3.5
"""Standard errors between the last probes and the window before them at which that window is dropped."""

PRIOR = 2.0
"""Probes that the spread assumed beforehand counts as: that of a noise with a single direction."""


class Probed(NamedTuple):
    """The measurement of one probe, per example.

    Args:
        noise: trace of the per-example covariance.
        grad_sq: squared norm of the gradient.
        size: examples behind that gradient.
        num_parts: parts whose spread gave the noise.
        noise_along, noise_at_quantile: other measures of the noise; None if they were not measured.
    """

    noise: float
    grad_sq: float
    size: float
    num_parts: int
    noise_along: float | None = None
    noise_at_quantile: float | None = None

    @property
    def signal(self) -> float:
        """Squared norm of the true gradient, unbiased."""
        return self.grad_sq - self.noise / self.size

    @classmethod
    def of(cls, moments: GradientMoments) -> Probed:
        """The numbers of a measurement."""
        return cls(
            moments.noise,
            moments.grad_sq,
            moments.num_examples,
            moments.num_parts,
            moments.noise_along,
            moments.noise_at_quantile,
        )


@dataclass(frozen=True, kw_only=True)
class Averages:
    """Exponentially weighted averages of noise and signal over probes, with their covariance.

    The recursion is West's (1979) for weighted means; ``weight`` and ``weight_sq`` are the sums of weights and of their
    squares, so the averages need no bias correction and are as certain as ``num_effective`` equal probes. All are in
    one norm; a measurement in another norm starts new averages.
    """

    weight: float = 0.0
    weight_sq: float = 0.0
    noise: float = 0.0
    signal: float = 0.0
    noise_along: float | None = None
    noise_at_quantile: float | None = None
    norm: str = EUCLIDEAN
    spread_noise: float = 0.0
    spread_signal: float = 0.0
    spread_both: float = 0.0
    comparisons: float = 0.0

    @property
    def num_effective(self) -> float:
        """How many equally weighted probes would be as certain."""
        return self.weight**2 / self.weight_sq if self.weight_sq else 0.0

    @property
    def freedom(self) -> float:
        """Degrees of freedom of the noise: ``num_parts - 1`` per probe, pooled over the probes."""
        return self.num_effective * self.comparisons

    @property
    def noise_scale(self) -> float:
        """``noise / signal`` of the averages, in examples; NaN if the signal is not positive."""
        return self.noise / self.signal if self.signal > 0 else math.nan

    def after(self, moments: GradientMoments, decay: float) -> Averages:
        """The averages with one more measurement in them, the past weighted by ``decay``."""
        # noise and signal in another norm are other quantities, and must not be mixed with these
        past = self if moments.norm == self.norm else Averages(norm=moments.norm)
        return past.with_probe(Probed.of(moments), decay)

    def with_probe(self, probe: Probed, decay: float, weight: float = 1.0) -> Averages:
        """The averages with one more probe that counts ``weight`` times."""
        # West's update of mean and spread: no difference of large sums of squares, which would cancel.
        total = decay * self.weight + weight
        # zero if every probe so far was an outlier
        share = weight / total if total > 0 else 0.0
        d_noise, d_signal = probe.noise - self.noise, probe.signal - self.signal
        mean_noise, mean_signal = self.noise + d_noise * share, self.signal + d_signal * share

        def mean(past: float | None, new: float | None) -> float | None:
            return new if past is None or new is None else past + (new - past) * share

        return Averages(
            weight=total,
            weight_sq=decay**2 * self.weight_sq + weight**2,
            noise=mean_noise,
            signal=mean_signal,
            noise_along=mean(self.noise_along, probe.noise_along),
            noise_at_quantile=mean(self.noise_at_quantile, probe.noise_at_quantile),
            norm=self.norm,
            spread_noise=decay * self.spread_noise + weight * d_noise * (probe.noise - mean_noise),
            spread_signal=decay * self.spread_signal + weight * d_signal * (probe.signal - mean_signal),
            spread_both=decay * self.spread_both + weight * d_noise * (probe.signal - mean_signal),
            comparisons=self.comparisons + (probe.num_parts - 1 - self.comparisons) * share,
        )

    def moments(self, plan: BatchPlan) -> GradientMoments:
        """What a step of ``plan`` would measure from single examples if noise and signal were these averages."""
        # Averages do not know the size of the parts they come from. Single examples lose the fewest digits, and are
        # parts of a plan of one micro-batch too; a batch of one example is taken in halves.
        return GradientMoments.from_noise(
            self.noise,
            self.signal,
            part_size=min(1.0, plan.global_batch_size / 2),
            num_examples=plan.global_batch_size,
            noise_along=self.noise_along,
        )._replace(noise_at_quantile=self.noise_at_quantile, norm=self.norm)

    def covariance(self) -> tuple[float, float, float]:
        """Variance of the average noise, of the average signal, and their covariance; infinite after a single probe."""
        # Bessel's correction for weights: with n equal ones this is n - 1.
        freedom = self.weight - self.weight_sq / self.weight if self.weight else 0.0
        if freedom <= 1e-12:
            return math.inf, math.inf, 0.0
        scale = 1 / (freedom * self.num_effective)
        return self.spread_noise * scale, self.spread_signal * scale, self.spread_both * scale


class _Deviations(NamedTuple):
    """Probes compared with their median; deviations are relative to it, on the scale of cube roots."""

    deviations: tuple[float, ...]
    spread: float
    center: float


@dataclass(frozen=True, kw_only=True)
class ProbeWindow:
    """The probes of a run: the last ones as they were measured, the earlier ones as averages.

    Args:
        past: averages of the probes before the last ones.
        recent: the last probes, at most ``RECENT``, the latest at the end.
        num_probes: number of probes since noise or signal last jumped.
        decay: weight of the past at each new probe; 0 keeps the last one only, without a test for outliers.
        scatter_noise, scatter_grad: mean squared deviation of the probes of ``past`` from their neighbours.
    """

    past: Averages = field(default_factory=Averages)
    recent: tuple[Probed, ...] = ()
    num_probes: int = 0
    decay: float = 0.0
    scatter_noise: float = 0.0
    scatter_grad: float = 0.0

    @classmethod
    def of(cls, averages: Averages) -> ProbeWindow:
        """A window of which only the averages are known."""
        # as after loading a checkpoint from before single probes were kept
        return cls(past=averages, num_probes=round(averages.num_effective))

    @cached_property
    def averages(self) -> Averages:
        """The averages over all probes, outliers left out."""
        found = self.past
        for probe, weight in zip(self.recent, self.weights, strict=True):
            found = found.with_probe(probe, self.decay, weight)
        return found

    @cached_property
    def weights(self) -> tuple[float, ...]:
        """How much each of the last probes counts, from 0 (an outlier) to 1."""
        if self.decay == 0:  # the single probe of `Control.direct()` is followed whatever it says
            return (1.0,) * len(self.recent)
        noise, grad = self._noise, self._grad
        # The smaller of two weights: a spike of the data may show in the noise or in the length of the gradient only.
        return tuple(
            min(_weight(one, noise.spread), _weight(other, grad.spread))
            for one, other in zip(noise.deviations, grad.deviations, strict=True)
        )

    def after(self, moments: GradientMoments, *, decay: float) -> ProbeWindow:
        """The window with one more measurement; a measurement in another norm starts a new window."""
        same = not self.num_probes or moments.norm == self.past.norm
        window = replace(
            self if same else ProbeWindow(),
            recent=((self.recent if same else ()) + (Probed.of(moments),)),
            num_probes=(self.num_probes if same else 0) + 1,
            decay=decay,
        )
        # an empty window has the default norm; the first measurement says which it is
        if window.past.norm != moments.norm:
            window = replace(window, past=Averages(norm=moments.norm))
        if len(window.recent) > RECENT:
            window = window._shortened()
        if window._has_changed():
            # Only the probes that agree count, so that the memory grows again from there.
            num_probes = round(sum(window.weights))
            window = replace(window, past=Averages(norm=moments.norm), num_probes=num_probes)
        return window

    def _shortened(self) -> ProbeWindow:
        """The window after its oldest recent probe has moved into the past."""
        # Its weight was computed again at each of the probes after it, and is final now.
        weight = self.weights[0]
        past = self.past.with_probe(self.recent[0], self.decay, weight)
        share = weight / past.weight if past.weight > 0 else 0.0

        # Capped, because one outlier in the spread would widen it and let the next outliers pass.
        def scatter(before: float, compared: _Deviations) -> float:
            return before + share * (min(compared.deviations[0] ** 2, (OUTLIER * compared.spread) ** 2) - before)

        return replace(
            self,
            past=past,
            recent=self.recent[1:],
            scatter_noise=scatter(self.scatter_noise, self._noise),
            scatter_grad=scatter(self.scatter_grad, self._grad),
        )

    def _has_changed(self) -> bool:
        """Whether the last probes no longer agree with those before them."""
        past, counted = self.past, sum(self.weights)
        # without a positive past noise there is no ratio to compare
        if self.decay == 0 or past.weight == 0 or len(self.recent) < RECENT or past.noise <= 0:
            return False
        # of the median of the last probes, whose variance is pi / 2 times that of their mean, and of the past's mean
        certain = math.sqrt(math.pi / 2 / counted + 1 / past.num_effective)
        signal = max(past.signal, 0.0)
        grad = median(probe.grad_sq / (signal + past.noise / probe.size) for probe in self.recent)
        # The median of a skewed noise lies below its mean, on this scale by its variance.
        return any(
            compared.center > 0 and abs(math.cbrt(ratio) - 1 + compared.spread**2) > CHANGED * compared.spread * certain
            for compared, ratio in ((self._noise, self._noise.center / past.noise), (self._grad, grad))
        )

    @cached_property
    def _noise(self) -> _Deviations:
        parts = median(probe.num_parts for probe in self.recent) - 1
        return self._deviations_of([probe.noise for probe in self.recent], 1 / max(parts, 1), self.scatter_noise)

    @cached_property
    def _grad(self) -> _Deviations:
        """Squared norms of the gradient, relative to what is expected for a batch of their size."""
        noise = max(self._noise.center, 0.0)
        signal = max(median(probe.signal for probe in self.recent), 0.0)
        expected = [signal + noise / probe.size for probe in self.recent]
        ratios = [probe.grad_sq / each if each > 0 else 0.0 for probe, each in zip(self.recent, expected, strict=True)]
        return self._deviations_of(ratios, 1.0, self.scatter_grad)

    def _deviations_of(self, values: Sequence[float], prior: float, scatter: float) -> _Deviations:
        """Deviations of ``values`` from their median, and the spread, pooled from theirs, that of the past and a prior.

        Args:
            prior: one over the degrees of freedom that a value has at least.
        """
        center, number = median(values), len(values)
        if not center > 0:  # no scale to compare with, so no probe is an outlier
            return _Deviations((0.0,) * number, 0.0, center)
        # Cube roots of a mean of squares are nearly normal whatever its degrees of freedom (Wilson and Hilferty 1931),
        # so one bound suits noise from two parts and from two hundred, and a skewed distribution loses no probes. cbrt,
        # unlike a power, also takes the negative noise of a small sample.
        deviations = tuple(math.cbrt(value / center) - 1 for value in values)
        # The median absolute deviation: 1.4826 makes it the standard deviation of normal numbers, and n / (n - 0.8) is
        # the factor of Croux and Rousseeuw (1992) for few of them.
        scale = 1.4826 * number / (number - 0.8) * median(map(abs, deviations))
        # Seven values alone give a poor spread, so it is pooled with that of the past, and with the variance of a
        # chi-square on the scale of cube roots, 2 / 9 over its degrees of freedom, which matters early in a run.
        sources = ((PRIOR, 2 / 9 * prior), (self.past.num_effective, scatter), (number - 1, scale**2))
        total = sum(weight for weight, _ in sources)
        return _Deviations(deviations, math.sqrt(sum(weight * square for weight, square in sources) / total), center)

    def state_dict(self) -> dict[str, Any]:
        """The numbers as a nested dict."""
        return {
            "past": asdict(self.past),
            "recent": [list(probe) for probe in self.recent],
            "num_probes": self.num_probes,
            "decay": self.decay,
            "scatter_noise": self.scatter_noise,
            "scatter_grad": self.scatter_grad,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> ProbeWindow:
        """The inverse of ``state_dict``."""
        return cls(
            **{**state, "past": Averages(**state["past"]), "recent": tuple(Probed(*row) for row in state["recent"])}
        )


def median(values: Iterable[float]) -> float:
    """The median, without the checks of ``statistics.median``: it is computed several times per probe."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def _weight(deviation: float, spread: float) -> float:
    """1 up to ``OUTLIER`` standard deviations, falling to 0 at twice as many (Hampel's redescending weight)."""
    # The spread contains a positive prior; it is zero only if there was no scale to compare the probes on.
    return 1.0 if spread == 0 else min(1.0, max(0.0, 2 - abs(deviation) / (OUTLIER * spread)))
