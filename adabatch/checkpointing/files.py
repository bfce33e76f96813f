"""Checkpoints as files: written completely or not at all, checked before they are read, and only the last few kept.

A checkpoint is a folder such as ``000012-step-3400``: the twelfth of its run, taken after 3,400 steps. It is written
under another name, its files and folders are synced to the disk, and only then is it renamed. A folder with such a name
is therefore complete unless the disk damaged it. Its ``manifest.json`` has two lines: its contents, with the size and
the SHA-256 of every file, as JSON; and the SHA-256 of that line.

One process at a time writes into a folder of checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeAlias

CHECKPOINT_FORMAT = 1
MANIFEST = "manifest.json"
UNFINISHED = ".unfinished"

_log = logging.getLogger("adabatch")

_NAME = re.compile(r"(\d{6,})-step-\d+")
_BEING_WRITTEN = re.compile(rf"(\d{{6,}})-step-\d+(\.[0-9a-f]+)?{re.escape(UNFINISHED)}")


Files: TypeAlias = Mapping[str, tuple[int, str]]
"""Size in bytes and SHA-256 of files, by their paths inside a checkpoint."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none of the existing ones can be read."""


class Damaged(CheckpointError):
    """A checkpoint is damaged: a file is missing, cut short or changed."""


class NewerFormat(ValueError):
    """A checkpoint was written by a later release."""


class Manifest(NamedTuple):
    """What a checkpoint holds.

    Args:
        contents: the description by its writer, ready for JSON.
        files: all other files of the checkpoint.
    """

    contents: Mapping[str, Any]
    files: Files


def checkpoints_in(folder: Path) -> dict[int, Path]:
    """The finished checkpoints of a folder by their number, the newest first; their files are not checked.

    If the folder is a checkpoint itself, it is the only one.

    Raises:
        CheckpointError: if two have the same number, so that the right one is unknown.
    """
    if not folder.is_dir():
        return {}
    found: dict[int, Path] = {}
    for path in [folder] if is_checkpoint(folder) else sorted(folder.iterdir()):
        if (match := _NAME.fullmatch(path.name)) and path.is_dir():
            other = found.setdefault(int(match[1]), path)
            if other != path:
                raise CheckpointError(
                    f"{folder} holds two checkpoints of number {int(match[1])}, {other.name} and {path.name}, of which "
                    f"one is not a checkpoint of this run: move it away"
                )
    return dict(sorted(found.items(), reverse=True))


def is_checkpoint(path: Path) -> bool:
    """Whether a path has the name of a checkpoint, and is not a folder of checkpoints."""
    return _NAME.fullmatch(path.name) is not None


def being_written(folder: Path) -> list[Path]:
    """The unfinished checkpoints of a folder: of a writer that was killed, or one at work."""
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if _BEING_WRITTEN.fullmatch(path.name)]


def begin_checkpoint(folder: Path, steps: int, nonce: int = 0, *, clear: bool = True) -> int:
    """Makes an empty ``place_of`` the next checkpoint, and returns its number.

    Args:
        folder: of the run's checkpoints; created if it is missing.
        steps: of the run so far.
        nonce: as for ``place_of``.
        clear: whether to remove unfinished ones, whose writers were killed. If not, the number is above theirs too.

    Raises:
        OSError: if the folder cannot be created.
    """
    folder.mkdir(parents=True, exist_ok=True)
    number = 1
    for path in folder.iterdir():
        if match := _BEING_WRITTEN.fullmatch(path.name):
            if clear:
                _remove(path)
                continue
        else:
            match = _NAME.fullmatch(path.name)  # a file of that name too is in the way
        if match:
            number = max(number, int(match[1]) + 1)
    place_of(folder, number, steps, nonce).mkdir()
    return number


def place_of(folder: Path, number: int, steps: int, nonce: int = 0) -> Path:
    """Where a checkpoint is written before it is finished.

    Args:
        nonce: a number that no other writer has, so that two writers never use one place; 0 if there is one writer.
    """
    mark = f".{nonce:x}" if nonce else ""
    return folder / f"{number:06d}-step-{steps}{mark}{UNFINISHED}"


def sealed(unfinished: Path, pattern: str = "**/*") -> Files:
    """Size and SHA-256 of the files of an unfinished checkpoint, after they were synced to the disk.

    Raises:
        OSError: if the disk is full or fails.
    """
    # Synced first: the manifest must not vouch for bytes that are not on the disk yet.
    files = {}
    for path in unfinished.glob(pattern):
        if path.is_file():
            # opened for writing, because some systems refuse to sync a file that was opened for reading only
            with path.open("rb+") as file:
                os.fsync(file.fileno())
                files[path.relative_to(unfinished).as_posix()] = (path.stat().st_size, _digest(file))
    return files


def _remove(path: Path) -> None:
    """Removes what is at a path; a link is removed, but not its target.

    Raises:
        OSError: if it cannot be removed.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)


def finish(
    unfinished: Path,
    contents: Mapping[str, Any],
    files: Files,
    *,
    keep: int,
    damaged: Collection[Path] = (),
    fence: Callable[[], None] = lambda: None,
) -> Path:
    """Finishes a checkpoint: writes its manifest and renames it; returns its final path.

    Args:
        unfinished: holds all files of the checkpoint.
        contents: the description for the manifest, ready for JSON.
        files: all of them, as ``sealed`` gave them.
        keep: how many checkpoints to keep, including this one.
        damaged: checkpoints that are known to be damaged, and do not count.
        fence: called before the checkpoint is put in place; raises an error if this process may no longer write.

    Raises:
        OSError: if the disk is full or fails.
    """
    line = json.dumps({"format": CHECKPOINT_FORMAT, "contents": contents, "files": files}, allow_nan=False)
    with (unfinished / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(f"{line}\n{hashlib.sha256(line.encode()).hexdigest()}\n")
        file.flush()
        os.fsync(file.fileno())
    # A synced file may still be lost with its name, which is an entry of its folder.
    for path in [*(path for path in unfinished.rglob("*") if path.is_dir()), unfinished]:
        _sync_folder(path)
    finished = unfinished.with_name(unfinished.name.partition(".")[0])
    # As late as possible: a process that has taken the folder over in the meantime must not find this checkpoint in it.
    fence()
    unfinished.rename(finished)
    _sync_folder(finished.parent)
    try:
        _prune(finished.parent, keep, damaged)
    except (OSError, CheckpointError) as error:  # the new checkpoint is in place, so this is not an error of the save
        _log.warning("checkpoints older than %s could not be removed: %s", finished, error)
    return finished


def abandon(unfinished: Path) -> None:
    """Removes the files of a checkpoint that will not be finished, as far as possible."""
    shutil.rmtree(unfinished, ignore_errors=True)


def check_files(path: Path, *, share: int = 0, of: int = 1) -> Manifest:
    """The manifest of a checkpoint, after its files were checked against it.

    Args:
        path: the checkpoint.
        share, of: read only every ``of``-th file, from number ``share`` on, so that several ranks share the work.
            Existence and size of all files are always checked.

    Raises:
        Damaged: names the file and what is wrong with it.
        NewerFormat: if a later release wrote it.
    """
    manifest = _read_manifest(path)
    # sorted, so that all ranks number the files alike, and each is read by one of them
    for index, (name, (size, digest)) in enumerate(sorted(manifest.files.items())):
        file = path / name
        try:
            # The size of every file costs nothing; only a share of the contents is read.
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
        # Not by splitting lines: a flipped bit may turn any byte into a line break.
        line, _, rest = (path / MANIFEST).read_bytes().partition(b"\n")
    except OSError as error:
        raise Damaged(f"{path}: {MANIFEST} cannot be read ({error.strerror})") from error
    # checked before the JSON is parsed, so that what a damaged byte makes of it is never trusted
    if rest != hashlib.sha256(line).hexdigest().encode() + b"\n":
        raise Damaged(f"{path}: {MANIFEST} does not match its own checksum")
    try:
        manifest = json.loads(line)
        number = manifest["format"]
        if not isinstance(number, int) or number < 1:
            raise TypeError(f"its format is {number!r}")
        if number > CHECKPOINT_FORMAT:
            raise NewerFormat(
                f"the checkpoint {path} has format {number}, this version reads up to {CHECKPOINT_FORMAT}: upgrade "
                f"adabatch"
            )
        files = {name: (size, digest) for name, (size, digest) in manifest["files"].items()}
        contents = manifest["contents"]
        if not isinstance(contents, dict):
            raise TypeError("its contents are not an object")
        for name, (size, digest) in files.items():
            # a manifest must not lead out of its checkpoint, whatever its checksum says
            inside = not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts
            if not (inside and isinstance(size, int) and isinstance(digest, str)):
                raise TypeError(f"its entry for {name!r} is not a file of a checkpoint with a size and a checksum")
    except NewerFormat:
        raise
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise Damaged(
            f"{path}: {MANIFEST} matches its checksum, and is not a manifest of a checkpoint: {error}"
        ) from None
    return Manifest(contents, files)


def _prune(folder: Path, keep: int, damaged: Collection[Path]) -> None:
    """Removes the checkpoints that are older than the ``keep`` newest good ones."""
    good = 0
    for path in checkpoints_in(folder).values():
        if good >= keep:
            # Renamed first: if the process is killed in the middle, the rest must not look like a damaged checkpoint.
            expired = path.with_name(path.name + UNFINISHED)
            path.rename(expired)
            with suppress(OSError):
                _remove(expired)
        # damaged ones stay until enough good ones are newer, and never count
        good += path not in damaged


def _digest(file: Any) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(path: Path) -> None:
    """Syncs the names in a folder to the disk, so that they survive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
