"""Criteria: the global batch size that the measured noise of the gradient asks for.

All are pure functions of an ``Observation``. They return a size in examples *before* rounding, and raise no error for
any measurement: they return ``inf`` if the denominator is not positive (no signal was seen), zero or less if no noise
was seen, and NaN if something was not measured or not finite. ``control.decide`` handles these cases by holding the
plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

from adabatch.arguments import check_fields, require, require_one_of
from adabatch.batch.moments import EUCLIDEAN, GradientMoments, Norm
from adabatch.batch.needs import Needs
from adabatch.batch.plan import PlanGrid, Progress
from adabatch.batch.step_times import StepTimes


class Observation(NamedTuple):
    """What is known at the end of a step; None for what was not measured.

    Args:
        moments: squared norms of the gradient and its parts, averaged over steps by the control.
        progress: what the run's applied updates consumed so far.
        loss: mean training loss of the step.
        seconds: recent time of a step, the mean over the ranks; for criteria that need it.
        times: the times of all plans that were timed.
        grid: the plans that the run can carry out.
    """

    moments: GradientMoments | None
    progress: Progress
    loss: float | None = None
    seconds: float | None = None
    times: StepTimes | None = None
    grid: PlanGrid | None = None


@runtime_checkable
class Criterion(Protocol):
    """Says which global batch size the observation asks for."""

    @property
    def needs(self) -> Needs:
        """What must be measured; ``Needs()`` for a schedule, which reads only progress."""
        ...

    def wanted(self, observation: Observation) -> float:
        """The global batch size asked for, in examples, before rounding and limits."""
        ...


@runtime_checkable
class DecaysLR(Protocol):
    """A criterion whose growing batch replaces a part of the decay of the learning rate (``Seesaw``)."""

    def lr_decay(self, progress: Progress) -> float:
        """A factor on the learning rate at this progress, in addition to that of the rule; not negative."""
        ...


@runtime_checkable
class Resting(Protocol):
    """A criterion that knows at which batch it stops asking for another one."""

    def rest(self, observation: Observation) -> float:
        """The global batch size at which ``wanted`` would ask for that same size; ``inf`` if no signal was seen."""
        ...


def resting_size(criterion: Criterion) -> Callable[[Observation], float]:
    """The size that a control follows: ``rest`` if the criterion has it (`Resting`), else ``wanted``.

    If a subclass defines ``wanted`` and inherits ``rest``, it is ``wanted`` too, because the inherited ``rest`` belongs
    to the test that the subclass replaces.
    """
    # a subclass that overrides only `wanted` would otherwise never have it called
    if isinstance(criterion, Resting) and _line_of("rest", criterion) <= _line_of("wanted", criterion):
        return criterion.rest
    return criterion.wanted


def _line_of(name: str, criterion: Criterion) -> int:
    """Number of base classes between the criterion and the definition of a method; 0 if the object itself has it."""
    line = type(criterion).__mro__
    return next((index for index, owner in enumerate(line) if name in vars(owner)), 0)


def ratio(noise: float, allowed: float) -> float:
    """``noise / allowed``: the batch at which the noise of the mean gradient falls to what is allowed."""
    if math.isnan(noise) or math.isnan(allowed):
        return math.nan
    # A negative estimate is taken for no signal: then no batch is large enough, unless there is no noise either.
    if allowed <= 0:
        return math.inf if noise > 0 else 0.0
    return noise / allowed


def _check_positive(name: str, value: float) -> None:
    require(math.isfinite(value) and value > 0, f"{name} must be a positive number", value)


def _check_norm(norm: str) -> None:
    require_one_of("norm", norm, Norm)


@dataclass(frozen=True)
class NormTest:
    """The norm test: the noise of the batch gradient must not exceed ``eta`` times its length.

        noise / b <= eta^2 |g|^2        wanted: b = noise / (eta^2 |g|^2)

    ``|g|^2`` is the squared norm of the batch gradient itself (the plug-in form of the papers), not the unbiased
    signal. If noise dominates, one test multiplies the batch by at most ``1 / eta^2``, and the batch comes to rest at
    ``noise_scale * (1 - eta^2) / eta^2``.

    **At this batch an example is worth eta^2 of one in a small batch** (`efficiency`):

        eta     batch over noise scale    worth of an example
        0.1     99                        1 %
        0.5     3                         25 %
        0.7     1.04                      49 %
        0.8     0.56                      64 %
        0.9     0.23                      81 %

    so ``eta`` trades examples for steps. If you know what a step costs in examples, use `StepPrice` instead.

    The control asks for the size at which the test rests (`rest`), with the unbiased signal; only ``Control.direct()``
    follows single tests.

    Args:
        eta: tolerated ratio of noise to gradient, positive; below 1 for the batch to stop growing. An example is worth
            ``eta^2``. 0.1 (MNIST) and 0.5 (ResNet-18 on CIFAR-10) in Lau et al. 2024.
        population: number of examples in the data set, for the form that counts sampling without replacement,
            ``b = n noise / (noise + (n - 1) eta^2 |g|^2)``, which never exceeds n. None omits the correction, as the
            papers do.

    Raises:
        ValueError: if ``eta`` is not positive, or the population is below 2.

    Source: Byrd et al. 2012, section 2; Bollapragada et al. 2018, section 1; Lau, Liu, Kolar 2024 (AdAdaGrad).
    """

    eta: float
    population: int | None = None
    needs: ClassVar[Needs] = Needs(noise=EUCLIDEAN)

    def __post_init__(self) -> None:
        check_fields(self)
        _check_positive("eta", self.eta)
        if self.population is not None and not self.population >= 2:
            raise ValueError(f"population must be the size of the data set, at least 2, got {self.population}")

    def wanted(self, observation: Observation) -> float:
        """The smallest batch that would pass the test."""
        moments = observation.moments
        if moments is None:
            return math.nan
        noise, allowed = moments.noise, self.eta * self.eta * moments.grad_sq
        # Without a gradient the form with a population would ask for n, and the control would not see that there is no
        # signal.
        if self.population is None or allowed <= 0:
            return ratio(noise, allowed)
        n = self.population
        return float(min(ratio(n * noise, noise + (n - 1) * allowed), n))  # min: rounding; NaN stays

    def rest(self, observation: Observation) -> float:
        """``noise_scale * (1 - eta^2) / eta^2``, from the unbiased signal: the batch that just passes the test.

        With a population ``n``, ``noise (n - eta^2 (n - 1)) / (noise + eta^2 (n - 1) signal)``. From ``eta=1`` on the
        test has no such size, and this is ``wanted``.
        """
        moments, allowed = observation.moments, self.eta * self.eta
        if moments is None or allowed >= 1:
            return self.wanted(observation)
        noise, signal = moments.noise, moments.signal
        if self.population is None:
            return ratio(noise * (1 - allowed), allowed * signal)
        n = self.population
        return float(min(ratio(noise * (n - allowed * (n - 1)), noise + allowed * (n - 1) * signal), n))


@dataclass(frozen=True)
class StepPrice:
    """The batch for which a run takes the least time, given what a step costs beside its examples.

        wanted: b = sqrt(noise_scale * price)

    If a step of b examples takes ``alpha + beta b``, its price is ``alpha / beta`` examples: the time that does not
    depend on the batch (launching kernels, the optimizer, the network), in examples that could be computed in it. The
    number of steps to a given loss is proportional to ``1 + noise_scale / b``, so this batch takes the least time. An
    example in it is worth ``1 / (1 + sqrt(price / noise_scale))`` of one in a small batch (`efficiency`): a half if the
    price equals the noise scale, nearly all if steps are cheap.

    The minimum is flat: with a price four times too large or too small the run takes at most an eighth longer, so a
    rough value is enough. A given price is the same on every machine and in every resumed run; `Goodput` measures it
    instead.

    Args:
        examples: the price of a step, in examples over all ranks, positive.
        norm: in which the noise scale is measured, as in `NoiseScale`.

    Raises:
        ValueError: if the price is not positive, or the norm is unknown.

    Source: McCandlish et al. 2018, appendix D, for a price in time.
    """

    examples: float
    norm: Norm = field(default="euclidean", kw_only=True)

    def __post_init__(self) -> None:
        check_fields(self)
        _check_positive("examples", self.examples)
        _check_norm(self.norm)

    @property
    def needs(self) -> Needs:
        """Noise and signal in the norm."""
        return Needs(noise=self.norm)

    def wanted(self, observation: Observation) -> float:
        """The geometric mean of noise scale and price; zero or less if no noise was seen."""
        moments = observation.moments
        if moments is None:
            return math.nan
        noise_scale = ratio(moments.noise, moments.signal)
        # NaN and zero stay what they are, since the control names each of these cases
        return math.sqrt(noise_scale * self.examples) if noise_scale > 0 else noise_scale


@dataclass(frozen=True)
class NoiseScale:
    """A multiple of the noise scale, ``b = multiple * noise / signal``, with the unbiased signal.

    At one times the noise scale a step makes half the progress of a noiseless one, and an example is worth half of one
    in a small batch; at a multiple of m it is worth ``1 / (1 + m)`` (`efficiency`).

    The Euclidean norm is that of gradient descent. Other methods rescale the gradient, and with it the noise, so noise
    and signal can be measured in the norm of the optimizer:

    - "adam": of ``g_c / (sqrt(v_c) + eps)``, with Adam's bias-corrected second moments ``v`` from before the step: they
      do not depend on its gradient, so noise and signal are unbiased. Before the first update there are no moments, and
      the plan is held; parameters that have none yet are left out. In plain models and DDP it costs an elementwise pass
      over the gradient and ``v`` in each micro-batch, and no permanent memory. It was worse in every comparison: it
      took 314 steps to a loss of 0.067, against 182 steps to 0.060 with the Euclidean norm (a small CNN on MNIST), and
      711 steps to 2.03, against 489 to 1.99 (a language model of bytes).
    - "sign": ``(sum_c sigma_c)^2 / |G|_1^2``, with ``sigma_c`` the standard deviation of coordinate c, for sign methods
      (signSGD, Signum, Lion). It needs the squares of each coordinate, added up over the parts: on a probed step 4
      bytes per parameter, 8 while a micro-batch runs, and with DDP a second reduction of the size of the gradient. The
      tolerance theta of arXiv 2602.03001 is ``multiple = 1 / theta^2`` (0.6 there, so 2.8).
    - "spectral": ``(sum_l tr C_l^(1/2))^2 / (sum_l |G_l|_*)^2`` over the weight matrices l, with the nuclear norm
      ``|.|_*`` and the covariance ``C_l`` of a matrix over its smaller side, for methods whose steps have a spectral
      norm (Muon). If ``torch.optim.Muon`` is one of several optimizers, the matrices are those that it holds; otherwise
      all parameters of two dimensions. It needs whole gradients, in plain models and DDP. On a probed step it costs a
      product ``g g^T`` for each matrix in each micro-batch, ``4 k^2`` bytes for a matrix with a smaller side of k (8 in
      the backward), with DDP a reduction of as many bytes, and the eigenvalues of three k x k matrices for each, of
      which two are distributed over the ranks.
    - "kfac": of ``P^(1/2) g`` with K-FAC's inverse factors ``P`` from before the step, ``|g|^2 = <g, P g>``. Before the
      first update there are no factors, and the plan is held; parameters that K-FAC does not precondition are left out.
      It costs two products with a layer's roots in each micro-batch, and a Cholesky factorization of the inverses when
      they change; it needs whole gradients, in plain models and DDP. It asks for larger batches than the Euclidean norm
      (by 2.7 times on a random network of width 4,096), and does not change with width.

    With FSDP2 "adam" and "sign" take a second reduce-scatter, of the gradient's squares in float32, and 4 bytes for
    each element of a rank's shards. With single examples (``PerExampleProbe``) these two add up squares as "sign" does,
    and only "sign" reduces them.

    It is contested how well any of these predicts the largest useful batch; the learning-rate rules "gain" and
    "sqrt_gain" read noise and signal in the same norm.

    Args:
        multiple: batch size in units of the noise scale, positive.
        norm: "euclidean", "adam", "sign", "spectral" or "kfac".

    Raises:
        ValueError: if ``multiple`` is not positive, or the norm is unknown.

    Source: McCandlish et al. 2018, section 2.2 and appendix A.1; "adam" as in AdaptDL (Qiao et al. 2021); "sign" and
    "spectral": arXiv 2602.03001, with the noise taken off the signal (`from_signs`, `from_matrices`).
    """

    multiple: float = 1.0
    norm: Norm = "euclidean"

    def __post_init__(self) -> None:
        check_fields(self)
        _check_positive("multiple", self.multiple)
        _check_norm(self.norm)

    @property
    def needs(self) -> Needs:
        """Noise and signal in the norm."""
        return Needs(noise=self.norm)

    def wanted(self, observation: Observation) -> float:
        """``multiple`` times the noise scale."""
        moments = observation.moments
        return math.nan if moments is None else ratio(self.multiple * moments.noise, moments.signal)


@dataclass(frozen=True)
class CoordinateNormTest:
    """The norm test of each coordinate c, which a share ``quantile`` of them must pass.

        Var_c / b <= eta^2 g_c^2        wanted: b = quantile_c (Var_c / g_c^2) / eta^2

    ``Var_c`` is the unbiased variance over examples and ``g`` the batch gradient itself, as in ``NormTest``.
    Coordinates without gradient and noise (rows of an embedding that the batch did not look up) do not count. A
    coordinate with noise but without gradient passes at no batch.

    The theory of AdaGrad and Adam requires all coordinates, ``quantile=1.0``. The worst of millions is one whose
    gradient happens to be near zero, so that the batch explodes; if it is exactly zero the plan is held ("not finite").
    In pure noise a coordinate asks for ``b / eta^2`` over the square of a normal number: half of them for 2.2 times
    what ``NormTest`` asks for, one in ten for 63 times. With few parts ``Var_c`` is uncertain too, and a high quantile
    selects the coordinates in which it is overestimated: measure many micro-batches, or single examples.

    The quantity averaged over probes is ``|g|^2`` times the quantile, which like the noise does not depend on the
    batch; its error bar is that of the noise.

    Cost on a probed step: the squares of each coordinate are added up over the parts, 4 bytes per parameter, 8 while a
    micro-batch runs; with DDP a second reduction of the size of the gradient, with FSDP2 a second reduce-scatter in
    float32 at each reduction and 4 bytes for each element of a rank's shards. The quantile is found on the device in
    three passes over them, without sorting. Single examples (``PerExampleProbe``) also form their gradients layer by
    layer, some at a time.

    Args:
        eta: tolerated ratio, positive. As in ``NormTest``, an example is worth about ``eta^2`` of one in a small batch.
        quantile: share of the coordinates that must pass, above 0 and up to 1.0, which is the papers' maximum. By
            default half: the median is the quantile that few parts affect least, and in training it asked for nearly
            the same batches as ``NormTest`` (118 steps against 125, 282 against 243, at eta 0.5).

    Raises:
        ValueError: if a value is outside its range.

    Source: Lau, Liu, Kolar 2024 (AdAdaGrad), the coordinate-wise norm test; the quantile is ours.
    """

    eta: float
    quantile: float = 0.5

    def __post_init__(self) -> None:
        check_fields(self)
        _check_positive("eta", self.eta)
        require(0 < self.quantile <= 1, "quantile must be above 0 and at most 1.0 (all coordinates)", self.quantile)

    @property
    def needs(self) -> Needs:
        """The quantile over coordinates, beside noise and signal."""
        return Needs(noise=EUCLIDEAN, quantile=self.quantile)

    def wanted(self, observation: Observation) -> float:
        """The smallest batch at which that share of the coordinates would pass."""
        moments = observation.moments
        if moments is None or moments.noise_at_quantile is None:
            return math.nan
        return ratio(moments.noise_at_quantile, self.eta * self.eta * moments.grad_sq)


@dataclass(frozen=True)
class InnerProductTest:
    """The inner-product test: the batch gradient must point downhill often enough.

        Var_i <g_i, g> / b <= theta^2 |g|^4        wanted: b = noise_along / (theta^2 |g|^2)

    Only the noise along the gradient counts, so in high dimension it asks for far smaller batches than the norm test.

    Args:
        theta: tolerated ratio, positive (0.9 in Bollapragada et al. 2018).

    Raises:
        ValueError: if ``theta`` is not positive.

    Source: Bollapragada, Byrd, Nocedal 2018, section 2.
    """

    theta: float
    needs: ClassVar[Needs] = Needs(noise=EUCLIDEAN, products=True)

    def __post_init__(self) -> None:
        check_fields(self)
        _check_positive("theta", self.theta)

    def wanted(self, observation: Observation) -> float:
        """The smallest batch that would pass the test."""
        moments = observation.moments
        if moments is None or moments.noise_along is None:
            return math.nan
        # noise_along is Var_i <g_i, g> / |g|^2, so that one |g|^2 of the test's two is left
        return ratio(moments.noise_along, self.theta * self.theta * moments.grad_sq)


@dataclass(frozen=True)
class OrthogonalityTest:
    """The orthogonality test: the gradient's noise across its own direction must stay bounded.

        trace Var_i (g_i - (<g_i, g> / |g|^2) g) / b <= nu^2 |g|^2        wanted: b = noise_across / (nu^2 |g|^2)

    Args:
        nu: tolerated ratio, positive (tan 80 degrees = 5.84 in Bollapragada et al. 2018).

    Raises:
        ValueError: if ``nu`` is not positive.

    Source: Bollapragada, Byrd, Nocedal 2018, section 3.1.
    """

    nu: float
    needs: ClassVar[Needs] = Needs(noise=EUCLIDEAN, products=True)

    def __post_init__(self) -> None:
        check_fields(self)
        _check_positive("nu", self.nu)

    def wanted(self, observation: Observation) -> float:
        """The smallest batch that would pass the test."""
        moments = observation.moments
        if moments is None or moments.noise_along is None:
            return math.nan
        return ratio(moments.noise_across, self.nu * self.nu * moments.grad_sq)


@dataclass(frozen=True)
class AugmentedInnerProductTest:
    """Inner-product and orthogonality test together: the larger of the two sizes.

    Args:
        theta: tolerance of the inner-product test, positive.
        nu: tolerance of the orthogonality test, positive.

    Raises:
        ValueError: if a tolerance is not positive.

    Source: Bollapragada, Byrd, Nocedal 2018, section 3.
    """

    theta: float
    nu: float
    needs: ClassVar[Needs] = Needs(noise=EUCLIDEAN, products=True)

    def __post_init__(self) -> None:
        check_fields(self)
        _check_positive("theta", self.theta)
        _check_positive("nu", self.nu)

    def wanted(self, observation: Observation) -> float:
        """The smallest batch that would pass both tests."""
        along = InnerProductTest(self.theta).wanted(observation)
        across = OrthogonalityTest(self.nu).wanted(observation)
        # max() alone would drop a NaN that comes second
        return math.nan if math.isnan(along) or math.isnan(across) else max(along, across)
