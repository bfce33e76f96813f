"""The training that is checked, and the result of a check."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from adabatch.arguments import check_fields, require
from adabatch.runtime.data import GlobalOrder, num_examples_in
from adabatch.runtime.probes.protocol import Probe


@dataclass(frozen=True, kw_only=True)
class Training:
    """The parts of a run, without ``AdaptiveBatch``.

    Args:
        model: as it is trained: plain, in ``DistributedDataParallel`` or sharded by ``fully_shard``.
        optimizer: over its parameters.
        loader: a ``GlobalOrder``, or any iterable of micro-batches that can be iterated several times.
        loss: (model, micro-batch) -> mean loss over its examples, shape (), not scaled. Use autocast inside it.
        micro_batch_size: examples in one forward and backward on one rank.
        probe: to be checked; by default the one that suits the model.
        count: examples in a micro-batch.
        weigh: weight of a micro-batch in the gradient, if not its number of examples; see ``AdaptiveBatch.steps``.
        scaler: of a run in float16. The second step of a check is then made to overflow, on the last rank only.
    """

    model: nn.Module
    optimizer: Optimizer
    loader: GlobalOrder | Iterable[Any]
    loss: Callable[[nn.Module, Any], Tensor]
    micro_batch_size: int
    probe: Probe | None = None
    count: Callable[[Any], int] = num_examples_in
    weigh: Callable[[Any], float] | None = None
    scaler: GradScaler | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.micro_batch_size >= 1, "micro_batch_size must be at least 1", self.micro_batch_size)

    @property
    def scales(self) -> bool:
        """Whether losses are scaled, so that updates may be left out."""
        return self.scaler is not None and self.scaler.is_enabled()

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return next(self.model.parameters()).device


Make = Callable[[], Training]
"""Builds a new training: new model, optimizer and scaler, the same weights, the same data from its beginning."""


class Check(NamedTuple):
    """The result of a check; the same on all ranks.

    Args:
        name: of the check.
        passed: whether the measured number is allowed.
        measured: the number that decides; its meaning is in the explanation.
        allowed: the largest number that passes; None if it is only reported.
        explanation: a sentence.
    """

    name: str
    passed: bool
    measured: float
    allowed: float | None
    explanation: str
