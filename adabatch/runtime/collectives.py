"""The few collectives that adabatch needs, in one place."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from adabatch.runtime.wrappers.compiled import uncompiled
from adabatch.runtime.wrappers.fsdp2 import data_parallel_mesh, is_sharded

_LOST = ("gloo", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
"""Parts of the messages of collectives whose peer has ended; these are plain RuntimeErrors."""


def is_connection_lost(error: BaseException) -> bool:
    """Whether an error of a collective is caused by the end of another rank."""
    said = str(error)
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(words in said for words in _LOST)
    )


@contextmanager
def explained() -> Iterator[None]:
    """Adds a note to the error of a collective whose peer has ended, which says what to look for."""
    try:
        yield
    except RuntimeError as error:
        if is_connection_lost(error) and not getattr(error, "__notes__", None):
            error.add_note(
                "Another rank has died or raised an error, which its own output tells, or waits elsewhere. Around the "
                "loop over the steps, `with adabatch.Watchdog(batches):` names that rank, where it was, and its error"
            )
        raise


class Started(NamedTuple):
    """A collective that goes on in the background."""

    values: Tensor
    work: dist.Work | None

    def wait(self) -> Tensor:
        """Its result; the host waits for it, or on an accelerator the stream."""
        if self.work is not None:
            with explained():
                self.work.wait()
        return self.values


Reducer = Callable[[Tensor, Any], Tensor]
"""Reduces a tensor over the ranks that are there, in place, by a ``dist.ReduceOp``; returns it."""


class Collectives:
    """Reductions over the ranks that see different data.

    Attributes:
        rank, size: this rank's number, and how many there are.
        fixed: whether both stay the same during the run.

    Args:
        groups: their process group; empty for a single process. If no single group spans the grid of ranks (HSDP beside
            pipeline stages), one group per dimension, the outermost first; reductions then run over one after the
            other.
        device: where the groups' backend expects its tensors.
        reducer: of a host whose ranks come and go, in the place of groups. Until the host says otherwise by
            ``stand_at``, this rank is alone. Only reductions go over such ranks.
    """

    def __init__(
        self, *groups: dist.ProcessGroup, device: torch.device | None = None, reducer: Reducer | None = None
    ) -> None:
        self._device = device or torch.device("cpu")
        self._groups = groups
        self._reducer = reducer
        self.fixed = reducer is None
        self.rank, self.size = 0, 1
        for group in groups:
            size = dist.get_world_size(group)
            # As in a mesh, the innermost group's rank changes fastest, so that every rank of the grid has its own
            # number.
            self.rank, self.size = self.rank * size + dist.get_rank(group), self.size * size

    def stand_at(self, rank: int, size: int) -> None:
        """Sets the rank and the number of ranks, for ranks that come and go."""
        assert not self.fixed, "the ranks of process groups do not change"
        self.rank, self.size = rank, size

    @property
    def device(self) -> torch.device:
        """The device of tensors that are reduced."""
        return self._device

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the ranks, with the same bits on each; ``values`` is not changed."""
        # A single process gets the same tensor back, without a copy: callers read the sum, and do not write into it.
        return values if self.size == 1 else self._reduced(values.clone(), dist.ReduceOp.SUM)

    def sum_in_place(self, values: Tensor) -> Tensor:
        """Sum over the ranks into ``values`` itself, for tensors too large to be held twice."""
        return values if self.size == 1 else self._reduced(values, dist.ReduceOp.SUM)

    def sum_of(self, *numbers: float) -> list[float]:
        """Sums over the ranks of a few host numbers."""
        if self.size == 1:
            return [float(number) for number in numbers]
        local = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        return [float(number) for number in self.sum(local).tolist()]  # host sync

    def minimum_of(self, *numbers: float) -> list[float]:
        """The minimum over the ranks of each of a few host numbers."""
        if self.size == 1:
            return [float(number) for number in numbers]
        # There is no maximum_of(): the minimum of the negated number gives it, in the same reduction as other minima.
        local = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        return [float(number) for number in self._reduced(local, dist.ReduceOp.MIN).tolist()]  # host sync

    def gather_of(self, *numbers: float) -> list[list[float]]:
        """A few host numbers of every rank, by rank."""
        # A sum with zeros for the other ranks, not a gather: only reductions work over a grid of groups.
        rows = torch.zeros(self.size, len(numbers), dtype=torch.float64, device=self._device)
        rows[self.rank] = torch.tensor(numbers, dtype=torch.float64)
        found: list[list[float]] = self.sum(rows).tolist()  # host sync
        return found

    def gather(self, row: Tensor) -> Tensor:
        """The rows of all ranks, shape (size, n), from one row per rank, shape (n,)."""
        return self.start_gather(row).wait()

    def reduce_scatter(self, values: Tensor) -> Tensor:
        """Sum over the ranks of ``values``, shape (size * n,), of which this rank gets its piece, shape (n,)."""
        if self.size == 1:
            return values
        output = values.new_empty(values.numel() // self.size)
        _reduce_scatter(output, values, op=dist.ReduceOp.SUM, group=self._one_group())
        return output

    # --- in the background, over one group ---------------------------------------------------------------------------

    def start_sum(self, values: Tensor) -> Started:
        """Sum over the ranks into ``values`` itself."""
        if self.size == 1:
            return Started(values, None)
        if len(self._groups) != 1:  # the sum over one group is what the next one sums
            return Started(self._reduced(values, dist.ReduceOp.SUM), None)
        return Started(values, dist.all_reduce(values, group=self._one_group(), async_op=True))

    def start_gather(self, row: Tensor) -> Started:
        """The rows of all ranks, shape (size, n), from one row per rank, shape (n,)."""
        rows = torch.empty(self.size, row.numel(), dtype=row.dtype, device=row.device)
        if self.size == 1:
            return Started(rows.copy_(row.view(1, -1)), None)
        return Started(rows, _all_gather(rows.view(-1), row.contiguous(), group=self._one_group(), async_op=True))

    def start_exchange(self, rows: Tensor) -> Started:
        """Sends row r of ``rows``, shape (size, n), to rank r; the rows for this rank, by sender."""
        if self.size == 1:
            return Started(rows, None)
        received = torch.empty_like(rows, memory_format=torch.contiguous_format)
        sent = rows.contiguous()
        return Started(received, dist.all_to_all_single(received, sent, group=self._one_group(), async_op=True))

    def beside(self) -> Collectives:
        """The same ranks over connections of their own, so that what goes on there delays nothing here.

        Call it on all of them. Only gloo has such connections: two communicators of NCCL that work at the same time may
        wait for each other for ever, so with other backends these are the same.
        """
        if self.size == 1 or dist.get_backend(self._one_group()) != "gloo":
            return self
        group = self._one_group()
        again = dist.new_group(
            dist.get_process_group_ranks(group),
            backend="gloo",
            # torch would take half an hour, whatever this group has
            timeout=group._get_backend(torch.device("cpu")).options._timeout,
            use_local_synchronization=True,
        )
        return Collectives(again, device=self._device)

    def copy_from(self, rank: int, values: Tensor) -> None:
        """Overwrites ``values`` by those of one rank."""
        if self.size > 1:
            # Backends send contiguous memory only. For other tensors this is a copy, and what arrived in it is written
            # back.
            sent = values.contiguous()
            dist.broadcast(sent, group=self._one_group(), group_src=rank)
            values.copy_(sent)

    def copy_from_first(self, values: Tensor) -> None:
        """Overwrites ``values`` by those of rank 0."""
        self.copy_from(0, values)

    def gather_at(self, rank: int, values: Tensor) -> Tensor | None:
        """The ``values`` of all ranks, stacked in their order, on one rank; None on the others."""
        if self.size == 1:
            return values.unsqueeze(0)
        rows = values.new_empty(self.size, *values.shape) if self.rank == rank else None
        # torch wants a list of one tensor per rank; as rows of one tensor they are stacked already.
        pieces = None if rows is None else list(rows)
        dist.gather(values.contiguous(), pieces, group=self._one_group(), group_dst=rank)
        return rows

    def scatter_from(self, rank: int, values: Tensor | None, like: Tensor) -> Tensor:
        """This rank's row of the ``values``, shape (size, ...), of one rank; ``like`` has the shape of a row."""
        if self.size == 1:
            assert values is not None
            return values[0]
        piece = torch.empty_like(like)
        # torch wants a list of one tensor per rank; as rows of a contiguous tensor they need no copies.
        rows = None if values is None else list(values.contiguous())
        dist.scatter(piece, rows, group=self._one_group(), group_src=rank)
        return piece

    def over(self, inner: Collectives) -> Collectives:
        """All ranks of a grid with these ranks as its outer dimension, and those of ``inner`` as its inner one."""
        return Collectives(*self._groups, *inner._groups, device=self._device)

    @property
    def members(self) -> frozenset[int]:
        """The ranks' numbers in the whole job; empty without process groups."""
        return frozenset(rank for group in self._groups for rank in dist.get_process_group_ranks(group))

    def _one_group(self) -> dist.ProcessGroup:
        assert len(self._groups) == 1, "only reductions go over a grid of groups"
        return self._groups[0]

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """The bytes of every rank, by rank; their lengths may differ."""
        # The lengths first, since all ranks must reduce tensors of the same shape.
        sizes = [int(size) for (size,) in self.gather_of(len(data))]
        rows = torch.zeros(self.size, max(sizes), dtype=torch.uint8)
        if data:
            rows[self.rank, : len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        # padded rows in one sum, for the same reason as in gather_of
        gathered = self.sum(rows.to(self._device)).cpu().numpy()  # host sync
        return [row[:size].tobytes() for row, size in zip(gathered, sizes, strict=True)]

    def first_message(self, own: str | None) -> tuple[int, str]:
        """The first rank that has a message, and the message. At least one has one; all ranks must call this."""
        told = self.gather_bytes((own or "").encode())
        rank = next(rank for rank, each in enumerate(told) if each)
        return rank, told[rank].decode()

    def agree(self, value: object) -> bool:
        """Whether ``repr(value)`` is the same on all ranks; every rank gets the same answer. Costs 16 bytes."""
        # Minimum and maximum, not a sum: of ranks that hold 0, 1 and 2, rank 1 would see the sum that it expects.
        digest = float(digest_of(value))
        least, minus_largest = self.minimum_of(digest, -digest)
        return least == -minus_largest

    def _reduced(self, values: Tensor, op: Any) -> Tensor:
        if self._reducer is not None:
            return self._reducer(values, op)
        with explained():
            # the innermost group first: its links are the fastest, and every rank takes the same order
            for group in reversed(self._groups):
                dist.all_reduce(values, op=op, group=group)
        return values


def digest_of(value: object) -> int:
    """A digest of ``repr(value)`` of 48 bits, which a float64 holds exactly."""
    return int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:6])


class HostGroup:
    """A second group of all ranks, over gloo, for exchanges in another thread beside the training.

    Args:
        collectives: the data-parallel ranks, which must be all ranks of the job.

    Raises:
        ValueError: if some ranks of the job are not among them.
    """

    def __init__(self, collectives: Collectives) -> None:
        if collectives.size != dist.get_world_size():
            raise ValueError(
                f"{dist.get_world_size()} processes are running, and the model is sharded over {collectives.size} of "
                f"them: sharded checkpoints need a model that is sharded over all"
            )
        # Every rank must issue the collectives of a group in the same order, which two threads of a process cannot
        # promise: hence a second group. new_group() is itself a collective of the whole job.
        self.group: dist.ProcessGroup = dist.new_group(backend="gloo")
        self._size = collectives.size

    def gathered(self, value: Any) -> list[Any]:
        """The picklable values of all ranks, by rank."""
        values = [None] * self._size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def close(self) -> None:
        """Ends the group."""
        dist.destroy_process_group(self.group)


def mean_future(values: Tensor, group: dist.ProcessGroup) -> Future[Tensor]:
    """Mean over the ranks of ``group``, in place and in the background, as DDP reduces a bucket."""
    # Multiplied by the inverse of the size before the sum, as DDP does: a division would round differently.
    work = dist.all_reduce(values.mul_(1 / dist.get_world_size(group)), group=group, async_op=True)
    # The future of a collective holds a list of tensors; DDP expects that of a hook to hold the bucket.
    reduced: Future[Tensor] = work.get_future().then(lambda future: future.value()[0])
    return reduced


def reduce_scatter(output: Tensor, values: Tensor, *, op: Any, group: dist.ProcessGroup, async_op: bool = False) -> Any:
    """Reduction of ``values``, shape (ranks * n,), of which each rank gets its piece in ``output``, shape (n,)."""
    return _reduce_scatter(output, values, op=op, group=group, async_op=async_op)


# torch 2.13 introduced these names, and warns about the old ones.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def collectives_of(model: torch.nn.Module) -> Collectives:
    """The data-parallel ranks of a model, from its wrapper.

    Raises:
        ValueError: if several processes run but the model has no wrapper that reduces its gradients, or if some
            parameters of a sharded model are sharded differently.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    inner = uncompiled(model)
    if isinstance(inner, DistributedDataParallel):
        return Collectives(inner.process_group, device=device)
    if is_sharded(model):
        # The ranks of its mesh, not all of the job: beside pipeline stages the job has more ranks than see different
        # data.
        mesh = data_parallel_mesh(model)
        return Collectives(*_groups_of(mesh), device=torch.device(mesh.device_type))
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise ValueError(
            f"{dist.get_world_size()} processes are running, but the model is a plain {type(model).__name__} whose "
            f"gradients are not reduced: wrap it in torch.nn.parallel.DistributedDataParallel, or apply "
            f"torch.distributed.fsdp.fully_shard to it, before AdaptiveBatch; or let workers step on their own, with "
            f"local_sgd=LocalSGD(...)"
        )
    return Collectives(device=device)


def workers_of(place: dist.ProcessGroup | DeviceMesh | None, *, device: torch.device) -> Collectives:
    """The ranks of a process group or of a mesh of one dimension; all ranks if neither is given.

    Raises:
        ValueError: if the mesh has several dimensions.
    """
    if isinstance(place, DeviceMesh):
        if place.ndim != 1:
            raise ValueError(
                f"workers must be a mesh of one dimension, got {place}: give the one over which workers average, such "
                f'as mesh["node"]'
            )
        return Collectives(place.get_group(), device=torch.device(place.device_type))
    if place is not None:
        return Collectives(place, device=device)
    if dist.is_available() and dist.is_initialized():
        return Collectives(*([dist.group.WORLD] if dist.group.WORLD else []), device=device)
    return Collectives(device=device)


def shards_and_replicas(mesh: DeviceMesh, num_shards: int) -> tuple[Collectives, Collectives]:
    """The ranks of a data-parallel mesh over which parameters are sharded, and those that hold the same shards."""
    groups = [mesh.get_group(dimension) for dimension in range(mesh.ndim)]
    # fully_shard shards over the last dimension of a mesh, and replicates over the one before it (HSDP).
    shards = groups[-1:] if num_shards > 1 else []
    device = torch.device(mesh.device_type)
    return Collectives(*shards, device=device), Collectives(*groups[: len(groups) - len(shards)], device=device)


def _groups_of(mesh: DeviceMesh) -> tuple[dist.ProcessGroup, ...]:
    """One group if one spans the mesh, else one per dimension."""
    whole = dist.group.WORLD
    # One reduction over the group of all ranks, where it serves, instead of one for each dimension.
    if whole is not None and mesh.size() == dist.get_world_size():
        return (whole,)
    return tuple(mesh.get_group(dimension) for dimension in range(mesh.ndim))
