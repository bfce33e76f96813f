"""The wheel and the source archive: what is in them, and what the command says where the extras are not installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("build", reason="needs build (extra test)")

ROOT = Path(__file__).parents[1]
ASK = """
import contextlib, io, json, sys
import adabatch
from adabatch.cli.main import main

answers = [adabatch.__file__]
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as error:
        status = main(arguments)
    answers.append([status, out.getvalue(), error.getvalue()])
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel, built from the source archive as an index would get it, and that archive."""
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    source.mkdir()
    for name in ("adabatch", "configs", "launch"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(place / "dist"), str(source)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (wheel,), (archive,) = (place / "dist").glob("*.whl"), (place / "dist").glob("*.tar.gz")
    return wheel, archive


@pytest.mark.slow
def test_wheel_and_archive_hold_the_package_and_its_data(archives: tuple[Path, Path]) -> None:
    wheel, archive = archives
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        metadata = file.read(next(name for name in names if name.endswith("METADATA"))).decode()
    with tarfile.open(archive) as file:
        inside = {name.partition("/")[2] for name in file.getnames()}
    assert "License-Expression: MIT" in metadata
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "adabatch").rglob("*.py")}
    expected |= {"adabatch/py.typed"}
    expected |= {f"adabatch/report/assets/{path.name}" for path in (ROOT / "adabatch/report/assets").iterdir()}
    expected |= {f"adabatch/shipped/{f}/{path.name}" for f in ("configs", "launch") for path in (ROOT / f).iterdir()}
    assert expected <= names
    assert expected <= inside
    strange = {name for name in names if not name.startswith(("adabatch/", "adabatch-"))}
    assert not strange, f"the wheel installs what is not the package's: {sorted(strange)}"


@pytest.mark.slow
def test_without_extras_each_command_says_what_is_missing(archives: tuple[Path, Path], tmp_path: Path) -> None:
    """The wheel beside torch and numpy and what these need, and nothing else."""
    site = tmp_path / "site"
    with zipfile.ZipFile(archives[0]) as file:
        file.extractall(site)
    # Stands for an environment without the extras: their names cannot be imported there.
    hidden = ("jsonargparse", "rich", "yaml", "shtab", "sklearn", "matplotlib", "tensorboard", "wandb", "mlflow")
    (site / "sitecustomize.py").write_text(
        "import sys\n"
        "class Hidden:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {hidden}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Hidden())\n"
    )
    asked = [
        ["train"],
        ["schedule", "compare"],
        ["completion", "bash"],
        ["init", "--from", "quickstart"],
        ["--version"],
    ]
    ended = subprocess.run(
        [sys.executable, "-P", "-c", ASK, json.dumps([*asked, ["doctor"]])],
        env={**os.environ, "PYTHONPATH": str(site)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    place, *answers = json.loads(ended.stdout)
    assert Path(place).is_relative_to(site)
    for (status, _, error), arguments in zip(answers[:3], asked, strict=False):
        assert status == 2, arguments
        assert "pip install adabatch[cli]" in error
        assert error.count("\n") == 1, error
    assert answers[3] == [0, "wrote quickstart.yaml\n", ""]
    assert answers[4][0] == 0
    assert (tmp_path / "quickstart.yaml").read_bytes() == (ROOT / "configs" / "quickstart.yaml").read_bytes()
    assert answers[5][0] == 0
