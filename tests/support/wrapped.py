"""What the tests of probes on several ranks share: ways to wrap a model, and gradients part by part.

Every rank knows the data of all ranks, so each can compute all parts on a plain copy of the model: slow and obvious.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from adabatch.batch.moments import GradientMoments, from_parts
from adabatch.runtime.engines.choice import engine_for
from adabatch.runtime.engines.engine import GradientSync
from adabatch.runtime.probes.protocol import Probe
from support.hard_models import Case, Unused

EXACT = 1e-5
"""Relative tolerance of float32 sums."""


def plain(model: nn.Module, case: Case) -> nn.Module:
    """As it is."""
    return model


def ddp(model: nn.Module, case: Case) -> DistributedDataParallel:
    """In ``DistributedDataParallel``."""
    return DistributedDataParallel(model, find_unused_parameters=case.make is Unused)


def fsdp(model: nn.Module, case: Case, **options: Any) -> nn.Module:
    """Sharded by ``fully_shard``: the parts first, then the rest."""
    for name in case.units:
        fully_shard(model.get_submodule(name), **options)
    return fully_shard(model, **options)


def hsdp(model: nn.Module, case: Case, *, shape: tuple[int, int]) -> nn.Module:
    """Replicated over the first dimension of a mesh and sharded over the second."""
    return fsdp(model, case, mesh=init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")))


def made(case: Case, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model of a case, with the same weights on every call."""
    torch.manual_seed(1)
    return case.make().to(dtype)


def losses_of(case: Case, sizes: Sequence[int], rank: int, dtype: torch.dtype) -> list[Callable[..., Tensor]]:
    """The losses of a rank's micro-batches, each with data of its own, as functions of the model: of each example,
    shape (num_examples,), or their mean, shape (1,)."""

    def drawn(seed: int, size: int, model: nn.Module, *, mean: bool = True) -> Tensor:
        torch.manual_seed(seed)
        losses = case.losses(model, case.draw(size, dtype))
        return losses.mean().view(1) if mean else losses

    return [partial(drawn, 100 * rank + index, size) for index, size in enumerate(sizes)]


def measured(
    model: nn.Module,
    probe: Probe,
    case: Case,
    sizes: Sequence[int],
    *,
    sync: GradientSync | None = None,
    dtype: torch.dtype = torch.float32,
    keep: bool = False,
) -> GradientMoments:
    """The probe's moments of one step, by the calls that a step makes; ``keep`` leaves the gradient."""
    engine = engine_for(model, sync)
    probe.start(engine.collectives.size)
    losses = losses_of(case, sizes, engine.collectives.rank, dtype)

    def backward(index: int) -> None:
        weight = sizes[index] / sum(sizes)
        share = losses[index](model).mean() * weight
        probe.begin_part()
        share.backward()  # type: ignore[no-untyped-call]
        probe.end_part(sizes[index], weight)

    for index in range(len(sizes) - 1):
        with engine.no_sync():
            backward(index)
    backward(len(sizes) - 1)
    totals = engine.collectives.sum(probe.collect()).tolist()
    moments = probe.moments(totals)
    # The same once another step is under way, where `Measure(late=True)` reads them.
    probe.start(engine.collectives.size)
    assert repr(probe.moments(totals)) == repr(moments)
    probe.stop()
    if not keep:
        model.zero_grad()
    return moments


class Parts(NamedTuple):
    """The gradients of a step's parts, each computed on its own on a plain model; float64.

    Args:
        grads: shape (num_parts, d).
        counts: examples in each.
        weights: of each in the step's gradient, shape (num_parts,).
        where: the coordinates of each parameter.
        model: the plain model.
    """

    grads: Tensor
    counts: list[int]
    weights: Tensor
    where: dict[Tensor, Tensor]
    model: nn.Module

    @property
    def mean(self) -> Tensor:
        """The step's gradient, shape (d,)."""
        return (self.weights[:, None] * self.grads).sum(0)

    @property
    def squares(self) -> Tensor:
        """``S_c``, shape (d,)."""
        return (self.weights[:, None] * self.grads.square()).sum(0)

    def moments(self, columns: Tensor | None = None, image: Tensor | None = None) -> GradientMoments:
        """Of some coordinates, in the norm of the gradients multiplied by ``image``, shape (d,)."""
        every = torch.arange(self.grads.shape[1]) if columns is None else columns
        times = torch.ones(self.grads.shape[1]) if image is None else image
        seen, mean = (self.grads * times)[:, every], (self.mean * times)[every]
        squares, grad_sq = seen.square().sum(1).numpy(), float(mean.square().sum())
        return from_parts(squares, self.counts, grad_sq, weights=self.weights.numpy())

    def layers(self) -> dict[str, Tensor]:
        """The coordinates of each module's own parameters; tied ones belong to the first."""
        left, found = dict(self.where), {}
        for name, module in self.model.named_modules():
            own = [left.pop(p) for p in module.parameters(recurse=False) if p in left]
            if own:
                found[name] = torch.cat(own)
        return found


def parts_of(
    case: Case,
    sizes: Sequence[int],
    ranks: int,
    *,
    joined: bool = False,
    examples: bool = False,
    dtype: torch.dtype = torch.float32,
    model: nn.Module | None = None,
) -> Parts:
    """The parts of a step.

    Args:
        case: model and loss.
        sizes: examples in the micro-batches of each rank.
        ranks: how many.
        joined: the micro-batches of a rank are one part.
        examples: each example is one.
        dtype: of model and data.
        model: with other weights than the case has at first.
    """
    model = made(case, dtype) if model is None else model
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for rank in range(ranks):
        losses = [loss for each in losses_of(case, sizes, rank, dtype) for loss in each(model, mean=not examples)]
        for loss in losses:
            grads = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
            pairs = zip(grads, parameters, strict=True)
            rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).double().flatten() for g, p in pairs]))
    shares = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
    parts = torch.stack(rows).view(ranks, -1, len(rows[0]))
    counts, weights = list(sizes) * ranks, (shares / ranks).repeat(ranks)
    if joined:
        parts = (parts * shares[None, :, None]).sum(1, keepdim=True)
        counts, weights = [sum(sizes)] * ranks, torch.full((ranks,), 1 / ranks, dtype=torch.float64)
    if examples:
        counts, weights = [1] * len(rows), torch.full((len(rows),), 1 / len(rows), dtype=torch.float64)
    flat = parts.flatten(0, 1)
    where = dict(zip(parameters, torch.arange(flat.shape[1]).split([p.numel() for p in parameters]), strict=True))
    return Parts(flat, counts, weights, where, model)


def part_by_part(case: Case, sizes: Sequence[int], ranks: int, **options: Any) -> GradientMoments:
    """The oracle: the moments of ``parts_of``, with those of the layers and the l1 norm."""
    parts = parts_of(case, sizes, ranks, **options)
    layers = {name: parts.moments(columns) for name, columns in parts.layers().items()}
    return parts.moments()._replace(grad_l1=float(parts.mean.abs().sum()), layers=layers)


def check(found: GradientMoments, oracle: GradientMoments, tolerance: float = EXACT) -> None:
    """That moments agree, to a relative tolerance; those of layers too, where they were measured."""
    if found.layers is not None:
        assert oracle.layers is not None
        assert found.layers.keys() == oracle.layers.keys()
        for name, layer in found.layers.items():
            check(layer, oracle.layers[name], tolerance)
    assert found.num_parts == oracle.num_parts
    for name in ("part_size", "num_examples"):
        assert getattr(found, name) == pytest.approx(getattr(oracle, name), rel=1e-12), name
    for name in ("part_sq", "grad_sq", "grad_l1", "grad_l2", "noise_at_quantile"):
        if getattr(found, name) is not None:
            assert getattr(found, name) == pytest.approx(getattr(oracle, name), rel=tolerance), name
    if oracle.num_parts > 1:
        # Noise and signal are differences of the two norms, so their error is relative to those.
        scale = oracle.part_sq * oracle.num_examples
        assert found.noise == pytest.approx(oracle.noise, rel=tolerance, abs=tolerance * scale)
        assert found.signal == pytest.approx(oracle.signal, rel=tolerance, abs=tolerance * oracle.part_sq)
