"""Is anything lost when a run is killed, ranks come, go or fail, numbers go wrong, or checkpoints and configs do?

    python benchmarks/faults.py [--kills 100] [--engine-kills 10] [--configs 10000] [--only PART] [--no-save]

*Kills*: `adabatch train` on two processes is killed with SIGKILL at random instants, one process or both; every second
kill waits for the next moment at which a checkpoint is being written. Each time the same command goes on. A run that is
through is compared with one that nobody disturbed: weights, optimizer, batch sizes, schedule, place in the data and
random numbers of the last checkpoint, the journal, and which examples each rank was given in each step; to the bit.
*Engines*: the same with FSDP2 and with DeepSpeed, whose own checkpoints are not checked for damage. *Loaders*: ranks
read an IterableDataset, a loader with a DistributedSampler and a GlobalOrder by loading processes that are forked or
spawned, and are forked or spawned themselves; the IterableDataset raises, loses a loading process, is shorter on one
rank or the same on all. *Workers*: kills under torchrun's agents, on 2, 1, 3 and 2 processes. *Damage*: checkpoints are
cut, changed and taken apart, and loaded. *Folders*: two runs start in one folder, a frozen one wakes up beside its
successor, and a disk fills under the journal. *Ranks*: of three gloo ranks one is killed, hangs, freezes or raises in
each part of a step, under a watchdog. *Settings*: of two ranks the second is given one setting that differs, each
setting in turn. *Numbers*: one that is not finite comes up on one of two ranks, in each micro-batch of a step.
*Configs*: random ones, most of them spoilt, go through `adabatch train` to their first plan or an error.

The job of kills and workers is that of tests/support/jobs.py: a network of 129 parameters with dropout, 200 examples,
127 steps, a checkpoint every five of them; that of engines is a third as long.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from _harness import Machine, Table, publish
from support.elastic import check_order, two_one_three_two
from support.jobs import PRELOADED, Attempt, Ended, Killed, Net, command, ended, kill_once, killed_runs, same, steps_run
from support.loading import KINDS as LOADERS
from support.loading import STARTS, STREAM_FAULTS, by_itself, several, stream_with
from support.lost_ranks import BOUND, PLACES, TIMEOUT, ends_of
from support.nonfinite import POISONS, POLICIES, all_cases, outcomes
from support.random_configs import outcome, random_config
from support.ranks import run_ranks
from support.settings import DIFFERENCES, said
from torch.multiprocessing import start_processes

import adabatch
from adabatch.checkpointing.files import MANIFEST, NewerFormat, checkpoints_in
from adabatch.checkpointing.lock import LOCK
from adabatch.journal.writer import Journal
from adabatch.report.curves import read_curves

FLIPS = 200
PARTS = ("kills", "engines", "loaders", "workers", "damage", "folders", "ranks", "settings", "numbers", "configs")
ENGINES: dict[str, dict[str, Any]] = {
    "FSDP2": {"engine": "fsdp2"},
    "DeepSpeed, ZeRO 2": {"zero_optimization": {"stage": 2}},
    "DeepSpeed, ZeRO 3": {"zero_optimization": {"stage": 3}},
}
DEEPSPEED_ON_A_CPU = {"DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"}
FAULTS = {"kill": "killed", "hang": "hangs", "freeze": "frozen", "raise": "raises an error"}
KINDS = {
    "planned": "a plan that can be run, in a run that begins",
    "refused": "an error that names what is wrong",
    "unclear": "another error",
    "crashed": "a traceback",
    "no plan": "a run without a plan, outside its limits or with a rate that is no number",
}
Outcome = tuple[str, int, int]
"""What was done, how often, and how often it ended as it should."""


def kills(folder: Path, count: int) -> tuple[list[tuple[str, ...]], list[str], dict[str, Any]]:
    """The kills in a table, by what was killed."""
    whole = folder / "whole"
    arguments = command(whole)
    assert Attempt(whole, arguments, 2).join() == [0, 0]
    expected, equal = ended(whole), []

    def check(run: Path) -> None:
        found = ended(run)
        equal.append([name for name in Ended._fields if same(getattr(found, name), getattr(expected, name))])

    done: list[Killed] = []
    # Ten kills a run: a run that is killed too often proves its end only once.
    for kill in killed_runs(folder, count, chance=random.Random(1), check=check, each=10):
        done.append(kill)
    names = {(0, 1): "both processes", (0,): "the one that writes", (1,): "the other one"}
    rows = [
        (
            name,
            str(sum(kill.ranks == ranks for kill in done)),
            str(sum(kill.ranks == ranks and kill.writing for kill in done)),
            str(sum(kill.ranks == ranks and kill.checkpoints == 0 for kill in done)),
        )
        for ranks, name in names.items()
    ]
    rows.append(
        (
            "all",
            str(len(done)),
            str(sum(kill.writing for kill in done)),
            str(sum(kill.checkpoints == 0 for kill in done)),
        )
    )
    through = len(equal)
    told = [
        f"{sum(name in each for each in equal)} of {through} runs that were killed {len(done)} times in all ended with "
        f"{what} of the uninterrupted run, to the bit."
        for name, what in (
            ("state", "the state"),
            ("journal", "the journal"),
            ("given", "the order of examples"),
        )
    ]
    return rows, told, {"kills": [kill._asdict() for kill in done], "equal": equal}


def engines(folder: Path, count: int) -> tuple[list[tuple[str, ...]], list[str], dict[str, Any]]:
    """Kills of a run on each engine with checkpoints of another kind, and whether it ends as if it had not been."""
    rows, raw = [], {}
    for number, (name, settings) in enumerate(ENGINES.items()):
        place = folder / str(number)
        place.mkdir(parents=True)
        changes: dict[str, Any] = {**settings, "total": {"count": 2000, "unit": "examples"}}
        if "zero_optimization" in settings:
            config = place / "deepspeed.json"
            config.write_text(json.dumps({"gradient_clipping": 0.0, "steps_per_print": 10**9, **settings}))
            changes = {"engine": "deepspeed", "engine_config": str(config), "total": changes["total"]}
        whole, run, patience = place / "whole", place / "run", 400
        arguments = command(whole, **changes)
        undisturbed = Attempt(whole, arguments, 2, variables=DEEPSPEED_ON_A_CPU)
        assert undisturbed.join(patience) == [0, 0], (whole / "output").read_text()
        chance, killed, arguments = random.Random(1), [], command(run, **changes)
        while len(killed) < count:
            kill = kill_once(
                run,
                arguments,
                chance,
                in_a_write=len(killed) % 2 == 1,
                most_steps=max(2, 40 // count),
                variables=DEEPSPEED_ON_A_CPU,
            )
            if kill is None:
                break
            killed.append(kill)
        if len(killed) == count:
            last = Attempt(run, arguments, 2, variables=DEEPSPEED_ON_A_CPU)
            assert last.join(patience) == [0, 0], (run / "output").read_text()
        found, expected = ended(run), ended(whole)
        equal = [same(getattr(found, each), getattr(expected, each)) for each in Ended._fields]
        raw[name] = {"kills": [kill._asdict() for kill in killed], "equal": equal}
        writing = sum(kill.writing for kill in killed)
        rows.append((name, str(len(killed)), str(writing), *("yes" if each else "no" for each in equal)))
    through = sum("no" not in row for row in rows)
    told = f"{through} of {len(rows)} killed runs on FSDP2 and DeepSpeed ended as undisturbed ones, to the bit."
    return rows, [told], raw


def loaders(folder: Path) -> list[Outcome]:
    """Kinds of loaders and start methods that must give the same, and streams with a fault that must be named."""
    folder.mkdir()
    found = run_ranks(several, 2, folder, ("none", *STARTS), LOADERS, timeout=900)
    outcomes: list[Outcome] = []
    for kind in LOADERS:
        equal = [all(each[kind, start] == each[kind, "none"] for each in found) for start in STARTS]
        what = f"{kind}, loading processes forked and spawned: examples and weights as without, to the bit"
        outcomes.append((what, len(equal), sum(equal)))
    for start in STARTS:
        results = folder / start
        arguments = (2, f"{results}.meeting", str(results), "GlobalOrder")
        start_processes(by_itself, arguments, nprocs=2, start_method=start)
        good = [
            torch.load(f"{results}.{rank}", weights_only=True) == tuple(found[rank]["GlobalOrder", "none"])
            for rank in range(2)
        ]
        outcomes.append((f"ranks that are started by {start}: examples and weights the same", len(good), sum(good)))
    for fault, words in STREAM_FAULTS.items():
        good = [
            stream_with(folder / f"{fault}-{start}", start, fault)
            for start in STARTS
            if not (start == "spawn" and fault in ("shorter", "same"))  # of no process
        ]
        right = "both end together" if fault == "shorter" else "both ranks name it"
        outcomes.append((f"IterableDataset: {words}: {right}", len(good), sum(good)))
    return outcomes


def workers(folder: Path) -> tuple[list[tuple[str, ...]], list[str]]:
    """The steps of each stretch between changes of the world size."""
    journal = two_one_three_two(folder)
    check_order(folder, journal)
    rows = []
    for size, stretch in itertools.groupby(journal, lambda line: line["plan"]["dp_size"]):
        steps = list(stretch)
        batches = sorted(line["plan"]["global_batch_size"] for line in steps)
        rows.append((str(size), str(len(steps)), f"{batches[0]} to {batches[-1]}", str(steps[-1]["examples"])))
    return rows, ["On 2, 1, 3 and 2 processes each step took the next examples of the one order, within its limits."]


@contextmanager
def damaged(folder: Path) -> Iterator[tuple[Path, Path]]:
    """A copy of two good checkpoints, the older one first."""
    copy = folder.with_name("copy")
    shutil.copytree(folder, copy)
    newest, before = list(checkpoints_in(copy).values())[:2]
    yield before, newest
    shutil.rmtree(copy)


def damage(folder: Path) -> list[Outcome]:
    """Every kind of damage to a checkpoint, and how often the one before was used and the damage named."""
    logging.getLogger("adabatch").setLevel(logging.ERROR)  # each is a warning there
    network = Net()
    for seed in range(2):
        adabatch.save(folder, model=network, others={"second": Net()}, config={"seed": seed})

    def passed_over(spoil: Callable[[Path], None], name: str) -> bool:
        with damaged(folder) as (before, newest):
            spoil(newest)
            loaded = adabatch.load(before.parent, model=network)
            return (
                loaded is not None and loaded.path == before and len(loaded.damaged) == 1 and name in loaded.damaged[0]
            )

    newest = next(iter(checkpoints_in(folder).values()))
    files = {path.name: path.read_bytes() for path in newest.iterdir()}
    cuts = [
        passed_over(lambda path, name=name, tenth=tenth: _cut(path / name, tenth), name)
        for name in files
        for tenth in range(10)
    ]
    places = [(name, place) for name, content in files.items() for place in range(len(content))]
    flips = []
    for index in range(FLIPS):
        name, place = places[index * len(places) // FLIPS]
        flips.append(passed_over(lambda path, n=name, p=place, b=index % 8: _flip(path / n, p, b), name))
    missing = [passed_over(lambda path, name=name: (path / name).unlink(), name) for name in files]
    return [
        ("cut at each tenth of each file: the one before is used", len(cuts), sum(cuts)),
        ("a bit flipped: the one before is used", len(flips), sum(flips)),
        ("a file missing: the one before is used", len(missing), sum(missing)),
        ("a newer format: a clear error", 1, int(_newer_is_refused(folder, network))),
    ]


def _cut(path: Path, tenth: int) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * tenth // 10])


def _flip(path: Path, place: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def _newer_is_refused(folder: Path, network: Net) -> bool:
    with damaged(folder) as (before, newest):
        line = (newest / MANIFEST).read_text().splitlines()[0].replace('"format": 1', '"format": 2', 1)
        (newest / MANIFEST).write_text(f"{line}\n{sha256(line.encode()).hexdigest()}\n")
        try:
            adabatch.load(before.parent, model=network)
        except NewerFormat:
            return True
        return False


def full_disk(folder: Path) -> list[Outcome]:
    """Saves to a file system of 64 KiB until it is full; nothing where it cannot be mounted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        return []
    try:
        saved, network = 0, Net()
        try:
            for _ in range(9):
                adabatch.save(folder / "checkpoints", model=network, keep=9)
                saved += 1
        except adabatch.checkpointing.CheckpointError as error:
            loaded = adabatch.load(folder / "checkpoints", model=Net())
            clear = "No space left" in str(error) and loaded is not None and loaded.path.name.startswith(f"{saved:06d}")
            return [("a full disk: a clear error, and the one before is used", 1, int(clear))]
        return [("a full disk: a clear error, and the one before is used", 1, 0)]
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def folders(folder: Path, count: int) -> list[Outcome]:
    """A second start beside a run; and a run that is frozen, loses its folder to a successor, and wakes up."""
    whole, short, patience = folder / "whole", {"count": 1500, "unit": "examples"}, 300
    assert Attempt(whole, command(whole, total=short), 1).join(patience) == [0], (whole / "output").read_text()
    expected = ended(whole)
    refused = fenced = equal = 0
    for number in range(count):
        run = folder / str(number)
        lock = run / "run" / "checkpoints" / LOCK
        slow = {"class_path": "support.jobs.Net", "init_args": {"pause": 0.003}}
        arguments = command(run, model=slow, total=short, hang_timeout=None)
        orphan = Attempt(run, arguments, 1)
        while steps_run(run) < 12 + number:
            assert orphan.running(), (run / "output").read_text()
            time.sleep(0.01)
        orphan.signal(0, signal.SIGSTOP)
        second = Attempt(run, arguments, 1).join(patience)
        said = f"is in use by process {orphan.processes[0].pid} on "
        refused += second == [1] and said in (run / "output").read_text()
        lock.unlink()  # by its operator, who thinks it dead
        successor = Attempt(run, arguments, 1)
        while f'"pid": {successor.processes[0].pid}' not in (lock.read_text() if lock.exists() else ""):
            assert successor.running(), (run / "output").read_text()
            time.sleep(0.01)
        orphan.signal(0, signal.SIGCONT)
        fenced += orphan.join(patience) == [1] and "was taken from this process" in (run / "output").read_text()
        assert successor.join(patience) == [0], (run / "output").read_text()
        found = ended(run)
        equal += same(found.state, expected.state) and found.journal == expected.journal
    return [
        ("a second start in the folder of a run: an error that names the holder", count, refused),
        ("an orphan that wakes up beside its successor: it writes nothing more, and ends", count, fenced),
        ("the successor of an orphan: its end is that of an undisturbed run, to the bit", count, equal),
    ]


def full_journal(folder: Path) -> list[Outcome]:
    """Writes a journal to a file system of 64 KiB until it is full; nothing where it cannot be mounted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        return []
    try:
        journal, written = Journal(folder / "journal.jsonl"), 0
        entry = {"format": 1, "plan": {"global_batch_size": 8}, "note": "x" * 700}
        try:
            for step in range(1000):
                journal.write({**entry, "step": step, "examples": 8 * step})
                written += 1
        except OSError as error:
            clear = "the journal could not be written: No space left" in str(error)
            whole = len(read_curves(folder / "journal.jsonl").examples) == written > 0
            ends = (folder / "journal.jsonl").read_bytes().endswith(b"\n")
            return [
                (
                    "a disk that fills under the journal: a clear error, and whole lines only",
                    1,
                    int(clear and whole and ends),
                )
            ]
        return [("a disk that fills under the journal: a clear error, and whole lines only", 1, 0)]
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def ranks(folder: Path) -> tuple[list[tuple[str, ...]], list[str], list[tuple[str, str, int, float, bool]]]:
    """How runs end in which one of three ranks comes to harm: by fault and part of a step."""
    done = []
    for fault, part, victim in itertools.product(FAULTS, PLACES, (0, 1)):
        place = folder / f"{fault}-{part}-{victim}"
        place.mkdir(parents=True)
        ends = ends_of(place, fault, part, size=3, victim=victim)
        told = [account for rank, account in enumerate(ends.accounts) if rank != victim]
        named = all(_names(victim, part, account) for account in told)
        done.append((fault, part, victim, ends.seconds, named))
    rows = []
    for fault, words in FAULTS.items():
        mine = [run for run in done if run[0] == fault]
        longest = max(seconds for *_, seconds, _ in mine)
        missed = sorted({part for _, part, _, _, named in mine if not named})
        named = sum(named for *_, named in mine)
        rows.append((words, str(len(mine)), str(named), ", ".join(missed) or "none", f"{longest:.0f}"))
    bounded = sum(seconds < BOUND for *_, seconds, _ in done)
    told = [f"{bounded} of {len(done)} runs ended within {BOUND:.0f} s, the start of the processes in it."]
    return rows, told, done


def _names(victim: int, part: str, account: str) -> bool:
    """Whether a rank that ended names the one that was lost; or the place, where all stand there and none can tell."""
    lost = (f"rank {victim} has died", f"rank {victim} has not", f"rank {victim} raised", f"all in {PLACES[part]}")
    return any(words in account for words in lost)


def settings(folder: Path) -> tuple[list[tuple[str, ...]], list[str], dict[str, list[str]]]:
    """What two ranks say that differ in one setting, and whether both name it before the first step."""
    folder.mkdir()
    found = run_ranks(said, 2, folder, timeout=300)
    told = {name: [each[name] for each in found] for name in DIFFERENCES}
    named = {name: all(DIFFERENCES[name][1] in each for each in both) for name, both in told.items()}
    rows = [(name, "yes" if named[name] else "no") for name in DIFFERENCES]
    return rows, [f"{sum(named.values())} of {len(named)} settings that differ were named on both ranks."], told


def numbers(folder: Path) -> list[Outcome]:
    """Updates left out on both ranks, by what was not finite."""
    folder.mkdir()
    results = run_ranks(all_cases, 2, folder, str(folder), timeout=300)
    found = outcomes(results, folder)
    return [
        (
            f"{poison}, {policy}",
            sum(case[1:3] == (policy, poison) for case in found),
            sum(left_out for case, left_out in found.items() if case[1:3] == (policy, poison)),
        )
        for poison, policy in itertools.product(POISONS, POLICIES)
    ]


def configs(count: int) -> tuple[list[tuple[str, ...]], list[str], list[tuple[int, str, str]]]:
    """What becomes of random configs, one process a core."""
    chance = random.Random(1)
    made = (random_config(chance) for _ in range(count))
    kinds: Counter[str] = Counter()
    bad = []
    with multiprocessing.get_context("forkserver").Pool() as processes:
        for number, (kind, message) in enumerate(processes.imap(outcome, made, chunksize=50)):
            kinds[kind] += 1
            if kind not in ("planned", "refused"):
                bad.append((number, kind, message))
    rows = [(words, str(kinds[kind])) for kind, words in KINDS.items()]
    return rows, [f"{len(bad)} of {count:,} random configs made neither a plan nor a clear error."], bad


def texts(counted: list[tuple[str, int, int]]) -> list[tuple[str, ...]]:
    """Rows of a table: what should happen, how often it was tried, and how often it happened."""
    return [(what, str(tries), str(good)) for what, tries, good in counted]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="how often a run is killed")
    parser.add_argument("--engine-kills", type=int, default=10, help="how often a run on another engine is; 0 for none")
    parser.add_argument("--configs", type=int, default=10_000, help="random configs; 0 leaves them out")
    parser.add_argument("--folders", type=int, default=3, help="how often a folder is contended for")
    parser.add_argument("--only", choices=PARTS, help="one part, into a file of its own")
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args()
    machine = Machine.here()
    if options.only == "engines":  # it is imported once then, and by no part that has nothing to do with it
        os.environ |= DEEPSPEED_ON_A_CPU
        PRELOADED.append("deepspeed")
    tables, told, raw = [], [], {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if options.only in (None, "kills"):
            rows, said, raw = kills(folder / "kills", options.kills)
            columns = ("killed", "times", "while a checkpoint was written", "before there was any")
            tables.append(Table("SIGKILL at random instants", columns, rows))
            told += said
        if options.only in (None, "engines") and options.engine_kills:
            rows, said, killed = engines(folder / "engines", options.engine_kills)
            columns = ("engine", "killed, times", "in a write", "state", "journal", "order of examples")
            tables.append(Table("SIGKILL on FSDP2 and DeepSpeed, and what was as undisturbed", columns, rows))
            told += said
            raw = {**raw, "engines": killed}
        if options.only in (None, "loaders"):
            read = loaders(folder / "loaders")
            table = texts(read)
            tables.append(Table("Loaders and start methods", ("what should happen", "tries", "happened"), table))
            told.append(
                f"{sum(good for *_, good in read)} of {sum(tries for _, tries, _ in read)} cases of loaders and start "
                f"methods went as they should."
            )
            raw = {**raw, "loaders": read}
        if options.only in (None, "workers"):
            rows, said = workers(folder / "workers")
            columns = ("processes", "steps", "batch sizes", "examples before its last step")
            tables.append(Table("Processes come and go under torchrun (limits 12 to 48)", columns, rows))
            told += said
        if options.only in (None, "damage"):
            damages = damage(folder / "damage") + full_disk(folder / "disk")
            table = texts(damages)
            tables.append(Table("Damaged checkpoints", ("damage, and what should happen", "tries", "happened"), table))
            bad = sum(tries - good for _, tries, good in damages)
            told.append(
                f"{bad} of {sum(tries for _, tries, _ in damages)} damages were accepted in silence or crashed."
            )
            raw = {**raw, "damage": damages}
        if options.only in (None, "folders"):
            held = folders(folder / "folders", options.folders) + full_journal(folder / "journal")
            table = texts(held)
            tables.append(
                Table("One run, one folder", ("what comes up, and what should happen", "tries", "happened"), table)
            )
            told.append(
                f"{sum(good for *_, good in held)} of {sum(tries for _, tries, _ in held)} went as they should."
            )
            raw = {**raw, "folders": held}
        if options.only in (None, "ranks"):
            rows, said, runs = ranks(folder / "ranks")
            columns = ("one of three ranks", "runs", "named by both others", "parts where not", "longest, in seconds")
            tables.append(
                Table(f"A rank is lost, under a watchdog of {TIMEOUT:g} s, in: {', '.join(PLACES)}", columns, rows)
            )
            told += said
            raw = {**raw, "ranks": runs}
        if options.only in (None, "settings"):
            rows, named, told_by = settings(folder / "settings")
            columns = ("differs on one of two ranks", "named on both before the first step")
            tables.append(Table("Ranks that differ in a setting", columns, rows))
            told += named
            raw = {**raw, "settings": told_by}
        if options.only in (None, "numbers"):
            found = numbers(folder / "numbers")
            rows = texts(found)
            columns = ("on one of two ranks, in each micro-batch of a step", "steps", "left out on both")
            tables.append(Table("Numbers that are not finite, under DDP and FSDP2", columns, rows))
            told.append(f"{sum(good for *_, good in found)} of {sum(tries for _, tries, _ in found)} were left out.")
            raw = {**raw, "numbers": found}
        if options.only in (None, "configs") and options.configs:
            rows, said, bad = configs(options.configs)
            tables.append(Table("Random configs through adabatch train", ("what comes of one", "configs"), rows))
            told += said
            raw = {**raw, "configs": bad}
    publish(
        f"faults_{options.only}" if options.only else "faults",
        question=(__doc__ or "").splitlines()[0],
        machine=machine,
        tables=tables,
        findings=told,
        data=raw,
        save=not options.no_save,
    )


if __name__ == "__main__":
    main()
