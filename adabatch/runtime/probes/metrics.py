"""Norms that belong to an optimizer: gradients as its step weights them, read from its state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, NAdam, Optimizer

from adabatch.arguments import checked
from adabatch.batch.moments import EUCLIDEAN
from adabatch.runtime.optimizers.joined import each_of
from adabatch.runtime.probes.norms import real
from adabatch.runtime.wrappers.fsdp2 import own_piece


@runtime_checkable
class Metric(Protocol):
    """A norm that an optimizer's state defines: the Euclidean norm of a linear image of the gradient.

    Pass your own metric to a probe (``norm=``). A criterion with ``needs = Needs(noise=metric.name)`` then receives
    noise in this norm.
    """

    @property
    def name(self) -> str:
        """The name of the norm, as in ``NoiseScale(norm=)``."""
        ...

    @property
    def diagonal(self) -> bool:
        """Whether the image only multiplies each coordinate by a weight. Probes that know sums of squares only (FSDP2,
        single examples) take no other metric."""
        ...

    def begin(self, parameters: Sequence[Tensor]) -> bool:
        """Called when a probed step begins. Returns whether any of the parameters has state, the same on all ranks."""
        ...

    def __call__(self, parameter: Tensor, grad: Tensor) -> Tensor:
        """The image of a gradient, in at least float32; zero for a parameter without state.

        Must not change ``grad``, nor sync with the host.

        Args:
            parameter: the parameter that the gradient belongs to.
            grad: this rank's piece of the gradient, in the shape of the parameter or flat.
        """
        ...


ProbeNorm = Metric | Literal["sign"]
"""A norm other than the Euclidean one, in which a probe measures."""


Image = Callable[[Tensor, Tensor], Tensor]
"""Parameter and gradient -> the image of the gradient."""


def begun(norm: ProbeNorm | None, parameters: Sequence[Tensor]) -> tuple[Image, bool]:
    """The image under which the step that begins is measured, and whether the norm is known yet."""
    if norm is None or isinstance(norm, str):
        return as_it_is, True
    # Before the optimizer's first step there is no state, hence no noise. Gradients are still measured, in the
    # Euclidean norm, because the step has to know whether they are finite.
    return (norm, True) if norm.begin(parameters) else (as_it_is, False)


def as_it_is(_: Tensor, grad: Tensor) -> Tensor:
    """The image in the Euclidean norm."""
    return grad


def norm_name(norm: ProbeNorm | None) -> str:
    """The name of a norm in the moments."""
    return EUCLIDEAN if norm is None else norm if isinstance(norm, str) else norm.name


def check_diagonal(norm: ProbeNorm | None, probe: str) -> None:
    """Checks that a norm can be computed from squares of coordinates.

    Raises:
        ValueError: if the metric mixes coordinates.
    """
    if norm is not None and not isinstance(norm, str) and not norm.diagonal:
        raise ValueError(
            f"norm={norm.name!r} mixes coordinates, of which {probe} knows the squares only: use a plain model or "
            f"DistributedDataParallel with MicroBatchProbe, or norm='adam'"
        )


def norm_of(name: str, optimizer: Optimizer) -> ProbeNorm | None:
    """The norm with this name.

    Raises:
        ValueError: if the optimizer does not have this norm.
    """
    if name == EUCLIDEAN:
        return None
    return "sign" if name == "sign" else METRICS[name](optimizer)


class AdamMetric:
    """Gradients divided by ``sqrt(v) + eps``, with Adam's bias-corrected second moments from before the step.

    Args:
        optimizer: ``Adam``, ``AdamW`` or ``NAdam``, also with ``amsgrad``.

    Raises:
        ValueError: if it is another optimizer.
    """

    name = "adam"
    diagonal = True

    @checked
    def __init__(self, optimizer: Optimizer) -> None:
        if not isinstance(optimizer, Adam | AdamW | NAdam):
            raise ValueError(
                f"norm='adam' reads the second moments of Adam, AdamW or NAdam, which {type(optimizer).__name__} does "
                f"not have: use norm='euclidean' (gradient descent) or norm='sign' (methods that step by signs)"
            )
        self._optimizer = optimizer
        self._group: dict[Tensor, dict[str, Any]] = {}

    def begin(self, parameters: Sequence[Tensor]) -> bool:
        """Whether any of the parameters has been updated.

        Raises:
            ValueError: if the optimizer holds none of them, but copies or shards that an engine made.
        """
        # Built again in each step: users add groups and change betas while they train.
        self._group = {p: group for group in self._optimizer.param_groups for p in group["params"]}
        if not any(p in self._group for p in parameters):
            raise ValueError(
                f"norm='adam' finds none of the measured parameters in the {type(self._optimizer).__name__}, which "
                f"updates copies or shards of them: use norm='euclidean', or an engine that gives it the parameters"
            )
        # get(), because an optimizer's state is a defaultdict: reading an entry that is missing would create it.
        return any("exp_avg_sq" in self._optimizer.state.get(p, {}) for p in parameters)

    def __call__(self, parameter: Tensor, grad: Tensor) -> Tensor:
        """``grad / (sqrt(v) + eps)``."""
        state, wide = self._optimizer.state.get(parameter, {}), _wide(grad)
        # Never updated so far: as zero, it is left out of noise and signal alike.
        if "exp_avg_sq" not in state:
            return torch.zeros_like(wide)
        group = self._group[parameter]
        # With amsgrad, the step divides by the largest second moments so far.
        moments = own_piece(state["max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"])[0]
        # torch keeps step counts in float32, in which 1 - beta^step would lose the fifth digit. A tensor on purpose:
        # capturable and fused optimizers keep the count on the device, where a Python number would need a host sync.
        correction = 1 - group["betas"][1] ** torch.as_tensor(state["step"], dtype=torch.float64)
        scale: Tensor = (_wide(moments).reshape(wide.shape) / correction).sqrt_().add_(group["eps"])
        return wide / scale


@runtime_checkable
class Whitens(Protocol):
    """An optimizer that preconditions gradients by a matrix and can apply its square root (``optim.KFAC``)."""

    @property
    def whitens(self) -> bool:
        """Whether the matrix exists yet; the same on all ranks."""
        ...

    def whiten(self, param: Tensor, grad: Tensor) -> Tensor:
        """Applies the square root to a gradient of the shape of ``param``; zero for parameters without a matrix."""
        ...


class KFACMetric:
    """Gradients in the metric of K-FAC, ``|g|^2 = <g, P g>``, with the most recent inverse factors P.

    They are from before the step, so noise and signal stay unbiased. The metric mixes coordinates, so it needs whole
    gradients.

    Args:
        optimizer: ``optim.KFAC``.

    Raises:
        ValueError: if it is another optimizer.
    """

    name = "kfac"
    diagonal = False

    @checked
    def __init__(self, optimizer: Optimizer) -> None:
        if not isinstance(optimizer, Whitens):
            raise ValueError(
                f"norm='kfac' reads the curvature of adabatch.optim.KFAC, which {type(optimizer).__name__} does not "
                f"have: use norm='euclidean', or 'adam' with Adam"
            )
        self._optimizer: Whitens = optimizer

    def begin(self, parameters: Sequence[Tensor]) -> bool:
        """Whether the inverses have been computed."""
        return self._optimizer.whitens

    def __call__(self, parameter: Tensor, grad: Tensor) -> Tensor:
        """``P^(1/2) grad``."""
        return self._optimizer.whiten(parameter, _wide(grad).view(parameter.shape))


class SpectralNorm:
    """The nuclear norm of matrices, dual to the spectral norm, in which Muon's steps have length one.

    Noise and signal are sums of singular values over matrices, not squares of an image. A ``Gauge`` with this norm
    computes them from Gram matrices (`MatrixGrams`). It needs whole gradients.

    Args:
        optimizer: the optimizer whose matrices are measured. If one of several optimizers is ``torch.optim.Muon``, only
            the matrices of Muon are.

    Raises:
        ValueError: if the optimizer holds no matrix.
    """

    name = "spectral"
    diagonal = False

    def __init__(self, optimizer: Optimizer) -> None:
        kind = getattr(torch.optim, "Muon", None)  # it came with torch 2.9
        muons = [one for one in each_of(optimizer) if kind is not None and isinstance(one, kind)]
        groups = [group for one in muons or each_of(optimizer) for group in one.param_groups]
        self._matrices = {id(p) for group in groups for p in group["params"] if p.ndim == 2}
        if not self._matrices:
            raise ValueError(
                f"norm='spectral' measures matrices, and the {type(optimizer).__name__} holds no parameter of two "
                f"dimensions: use norm='euclidean'"
            )

    def takes(self, parameter: Tensor) -> bool:
        """Whether the parameter is one of the measured matrices."""
        return id(parameter) in self._matrices

    def begin(self, parameters: Sequence[Tensor]) -> bool:
        """True: the norm needs no state.

        Raises:
            ValueError: if none of the measured parameters is one of the matrices.
        """
        if not any(self.takes(p) for p in parameters):
            raise ValueError(
                "norm='spectral' finds none of the measured parameters in the optimizer, which updates copies or "
                "shards of them: use norm='euclidean', or an engine that gives it the parameters"
            )
        return True

    def __call__(self, parameter: Tensor, grad: Tensor) -> Tensor:
        """The gradient as it is."""
        return grad


METRICS: dict[str, Callable[[Optimizer], Metric]] = {
    AdamMetric.name: AdamMetric,
    KFACMetric.name: KFACMetric,
    SpectralNorm.name: SpectralNorm,
}
"""The metrics that criteria can name, and how to make each from the optimizer."""


def _wide(tensor: Tensor) -> Tensor:
    """The tensor as dense real numbers in at least float32; complex numbers become pairs."""
    dense = real(tensor.to_dense() if tensor.is_sparse else tensor)
    return dense if dense.dtype is torch.float64 else dense.float()
