"""Where a run goes that is given no folder: the same command continues, and everything else has a folder of its own."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from adabatch.checkpointing.lock import LOCK, FolderLock
from adabatch.cli.display import Display
from adabatch.cli.run_folder import mark_finished, run_folder
from adabatch.cli.runs import BEGUN
from adabatch.runtime.collectives import Collectives

SETTINGS = {"seed": 1, "limits": {"max": 64}, "sizes": (1, 2)}


def folder(runs: Path, *, resume: bool = True, **changes: object) -> Path:
    return run_folder({**SETTINGS, **changes}, Collectives(), resume=resume, display=Display(0), runs=runs)


def test_the_same_command_goes_on_until_its_run_is_finished(tmp_path: Path) -> None:
    runs = tmp_path / "deep" / "runs"
    first = folder(runs)
    assert first.name.endswith("-1")
    assert (runs / "latest").resolve() == first.resolve()
    assert os.readlink(runs / "latest") == first.name  # whoever moves the folder of the runs takes it along
    assert folder(runs) == first
    mark_finished(first)
    assert json.loads((first / BEGUN).read_text())["finished"]
    second = folder(runs)
    assert second.name == first.name[:-1] + "2"
    assert (runs / "latest").resolve() == second.resolve()


def test_other_settings_and_a_fresh_start_have_a_folder_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = folder(tmp_path)
    second = folder(tmp_path, seed=2)
    assert f"{first} is unfinished" in capsys.readouterr().out.replace("\n", "")
    third = folder(tmp_path, seed=2, resume=False)
    fourth = run_folder(None, Collectives(), resume=True, display=Display(0), runs=tmp_path)
    assert len({first, second, third, fourth}) == 4


def test_a_run_that_another_process_has_is_not_taken(tmp_path: Path) -> None:
    first = folder(tmp_path)
    FolderLock(first / "checkpoints").claim("a")
    lock = json.loads((first / "checkpoints" / LOCK).read_text())
    lock["holder"]["pid"] = 1  # it runs on every machine
    lock["holder"]["started"] = int(Path("/proc/1/stat").read_text().rpartition(")")[2].split()[19])
    (first / "checkpoints" / LOCK).write_text(json.dumps(lock))
    assert folder(tmp_path) != first


def test_a_folder_of_an_earlier_release_and_strays_are_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "latest").mkdir()
    (tmp_path / "2020-01-02-x").mkdir()
    (tmp_path / "notes.txt").write_text("")
    first = folder(tmp_path)
    assert not (tmp_path / "latest").is_symlink()
    assert "is a folder, not the link to the newest run" in capsys.readouterr().out.replace("\n", " ")
    (tmp_path / "latest").rmdir()
    (tmp_path / "latest").symlink_to("2020-01-02-x")
    assert folder(tmp_path).name == first.name[:-1] + "2"
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").symlink_to("gone")
    assert folder(tmp_path).name == first.name[:-1] + "3"


def test_no_place_for_a_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(OSError, match="runs"):
        folder(tmp_path / "runs")
