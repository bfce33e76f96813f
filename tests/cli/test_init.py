"""``adabatch init``: the config it writes runs, what is wrong with a file is named, and what is shipped comes out."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from adabatch.cli.init import run_init
from adabatch.cli.main import main
from adabatch.cli.shipped import about, shipped

ROOT = Path(__file__).parents[2]
FILE = """
import torch


class Net(torch.nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(6, {outputs})

    def forward(self, x):
        return self.linear(x)


class Points(torch.utils.data.Dataset):
    def __init__(self, split: str = "train") -> None:
        generator = torch.Generator().manual_seed(len(split))
        self.x = torch.randn({count}, 6, generator=generator)
        self.y = (self.x[:, 0] > 0).long()

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], self.y[index]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    with torch.random.fork_rng(devices=[]):
        yield tmp_path
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


def written(folder: Path, name: str, *, outputs: int = 2, count: int = 256, more: str = "") -> Path:
    """A model file; each test has a name of its own for it."""
    path = folder / f"{name}.py"
    path.write_text(FILE.format(outputs=outputs, count=count) + more, encoding="utf-8")
    return path.relative_to(folder)


def error_of(arguments: list[str], capsys: Any) -> str:
    assert main(["init", *arguments]) == 2
    said: str = capsys.readouterr().err
    assert said.count("\n") == 1, said
    return said


def test_the_config_is_written_checked_and_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", str(written(folder, "init_whole"))]) == 0
    said = capsys.readouterr().out
    assert "Net, 14 parameters" in said
    assert "256 examples; input float32 (6,), target int64 ()" in said
    assert "dry run    2 steps of 16 examples" in said
    config = yaml.safe_load((folder / "init_whole.yaml").read_text())
    assert config["model"] == {"class_path": "init_whole.Net"}
    assert config["test_data"] == {"class_path": "init_whole.Points", "init_args": {"split": "test"}}
    assert (config["limits"], config["total"]["count"]) == ({"min": 16, "max": 32}, 2560)
    assert not (folder / "runs").exists()
    assert main(["train", "--config", "init_whole.yaml", "--total.count=256", "--quiet"]) == 0
    shown = capsys.readouterr().out
    assert "train:" not in shown
    assert "test accuracy" in shown
    assert (folder / "runs" / "init_whole" / "journal.jsonl").exists()


def test_what_is_there_is_not_written_over(folder: Path, capsys: Any) -> None:
    file = str(written(folder, "init_twice"))
    (folder / "init_twice.yaml").write_text("mine")
    assert "is there already: choose another place with --out, or pass --force" in error_of([file], capsys)
    assert (folder / "init_twice.yaml").read_text() == "mine"
    assert main(["init", file, "--no-check", "--force", "--optimizer", "torch.optim.SGD"]) == 0
    assert "torch.optim.SGD" in (folder / "init_twice.yaml").read_text()


def test_a_loss_of_the_file_is_taken(folder: Path) -> None:
    own = "\n\nclass SmoothLoss(torch.nn.CrossEntropyLoss):\n    pass\n"
    assert main(["init", str(written(folder, "init_loss", more=own)), "--no-check", "--out", "sub/job.yaml"]) == 0
    assert yaml.safe_load((folder / "sub/job.yaml").read_text())["loss"] == {"class_path": "init_loss.SmoothLoss"}


SECOND = "\n\nclass Other(Net):\n    pass\n"
NEEDS = "\n\nclass Wide(Net):\n    def __init__(self, width):\n        super().__init__(width)\n"


@pytest.mark.parametrize(
    "name, settings, options, said",
    [
        ("init_two", {"more": SECOND}, [], "several classes that are a torch.nn.Module: say which with --model"),
        ("init_none", {}, ["--model", "Nett"], "has no torch.nn.Module Nett: it has Net"),
        ("init_needs", {"more": NEEDS}, ["--model", "Wide"], "Wide in init_needs.py needs width: give each a default"),
        ("init_few", {"count": 16}, [], "has 16 examples, and a batch that can grow needs at least 32"),
        ("init_broken", {"more": "\nraise RuntimeError('no')\n"}, [], "cannot be imported: RuntimeError: no"),
        ("init_narrow", {"outputs": 1}, [], "the forward of Net, the loss, or the backward failed: IndexError"),
        ("init_unmade", {}, ["--loss", "torch.nn.NoSuch"], "torch.nn.NoSuch"),
        ("json", {}, [], "has the name of a module of Python itself"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(
    name: str, settings: dict[str, Any], options: list[str], said: str, folder: Path, capsys: Any
) -> None:
    arguments = ["init", str(written(folder, name, **settings)), *options]
    try:
        status = main(arguments)
    except SystemExit as stopped:  # of the parser
        status = int(stopped.code or 0)
    assert status == 2
    assert said in capsys.readouterr().err
    assert not (folder / f"{name}.yaml").exists()


def test_no_file_and_a_file_elsewhere_are_named(folder: Path, tmp_path_factory: Any, capsys: Any) -> None:
    assert "nowhere.py: no such file" in error_of(["nowhere.py"], capsys)
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "net.py"
    elsewhere.write_text("")
    assert f"is not below the working folder, so that a config could not name its classes: cd {elsewhere.parent}" in (
        error_of([str(elsewhere)], capsys)
    )
    with pytest.raises(SystemExit) as stopped:
        run_init([])
    assert stopped.value.code == 2


def test_what_is_shipped_is_what_the_repository_has() -> None:
    there = {f"{folder}/{path.name}": path for folder in ("configs", "launch") for path in (ROOT / folder).iterdir()}
    assert set(shipped()) == set(there)
    for name, path in there.items():
        assert shipped()[name].read_bytes() == path.read_bytes()
        assert name.endswith(".json") or 20 < len(about(shipped()[name])) < 110, name


def test_what_is_shipped_comes_out(folder: Path, capsys: Any) -> None:
    assert main(["init", "--list"]) == 0
    assert all(name in capsys.readouterr().out or name for name in shipped())
    assert main(["init", "--from", "quickstart"]) == 0
    assert (folder / "quickstart.yaml").read_bytes() == (ROOT / "configs" / "quickstart.yaml").read_bytes()
    assert main(["init", "--from", "launch"]) == 0
    assert sorted(path.name for path in (folder / "launch").iterdir()) == sorted(os.listdir(ROOT / "launch"))
    assert os.access(folder / "launch" / "torchrun.sh", os.X_OK)
    assert main(["init", "--from", "torchrun.sh", "--out", "run.sh"]) == 0
    assert os.access(folder / "run.sh", os.X_OK)
    capsys.readouterr()
    assert "no config or script is called 'quick'" in error_of(["--from", "quick"], capsys)
