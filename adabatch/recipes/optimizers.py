"""Optimizers that need more than one of torch's classes, as one class that a config can name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import final

import torch
from torch import Tensor

from adabatch.arguments import checked
from adabatch.runtime.optimizers.joined import JoinedOptimizers


@final
class MuonAndAdamW(JoinedOptimizers):
    """Muon for the hidden matrices, AdamW for the rest: vectors, and the first and the last matrix.

    Muon is for hidden layers, and the first and the last matrix of most models are an embedding or read the input, and
    a head. In models whose parameters are in another order, build two optimizers and give them as a list.

    Args:
        params: all parameters of a model, in its order.
        lr: of AdamW.
        muon_lr: of Muon, whose updates are scaled to the size of AdamW's; by default the same.
        weight_decay: of both.
        momentum: of Muon.

    Raises:
        ValueError: if there is no hidden matrix, or torch has no Muon (before 2.9).

    Source: Jordan et al. 2024 (Muon); Liu et al. 2025, arXiv:2502.16982 (the scale of its updates).
    """

    @checked
    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        lr: float = 1e-3,
        muon_lr: float | None = None,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
    ) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise ValueError(f"torch {torch.__version__} has no Muon: it came with torch 2.9")
        given = [p for p in params if p.requires_grad]
        hidden = [p for p in given if p.ndim == 2][1:-1]
        if not hidden:
            raise ValueError(
                "Muon steps hidden matrices, and the model has none between its first and its last: use AdamW"
            )
        taken = {id(p) for p in hidden}
        super().__init__(
            [
                torch.optim.Muon(
                    hidden,
                    lr=lr if muon_lr is None else muon_lr,
                    weight_decay=weight_decay,
                    momentum=momentum,
                    adjust_lr_fn="match_rms_adamw",
                ),
                torch.optim.AdamW([p for p in given if id(p) not in taken], lr=lr, weight_decay=weight_decay),
            ]
        )
