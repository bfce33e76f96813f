"""A backend of ``torch.distributed`` that carries collectives over MPI, by mpi4py.

As a backend it works for everything that calls ``torch.distributed``: the statistics of a step, DDP, and local SGD.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from adabatch.runtime.launch.mpi import abort_at_exit, started_mpi

BACKEND = "mpi4py"
"""Its name in ``torch.distributed.init_process_group``."""

SPIN_S = 1e-3
"""How long a rank polls for the end of a collective without a pause, before it yields the core to other processes."""


def connect(*, rank: int, size: int, timeout: timedelta) -> None:
    """Makes the default process group of ``torch.distributed``, over MPI.

    Raises:
        ValueError: see ``started_mpi``; or if the job was not started by ``mpiexec`` with ``size`` processes.
    """
    comm = started_mpi().COMM_WORLD
    if (comm.rank, comm.size) != (rank, size):
        raise ValueError(
            f"the backend {BACKEND} needs all {size} processes started by mpiexec; to MPI this one is rank {comm.rank} "
            f"of {comm.size}: start the job with mpiexec, or unset ADABATCH_BACKEND"
        )
    register()
    store = dist.HashStore()  # torch wants one; MPI does not need it
    dist.init_process_group(BACKEND, store=store, rank=rank, world_size=size, timeout=timeout)


def register() -> None:
    """Registers the backend in ``torch.distributed``; calling it again is harmless."""
    if BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(BACKEND, _group_of, extended_api=True, devices=["cpu", "cuda"])


def _group_of(options: Any, _: Any) -> MPIGroup:
    """A process group for ``torch.distributed``, of all ranks or of some; its members create it together."""
    comm = started_mpi().COMM_WORLD
    ranks = list(options.global_ranks_in_group)
    if ranks and len(ranks) < comm.size:
        # Not Create(), which would wait for the ranks outside the group: they do not come here.
        comm = comm.Create_group(comm.group.Incl(ranks))
    return MPIGroup(comm, options.timeout)


class _Done(dist._Work):  # the name by which Python may derive from it
    """A collective that is over."""

    def __init__(self, result: list[Tensor]) -> None:
        super().__init__()
        self._result = result
        self._future: Future[list[Tensor]] = Future()
        self._future.set_result(result)

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Returns at once."""
        return True

    def is_completed(self) -> bool:
        """True."""
        return True

    def is_success(self) -> bool:
        """True: a failure has raised an error before."""
        return True

    def result(self) -> list[Tensor]:
        """The tensors of the collective."""
        return self._result

    def get_future(self) -> Any:
        """The same as a future."""
        return self._future


class MPIGroup(dist.ProcessGroup):
    """Collectives of ``torch.distributed`` over MPI. Each runs to its end before it returns.

    Tensors go through the host: those on an accelerator are copied there and back, and 16-bit floats are added up in
    float32. A rank that waits longer than ``timeout`` raises an error, and ends the whole job when it exits.

    Args:
        comm: mpi4py's communicator.
        timeout: of one collective.
    """

    def __init__(self, comm: Any, timeout: timedelta) -> None:
        super().__init__(comm.rank, comm.size)  # type: ignore[call-arg]
        self._comm = comm
        self._timeout = timeout

    def getBackendName(self) -> str:
        """The name that it was registered under."""
        return BACKEND

    def allreduce(self, tensors: Any, opts: Any = None) -> Any:  # type: ignore[override]
        """Reduction of each tensor over the ranks, in place."""
        for tensor in tensors:
            self._allreduce(tensor, opts)
        return _Done(tensors)

    def broadcast(self, tensors: Any, opts: Any = None) -> Any:  # type: ignore[override]
        """Each tensor of the root, to all."""
        for tensor in tensors:
            values = _bytes(tensor)
            self._run("broadcast", self._comm.Ibcast, values.numpy(), root=opts.rootRank)
            tensor.copy_(_as(values, tensor))
        return _Done(tensors)

    def allgather(self, output_tensors: Any, input_tensors: Any, opts: Any = None) -> Any:
        """The tensors of all ranks, as a list by rank."""
        for outputs, tensor in zip(output_tensors, input_tensors, strict=True):
            rows = torch.empty(len(outputs), *tensor.shape, dtype=tensor.dtype)
            self._allgather_base(rows, tensor)
            for output, row in zip(outputs, rows, strict=True):
                output.copy_(row)
        return _Done(output_tensors)

    def _allgather_base(self, output: Tensor, input: Tensor, opts: Any = None) -> Any:
        received = torch.empty(output.numel() * output.element_size(), dtype=torch.uint8)
        # As bytes: nothing is added up, and numpy does not know all types of torch (bfloat16).
        self._run("all-gather", self._comm.Iallgather, _bytes(input).numpy(), received.numpy())
        output.copy_(_as(received, output))
        return _Done([output])

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None, **_: Any) -> Any:
        """The tensors of all ranks in one, by rank."""
        return self._allgather_base(output, input, opts)

    def gather(self, output_tensors: Any, input_tensors: Any, opts: Any = None) -> Any:  # type: ignore[override]
        """The tensors of all ranks as a list by rank, on the root only."""
        for position, tensor in enumerate(input_tensors):
            outputs = output_tensors[position] if self.rank() == opts.rootRank else []
            rows = torch.empty(len(outputs), tensor.numel() * tensor.element_size(), dtype=torch.uint8)
            received = rows.numpy() if outputs else None
            self._run("gather", self._comm.Igather, _bytes(tensor).numpy(), received, root=opts.rootRank)
            for output, row in zip(outputs, rows, strict=True):
                output.copy_(_as(row, output))
        return _Done([output for outputs in output_tensors for output in outputs])

    def scatter(self, output_tensors: Any, input_tensors: Any, opts: Any = None) -> Any:  # type: ignore[override]
        """Each tensor of a list on the root, to the rank of its place."""
        for position, output in enumerate(output_tensors):
            rows = None
            if self.rank() == opts.rootRank:
                rows = torch.stack([_bytes(tensor) for tensor in input_tensors[position]]).numpy()
            received = torch.empty(output.numel() * output.element_size(), dtype=torch.uint8)
            self._run("scatter", self._comm.Iscatter, rows, received.numpy(), root=opts.rootRank)
            output.copy_(_as(received, output))
        return _Done(list(output_tensors))

    def _reduce_scatter_base(self, output: Tensor, input: Tensor, opts: Any = None) -> Any:
        # A whole reduction, of which each rank keeps its piece: more bytes than MPI's own reduce-scatter, but 16-bit
        # floats and averages are handled in one place.
        whole = input.detach().clone()
        self._allreduce(whole, opts)
        output.copy_(whole.view(self.size(), -1)[self.rank()].view_as(output))
        return _Done([output])

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = None, **_: Any) -> Any:  # type: ignore[override]
        """Reduction of a tensor over the ranks, of which each gets its piece."""
        return self._reduce_scatter_base(output, input, opts)

    def alltoall_base(
        self, output: Tensor, input: Tensor, output_sizes: Any, input_sizes: Any, opts: Any = None
    ) -> Any:
        """Row r of each rank's tensor, to rank r; rows of equal size only."""
        if output_sizes or input_sizes:
            raise NotImplementedError(f"the backend {BACKEND} exchanges rows of equal size only")
        received = torch.empty(output.numel() * output.element_size(), dtype=torch.uint8)
        self._run("exchange", self._comm.Ialltoall, _bytes(input).numpy(), received.numpy())
        output.copy_(_as(received, output))
        return _Done([output])

    def barrier(self, opts: Any = None) -> Any:
        """Waits for all ranks."""
        self._run("barrier", self._comm.Ibarrier)
        return _Done([])

    def shutdown(self) -> None:
        """Does nothing: MPI itself ends the communicator."""

    def _allreduce(self, tensor: Tensor, opts: Any) -> None:
        mpi, op = started_mpi(), dist.ReduceOp.SUM if opts is None else opts.reduceOp
        kinds = {"SUM": mpi.SUM, "AVG": mpi.SUM, "MIN": mpi.MIN, "MAX": mpi.MAX, "PRODUCT": mpi.PROD}
        kind = next((name for name in kinds if op == getattr(dist.ReduceOp, name)), None)
        if kind is None:
            raise NotImplementedError(f"the backend {BACKEND} reduces by {', '.join(kinds)} only, got {op}")
        # numpy has no bfloat16, and MPI reduces no 16-bit floats.
        wide = torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype
        values = tensor.detach().to(device="cpu", dtype=wide).contiguous()
        self._run("reduction", self._comm.Iallreduce, mpi.IN_PLACE, values.numpy(), op=kinds[kind])
        if kind == "AVG":
            values /= self.size()
        tensor.copy_(values)

    def _run(self, name: str, start: Callable[..., Any], *buffers: Any, **options: Any) -> None:
        """Starts a collective and waits for its end.

        Raises:
            RuntimeError: if not all ranks came within the timeout.
        """
        # Non-blocking, and polled: a blocking call of MPI cannot time out when a rank has died.
        request = start(*buffers, **options)
        began = time.monotonic()
        while not request.Test():
            waited = time.monotonic() - began
            if waited > self._timeout.total_seconds():
                abort_at_exit()
                raise RuntimeError(
                    f"rank {self.rank()} waited {waited:.0f} s for the other ranks in a {name} over MPI: one of them "
                    f"has ended, hangs, or cannot be reached; resume from the last checkpoint"
                )
            if waited > SPIN_S:
                time.sleep(SPIN_S / 10)


def _bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor on the host, shape (n,), whatever its type."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)


def _as(values: Tensor, like: Tensor) -> Tensor:
    return values.view(like.dtype).view(like.shape)
