"""The scripts of ``examples/`` run as their heads say, learn something, and let the batch grow."""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import sys
import warnings
from pathlib import Path

import pytest
from support.hosts import rank_variables
from support.launched import run_whole
from support.ports import free_port
from support.ranks import run_ranks

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
CHANCE = 0.693
"""Loss of two classes that are guessed."""


BY_COMMAND = ("ddp", "one_process", "torchft_replicas")
"""Scripts that are run by the very command. The others run in forked processes with the variables that it would set:
those have torch already, whose import takes longer than a script."""


@pytest.mark.distributed
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_runs_by_the_command_at_its_head(path: Path, tmp_path: Path) -> None:
    if path.stem.startswith("torchft"):
        pytest.importorskip("torchft", reason="torchft has wheels for Linux on x86-64 only")
    shown = re.search(r"^(python|torchrun --standalone --nproc-per-node=2) examples/(\w+)\.py$", path.read_text(), re.M)
    assert shown is not None
    assert shown[2] == path.stem
    size = 1 if shown[1] == "python" else 2
    output = by_command(path, size) if path.stem in BY_COMMAND else in_forks(path, size, tmp_path)
    losses = [float(loss) for loss in re.findall(r"loss=([\d.]+)", output)]
    assert losses, output
    assert losses[-1] < 0.8 * CHANCE, output
    sizes = [int(size) for size in re.findall(r"global batch (\d+)", output)]
    assert sizes[-1] > 32, output


def by_command(path: Path, size: int) -> str:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if size > 1 else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    ended = run_whole([sys.executable, *launcher, str(path)], environment=environment, timeout=200, cwd=ROOT)
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


def in_forks(path: Path, size: int, folder: Path) -> str:
    return "".join(run_ranks(script, size, folder, path, size, free_port(), timeout=200, connect=False))


def script(rank: int, path: Path, size: int, port: int) -> str:
    """What the script prints on this rank."""
    warnings.simplefilter("ignore")
    if size > 1:
        rank_variables(rank, size, port)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        runpy.run_path(str(path), run_name="__main__")
    return said.getvalue()


def test_every_engine_and_host_has_an_example() -> None:
    assert [path.stem for path in SCRIPTS] == [
        "accelerate_loop",
        "ddp",
        "fsdp2",
        "lightning_fit",
        "local_sgd",
        "one_process",
        "torchft_replicas",
        "transformers_trainer",
        "trl_sft",
    ]
    assert all(len(path.read_text().splitlines()) <= 60 for path in SCRIPTS), "a screen"
