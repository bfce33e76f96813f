"""Rank and world size of this process from the variables of each launcher. Pure: reads a mapping."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

Environment = Mapping[str, str]

MPI = "mpiexec"
"""Any MPI's launcher."""

BY_HAND = "the caller"
"""The source of torchrun's variables if torchrun did not set them."""

MPI_VARIABLES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),  # Open MPI
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),  # MPICH, Intel MPI, and Slurm's pmi2
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK"),  # MVAPICH
)


class ProcessPlace(NamedTuple):
    """A rank and the number of ranks."""

    rank: int
    size: int


class Claim(NamedTuple):
    """The information from one launcher.

    Args:
        launcher: its name.
        place: of this process among all that it started.
        local_rank: number of this process on its node, from 0.
        variables: their names, for messages.
        node: for a launcher that runs once per node (torchrun, deepspeed): the place of that node. An outer launcher
            that starts one such launcher per node gives this place.
        address: "host:port" where the processes can meet; None if ``MASTER_ADDR`` and ``MASTER_PORT`` give it.
    """

    launcher: str
    place: ProcessPlace
    local_rank: int
    variables: str
    node: ProcessPlace | None = None
    address: str | None = None

    def __str__(self) -> str:
        return f"{self.variables} of {self.launcher}"


def torch_claim(environment: Environment) -> Claim | None:
    """The claim of torchrun, the deepspeed launcher, or a user who sets the same variables.

    Raises:
        ValueError: if variables are incomplete or not numbers.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return None
    way_out = "start the job with torchrun, or unset RANK and WORLD_SIZE to run one process"
    launcher, node = BY_HAND, None
    # Several launchers set RANK and WORLD_SIZE; each of these variables belongs to one.
    if "TORCHELASTIC_RUN_ID" in environment:
        launcher, node = "torchrun", _place(environment, "GROUP_RANK", "GROUP_WORLD_SIZE", way_out)
    elif "CROSS_RANK" in environment:
        launcher, node = "deepspeed", _place(environment, "CROSS_RANK", "CROSS_SIZE", way_out)
    return _claim(environment, launcher, names, way_out)._replace(node=node)


def mpi_claim(environment: Environment) -> Claim | None:
    """The claim of ``mpiexec``. mpi4py is more reliable, but importing it starts MPI.

    Raises:
        ValueError: if variables are incomplete or not numbers.
    """
    for names in MPI_VARIABLES:
        if names[1] in environment:
            return _claim(environment, MPI, names, "start the job with mpiexec, or unset them")
    return None


def slurm_claim(environment: Environment) -> Claim | None:
    """The claim of ``srun``. The batch script of ``sbatch`` is not a task of a step, and is one process.

    The ranks meet on the first node of the step, where ``srun`` puts rank 0 by default (over the loopback if there is
    one node), at a port that is computed from the number of the job; ``MASTER_ADDR`` and ``MASTER_PORT`` override both.

    Raises:
        ValueError: if variables are incomplete or not numbers.
    """
    # Not SLURM_NTASKS, which the batch script of several tasks has in its environment too.
    if "SLURM_STEP_NUM_TASKS" not in environment:
        return None
    names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    claim = _claim(environment, "srun", names, "start the job with srun, or unset them")
    alone = environment.get("SLURM_STEP_NUM_NODES") == "1"
    nodes = "127.0.0.1" if alone else environment.get("SLURM_STEP_NODELIST", "127.0.0.1")
    host = environment.get("MASTER_ADDR") or first_host(nodes)
    port = environment.get("MASTER_PORT") or str(_slurm_port(environment))
    return claim._replace(address=f"{host}:{port}")


def job_named(environment: Environment) -> str | None:
    """The launcher's name for a job, which is the same after a restart; None if it has none.

    For torchrun it is ``--rdzv-id`` ("none" by default), for Slurm the number of the job, also after a requeue.
    """
    names = ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID")
    found = [f"{name}={environment[name]}" for name in names if environment.get(name, "none") not in ("", "none")]
    return " ".join(found) or None


def first_host(nodes: str) -> str:
    """First host of a node list as Slurm writes it: "gpu[07-09,12],cpu1" -> "gpu07"."""
    # A comma inside brackets separates numbers of hosts, one outside separates names.
    found = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if found is None:
        raise ValueError(f"SLURM_STEP_NODELIST={nodes!r} names no host: set MASTER_ADDR to that of rank 0")
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", found[0])


def _slurm_port(environment: Environment) -> int:
    """A port that differs between jobs and steps, below the range from which Linux assigns ports."""
    job, step = (re.sub(r"\D", "", environment.get(name, "")) or "0" for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    # Consecutive jobs are 131 ports apart, which leaves room for the steps of each.
    return 12_000 + (131 * int(job) + int(step)) % 20_000


def _claim(environment: Environment, launcher: str, names: tuple[str, str, str], way_out: str) -> Claim:
    place = _place(environment, names[0], names[1], way_out)
    try:
        local_rank = int(environment.get(names[2], 0))
    except ValueError as error:
        raise _unreadable(environment, names, way_out) from error
    variables = f"{names[0]}={place.rank} and {names[1]}={place.size}"
    return Claim(launcher, place, local_rank, variables)


def _place(environment: Environment, rank: str, size: str, way_out: str) -> ProcessPlace:
    try:
        place = ProcessPlace(int(environment[rank]), int(environment[size]))
    except (KeyError, ValueError) as error:
        raise _unreadable(environment, (rank, size), way_out) from error
    if not 0 <= place.rank < place.size:
        raise ValueError(f"{rank}={place.rank} is not below {size}={place.size}: check the launcher")
    return place


def _unreadable(environment: Environment, names: tuple[str, ...], way_out: str) -> ValueError:
    found = {name: environment[name] for name in names if name in environment}
    return ValueError(f"the launcher's variables are incomplete or not numbers: {found}; {way_out}")
