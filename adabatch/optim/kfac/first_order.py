"""The first-order update of the parameters that K-FAC does not take, by torch's own functions."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

Others = Literal["adamw", "sgd"]

ADAM_BETAS, ADAM_EPS = (0.9, 0.999), 1e-8
"""Kingma and Ba 2015, and torch's defaults."""


def update_others(group: dict[str, Any], state: MutableMapping[Tensor, Any]) -> None:
    """One step of AdamW or SGD on the parameters of a group."""
    params = [p for p in group["params"] if p.grad is not None]
    if not params:
        return
    grads = [p.grad for p in params]
    if group["method"] == "sgd":
        _sgd(params, grads, group, state)
        return
    for p in params:
        if "exp_avg" not in state[p]:
            state[p].update(
                # As torch's own AdamW begins: the count is on the CPU, where reading it needs no sync.
                step=torch.zeros((), dtype=torch.float32),
                exp_avg=torch.zeros_like(p),
                exp_avg_sq=torch.zeros_like(p),
            )
    adamw(
        params,
        grads,
        [state[p]["exp_avg"] for p in params],
        [state[p]["exp_avg_sq"] for p in params],
        [],
        [state[p]["step"] for p in params],
        amsgrad=False,
        beta1=ADAM_BETAS[0],
        beta2=ADAM_BETAS[1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=ADAM_EPS,
        maximize=False,
    )


def _sgd(params: list[Tensor], grads: list[Tensor], group: dict[str, Any], state: MutableMapping[Tensor, Any]) -> None:
    lr = float(group["lr"])
    for p in params:
        p.mul_(1 - lr * group["weight_decay"])  # decoupled, as everywhere in K-FAC; torch's sgd() couples it
    buffers: list[Tensor | None] = [state[p].get("momentum_buffer") for p in params]
    sgd(
        params,
        grads,
        buffers,
        weight_decay=0.0,
        momentum=group["momentum"],
        lr=lr,
        dampening=0.0,
        nesterov=False,
        maximize=False,
    )
    if group["momentum"]:
        for p, buffer in zip(params, buffers, strict=True):
            state[p]["momentum_buffer"] = buffer
