"""`adabatch train` on several processes, started as a launcher does but from one that has torch already; and ended.

The job is tiny, and says on the side which examples each step of each rank was given.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import yaml
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.utils.data import Dataset

from adabatch import NormTest
from adabatch.batch import Observation
from adabatch.batch.needs import Needs
from adabatch.checkpointing.files import UNFINISHED, checkpoints_in
from adabatch.cli.main import main
from support.loops import journal_text
from support.ports import free_port
from support.ranks import PRELOADED

PROCESSES = multiprocessing.get_context("forkserver")

NUM_EXAMPLES = 200
SEED = 6
_given: list[int] = []
"""Examples that this process was given since the last step ended."""


class Places(Dataset[Any]):
    """Regression data that notes who asks for what."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(NUM_EXAMPLES, 6, generator=generator)
        self.y = self.x.sin().sum(1, keepdim=True) + torch.randn(NUM_EXAMPLES, 1, generator=generator)

    def __len__(self) -> int:
        return NUM_EXAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        _given.append(index)
        return self.x[index], self.y[index]


class Net(nn.Module):
    """Two layers and dropout, whose masks come from the rank's random numbers.

    Args:
        pause: seconds that a forward takes at least, so that others have time to interfere.
    """

    def __init__(self, pause: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 1))
        self.pause = pause

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.pause)
        return self.layers(x)


class Watched(NormTest):
    """The norm test; at the end of each step it writes down what this rank was given for it."""

    needs: ClassVar[Needs] = NormTest.needs

    def rest(self, observation: Observation) -> float:  # what the control asks for
        if _given:  # it is asked again for the error bar
            rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            told = {"end": observation.progress.examples, "rank": rank, "size": size, "given": _given}
            with open(f"{os.environ['GIVEN']}.{rank}", "ab", buffering=0) as file:
                file.write(json.dumps(told).encode() + b"\n")  # one call, so all of it or nothing
            _given.clear()
        return super().rest(observation)


def command(folder: Path, **changes: Any) -> list[str]:
    """The arguments of `adabatch train`, its config written down in ``folder``; the run goes to ``folder / "run"``."""
    config = {
        "format": 1,
        "model": {"class_path": "support.jobs.Net"},
        "loss": {"class_path": "torch.nn.MSELoss"},
        "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.01}},
        "train_data": {"class_path": "support.jobs.Places"},
        "criterion": {"class_path": "support.jobs.Watched", "init_args": {"eta": 0.4}},
        "micro_batch_size": 2,
        "limits": {"min": 12, "max": 48},
        "lr_rule": "gain",
        "shape": {"class_path": "adabatch.lr.cosine"},
        "total": {"count": 6000, "unit": "examples"},
        "checkpoint": {"every": {"count": 5, "unit": "steps"}},
        "seed": SEED,
        "out": str(folder / "run"),
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return ["train", "--config", str(path)]


class Attempt:
    """One start of a command on several processes; what they print goes to ``folder / "output"``.

    Args:
        folder: of the job.
        arguments: of the command.
        size: number of processes.
        sync_seconds: what it takes the disk at least to make a file safe.
        variables: of the environment, beside those of a launcher.
        cwd: the working folder; that of the fork server by default.
        apart: the output of each process goes to ``folder / "output.RANK"``.
    """

    def __init__(
        self,
        folder: Path,
        arguments: Sequence[str],
        size: int,
        *,
        sync_seconds: float = 0.0,
        variables: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        apart: bool = False,
    ) -> None:
        PROCESSES.set_forkserver_preload(PRELOADED)
        port = free_port()
        self.processes = [
            PROCESSES.Process(
                target=_run,
                args=(
                    list(arguments),
                    {
                        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
                        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GIVEN": str(folder / "given"),
                        **(variables or {}),
                    },
                    folder / (f"output.{rank}" if apart else "output"),
                    sync_seconds,
                    cwd,
                ),
            )
            for rank in range(size)
        ]  # fmt: skip
        for process in self.processes:
            process.start()

    def running(self) -> bool:
        return any(process.exitcode is None for process in self.processes)

    def join(self, timeout: float = 120) -> list[int]:
        """The exit codes of all, once they have ended; those that do not end in time are killed."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        self.kill(range(len(self.processes)))
        return [process.exitcode or 0 for process in self.processes]

    def signal(self, rank: int, number: signal.Signals) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        if self.processes[rank].exitcode is None:
            os.kill(pid, number)

    def kill(self, ranks: Sequence[int]) -> None:
        for rank in ranks:
            self.processes[rank].kill()
        for rank in ranks:
            self.processes[rank].join()


def _run(
    arguments: list[str], environment: dict[str, str], output: Path, sync_seconds: float, cwd: Path | None
) -> None:
    prepare(environment, output)
    if cwd is not None:
        os.chdir(cwd)
    if sync_seconds:
        fsync = os.fsync

        def slow_fsync(handle: int) -> None:
            time.sleep(sync_seconds)
            fsync(handle)

        os.fsync = slow_fsync
    sys.exit(main(arguments))


def prepare(environment: dict[str, str], output: Path) -> None:
    """Makes a fresh process one of a launcher's."""
    os.environ |= environment
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    torch.set_num_threads(1)


class Ended(NamedTuple):
    """What a finished run left, in forms that can be compared.

    Args:
        state: of its last checkpoint: weights, optimizer, batches, schedule, place in the data, random numbers.
        journal: the bytes.
        given: what each rank was given for the step that ended at a number of examples.
    """

    state: dict[str, Any]
    journal: str
    given: dict[tuple[int, int], list[int]]


def ended(folder: Path) -> Ended:
    """The result of the run in ``folder``.

    Raises:
        AssertionError: a step was run twice, after a kill, with other examples.
    """
    given: dict[tuple[int, int], list[int]] = {}
    for path in sorted(folder.glob("given.*")):
        for told in map(json.loads, path.read_text().splitlines()):
            key = (told["end"], told["rank"])
            assert given.setdefault(key, told["given"]) == told["given"], f"step to {key[0]}, rank {key[1]}"
    assert given, "no rank said what it was given"
    state = _state_in(folder / "run" / "checkpoints")
    return Ended(state, journal_text(folder / "run" / "journal.jsonl"), given)


def _state_in(checkpoints: Path) -> dict[str, Any]:
    """The tensors and plain values of the newest checkpoint of a run, on whatever engine."""
    newest = newest_of_deepspeed(checkpoints)
    if newest is not None:  # trusted files, with objects of DeepSpeed's in them
        files = {path.name: torch.load(path, weights_only=False) for path in sorted(newest.glob("*.pt"))}
        _drop_padding(files)
        return {name: _plain(state) for name, state in files.items()}
    newest = next(iter(checkpoints_in(checkpoints).values()))
    state: dict[str, Any] = torch.load(newest / "state.pt", weights_only=True)
    if (newest / "shards").exists():
        with tempfile.TemporaryDirectory() as place:
            dcp_to_torch_save(newest / "shards", Path(place) / "whole.pt")
            state["shards"] = torch.load(Path(place) / "whole.pt", weights_only=True)
    return state


def _drop_padding(files: dict[str, Any]) -> None:
    """ZeRO 3 pads each parameter to a multiple of the ranks; no one ever writes the padding, so it may be anything."""
    for name, state in files.items():
        found = re.fullmatch(r"zero_pp_rank_(\d+)_(.*)_optim_states\.pt", name)
        held = state["optimizer_state_dict"] if found else {}
        if found is None or "fp32_flat_groups" not in held:
            continue
        rank, ranks = int(found[1]), held["partition_count"]
        groups = files[f"zero_pp_rank_{rank}_{found[2]}_model_states.pt"]["param_shapes"]
        for index, (flat, shapes) in enumerate(zip(held["fp32_flat_groups"], groups, strict=True)):
            sizes = [-(-shape.numel() // ranks) for shape in shapes.values()]
            pieces = flat.split([*sizes, flat.numel() - sum(sizes)])[:-1]
            own = [max(0, shape.numel() - rank * size) for shape, size in zip(shapes.values(), sizes, strict=True)]
            held["fp32_flat_groups"][index] = torch.cat([piece[:most] for piece, most in zip(pieces, own, strict=True)])


def _plain(state: Any) -> Any:
    """A state without the objects in it, which do not say whether they are equal."""
    if isinstance(state, dict):
        return {key: _plain(value) for key, value in state.items() if key != "run"}  # a token, drawn for each run
    if isinstance(state, list | tuple):
        return [_plain(value) for value in state]
    return state if isinstance(state, Tensor | int | float | str | bytes | None) else type(state).__name__


def same(one: Any, two: Any) -> bool:
    """Whether two states are equal to the bit."""
    if isinstance(one, Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return bool(one == two)


def lines(folder: Path) -> list[dict[str, Any]]:
    """What the journal of the run in ``folder`` says so far; a last line may be under way."""
    path = folder / "run" / "journal.jsonl"
    texts = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(text) for text in texts]


def await_lines(folder: Path, count: int, *, size: int) -> None:
    """Until the last ``count`` steps were of ``size`` ranks."""
    deadline = time.monotonic() + 120
    while [line["plan"]["dp_size"] for line in lines(folder)][-count:] != [size] * count:
        assert time.monotonic() < deadline, (folder / "output").read_text()
        time.sleep(0.05)


class Killed(NamedTuple):
    """How an attempt was ended.

    Args:
        seconds: after its start.
        ranks: which were killed; the others ended by themselves.
        writing: a checkpoint was being written.
        checkpoints: number of the newest finished one.
    """

    seconds: float
    ranks: tuple[int, ...]
    writing: bool
    checkpoints: int


def killed_runs(
    folder: Path, count: int, *, chance: random.Random, check: Callable[[Path], None], each: int = 100
) -> Iterator[Killed]:
    """Runs the job again and again, each time by the same command until it is through, and kills it ``count`` times.

    Args:
        folder: in which each run gets a folder.
        count: kills, or a few more until one of them was in a write.
        chance: decides when, and which rank is killed, or all.
        check: given the folder of a run that is through.
        each: kills in a run at most.
    """
    killed, hit = 0, False
    for number in itertools.count():
        run = folder / str(number)
        arguments = command(run)
        through = False
        for _ in range(each):
            if killed >= count and hit:
                break
            kill = kill_once(run, arguments, chance, in_a_write=killed % 2 == 1)
            through = kill is None
            if kill is None:
                break
            killed, hit = killed + 1, hit or kill.writing
            yield kill
        if not through:
            assert Attempt(run, arguments, 2).join() == [0, 0], (run / "output").read_text()
        check(run)
        if killed >= count and hit:
            return


def kill_once(
    folder: Path,
    arguments: Sequence[str],
    chance: random.Random,
    *,
    in_a_write: bool,
    most_steps: int = 40,
    variables: Mapping[str, str] | None = None,
) -> Killed | None:
    """Starts the command on two processes and kills it at a random instant; None where it was through before that.

    One kill in five comes in the first second, before or while the run is set up. The others come some milliseconds
    after so many steps; a fixed time would be over before the first, or after the last, on another machine.

    Args:
        folder: of the job.
        arguments: of the command.
        chance: decides when, and which rank is killed, or both.
        in_a_write: after the steps, wait until there is a place for the next checkpoint, and a moment longer.
        most_steps: before a kill.
        variables: of the environment, for the processes.
    """
    checkpoints = folder / "run" / "checkpoints"

    def unfinished() -> set[tuple[str, int]]:
        latest = newest_of_deepspeed(checkpoints)
        later = (path for path in checkpoints.glob("step*") if latest is None or path.name > latest.name)
        paths = [*checkpoints.glob(f"*-step-*{UNFINISHED}"), *later]
        return {(path.name, path.stat().st_ctime_ns) for path in paths}

    left = unfinished()  # by attempts before this one
    early, steps, pause = chance.random() < 0.2, chance.randrange(most_steps), chance.uniform(0, 0.01)
    ranks = chance.choice([(0, 1), (0,), (1,)])
    in_a_write = in_a_write and not early
    # On a slow disk a write outlasts every pause, whatever the machine.
    attempt = Attempt(folder, arguments, 2, sync_seconds=0.02 if in_a_write else 0.0, variables=variables)
    began = time.monotonic()
    if early:
        pause *= 100
    else:
        goal = steps_run(folder) + steps
        while attempt.running() and steps_run(folder) < goal:
            time.sleep(0.002)
    while attempt.running() and in_a_write and not _beyond(unfinished, left):
        time.sleep(0.0005)
    time.sleep(pause)
    if not attempt.running():
        codes = attempt.join()
        assert codes == [0, 0], (folder / "output").read_text()
        return None
    attempt.kill(ranks)
    newest = max(checkpoints_in(checkpoints), default=int(newest_of_deepspeed(checkpoints) is not None))
    killed = Killed(time.monotonic() - began, ranks, _beyond(unfinished, left), newest)
    attempt.join(timeout=3)  # a launcher ends the others; those that wait for the dead one while they start wait long
    return killed


def steps_run(folder: Path) -> int:
    """Steps that the first rank has run in all attempts, some of them again."""
    given = folder / "given.0"
    return given.read_bytes().count(b"\n") if given.exists() else 0


def newest_of_deepspeed(checkpoints: Path) -> Path | None:
    """The checkpoint that DeepSpeed would load; None if there is none, or if another engine writes them."""
    latest = checkpoints / "latest"
    return checkpoints / latest.read_text().strip() if latest.exists() else None


def _beyond(unfinished: Callable[[], set[tuple[str, int]]], left: set[tuple[str, int]]) -> bool:
    """Whether there is a place for a checkpoint that was not there before."""
    with suppress(FileNotFoundError):  # finished between the listing and the look
        return bool(unfinished() - left)
    return False
