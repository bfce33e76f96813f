"""The scripts of ``examples/`` run as their heads say, learn something, and let the batch grow."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
from support.launched import run_whole

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
CHANCE = 0.693
"""Loss of two classes that are guessed."""


@pytest.mark.distributed
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_runs_by_the_command_at_its_head(path: Path) -> None:
    if path.stem.startswith("torchft"):
        pytest.importorskip("torchft", reason="torchft has wheels for Linux on x86-64 only")
    shown = re.search(r"^(python|torchrun \S.*) examples/(\w+)\.py$", path.read_text(), flags=re.MULTILINE)
    assert shown is not None
    assert shown[2] == path.stem
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    launcher = torchrun if shown[1].startswith("torchrun") else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    ended = run_whole([sys.executable, *launcher, str(path)], environment=environment, timeout=200, cwd=ROOT)
    assert ended.returncode == 0, ended.stdout
    losses = [float(loss) for loss in re.findall(r"loss=([\d.]+)", ended.stdout)]
    assert losses, ended.stdout
    assert losses[-1] < 0.8 * CHANCE, ended.stdout
    sizes = [int(size) for size in re.findall(r"global batch (\d+)", ended.stdout)]
    assert sizes[-1] > 32, ended.stdout


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
