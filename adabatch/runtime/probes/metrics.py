"""The norms of optimizers: gradients as a step sees them, from the state of its optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, NAdam, Optimizer

from adabatch.arguments import checked
from adabatch.batch.moments import EUCLIDEAN
from adabatch.runtime.fsdp2 import own_piece
from adabatch.runtime.optimizers import each_of


@runtime_checkable
class Metric(Protocol):
    """A norm that an optimizer's state defines: the Euclidean norm of a linear image of the gradient.

    Hand your own metric to a probe (``norm=``). A criterion with ``needs = Needs(noise=metric.name)`` reads the
    noise in it.
    """

    @property
    def name(self) -> str:
        """What the norm is called in ``NoiseScale(norm=)``."""
        ...

    @property
    def diagonal(self) -> bool:
        """Whether each coordinate is multiplied by a weight of its own. Where only sums of squares are known, as with
        FSDP2 or single examples, no other metric can be taken."""
        ...

    def begin(self, parameters: Sequence[Tensor]) -> bool:
        """A probed step begins; says whether any of the parameters has a state, the same on all ranks."""
        ...

    def __call__(self, parameter: Tensor, grad: Tensor) -> Tensor:
        """The image of a gradient, in float32 at least; zero for a parameter that has no state yet.

        Args:
            parameter: whose gradient it is.
            grad: this rank's piece of it, in the parameter's shape or flat; left as it is. No host sync.
        """
        ...


ProbeNorm = Metric | Literal["sign"]
"""The norm in which a probe measures, where it is not the Euclidean one."""


Image = Callable[[Tensor, Tensor], Tensor]
"""Parameter and gradient -> the image of the gradient."""


def begun(norm: ProbeNorm | None, parameters: Sequence[Tensor]) -> tuple[Image, bool]:
    """The images under which a step that begins is measured, and whether the norm is known in it.

    Where it is not, gradients are taken as they are: that they are finite is worth knowing, though no noise follows.
    """
    if norm is None or isinstance(norm, str):
        return as_it_is, True
    return (norm, True) if norm.begin(parameters) else (as_it_is, False)


def as_it_is(_: Tensor, grad: Tensor) -> Tensor:
    """The image in the Euclidean norm."""
    return grad


def name_of(norm: ProbeNorm | None) -> str:
    """What a norm is called in the moments."""
    return EUCLIDEAN if norm is None else norm if isinstance(norm, str) else norm.name


def check_diagonal(norm: ProbeNorm | None, probe: str) -> None:
    """That a norm can be taken of squares of coordinates.

    Raises:
        ValueError: a metric that mixes coordinates.
    """
    if norm is not None and not isinstance(norm, str) and not norm.diagonal:
        raise ValueError(
            f"norm={norm.name!r} mixes coordinates, of which {probe} knows the squares only: use a plain model or "
            f"DistributedDataParallel with MicroBatchProbe, or norm='adam'"
        )


def norm_of(name: str, optimizer: Optimizer) -> ProbeNorm | None:
    """The norm of that name.

    Raises:
        ValueError: an optimizer that has no such norm.
    """
    if name == EUCLIDEAN:
        return None
    return "sign" if name == "sign" else METRICS[name](optimizer)


class AdamMetric:
    """Gradients divided by ``sqrt(v) + eps``, with Adam's bias-corrected second moments from before the step.

    Args:
        optimizer: ``Adam``, ``AdamW`` or ``NAdam``, with ``amsgrad`` too. Its step counts are read where they lie.

    Raises:
        ValueError: another optimizer.
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
        """Whether any of the parameters was updated yet.

        Raises:
            ValueError: the optimizer holds none of them, but copies or shards that an engine made.
        """
        self._group = {p: group for group in self._optimizer.param_groups for p in group["params"]}
        if not any(p in self._group for p in parameters):
            raise ValueError(
                f"norm='adam' finds none of the measured parameters in the {type(self._optimizer).__name__}, which "
                f"steps copies or shards of them: use norm='euclidean', or an engine that leaves parameters to it"
            )
        return any("exp_avg_sq" in self._optimizer.state.get(p, {}) for p in parameters)

    def __call__(self, parameter: Tensor, grad: Tensor) -> Tensor:
        """``grad / (sqrt(v) + eps)``."""
        state, wide = self._optimizer.state.get(parameter, {}), _wide(grad)
        if "exp_avg_sq" not in state:
            return torch.zeros_like(wide)
        group = self._group[parameter]
        moments = own_piece(state["max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"])[0]
        # In float32, as the counts are, one minus a power near one would lose the fifth digit.
        correction = 1 - group["betas"][1] ** torch.as_tensor(state["step"], dtype=torch.float64)
        scale: Tensor = (_wide(moments).reshape(wide.shape) / correction).sqrt_().add_(group["eps"])
        return wide / scale


@runtime_checkable
class Whitens(Protocol):
    """An optimizer that preconditions gradients by a matrix, and can apply the square root of it (``optim.KFAC``)."""

    @property
    def whitens(self) -> bool:
        """Whether it has the matrix yet; the same on all ranks."""
        ...

    def whiten(self, param: Tensor, grad: Tensor) -> Tensor:
        """The square root on a gradient of the shape of ``param``; zero for a parameter that it does not take."""
        ...


class KFACMetric:
    """Gradients in the metric of K-FAC, ``|g|^2 = <g, P g>`` with the inverse factors P as they were last computed.

    They are from before the step, so noise and signal stay unbiased. It mixes coordinates, so it needs whole gradients.

    Args:
        optimizer: ``optim.KFAC``.

    Raises:
        ValueError: another optimizer.
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
        """Whether the inverses were computed yet."""
        return self._optimizer.whitens

    def __call__(self, parameter: Tensor, grad: Tensor) -> Tensor:
        """``P^(1/2) grad``."""
        return self._optimizer.whiten(parameter, _wide(grad).view(parameter.shape))


class SpectralNorm:
    """The nuclear norm of matrices, dual to the spectral norm in which Muon's steps have length one.

    Noise and signal in it are sums over matrices of singular values, and not squares of an image: a ``Gauge`` that is
    given this object takes them from Gram matrices (`MatrixGrams`). It needs whole gradients.

    Args:
        optimizer: its matrices count. If ``torch.optim.Muon`` is among several, only what Muon holds.

    Raises:
        ValueError: the optimizer holds no matrix.
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
        """Whether the parameter is a matrix that counts."""
        return id(parameter) in self._matrices

    def begin(self, parameters: Sequence[Tensor]) -> bool:
        """It is always known.

        Raises:
            ValueError: none of the measured parameters counts.
        """
        if not any(self.takes(p) for p in parameters):
            raise ValueError(
                "norm='spectral' finds none of the measured parameters in the optimizer, which steps copies or shards "
                "of them: use norm='euclidean', or an engine that leaves parameters to it"
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
"""The metrics that criteria may name, and how each is made from the run's optimizer."""


def _wide(tensor: Tensor) -> Tensor:
    """Dense and real numbers in float32 at least; complex ones as pairs."""
    dense = tensor.to_dense() if tensor.is_sparse else tensor
    real = torch.view_as_real(dense.resolve_conj()) if dense.is_complex() else dense
    return real if real.dtype is torch.float64 else real.float()
