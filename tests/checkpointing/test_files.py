"""Checkpoints as files: whole or not there, and no damage goes unseen."""

from __future__ import annotations

import json
import shutil
from hashlib import sha256
from pathlib import Path

import pytest

from adabatch.checkpointing.files import (
    MANIFEST,
    UNFINISHED,
    CheckpointError,
    Damaged,
    NewerFormat,
    begin_checkpoint,
    check_files,
    checkpoints_in,
    finish,
    place_of,
    sealed,
)
from adabatch.checkpointing.newest import newest_checkpoint
from adabatch.runtime.collectives import Collectives

CONTENTS = {
    "state.pt": bytes(range(256)) * 11,
    "shards/__0_0.distcp": b"shard" * 40,
    "shards/.metadata": b"what is where" * 5,
}


def written(folder: Path, *, steps: int = 1, keep: int = 9, damaged: tuple[Path, ...] = ()) -> Path:
    """A checkpoint of three small files."""
    place = place_of(folder, begin_checkpoint(folder, steps), steps)
    for name, content in CONTENTS.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(content)
    return finish(place, {"steps": steps}, sealed(place), keep=keep, damaged=damaged)


def newest(folder: Path) -> Path | None:
    found = newest_checkpoint(folder, Collectives())
    return None if found is None else found.path


def test_what_is_finished_is_found_and_holds_what_was_written(tmp_path: Path) -> None:
    path = written(tmp_path / "deep" / "run", steps=34)
    assert path.name == "000001-step-34"
    manifest = check_files(path)
    assert manifest.contents == {"steps": 34}
    assert {name: size for name, (size, _) in manifest.files.items()} == {n: len(c) for n, c in CONTENTS.items()}
    assert all(digest == sha256(CONTENTS[name]).hexdigest() for name, (_, digest) in manifest.files.items())
    assert newest(tmp_path / "deep" / "run") == path
    assert newest(path) == path  # one checkpoint may be named itself
    assert newest(tmp_path / "nowhere") is None


def test_the_last_few_are_kept_by_number_not_by_step(tmp_path: Path) -> None:
    for steps in (10, 20, 30, 15):  # a run that went back to 10, and on to 15
        written(tmp_path, steps=steps, keep=2)
    assert [path.name for path in checkpoints_in(tmp_path).values()] == ["000004-step-15", "000003-step-30"]


def test_a_damaged_one_does_not_count_among_those_kept(tmp_path: Path) -> None:
    good, bad = written(tmp_path), written(tmp_path)
    (bad / "state.pt").unlink()
    written(tmp_path, keep=2, damaged=(bad,))
    assert good in checkpoints_in(tmp_path).values()
    written(tmp_path, keep=2, damaged=(bad,))
    assert list(checkpoints_in(tmp_path)) == [4, 3]


def test_an_unfinished_one_is_not_seen_and_removed_by_the_next(tmp_path: Path) -> None:
    path = written(tmp_path)
    left = place_of(tmp_path, begin_checkpoint(tmp_path, 7), 7)
    (left / "state.pt").write_bytes(b"half")
    assert list(checkpoints_in(tmp_path).values()) == [path]
    assert newest(tmp_path) == path
    written(tmp_path)
    assert not left.exists()


def test_what_a_kill_leaves_of_a_pruned_one_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path)
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: None)  # the kill comes before a file is gone
    written(tmp_path, keep=1)
    assert list(checkpoints_in(tmp_path)) == [2]


def test_a_file_truncated_at_any_tenth_is_named(tmp_path: Path) -> None:
    good, bad = written(tmp_path), written(tmp_path)
    for name in (*CONTENTS, MANIFEST):
        whole = (bad / name).read_bytes()
        for tenth in range(10):
            (bad / name).write_bytes(whole[: len(whole) * tenth // 10])
            with pytest.raises(Damaged, match=name):
                check_files(bad)
            assert newest(tmp_path) == good
        (bad / name).write_bytes(whole)
    assert newest(tmp_path) == bad


def test_a_bit_flipped_anywhere_is_seen(tmp_path: Path) -> None:
    """At 200 places, spread over all files with the same distance; each bit of a byte in turn."""
    good, bad = written(tmp_path), written(tmp_path)
    wholes = {name: (bad / name).read_bytes() for name in (*CONTENTS, MANIFEST)}
    places = [(name, place) for name, whole in wholes.items() for place in range(len(whole))]
    chosen = [places[index * len(places) // 200] for index in range(200)]
    assert {name for name, _ in chosen} == wholes.keys()
    for index, (name, place) in enumerate(chosen):
        flipped = bytearray(wholes[name])
        flipped[place] ^= 1 << index % 8
        (bad / name).write_bytes(flipped)
        with pytest.raises(Damaged, match=name):
            check_files(bad)
        assert newest(tmp_path) == good
        (bad / name).write_bytes(wholes[name])


@pytest.mark.parametrize("name", [*CONTENTS, MANIFEST])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    good, bad = written(tmp_path), written(tmp_path)
    (bad / name).unlink()
    with pytest.raises(Damaged, match=f"{name} cannot be read"):
        check_files(bad)
    assert newest(tmp_path) == good


def test_all_damaged_is_an_error_that_names_each(tmp_path: Path) -> None:
    for path in (written(tmp_path), written(tmp_path)):
        (path / "state.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"000002-step-1: state.pt has 0 bytes, 2,816 .*000001-step-1: state.pt"):
        newest(tmp_path)


def test_a_newer_format_is_an_error_and_no_older_one_is_taken(tmp_path: Path) -> None:
    written(tmp_path)
    path = written(tmp_path) / MANIFEST
    line = json.dumps({"format": 2, "anything": "else"})
    path.write_text(f"{line}\n{sha256(line.encode()).hexdigest()}\n")
    with pytest.raises(NewerFormat, match="000002-step-1 has format 2, this version reads up to 1: upgrade adabatch"):
        newest(tmp_path)


def rewritten(path: Path, line: str) -> None:
    """A manifest with a right checksum."""
    (path / MANIFEST).write_text(f"{line}\n{sha256(line.encode()).hexdigest()}\n")


@pytest.mark.parametrize(
    "line",
    [
        "",
        "[]",
        "7",
        "{}",
        '{"format": "1", "contents": {}, "files": {}}',
        '{"format": 0, "contents": {}, "files": {}}',
        '{"format": 1, "files": {}}',
        '{"format": 1, "contents": [], "files": {}}',
        '{"format": 1, "contents": {}, "files": []}',
        '{"format": 1, "contents": {}, "files": {"state.pt": 7}}',
        '{"format": 1, "contents": {}, "files": {"state.pt": ["7", "abc"]}}',
        '{"format": 1, "contents": {}, "files": {"../../outside": [7, "abc"]}}',
        '{"format": 1, "contents": {}, "files": {"/etc/hostname": [7, "abc"]}}',
    ],
)
def test_a_manifest_with_a_right_checksum_and_wrong_contents_is_damage(tmp_path: Path, line: str) -> None:
    good, bad = written(tmp_path), written(tmp_path)
    rewritten(bad, line)
    with pytest.raises(Damaged, match=r"000002-step-1: manifest\.json matches its checksum, and is not a manifest"):
        check_files(bad)
    assert newest(tmp_path) == good


def test_links_strays_and_what_looks_like_ours_are_left_alone_and_in_nobodys_way(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    moved = written(folder)
    moved.rename(elsewhere)
    moved.symlink_to(elsewhere)  # to another disk, say
    assert newest(folder) == moved
    (folder / "notes.unfinished").mkdir()
    (folder / "000002-step-3.unfinished").symlink_to(elsewhere)
    (folder / "000003-step-4").write_text("a file")
    (folder / "12-step-4").mkdir()
    (folder / "000004-step-5.old").mkdir()
    path = written(folder, keep=1)
    assert path.name == "000004-step-1"
    assert newest(folder) == path
    left = {each.name for each in folder.iterdir()}
    assert left == {"notes.unfinished", "000003-step-4", "12-step-4", "000004-step-5.old", "000004-step-1"}
    check_files(elsewhere)  # what a link points to stays


def test_two_checkpoints_of_one_number_are_named(tmp_path: Path) -> None:
    path = written(tmp_path)
    shutil.copytree(path, tmp_path / "000001-step-9")
    with pytest.raises(CheckpointError, match="two checkpoints of number 1, 000001-step-1 and 000001-step-9"):
        newest(tmp_path)
    assert written(tmp_path).name == "000002-step-1"  # a run does not lose what it writes


def test_a_checkpoint_stands_where_older_ones_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    written(tmp_path)
    rename = Path.rename

    def refused(self: Path, target: Path) -> Path:
        if str(target).endswith(UNFINISHED):
            raise PermissionError(13, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refused)
    path = written(tmp_path, keep=1)
    assert newest(tmp_path) == path
    assert "older than" in caplog.text
    assert "Permission denied" in caplog.text


def test_ranks_share_the_reading_and_each_looks_at_all_sizes(tmp_path: Path) -> None:
    path = written(tmp_path)
    (path / "state.pt").write_bytes(bytes(len(CONTENTS["state.pt"])))  # the last of three by name
    check_files(path, share=0, of=3)
    check_files(path, share=1, of=3)
    with pytest.raises(Damaged, match=r"state\.pt"):
        check_files(path, share=2, of=3)
    (path / "state.pt").write_bytes(b"short")
    with pytest.raises(Damaged, match=r"state\.pt has 5 bytes"):
        check_files(path, share=0, of=3)


def test_a_full_disk_leaves_the_checkpoints_that_were_there(small_disk: Path) -> None:
    path = written(small_disk)
    place = place_of(small_disk, begin_checkpoint(small_disk, 2), 2)
    with pytest.raises(OSError, match="No space left"):
        (place / "state.pt").write_bytes(bytes(100_000))
    assert newest(small_disk) == path
    (place / "state.pt").write_bytes(bytes(8))
    (place / "filler").write_bytes(bytes(36_000))
    files = sealed(place)
    with pytest.raises(OSError, match="No space left"):  # where the manifest comes to be written
        finish(place, {"long": "x" * 30_000}, files, keep=3)
    assert newest(small_disk) == path
