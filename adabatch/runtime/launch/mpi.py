"""MPI by mpi4py, to find the rank of a process. Imported only when it is needed, because the import starts MPI."""

from __future__ import annotations

import atexit
from typing import Any, TypeVar

from adabatch.runtime.launch.launchers import Claim, ProcessPlace

T = TypeVar("T")


def started_mpi() -> Any:
    """mpi4py's MPI; its first import starts it.

    Raises:
        ValueError: if mpi4py is not installed, or finds no MPI.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"the job was started by mpiexec, but mpi4py cannot be used ({error}): `pip install adabatch[mpi]` and an "
            f"MPI (`pip install mpich`, or your cluster's), or start the job with torchrun"
        ) from error
    return MPI


class Communicator:
    """The processes of ``mpiexec``, with the few exchanges that are needed before there is a process group.

    Args:
        comm: mpi4py's communicator.
    """

    def __init__(self, comm: Any) -> None:
        mpi = started_mpi()
        self._comm = comm
        self.place = ProcessPlace(comm.rank, comm.size)
        on_node = comm.Split_type(mpi.COMM_TYPE_SHARED)
        self.local_rank: int = on_node.rank
        firsts = comm.allgather(comm.rank if on_node.rank == 0 else -1)
        nodes = [first for first in firsts if first >= 0]
        # The first process of a node tells its rank to the others, which find their node by it.
        self.node = ProcessPlace(nodes.index(on_node.bcast(comm.rank)), len(nodes))

    def gather(self, value: T) -> list[T]:
        """A value of every rank, by rank."""
        values: list[T] = self._comm.allgather(value)
        return values

    def first_of(self, value: T) -> T:
        """The value of rank 0."""
        first: T = self._comm.bcast(value)
        return first


def world_communicator(said: Claim) -> Communicator:
    """All processes of ``mpiexec``.

    Raises:
        ValueError: see ``started_mpi``; or if MPI has another number of processes than ``mpiexec``, because mpi4py runs
            another MPI.
    """
    mpi = started_mpi()
    comm = mpi.COMM_WORLD
    if (comm.rank, comm.size) != said.place:
        library = mpi.Get_library_version().split(",")[0].split("\n")[0].strip()
        raise ValueError(
            f"{said} contradict mpi4py, which is rank {comm.rank} of {comm.size}: it runs {library}, and mpiexec is "
            f"another MPI's; use that one's mpiexec, or point MPI4PY_LIBMPI at the libmpi.so of this one"
        )
    return Communicator(comm)


def abort_at_exit() -> None:
    """Ends all processes of ``mpiexec`` when this one ends.

    For a rank that failed: at the end of a process MPI waits for all others, which may be waiting for this one.
    """
    atexit.register(started_mpi().COMM_WORLD.Abort, 1)
