"""Checkpoints as files: put in place whole or not at all, checked before they are read, the last few of them kept.

A checkpoint is a folder such as ``000012-step-3400``: the twelfth of its run, taken after 3,400 steps. It is written
under another name, its files and folders are synced to the disk, and only then it is renamed, so a folder of that name
is whole unless the disk damaged it. Its ``manifest.json`` is two lines: what is in it, with the size and the SHA-256 of
every file, as JSON; and the SHA-256 of that line.

One process at a time writes into a folder of checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

CHECKPOINT_FORMAT = 1
MANIFEST = "manifest.json"
UNFINISHED = ".unfinished"

_NAME = re.compile(r"(\d{6,})-step-\d+")


Files: TypeAlias = Mapping[str, tuple[int, str]]
"""Size in bytes and SHA-256 of files, by their paths inside a checkpoint."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none of those that are there can be read."""


class Damaged(CheckpointError):
    """A checkpoint is not what was written: a file is missing, cut short or changed."""


class NewerFormat(ValueError):
    """A checkpoint was written by a later release."""


class Manifest(NamedTuple):
    """What a checkpoint holds.

    Args:
        contents: what its writer said of it, ready for JSON.
        files: all others of its files.
    """

    contents: Mapping[str, Any]
    files: Files


def checkpoints_in(folder: Path) -> dict[int, Path]:
    """The finished checkpoints of a folder by their number, the newest first; whether they are intact is not said.

    A folder that is a checkpoint itself holds that one.
    """
    if not folder.is_dir():
        return {}
    places = [folder] if _NAME.fullmatch(folder.name) else folder.iterdir()
    found = {int(match[1]): path for path in places if (match := _NAME.fullmatch(path.name)) and path.is_dir()}
    return dict(sorted(found.items(), reverse=True))


def begin(folder: Path, steps: int) -> int:
    """Makes an empty ``place_of`` the next checkpoint, and returns its number; what others left unfinished is removed.

    Args:
        folder: of the run's checkpoints; made where it is missing.
        steps: of the run so far.

    Raises:
        OSError: the folder cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob(f"*{UNFINISHED}"):
        shutil.rmtree(path)
    number = max(checkpoints_in(folder), default=0) + 1
    place_of(folder, number, steps).mkdir()
    return number


def place_of(folder: Path, number: int, steps: int) -> Path:
    """Where a checkpoint is written before it is finished."""
    return folder / f"{number:06d}-step-{steps}{UNFINISHED}"


def sealed(unfinished: Path, pattern: str = "**/*") -> Files:
    """Size and SHA-256 of the files of a checkpoint that is being written, once they are safe on the disk.

    Raises:
        OSError: the disk is full or fails.
    """
    files = {}
    for path in unfinished.glob(pattern):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
                files[path.relative_to(unfinished).as_posix()] = (path.stat().st_size, _digest(file))
    return files


def finish(
    unfinished: Path, contents: Mapping[str, Any], files: Files, *, keep: int, damaged: Collection[Path] = ()
) -> Path:
    """Makes a checkpoint of what was written to its place; returns where it is now.

    Args:
        unfinished: holds all files of the checkpoint.
        contents: what to say of it in the manifest, ready for JSON.
        files: all of them, as ``sealed`` gave them.
        keep: how many checkpoints stay, this one among them.
        damaged: checkpoints that are known to be of no use, and do not count.

    Raises:
        OSError: the disk is full or fails.
    """
    line = json.dumps({"format": CHECKPOINT_FORMAT, "contents": contents, "files": files}, allow_nan=False)
    with (unfinished / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(f"{line}\n{hashlib.sha256(line.encode()).hexdigest()}\n")
        file.flush()
        os.fsync(file.fileno())
    for path in [*(path for path in unfinished.rglob("*") if path.is_dir()), unfinished]:
        _sync_folder(path)
    finished = unfinished.with_name(unfinished.name.removesuffix(UNFINISHED))
    unfinished.rename(finished)
    _sync_folder(finished.parent)
    _prune(finished.parent, keep, damaged)
    return finished


def abandon(unfinished: Path) -> None:
    """Removes what was written of a checkpoint that will not be finished, as far as that is possible."""
    shutil.rmtree(unfinished, ignore_errors=True)


def check(path: Path, *, share: int = 0, of: int = 1) -> Manifest:
    """The manifest of a checkpoint, once its files are found to be what was written.

    Args:
        path: the checkpoint.
        share, of: read only each ``of``-th file, from number ``share`` on; that all are there and of the right size is
            always looked at. So several ranks share the work.

    Raises:
        Damaged: names the file and what is wrong with it.
        NewerFormat: a checkpoint of a later release.
    """
    manifest = _read_manifest(path)
    for index, (name, (size, digest)) in enumerate(sorted(manifest.files.items())):
        file = path / name
        try:
            found = file.stat().st_size
            if found != size:
                raise Damaged(f"{path}: {name} has {found:,} bytes, {size:,} were written")
            if index % of == share:
                with file.open("rb") as opened:
                    if _digest(opened) != digest:
                        raise Damaged(f"{path}: the contents of {name} have changed since it was written")
        except OSError as error:
            raise Damaged(f"{path}: {name} cannot be read ({error.strerror})") from error
    return manifest


def _read_manifest(path: Path) -> Manifest:
    try:
        # Not by lines: a flipped bit may make a line break of any byte.
        line, _, rest = (path / MANIFEST).read_bytes().partition(b"\n")
    except OSError as error:
        raise Damaged(f"{path}: {MANIFEST} cannot be read ({error.strerror})") from error
    if rest != hashlib.sha256(line).hexdigest().encode() + b"\n":
        raise Damaged(f"{path}: {MANIFEST} does not match its own checksum")
    manifest = json.loads(line)
    if manifest["format"] > CHECKPOINT_FORMAT:
        raise NewerFormat(
            f"the checkpoint {path} has format {manifest['format']}, this version reads up to {CHECKPOINT_FORMAT}: "
            f"upgrade adabatch"
        )
    files = {name: (size, digest) for name, (size, digest) in manifest["files"].items()}
    return Manifest(manifest["contents"], files)


def _prune(folder: Path, keep: int, damaged: Collection[Path]) -> None:
    """Removes the checkpoints that are older than the ``keep`` newest good ones."""
    good = 0
    for path in checkpoints_in(folder).values():
        if good >= keep:
            # Renamed first: a kill in the middle must not leave what looks like a damaged checkpoint.
            doomed = path.with_name(path.name + UNFINISHED)
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
        good += path not in damaged


def _digest(file: Any) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(path: Path) -> None:
    """Makes the names in a folder last through a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
