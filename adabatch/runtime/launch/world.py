"""Rank, world size and rendezvous of this process: the only reader of the launcher's environment variables."""

from __future__ import annotations

import gc
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal, cast, get_args

import torch
import torch.distributed as dist

from adabatch.runtime.launch.launchers import BY_HAND, MPI, Claim, job_named, mpi_claim, slurm_claim, torch_claim
from adabatch.runtime.launch.mpi import Communicator, abort_at_exit, world_communicator
from adabatch.runtime.launch.mpi_group import BACKEND as MPI_BACKEND
from adabatch.runtime.launch.mpi_group import connect

_MOMENT = 0.05
"""Seconds at the end of a job in which threads of the group free what the last collective left."""

Backend = Literal["nccl", "gloo", "mpi4py"]
"""What carries the collectives: torch.distributed's own two, or MPI."""


def launcher_job(environment: Mapping[str, str] | None = None) -> str | None:
    """The launcher's name for the job of this process, which is the same after a restart; None if it has none."""
    return job_named(os.environ if environment is None else environment)


@dataclass(frozen=True, kw_only=True)
class World:
    """Rank and world size of this process among those that were launched together.

    Args:
        rank: number of this process, from 0.
        size: number of processes.
        local_rank: number of this process on its node, from 0.
        launcher: the name of the launcher.
        address: "host:port" where they meet; None if torch reads it from the environment.
        backend: of their collectives; None for the default of the device.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    launcher: str = field(default="nobody", compare=False)
    address: str | None = field(default=None, compare=False)
    backend: Backend | None = field(default=None, compare=False)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> World:
        """The world of the launcher: torchrun, deepspeed, mpiexec or srun; one process if there is no launcher.

        Launchers may be nested: one torchrun or deepspeed per node inside mpiexec or srun, or mpiexec inside srun.
        Under mpiexec the ranks are those of mpi4py. ``ADABATCH_BACKEND`` chooses the backend.

        Raises:
            ValueError: if variables are incomplete, not numbers, or contradict each other, if mpi4py is missing under
                mpiexec or runs another MPI, or if the backend is unknown.
        """
        source = os.environ if environment is None else environment
        backend = _backend(source)
        torch_says, mpi_says, slurm_says = torch_claim(source), mpi_claim(source), slurm_claim(source)
        # A mpiexec of one process, or one that started torchrun, does not say which rank this process is.
        if mpi_says is not None and mpi_says.place.size > 1 and (torch_says is None or torch_says.node is None):
            if mpi_says.place == (slurm_says.place if slurm_says else None) and backend != MPI_BACKEND:
                mpi_says = None  # srun also sets MPI's variables, for programs that may not use MPI
            else:
                return cls._of_mpi(source, mpi_says, [claim for claim in (torch_says, slurm_says) if claim])
        outer = [claim for claim in (mpi_says, slurm_says) if claim is not None]
        # The innermost launcher started this very process, so its rank is the right one; torchrun runs inside the
        # others.
        inner = torch_says or slurm_says or mpi_says
        if inner is None:
            return cls(backend=backend)
        for claim in outer:
            if objection := _objection(inner, claim):
                raise ValueError(objection)
        return cls(
            rank=inner.place.rank,
            size=inner.place.size,
            local_rank=inner.local_rank,
            launcher=inner.launcher,
            address=inner.address,
            backend=backend,
        )

    @classmethod
    def _of_mpi(cls, source: Mapping[str, str], said: Claim, others: list[Claim]) -> World:
        """The ranks under mpiexec, as MPI itself counts them; an error of one is raised on all."""
        communicator = world_communicator(said)
        found = said._replace(place=communicator.place, node=communicator.node)
        objections = [_objection(found, other) for other in others]
        for objection in communicator.gather(next(filter(None, objections), "")):
            if objection:
                raise ValueError(objection)
        return cls(
            rank=found.place.rank,
            size=found.place.size,
            local_rank=communicator.local_rank,
            launcher=said.launcher,
            address=_meeting_point(source, communicator),
            backend=_backend(source),
        )

    @property
    def device(self) -> torch.device:
        """The accelerator of this process if there is one, else the CPU."""
        if torch.cuda.is_available():
            # Modulo, since some launchers show each process its own devices only.
            return torch.device("cuda", self.local_rank % torch.cuda.device_count())
        return torch.device("cpu")


def _objection(found: Claim, other: Claim) -> str:
    """What is wrong with two claims about one process; empty if they agree, or one launcher runs inside the other."""
    outer = other.place == found.node or (other.place.size == 1 and other.launcher != BY_HAND)
    if outer or other.place == found.place:
        return ""
    return (
        f"{found} contradict {other}: one process cannot be both, and the ranks would not agree on the job; "
        f"unset the variables of the launcher that does not run this job, or start one launcher over all nodes"
    )


def _backend(source: Mapping[str, str]) -> Backend | None:
    wanted = source.get("ADABATCH_BACKEND") or None
    if wanted is not None and wanted not in get_args(Backend):
        raise ValueError(f"ADABATCH_BACKEND must be one of {', '.join(get_args(Backend))}, got {wanted!r}")
    return cast(Backend | None, wanted)


def _meeting_point(source: Mapping[str, str], communicator: Communicator) -> str:
    """A free port on the node of rank 0, the same for all; over the loopback if there is one node."""
    host = source.get("MASTER_ADDR") or ("127.0.0.1" if communicator.node.size == 1 else socket.gethostname())
    # The port is free now and may be taken before it is used; but there is no way to reserve it for torch's store.
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = source.get("MASTER_PORT") or probe.getsockname()[1]
    return communicator.first_of(f"{host}:{port}")


@contextmanager
def connected(world: World, *, device: torch.device, timeout: timedelta = timedelta(minutes=10)) -> Iterator[None]:
    """The default process group for the time of the block; nothing for a single process.

    NCCL on CUDA, gloo elsewhere, and MPI (through mpi4py) if torch has neither or ``world.backend`` asks for it. A
    rank that waits longer than ``timeout`` in a collective raises an error.

    Raises:
        ValueError: if this torch or this launcher does not have the backend.
    """
    if world.size == 1:
        yield
        return
    if device.type == "cuda":
        # Before the group exists: NCCL takes the current device as that of the rank.
        torch.cuda.set_device(device)
    backend = world.backend or _suited_backend(device, world.launcher)
    if backend == MPI_BACKEND:
        connect(rank=world.rank, size=world.size, timeout=timeout)
    else:
        where = None if world.address is None else f"tcp://{world.address}"
        dist.init_process_group(backend, init_method=where, rank=world.rank, world_size=world.size, timeout=timeout)
    try:
        yield
    except BaseException:
        # at the end of a process MPI waits for all others, which may be waiting for this one
        if world.launcher == MPI:
            abort_at_exit()
        raise
    finally:
        dist.destroy_process_group()
        _let_threads_of_the_group_finish()
    _end_threads_of_the_group()


def _let_threads_of_the_group_finish() -> None:
    """Lets a thread of a gloo group free the tensors of the last collective, for which it needs Python's lock (GIL).

    It does so while it holds the lock of the group. The reducer of a ``DistributedDataParallel`` often has the last
    reference to the group, and is freed with the GIL held; the end of the group then takes the group's lock. If the
    thread is not done by then, both wait for each other for ever, and a rank that has reported its error never ends.
    """
    time.sleep(_MOMENT)  # without the GIL


def _end_threads_of_the_group() -> None:
    # A thread of a gloo group frees the tensors of the last collective, for which it needs the interpreter. If it does
    # so while the interpreter ends, it aborts the process (status -6) after all its work was done. A destroyed group
    # joins its threads when nothing refers to it any longer, but models and loops refer to it in cycles.
    gc.collect()


def _suited_backend(device: torch.device, launcher: str) -> str:
    if device.type == "cuda" and dist.is_nccl_available():
        return "nccl"
    if dist.is_gloo_available():
        return "gloo"
    if launcher == MPI:
        return MPI_BACKEND
    raise ValueError(
        f"torch {torch.__version__} has no backend for {device.type} (no NCCL, no gloo): start the job with mpiexec, "
        f"whose MPI then carries the collectives, or install a torch that has one"
    )
