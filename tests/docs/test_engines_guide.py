"""The code of the pages about engines runs as it stands, on those that they name, and their tables say what happens."""

from __future__ import annotations

import json
import os
import re
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from support.deepspeed_engines import engine_of, run_deepspeed
from support.engine_habits import HABITS, RANKED, tried
from support.launched import run_whole, surroundings
from support.loops import lines
from support.mpi import mpich
from torch.optim import AdamW

from adabatch import EXIT_PREEMPTED
from adabatch.cli.engines import EngineName
from adabatch.guards import EXIT_RANK_LOST
from adabatch.runtime.launch.launchers import MPI_VARIABLES
from adabatch.runtime.launch.world import World, connected

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
PAGES = {
    name: (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    for name in ("engines", "ddp", "fsdp2", "deepspeed", "launchers")
}
BLOCKS = {name: re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) for name, text in PAGES.items()}
SCRIPT = "\n\n".join([*BLOCKS["engines"][:-1], *BLOCKS["deepspeed"], BLOCKS["engines"][-1]])
COLUMNS = ["plain", "DDP", "FSDP2", "ZeRO 0", "ZeRO 1 to 3", "local SGD"]
FLAT = "give it flat pieces of them; use ZeRO 0, DDP or FSDP2"
BY_NORM = "gradient is known, .*use ZeRO 0, DDP or FSDP2, or a criterion in the Euclidean norm"
NOT_FORMED = "local SGD does not measure .* use a criterion in the Euclidean norm"
UNWRAPPED = "CommHookProbe needs a model in DistributedDataParallel"
CHOSEN = "attach chooses probe= from the DeepSpeed engine: leave it out, or use DDP or FSDP2"

# Why a cell is "no": habit -> column -> what it is refused with; every other is "yes".
REFUSED: dict[str, dict[str, str]] = {
    '`NoiseScale(norm="adam")`': {"ZeRO 1 to 3": BY_NORM, "local SGD": NOT_FORMED},
    '`NoiseScale(norm="sign")`': {"ZeRO 1 to 3": BY_NORM, "local SGD": NOT_FORMED},
    "`CoordinateNormTest`": {"ZeRO 1 to 3": BY_NORM, "local SGD": NOT_FORMED},
    "exact tests: `PerExampleProbe`": {"ZeRO 0": CHOSEN, "ZeRO 1 to 3": CHOSEN},
    "`CommHookProbe`": {column: UNWRAPPED for column in COLUMNS if column != "DDP"},
    "`Measure(l1=)`": {"ZeRO 1 to 3": "shows the norm only: leave it out, or use ZeRO 0"},
    "`Measure(layers=)`": {"ZeRO 1 to 3": "shows the norm only: leave it out, or use ZeRO 0"},
    "`EngineOptions(scaler=)`, float16": {
        "ZeRO 0": "attach chooses engine=", "ZeRO 1 to 3": "attach chooses engine=", "local SGD": "Use bfloat16"
    },
    "`AdaGradNorm`": {"ZeRO 1 to 3": FLAT},
    "`Shampoo`": {"ZeRO 1 to 3": FLAT},
    "`KFAC`": {"ZeRO 0": "cannot share its factors among the ranks .* use DDP or FSDP2", "ZeRO 1 to 3": FLAT},
    "`Guard(check_every=)`": {"local SGD": "differ between the workers of local_sgd"},
}  # fmt: skip


def table() -> dict[str, dict[str, str]]:
    """Habit -> column -> cell, as the guide has it."""
    part = PAGES["engines"].split("## In one table")[1]
    header, _, *rows = [line for line in part.splitlines() if line.startswith("|")]
    names = [cell.strip() for cell in header.strip("|").split("|")][1:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return {name: dict(zip(names, each, strict=True)) for name, *each in cells}


def adamw_of(parameters: Any) -> AdamW:
    return AdamW(parameters, lr=0.01)


# --- what the ranks of the job run -----------------------------------------------------------------------------------


def everything(folder: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    os.chdir(folder)
    world = World.from_environment()
    with connected(world, device=torch.device("cpu")):
        guide = runpy.run_path("train.py")
        grown: dict[str, int] = {}
        for engine in ("ddp", "fsdp2"):
            guide["on_torch"](engine)
        guide["on_deepspeed"](2)
        for page in ("ddp", "fsdp2"):
            (block,) = BLOCKS[page]
            own: dict[str, Any] = {}
            exec(compile(block, f"docs/{page}.md", "exec"), own)
            grown[page] = own["batches"].plan.global_batch_size
        cells = {name: {engine: tried(engine, habit) for engine in RANKED} for name, habit in HABITS.items()}
        sharded = engine_of(3, adamw_of, zero_optimization={"stage3_param_persistence_threshold": 0})
        held = sum(parameter.numel() for parameter in sharded.module.parameters())
    return {"launcher": world.launcher, "cells": cells, "held between steps": held, "grown": grown}


# --- what they found -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where train.py is, and was run alone."""
    folder = tmp_path_factory.mktemp("guide")
    (folder / "train.py").write_text(SCRIPT)
    return folder


@pytest.fixture(scope="module")
def found(place: Path) -> dict[str, Any]:
    if find_spec("deepspeed") is None:  # an import would change the environment of this process
        pytest.skip("needs DeepSpeed")
    first, second = run_deepspeed(2, everything, str(place))
    assert first == second
    return first  # type: ignore[no-any-return]


def sizes(journal: Path) -> list[int]:
    return [line["plan"]["global_batch_size"] for line in lines(journal)]


def test_the_loop_takes_the_same_run_on_every_engine(found: dict[str, Any], place: Path) -> None:
    reference = sizes(place / "runs" / "ddp.jsonl")
    assert found["launcher"] == "deepspeed"
    assert reference[-1] > reference[0]
    for name in ("fsdp2", "zero2"):
        assert sizes(place / "runs" / f"{name}.jsonl") == reference, name
    saved = sorted(path.name for path in (place / "runs" / "zero2").glob("step*"))
    assert len(saved) == 2


def test_the_page_of_each_engine_of_torch_has_a_loop_of_its_own(found: dict[str, Any]) -> None:
    assert found["grown"]["ddp"] == found["grown"]["fsdp2"] > 32


def test_the_script_runs_under_mpi(tmp_path: Path) -> None:
    mpi = mpich()
    (tmp_path / "train.py").write_text(SCRIPT)
    command = [*mpi.mpiexec, "-n", "2", sys.executable, "train.py", "ddp"]
    environment = surroundings({**mpi.variables, "ADABATCH_BACKEND": "mpi4py"})
    ended = run_whole(command, environment=environment, cwd=tmp_path, timeout=120)
    assert ended.returncode == 0, ended.stdout
    assert "ddp: 2 processes by mpiexec, last batch" in ended.stdout


def test_the_script_runs_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "plain"])
    for variables in (("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"), *MPI_VARIABLES):
        for name in variables:
            monkeypatch.delenv(name, raising=False)
    with torch.random.fork_rng(devices=[]):
        runpy.run_path("train.py", run_name="__main__")
    assert "plain: 1 processes by nobody" in capsys.readouterr().out


def test_the_table_has_every_habit_and_says_what_is_refused() -> None:
    expected = {
        name: {column: "no" if column in REFUSED.get(name, {}) else "yes" for column in COLUMNS} for name in HABITS
    }
    assert table() == expected


@pytest.mark.parametrize("name", HABITS)
def test_each_cell_is_what_happens(name: str, found: dict[str, Any]) -> None:
    happened = {"plain": tried("plain", HABITS[name]), **found["cells"][name]}
    for engine, result in happened.items():
        column = "ZeRO 1 to 3" if engine in ("ZeRO 2", "ZeRO 3") else engine
        says = REFUSED.get(name, {}).get(column)
        assert re.search(says, result) if says else result == "yes", (engine, result)


def test_a_rank_of_zero_3_holds_no_large_weights_to_compare_between_steps(found: dict[str, Any]) -> None:
    assert found["held between steps"] == 0


def test_every_engine_script_variable_and_status_is_named() -> None:
    text = "\n".join(PAGES.values())
    assert all(f"`{name}`" in text for name in get_args(EngineName))
    cells = " ".join(line for line in text.splitlines() if line.startswith("|"))
    for script in (ROOT / "launch").iterdir():
        if script.suffix == ".json":
            assert isinstance(json.loads(script.read_text()), dict)
            continue
        assert f"| `{script.name}` |" in cells
        head = script.read_text().split("set -euo pipefail")[0]
        variables = set(re.findall(r"^#   ([A-Z_]{4,})  ", head, flags=re.MULTILINE))
        assert variables
        assert not [name for name in variables if f"`{name}`" not in cells], script.name
    for names in MPI_VARIABLES:
        assert f"`{names[1].split('SIZE')[0]}*`" in cells
    for status in (0, 1, 2, EXIT_PREEMPTED, EXIT_RANK_LOST):
        assert f"| {status}" in cells
