"""Which rank inverts which layer's statistics, and how gradients and roots are sent: K-FAC and Shampoo on DDP and
FSDP2.

Inverses and roots cost the cube of a layer's sides, so each is computed by one rank, its owner. The layers (for
Shampoo, the parameters, or stacks of their blocks) are distributed so that the costs of the ranks are as equal as
possible.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypedDict, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from adabatch.arguments import checked
from adabatch.runtime.collectives import Collectives, collectives_of
from adabatch.runtime.wrappers.fsdp2 import is_sharded

Name = TypeVar("Name", str, int)


class AcrossRanks(TypedDict):
    """The arguments of a second-order optimizer that concern ranks."""

    reduce: Callable[[Tensor], Tensor] | None
    owner: ReplicatedMatrices | ShardedMatrices | None


@checked
def across_ranks(model: nn.Module) -> AcrossRanks:
    """The arguments with which a second-order optimizer runs on a model's ranks.

    ``KFAC(params, model, **across_ranks(model))``, or ``Shampoo(params, **across_ranks(model))``. Under DDP the owner's
    inverses or roots are sent to all ranks when they are computed. Under FSDP2 the gradient of a matrix is gathered at
    its owner, and its direction scattered from there, in every step.

    Args:
        model: plain on one process, in ``DistributedDataParallel``, or sharded by ``fully_shard``.

    Raises:
        ValueError: if a DeepSpeed engine partitions gradients or optimizer state into flat pieces (ZeRO 1 to 3), or if
            a plain model runs on several processes.
    """
    # Asked by its method and not by its class, since DeepSpeed may not be installed.
    stage = getattr(model, "zero_optimization_stage", None)
    if callable(stage) and stage() > 0:
        raise ValueError(
            f"ZeRO {stage()} cuts gradients or optimizer state into flat pieces, in which no layer's matrix is left "
            f"for a second-order optimizer: use DistributedDataParallel or fully_shard (FSDP2)"
        )
    collectives = collectives_of(model)
    if collectives.size == 1:
        return {"reduce": None, "owner": None}
    kind = ShardedMatrices if is_sharded(model) else ReplicatedMatrices
    return {"reduce": collectives.sum, "owner": kind(collectives)}


def dealt_out(costs: Mapping[Name, float], num_ranks: int) -> dict[Name, int]:
    """A rank for each name: in order of falling cost, each goes to the rank with the lowest cost so far."""
    # Costs differ by orders of magnitude: layers that were dealt out in turn could leave most of the work to one rank.
    loads = [0.0] * num_ranks
    owners = {}
    # By name among equals, so that all ranks compute the same assignment.
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        rank = loads.index(min(loads))
        owners[name], loads[rank] = rank, loads[rank] + costs[name]
    return owners


class _Owners:
    """Ranks by the names of layers."""

    def __init__(self, collectives: Collectives) -> None:
        self._collectives = collectives
        self._owners: dict[str, int] = {}

    @property
    def rank(self) -> int:
        """Among those that see different data."""
        return self._collectives.rank

    def deal(self, costs: Mapping[str, float]) -> None:
        """Gives each layer an owner."""
        self._owners = dealt_out(costs, self._collectives.size)

    def owns(self, layer: str) -> bool:
        """Whether this rank is the owner."""
        return self._owners[layer] == self._collectives.rank

    def share(self, layer: str, roots: Sequence[Tensor]) -> None:
        """One broadcast of all roots of the layer."""
        # One broadcast instead of several: most roots are small, and each broadcast costs a latency.
        # On the other ranks the numbers in it are overwritten; a broadcast needs a buffer everywhere.
        flat = torch.cat([root.reshape(-1) for root in roots])
        self._collectives.copy_from(self._owners[layer], flat)
        for root, values in zip(roots, torch.split(flat, [root.numel() for root in roots]), strict=True):
            root.copy_(values.view(root.shape))


class ReplicatedMatrices(_Owners):
    """Every rank holds the whole gradient (DDP), and preconditions it with the owner's inverses."""

    @property
    def owners_per_layer(self) -> int:
        """All ranks."""
        return self._collectives.size

    def catch_up(self, layer: str, statistics: Sequence[Tensor]) -> None:
        """Nothing to do: every rank has seen the same gradients."""

    def gather(self, layer: str, grad: Tensor) -> Tensor:
        """The gradient itself."""
        return grad

    def scatter(self, layer: str, direction: Tensor | None, grad: Tensor) -> Tensor:
        """The direction itself."""
        assert direction is not None
        return direction


class ShardedMatrices(_Owners):
    """Each rank holds rows of the gradient (FSDP2); the owner preconditions the whole."""

    @property
    def owners_per_layer(self) -> int:
        """One, at which the gradient is gathered."""
        return 1

    def catch_up(self, layer: str, statistics: Sequence[Tensor]) -> None:
        """One broadcast from the owner, which alone has seen whole gradients."""
        self.share(layer, statistics)

    def gather(self, layer: str, grad: Tensor) -> Tensor | None:
        """All rows at the owner. On a mesh of two dimensions (HSDP), on every rank."""
        if not isinstance(grad, DTensor):
            return grad
        if not _in_rows(grad):
            return grad.full_tensor()
        # Gathered at one rank, where full_tensor() would send the whole gradient to all of them.
        rows = self._collectives.gather_at(self._owners[layer], _padded(grad, self._collectives.size))
        return None if rows is None else rows.flatten(0, 1)[: grad.shape[0]]

    def scatter(self, layer: str, direction: Tensor | None, grad: Tensor) -> Tensor:
        """This rank's rows of the owner's direction."""
        if not isinstance(grad, DTensor):
            assert direction is not None
            return direction
        mesh, placements = grad.device_mesh, grad.placements
        if not _in_rows(grad):
            assert direction is not None
            # no check: it would be a collective, and every rank has computed the direction from the same gradient
            everywhere = DTensor.from_local(direction, mesh, [Replicate()] * mesh.ndim, run_check=False)
            return everywhere.redistribute(mesh, placements)
        size = self._collectives.size
        rows = None
        if direction is not None:
            # torch cuts rows as chunk() does, so the last ranks may hold fewer rows or none. A scatter needs equal
            # pieces.
            padded = direction.new_zeros(size * _rows_per_rank(grad, size), *direction.shape[1:])
            padded[: len(direction)] = direction
            rows = padded.view(size, -1, *direction.shape[1:])
        piece = self._collectives.scatter_from(self._owners[layer], rows, _padded(grad, size))
        local = piece[: len(grad.to_local())]
        # Shape and stride are given, because from_local() assumes that all ranks hold equally much.
        return DTensor.from_local(local, mesh, placements, run_check=False, shape=grad.shape, stride=grad.stride())


def _in_rows(grad: DTensor) -> bool:
    return grad.device_mesh.ndim == 1 and grad.placements == (Shard(0),)


def _rows_per_rank(grad: DTensor, size: int) -> int:
    return -(-grad.shape[0] // size)


def _padded(grad: DTensor, size: int) -> Tensor:
    """This rank's rows, with zeros below them if the last ranks hold fewer."""
    local = grad.to_local()
    padded = local.new_zeros(_rows_per_rank(grad, size), *local.shape[1:])
    padded[: len(local)] = local
    return padded
