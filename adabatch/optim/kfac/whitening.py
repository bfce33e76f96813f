"""The square root of a preconditioner, for measuring the noise of the gradient in its metric."""

from __future__ import annotations

import torch
from torch import Tensor

from adabatch.optim.kfac.inversion import FactorBlock
from adabatch.optim.kfac.roots import Root


class Whitening:
    """Square roots of the present inverses, each computed when it is first needed.

    The root of an inverse ``P`` is any factor ``C`` with ``C^T C = P``; all of them give the same norm.
    """

    def __init__(self) -> None:
        self._factors: dict[tuple[int, str], Tensor] = {}

    def of(self, block: FactorBlock, grad: Tensor) -> Tensor:
        """Applies the square root of a block's preconditioner to a gradient of the shape of its parameter."""
        state = block.state
        dtype = state["output_root" if "output_root" in state else "inverse"].dtype
        grad = grad.to(dtype)
        if block.is_bias:
            return self._times(block, "output", grad.unsqueeze(-1)).squeeze(-1)
        matrix = block.layer.kind.matrix(grad)
        if "inverse" in state:
            turned = state["output_basis"].T @ matrix
            turned = turned if state["input_basis"].dim() == 1 else turned @ state["input_basis"]
            return block.layer.kind.shaped(turned * state["inverse"].sqrt(), grad)
        turned = self._times(block, "output", matrix)
        return block.layer.kind.shaped(self._times(block, "input", turned.T).T, grad)

    def _times(self, block: FactorBlock, side: str, grad: Tensor) -> Tensor:
        key = (id(block), side)
        if key not in self._factors:
            self._factors[key] = _factor(Root(block.state[f"{side}_root"], block.state.get(f"{side}_scale")))
        factor = self._factors[key]
        if factor.dim() == 2:
            return factor @ grad
        return factor.unsqueeze(-1) * grad if factor.dim() == 1 else factor * grad


def _factor(root: Root) -> Tensor:
    """A matrix C such that ``C^T C`` is the root; zero if the root is zero."""
    core = root.core
    if root.scale is not None:
        core = root.scale * torch.eye(core.shape[1], dtype=core.dtype, device=core.device) - core.T @ core
    if core.dim() < 2:
        return core.sqrt()
    # The root is L L^T, so C is the transpose of L. cholesky_ex() does not raise, and needs no host sync.
    factor, info = torch.linalg.cholesky_ex(core.double())
    # Only the zero inverse of a layer without curvature is not positive definite.
    return torch.where(info == 0, factor.T, 0.0).to(core.dtype)
