"""Jobs with ``local_sgd``: the same command, alone and on two processes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.jobs import Attempt

from adabatch.checkpointing.files import checkpoints_in
from adabatch.cli.main import main

pytest.importorskip("sklearn", reason="the digits need scikit-learn (extra cli)")

ROOT = Path(__file__).parents[2]
SGD_EVERY_4 = {"class_path": "adabatch.LocalSGD", "init_args": {"sync_every": 4}}
DILOCO = {
    "class_path": "adabatch.LocalSGD",
    "init_args": {
        "sync_every": {
            "class_path": "adabatch.local_sgd.Quadratic",
            "init_args": {"alpha": 0.2, "base": 2, "longest": 6},
        },
        "outer": {"class_path": "adabatch.local_sgd.Nesterov", "init_args": {"lr": 0.7, "momentum": 0.5}},
        "warmup": {"count": 100, "unit": "examples"},
        "compression": "int8",
        "spread": "within",
    },
}


@pytest.fixture
def config(tmp_path: Path) -> Any:
    """The MNIST config with digits in the place of the images; returns a path."""

    def write(**changes: Any) -> str:
        job = yaml.safe_load((ROOT / "configs" / "local_sgd_mnist.yaml").read_text())
        digits = {"class_path": "adabatch.recipes.digits.Digits"}
        job |= {
            "model": {"class_path": "adabatch.recipes.models.MLP"},
            "train_data": {**digits, "init_args": {"split": "train"}},
            "test_data": {**digits, "init_args": {"split": "test"}},
            "total": {"count": 2000, "unit": "examples"},
            "out": str(tmp_path / "run"),
        }
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({**job, **changes}))
        return str(path)

    return write


def journal(run: Path) -> list[dict[str, Any]]:
    texts = (run / "journal.jsonl").read_text().splitlines()
    return [line for text in texts if "plan" in (line := json.loads(text))]


def test_the_config_runs_alone(config: Any, tmp_path: Path) -> None:
    limits = {"min": 16, "max": 256}
    assert main(["train", "--config", config(local_sgd=SGD_EVERY_4, limits=limits)]) == 0
    lines = journal(tmp_path / "run")
    assert [line["local_sgd"]["step_in_round"] for line in lines[:8]] == [1, 2, 3, 0, 1, 2, 3, 0]
    assert [line["moments"] is not None for line in lines[:8]] == [True, False, False, False] * 2
    assert lines[-1]["next"] > 16


def test_the_config_with_muon_runs_alone(tmp_path: Path) -> None:
    config = ROOT / "configs" / "local_sgd_muon.yaml"
    assert main(["train", f"--config={config}", f"--out={tmp_path / 'run'}", "--total.count=2000"]) == 0
    lines = journal(tmp_path / "run")
    assert lines[0]["lr"]["base"] == [0.005, 0.002]  # Muon's and AdamW's
    steps = [line["local_sgd"]["step_in_round"] for line in lines]
    warm = steps.index(1)
    assert steps[:warm] == [0] * warm
    assert 10 < warm <= 20  # 640 examples, 32 or more a step
    assert steps[warm : warm + 10] == [1, 2, 3, 4, 5, 6, 7, 8, 0, 1]
    assert [n for n, line in enumerate(lines) if n >= warm and line["moments"] is not None][:2] == [warm, warm + 9]
    assert lines[-1]["next"] > 32


@pytest.mark.distributed
def test_two_processes_average_and_write_a_file_each(config: Any, tmp_path: Path) -> None:
    job = config(local_sgd=DILOCO, total={"count": 1000, "unit": "examples"})
    codes = Attempt(tmp_path, ["train", "--config", job], 2).join()
    said = (tmp_path / "output").read_text()
    assert codes == [0, 0], said
    last = journal(tmp_path / "run")[-1]["local_sgd"]
    assert 0 < last["rounds"] < len(journal(tmp_path / "run"))
    assert last["bytes_saved"] > 2 * last["bytes_sent"] > 0
    newest = next(iter(checkpoints_in(tmp_path / "run" / "checkpoints").values()))
    assert {path.name for path in newest.iterdir()} == {"state.pt", "state-1.pt", "manifest.json"}
    assert "test accuracy" in said


@pytest.mark.parametrize(
    ("command", "local_sgd", "says"),
    [
        ("train", {"class_path": "adabatch.LocalSGD", "init_args": {"sync_every": 0}}, "at least 1 local step, got 0"),
        ("train", {"class_path": "adabatch.LocalSGD"}, "sync_every"),
        ("train", {"class_path": "torch.nn.Linear"}, "local_sgd"),
        ("verify", SGD_EVERY_4, "leave local_sgd out"),
    ],
)
def test_mistakes_end_in_one_clear_line(config: Any, capsys: Any, command: str, local_sgd: Any, says: str) -> None:
    try:
        status: Any = main([command, "--config", config(local_sgd=local_sgd)])
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    assert says in capsys.readouterr().err
