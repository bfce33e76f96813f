"""Finds ranks that train on the same examples, from the micro-batches themselves.

A ``DataLoader`` without a ``DistributedSampler`` gives each rank of a job the same examples, and in the same order if
it does not shuffle or the ranks have the same seed. A step of n ranks then holds only 1/n of the examples that it seems
to hold, and the gradients of the ranks do not differ, so that the estimated noise is too small, or 0. Nothing fails.

In the first step of a pass each rank computes a digest of 48 bits of a sample of its micro-batches. Ranks with the same
digest compare all of their data, so that an error cannot come from a coincidence in the sample.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adabatch.runtime.collectives import Collectives

# Numbers of a tensor in the sample: enough to distinguish any two micro-batches, and read in far less time than a
# forward takes. All numbers are read only if the samples of two ranks are equal.
_GLANCE = 4096

_NOTHING = -1.0


def check_different(batches: Sequence[Any], collectives: Collectives) -> None:
    """Raises an error on all ranks at once, if some of them hold the same micro-batches to the bit.

    It takes a reduction of 8 bytes per rank. Some data is not checked: that of a rank whose examples or micro-batches
    are all the same (the constant data of a benchmark, or one batch that is learned by heart), and micro-batches
    without anything that can be compared.

    Args:
        batches: this rank's micro-batches of one step.
        collectives: the data-parallel ranks.

    Raises:
        ValueError: if some ranks hold the same micro-batches.
    """
    if collectives.size == 1:
        return
    # a sample first: reading all of the data is needed only when samples are equal
    for limit in (_GLANCE, None):
        mine = _digest(batches, limit)
        # A sum with one entry per rank instead of a gather, which a grid of groups does not have.
        digests = collectives.sum_of(*(mine * (rank == collectives.rank) for rank in range(collectives.size)))
        holders = Counter(digests)  # not digests.count(), which takes seconds for 10,000 ranks
        alike = [rank for rank, digest in enumerate(digests) if digest != _NOTHING and holders[digest] > 1]
        if not alike:
            return
    raise ValueError(
        f"ranks {', '.join(map(str, alike))} were given the same examples, to the bit: each rank must read a share of "
        f"its own. Give the DataLoader sampler=torch.utils.data.DistributedSampler(dataset), or wrap the data set in "
        f"adabatch.GlobalOrder(dataset), which does it by itself; for a stream see split_dataset_by_node. If the ranks "
        f"are to train on the same examples, say so: steps(..., allow_same_data=True)"
    )


def glance(batch: Any) -> bytes:
    """A digest of a sample of one micro-batch; the same for all that cannot be compared."""
    try:
        return hashlib.sha256(b"".join(_bytes_of(batch, _GLANCE))).digest()
    except Exception:  # of a tensor or class that cannot be read
        return b""


def digest_of_one(batch: Any) -> float | None:
    """A digest of a whole micro-batch; None if it cannot be compared, or its examples are all the same."""
    digest = _digest([batch], None)
    return None if digest == _NOTHING else digest


def _digest(batches: Sequence[Any], limit: int | None) -> float:
    """A digest of 48 bits of the micro-batches, exact in float64; ``_NOTHING`` if they cannot be compared."""
    try:
        return _sum_up(batches, limit)
    except Exception:  # of a tensor or class that cannot be read; the other ranks wait for this rank's digest
        return _NOTHING


def _sum_up(batches: Sequence[Any], limit: int | None) -> float:
    each = [hashlib.sha256(b"".join(_bytes_of(batch, limit))).digest() for batch in batches]
    if not each or (len(each) > 1 and len(set(each)) == 1) or not any(_varies(batch) for batch in batches):
        return _NOTHING
    return float(int.from_bytes(hashlib.sha256(b"".join(each)).digest()[:6]))


def _leaves(entry: Any) -> Iterator[Any]:
    """Tensors, arrays, numbers and text in a micro-batch, including those in objects of custom classes."""
    if isinstance(entry, Tensor | np.ndarray | str | bytes | int | float):
        yield entry
    elif isinstance(entry, Mapping):
        for value in entry.values():
            yield from _leaves(value)
    elif isinstance(entry, Sequence):
        for value in entry:
            yield from _leaves(value)
    elif hasattr(entry, "__dict__") and not isinstance(entry, type):
        for value in vars(entry).values():
            if isinstance(value, Tensor | np.ndarray):
                yield value


def _bytes_of(batch: Any, limit: int | None) -> Iterator[bytes]:
    for leaf in _leaves(batch):
        if isinstance(leaf, Tensor):
            yield repr((leaf.dtype, tuple(leaf.shape) if leaf.layout == torch.strided else None)).encode()
            yield _host(leaf, limit).view(torch.uint8).numpy().tobytes()
        elif isinstance(leaf, np.ndarray):
            yield from _bytes_of(torch.as_tensor(leaf), limit)
        else:
            yield repr(leaf).encode()


def _host(tensor: Tensor, limit: int | None) -> Tensor:
    """Its numbers, or an evenly spaced sample of them, in host memory; shape (n,)."""
    tensor = tensor.detach()
    if tensor.layout != torch.strided:
        tensor = tensor.coalesce().values() if tensor.layout == torch.sparse_coo else tensor.to_dense()
    flat = tensor.reshape(-1)
    return flat[:: _stride(flat.numel(), limit)].contiguous().cpu()  # host sync if the data is on an accelerator


def _stride(count: int, limit: int | None) -> int:
    return 1 if limit is None else max(1, -(-count // limit))


def _varies(batch: Any) -> bool:
    """Whether anything in the sample of a micro-batch differs from example to example."""
    words: set[object] = set()
    for leaf in _leaves(batch):
        if isinstance(leaf, Tensor | np.ndarray):
            rows = torch.as_tensor(leaf).detach()
            if rows.layout != torch.strided or (rows.ndim and rows.size(0) == 1 and rows.numel()):
                return True  # a single example can only be compared with those of other ranks
            if rows.ndim and rows.numel():
                # A few examples are enough to see that they are not all the same.
                some = rows[:64].flatten(1) if rows.ndim > 1 else rows[:64, None]
                if not bool((some == some[:1]).all()):
                    return True
        else:
            words.add(leaf)
    return len(words) > 1
