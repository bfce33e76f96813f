"""What ranks hold: digests of weights, and which ranks hold copies of the same ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from adabatch.runtime.collectives import Collectives, digest_of
from adabatch.runtime.data.permutation import mixed
from adabatch.runtime.wrappers.compiled import uncompiled
from adabatch.runtime.wrappers.fsdp2 import own_piece, units_of

_BLOCK = 1 << 18
"""Elements that are hashed at a time: 6 MiB of memory."""

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def fingerprint(tensors: Iterable[Tensor]) -> int:
    """A hash of the bits of this rank's pieces of some tensors: one pass over them, and one host sync.

    For each block, the bits of each element are multiplied by a pseudo-random odd number and summed modulo 2^64. The
    hash is 48 bits of the SHA-256 of these sums, so a difference is missed once in 2^48 times.
    """
    sums: list[Tensor] = []
    # Odd numbers are invertible modulo 2^64, so a change of a single element always changes the sum.
    odd = torch.from_numpy(mixed(np.arange(_BLOCK, dtype=np.uint64)).view(np.int64) | 1)
    for tensor in tensors:
        bits = _bits_of(own_piece(tensor)[0])
        odd = odd.to(bits.device)
        # int64 wraps around, which is arithmetic modulo 2^64
        sums += [(block.to(torch.int64) * odd[: len(block)]).sum() for block in torch.split(bits, _BLOCK)]
    return digest_of(torch.stack([each.to(odd.device) for each in sums]).tolist() if sums else [])  # host sync


def _bits_of(tensor: Tensor) -> Tensor:
    """The elements as integers of the same width, shape (num_elements,)."""
    # Bits, not numbers: 0.0 and -0.0 must differ, and equal NaNs must not.
    values = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return values.detach().contiguous().view(-1).view(_INTEGERS[values.element_size()])


def shard_of(tensors: Iterable[Tensor]) -> int:
    """A number for the piece of each tensor that this rank holds: ranks with the same number hold copies."""
    pieces = []
    for tensor in tensors:
        if isinstance(tensor, DTensor):
            place: list[int] = list(tensor.device_mesh.get_coordinate() or ())
            cut = [not placement.is_replicate() for placement in tensor.placements]
            # Only the place along dimensions that cut: ranks that differ along the others hold copies (HSDP).
            pieces.append(tuple(at for at, is_cut in zip(place, cut, strict=True) if is_cut))
    return digest_of(sorted(set(pieces)))


WHOLE = digest_of([])
"""The shard of a rank none of whose tensors is sharded."""


class HeldDigests(NamedTuple):
    """Digests of what a rank holds.

    Args:
        plan: of whatever else must be equal on all ranks.
        shard: equal on ranks that hold the same pieces of the weights.
        weights: of these pieces.
    """

    plan: int
    shard: int
    weights: int


def held_by_this_rank(model: nn.Module, plan: object) -> HeldDigests:
    """What this rank holds; ``plan`` is compared by its ``repr``."""
    for unit in units_of(model).values():
        unit.reshard()  # after a forward without a backward its root holds whole parameters
    tensors = shared_parameters(model)
    return HeldDigests(digest_of(plan), shard_of(tensors), fingerprint(tensors))


def shared_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of a model, but for those that DDP was told to ignore, because each rank may train its own."""
    inner = uncompiled(model)
    if not isinstance(inner, DistributedDataParallel):
        return list(model.parameters())
    own = set(inner.parameters_to_ignore)
    return [parameter for name, parameter in inner.module.named_parameters() if name not in own]


def gather_held(collectives: Collectives, own: HeldDigests) -> tuple[list[list[float]], list[dict[int, float]]]:
    """What each rank holds, and, for each shard, the weights of the ranks that hold it."""
    rows = collectives.gather_of(*own)
    copies: dict[float, dict[int, float]] = defaultdict(dict)
    for rank, (_, shard, digest) in enumerate(rows):
        copies[shard][rank] = digest
    return rows, list(copies.values())


def odd_ranks(collectives: Collectives, model: nn.Module) -> list[int]:
    """The ranks whose weights differ from those of most ranks with copies of the same weights; of two, the second."""
    _, copies = gather_held(collectives, held_by_this_rank(model, None))
    return sorted(rank for held in copies for group in groups_of(held)[1:] for rank in group)


def groups_of(held: dict[int, float]) -> list[list[int]]:
    """Ranks that hold the same, the most first; of equally many, the first."""
    groups: dict[float, list[int]] = defaultdict(list)
    for rank, digest in held.items():
        groups[digest].append(rank)
    # a stable sort: of two equally large groups, the one with the lowest rank stays first
    return sorted(groups.values(), key=len, reverse=True)
