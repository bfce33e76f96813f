"""FSDP2 (``torch.distributed.fsdp.fully_shard``): its units, and how parameters are sharded."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def is_sharded(model: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied to the model or to any part of it."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def class_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module before ``fully_shard``, which replaces it by a subclass."""
    # fully_shard() makes a class FSDPLinear(FSDPModule, Linear) on the fly, so the original is the second base.
    kind = type(module)
    return kind.__bases__[1] if kind.__bases__[0] is FSDPModule else kind


def units_of(model: nn.Module) -> dict[str, FSDPModule]:
    """The modules to which ``fully_shard`` was applied, by their names in the model ("" is the model itself)."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FSDPModule)}


def reduces(unit: FSDPModule) -> bool:
    """Whether the next backward through a unit reduces its gradients (``set_requires_gradient_sync``).

    FSDP2 has no public way to read this; if a release keeps the switch elsewhere, it is assumed to be on.
    """
    state = unit._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)  # torch 2.13; one group in releases before
    if groups is None:
        groups = [group for group in [getattr(state, "_fsdp_param_group", None)] if group is not None]
    return all(getattr(group, "reduce_grads", True) for group in groups)


def data_parallel_mesh(model: nn.Module) -> DeviceMesh:
    """The mesh over which a sharded model's gradients are reduced: each of its ranks sees different data.

    The model is resharded first: after a forward without a backward its root still holds whole parameters.

    Raises:
        ValueError: if a trainable parameter is not sharded, parameters are on several meshes, or other kinds of
            parallelism share the mesh.
    """
    for unit in units_of(model).values():
        unit.reshard()
    found: DeviceMesh | None = None
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if not isinstance(parameter, DTensor):
            raise ValueError(
                f"the parameter {name} is not sharded, while others of the {type(model).__name__} are, so its gradient "
                f"is not reduced: apply fully_shard to the whole model too, after its parts, without ignored_params"
            )
        # With two dimensions (HSDP), FSDP2 replicates over the outer one and shards over the inner one.
        *outer, inner = parameter.placements
        if not (all(placement.is_replicate() for placement in outer) and (inner.is_shard() or inner.is_replicate())):
            raise ValueError(
                f"the parameter {name} is placed as {parameter.placements} on {parameter.device_mesh}: only data "
                f"parallelism is supported (a mesh of one dimension, or of two for HSDP), without tensor or expert "
                f"parallelism"
            )
        if found is not None and parameter.device_mesh != found:
            raise ValueError(
                f"the parameter {name} is sharded over {parameter.device_mesh}, others over {found}: give all calls of "
                f"fully_shard the same mesh"
            )
        found = parameter.device_mesh
    if found is None:
        raise ValueError(f"{type(model).__name__} has no parameter that requires a gradient: nothing can train")
    return found


@torch.no_grad()
def own_piece(tensor: Tensor) -> tuple[Tensor, int]:
    """This rank's piece of a tensor, and how many ranks of its mesh hold the same; a plain tensor itself, and 1."""
    if not isinstance(tensor, DTensor):
        return tensor, 1
    # Needed because a sum over all ranks counts such a piece `holders` times.
    holders = 1
    for dimension, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            holders *= tensor.device_mesh.size(dimension)
    return tensor.to_local(), holders


def own_values(grad: Tensor) -> Tensor:
    """The numbers in this rank's piece of a gradient, which may be none; of a sparse one those that it holds."""
    piece, _ = own_piece(grad)
    return piece.coalesce().values() if piece.is_sparse else piece


def shards_in(mesh: DeviceMesh, parameters: list[Tensor]) -> int:
    """The number of pieces into which the parameters are sharded."""
    cut = any(isinstance(p, DTensor) and p.placements[-1].is_shard() for p in parameters)
    return mesh.size(mesh.ndim - 1) if cut else 1


def padded_length(parameter: Tensor, num_shards: int) -> int:
    """Elements of a parameter's gradient per rank, including the zeros that make all shares equal."""
    if isinstance(parameter, DTensor):
        placement = parameter.placements[-1]
        if placement.is_shard(0):
            # FSDP2 pads dimension 0 so that all ranks reduce-scatter equal pieces; other dimensions must be divisible
            # anyhow.
            return -(-parameter.shape[0] // num_shards) * math.prod(parameter.shape[1:])
    return parameter.numel() // num_shards
