"""What the tests of the runtime share: small data, small networks, and the loop that a person would write by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import TensorDataset

from adabatch import AdaptiveBatch


def regression(num_examples: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> TensorDataset:
    """Noisy regression data with 6 features."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_examples, 6, generator=generator, dtype=torch.float64)
    y = x @ torch.randn(6, 1, generator=generator, dtype=torch.float64).sin()
    y += torch.randn(num_examples, 1, generator=generator, dtype=torch.float64)
    return TensorDataset(x.to(dtype), y.to(dtype))


def network(*, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Two layers, 57 parameters; the same for every caller."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 1)).to(dtype)


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    """Mean squared error."""
    x, y = batch
    return functional.mse_loss(model(x), y)


def train(
    batches: AdaptiveBatch,
    model: nn.Module,
    optimizer: Optimizer,
    loader: Iterable[Any],
    *,
    each: Callable[[Any], None] = lambda step: None,
    schedule: Any = None,
    **options: Any,
) -> None:
    """The loop of the README; ``each`` sees every step after its update."""
    for step in batches.steps(loader, **options):
        for batch in step:
            step.backward(loss_of(model, batch))
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
        each(step)


def train_by_hand(model: nn.Module, optimizer: Optimizer, batches: Iterable[Any], *, accumulation: int) -> None:
    """Plain gradient accumulation, as in PyTorch's own notes; a last step that is not filled is left out."""
    pending: list[Any] = []
    for batch in batches:
        pending.append(batch)
        if len(pending) < accumulation:
            continue
        if isinstance(model, DistributedDataParallel):
            with model.no_sync():
                for part in pending[:-1]:
                    (loss_of(model, part) / accumulation).backward()
        else:
            for part in pending[:-1]:
                (loss_of(model, part) / accumulation).backward()
        (loss_of(model, pending[-1]) / accumulation).backward()
        optimizer.step()
        optimizer.zero_grad()
        pending.clear()


def weights(model: nn.Module) -> Tensor:
    """All parameters in one vector, a copy."""
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def lines(journal: Path) -> list[dict[str, Any]]:
    """The steps in a journal, without the token of its run."""
    return [line for line in all_lines(journal) if "evaluation" not in line]


def all_lines(journal: Path) -> list[dict[str, Any]]:
    """What a journal holds, without the token of its run: steps and evaluations."""
    return [json.loads(text) for text in journal_text(journal).splitlines()]


def journal_text(journal: Path) -> str:
    """A journal, but for the token of its run: equal for equal runs."""
    return re.sub(r',"run":"[0-9a-f]+"', "", journal.read_text())
