"""The configs and launch scripts that are part of the package, and how to write them out."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from importlib.resources import files
from importlib.resources.abc import Traversable

SHIPPED = ("configs", "launch")
SCRIPTS = (".sh", ".sbatch")


def shipped() -> Mapping[str, Traversable]:
    """Each shipped file by its path in the repository, such as "configs/quickstart.yaml"."""
    root = files("adabatch") / "shipped"
    return {
        f"{folder}/{each.name}": each
        for folder in SHIPPED
        for each in sorted((root / folder).iterdir(), key=lambda file: file.name)
        if each.is_file() and not each.name.startswith(".")
    }


def named(name: str) -> Mapping[str, Traversable]:
    """The files that a name stands for: a path, a file's name with or without its ending, or a whole folder.

    Raises:
        ValueError: if there is no such file.
    """
    there = shipped()
    # a folder first: its name is that of no file
    if name in SHIPPED:
        return {path: file for path, file in there.items() if path.startswith(f"{name}/")}
    for path, file in there.items():
        whole = path.partition("/")[2]
        if name in (path, whole, whole.rpartition(".")[0]):
            return {path: file}
    raise ValueError(
        f"no config or script is called {name!r}: there are {', '.join(there)}, and the folders configs, launch"
    )


def about(file: Traversable) -> str:
    """The beginning of a file's head comment, up to the first stop; empty if it has none."""
    said = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith(("#!", "#SBATCH")):
            continue
        if not line.startswith("#") or not line.strip("# "):
            break
        said.append(line.strip("# "))
    return re.split(r"[.:;] |, after |, as in |[.:;]$", " ".join(said))[0]


def is_script(name: str) -> bool:
    """Whether a file of this name should be executable."""
    return os.path.splitext(name)[1] in SCRIPTS
