"""What all benchmarks share: fair timing of rivals, the machine they ran on, and the two files they leave.

A benchmark states its question, times its contenders with `interleave`, and hands tables and raw numbers to
`publish`, which prints them and writes ``benchmarks/results/NAME.md`` and ``NAME.json``. Scripts run from the
repository as ``python benchmarks/NAME.py``. Host names and paths never appear in what is written."""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import random
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT / "tests"))  # some jobs of benchmarks are those of tests/support
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # two-sided 95 % of Student's t, by number of seeds


class Quartiles(NamedTuple):
    """A median and its spread."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))

    def show(self, digits: int = 2, scale: float = 1.0) -> str:
        """``median (low to high)``, each times ``scale``."""
        low, median, high = (f"{value * scale:.{digits}f}" for value in self)
        return f"{median} ({low} to {high})"


class Spread(NamedTuple):
    """Mean and standard deviation over seeds."""

    mean: float
    deviation: float
    number: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.fmean(values), statistics.stdev(values), len(values))

    def show(self, digits: int = 4, *, sign: str = "") -> str:
        """``mean ± standard deviation``."""
        return f"{self.mean:{sign}.{digits}f} ± {self.deviation:.{digits}f}"

    @property
    def clear(self) -> bool:
        """Whether the mean differs from 0 at the 95 % level, by Student's t."""
        return abs(self.mean) * math.sqrt(self.number) > T_95[self.number] * self.deviation


@dataclass(frozen=True)
class Timings:
    """Seconds of each contender, one entry per round; entries of the same round belong together."""

    seconds: Mapping[str, Sequence[float]]

    def of(self, name: str) -> Quartiles:
        """Time of one call, in seconds."""
        return Quartiles.of(self.seconds[name])

    def ratio(self, name: str, to: str) -> Quartiles:
        """Time of one contender over that of another, round by round: what slows a round cancels."""
        pairs = zip(self.seconds[name], self.seconds[to], strict=True)
        return Quartiles.of([mine / theirs for mine, theirs in pairs])


def random_texts(size: int, length: int, *, rank: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless micro-batches of random characters and those that follow, the same on every call."""
    generator = torch.Generator().manual_seed(rank)
    stock = [torch.randint(65, (size, length + 1), generator=generator) for _ in range(16)]
    while True:
        for text in stock:
            yield text[:, :-1], text[:, 1:]


def interleave(
    make: Callable[[], Mapping[str, Callable[[], object]]],
    *,
    trials: int,
    rounds: int,
    warmup: int = 3,
    calls: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    synchronize: Callable[[], object] | None = None,
    seed: int = 0,
) -> Timings:
    """Time callables against each other: every round calls each of them once, in a new order.

    The order is shuffled because a call inherits the caches and the allocator from the one before it; in a
    fixed order each would always inherit from the same rival. It depends on ``seed`` alone, so processes that
    run the same benchmark together call the same thing at the same time. All is made anew for every trial
    because where memory happens to lie can decide a tenth of the time, and stays where it is.

    Args:
        make: makes what is timed, by name.
        trials: times that it is made.
        rounds: samples of each in a trial; two at least in all.
        warmup: rounds run first in a trial and not counted.
        calls: calls behind one sample, for what is too short to time alone; the sample is their mean.
        clock: in seconds. ``time.process_time`` leaves out what other programs took of the processor: right
            for a single thread on a shared machine, wrong for several, for waiting and for devices.
        synchronize: waits for the device; called before the clock is read.
        seed: of the order.
    """
    order = random.Random(seed)
    seconds: dict[str, list[float]] = {}
    for _ in range(trials):
        contenders = make()
        names = list(contenders)
        gc.collect()
        gc.disable()
        try:
            for turn in range(warmup + rounds):
                order.shuffle(names)
                for name in names:
                    elapsed = _time(contenders[name], calls, clock, synchronize)
                    if turn >= warmup:
                        seconds.setdefault(name, []).append(elapsed)
        finally:
            gc.enable()
    return Timings({name: seconds[name] for name in contenders})


def _time(
    call: Callable[[], object],
    calls: int,
    clock: Callable[[], float],
    synchronize: Callable[[], object] | None,
) -> float:
    if synchronize is not None:
        synchronize()
    start = clock()
    for _ in range(calls):
        call()
    if synchronize is not None:
        synchronize()
    return (clock() - start) / calls


@dataclass(frozen=True)
class Machine:
    """Where and on what a benchmark ran; nothing in it names the host."""

    system: str
    cpu: str
    cores: int
    accelerator: str
    python: str
    torch: str
    load: str
    commit: str
    command: str

    @classmethod
    def here(cls) -> Machine:
        return cls(
            system=f"{platform.system()} {platform.machine()}",
            cpu=_cpu_model(),
            cores=len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1,
            accelerator=torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
            python=platform.python_version(),
            torch=torch.__version__,
            load=f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown",
            commit=_commit(),
            command=shlex.join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]),
        )

    def show(self) -> str:
        """Two lines of Markdown."""
        return (
            f"`{self.command}` at commit {self.commit}, torch {self.torch}, Python {self.python}\n"
            f"on {self.system}, {self.cpu}, {self.cores} cores, accelerator: {self.accelerator}; "
            f"load average at the start {self.load}"
        )


class Table(NamedTuple):
    """Rows of ready-made text under a heading."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def show(self) -> str:
        """Markdown, padded so that it also reads well in a terminal."""
        cells = [list(self.columns), *map(list, self.rows)]
        widths = [max(len(row[column]) for row in cells) for column in range(len(self.columns))]
        lines = [
            "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |"
            for row in cells
        ]
        lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
        return f"### {self.title}\n\n" + "\n".join(lines)


def publish(
    name: str,
    *,
    question: str,
    machine: Machine,
    tables: Sequence[Table],
    findings: Sequence[str],
    data: Mapping[str, Any],
    save: bool = True,
) -> None:
    """Print a result and write it to ``results/NAME.md`` and ``results/NAME.json``.

    Args:
        name: of the benchmark, and of its files.
        question: what was asked, in a sentence or two.
        machine: where it ran, taken before the timing began.
        tables: what was measured.
        findings: what follows, a sentence each.
        data: the numbers behind the tables, ready for JSON; each entry gets a line of the file.
        save: False only prints.
    """
    parts = [f"# {name}", question, machine.show(), *(table.show() for table in tables)]
    parts.append("\n".join(f"- {finding}" for finding in findings))
    text = "\n\n".join(parts) + "\n"
    print(text)
    if save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.md").write_text(text)
        record = {
            "name": name,
            "question": question,
            "machine": asdict(machine),
            "findings": list(findings),
            **data,
        }
        lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in record.items())
        (RESULTS / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown CPU"


def _commit() -> str:
    """The commit checked out, marked where tracked files differ from it (results of benchmarks aside)."""
    head = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return (head or "unknown") + (" with changes" if changed else "")


def _git(*words: str) -> str:
    try:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
