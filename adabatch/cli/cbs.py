"""``adabatch cbs``: the critical batch, measured by branches from a checkpoint, beside the noise scale there."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adabatch.batch.critical import CriticalBatch, critical_batch, smoothed_losses
from adabatch.batch.efficiency import efficiency
from adabatch.checkpointing.newest import newest_checkpoint
from adabatch.cli.branch import (
    LEAST_STEPS,
    Branch,
    BranchPoint,
    BranchStart,
    CriticalOptions,
    branch_of,
    options_for_json,
    run_branch,
    state_at,
)
from adabatch.cli.display import Display
from adabatch.cli.job import Job
from adabatch.cli.making import job_of
from adabatch.cli.picture import draw_picture
from adabatch.cli.run_folder import LATEST, RUNS
from adabatch.cli.runs import CHECKPOINTS
from adabatch.cli.text_files import json_values, write_atomically
from adabatch.journal.writer import finite_or_null
from adabatch.runtime.collectives import workers_of
from adabatch.runtime.launch.world import World

FOLDER, RESULT, PICTURE = "cbs", "cbs.json", "cbs.png"
HEADER = ("batch", "steps", "lr", "loss", "against the smallest", "test loss", "predicted worth", "time")


def measure(
    make: Callable[[], Job],
    world: World,
    options: CriticalOptions,
    *,
    arguments: Sequence[str],
    settings: Mapping[str, Any],
    display: Display,
) -> CriticalBatch | None:
    """Runs the branches that are not finished yet, and writes table, JSON and picture beside the checkpoint's run.

    Args:
        make: builds the job again.
        world: rank and world size of this process.
        options: of the command.
        arguments: the command line, from which other processes build the job.
        settings: the job in plain values, by which finished branches are recognized.
        display: shows progress.

    Returns:
        The critical batch, or None if the time was over before two branches were finished.

    Raises:
        ValueError: if the options do not fit the job or the checkpoint.
        CheckpointError: if the checkpoint is damaged.
    """
    if options.processes > 1 and world.size > 1:
        raise ValueError(
            f"processes={options.processes} runs branches side by side, each alone; {world.size} processes run this "
            f"job together: leave one of them out"
        )
    # a job only to ask; each branch makes one of its own, since training changes it
    job = make()
    if options.judge == "test" and job.test_data is None:
        raise ValueError("judge=test needs test_data in the config")
    # wall-clock time, since the processes of _beside compare their own clock with it
    deadline = None if options.max_minutes is None else time.time() + 60 * options.max_minutes
    run = job.out or RUNS / LATEST
    where = options.branch_from or job.checkpoint.directory or run / CHECKPOINTS
    found = newest_checkpoint(where, workers_of(None, device=world.device))
    if found is None:
        raise ValueError(
            f"there is no checkpoint in {where}: train first (adabatch train), give the run's folder by --out, or a "
            f"checkpoint by --branch_from"
        )
    state = state_at(job, world, found.path)
    smallest = options.smallest or state.batch
    sizes = _sizes(smallest, options.factors)
    examples = _examples(options.examples, job, sizes[-1])
    start = BranchStart(found.path, examples, deadline)
    display.say(
        f"branches from {found.path}: {state.steps:,} steps, {state.examples:,} examples, batch {state.batch:,}; each "
        f"takes {examples:,} examples"
    )
    # by checkpoint: another one has branches of its own
    folder = run / FOLDER / found.path.name
    folder.mkdir(parents=True, exist_ok=True)
    # Not tolerance, half_life and judge, which only compare: branches that are finished serve for others of those too.
    known = {"examples": examples, "job": json_values(settings)}
    branches = {size: branch for size in sizes if (branch := _read(folder, size, known)) is not None}
    if branches:
        display.say(f"finished already: batch {', '.join(f'{size:,}' for size in branches)}")
    todo = [size for size in sizes if size not in branches]
    new = (
        _beside(arguments, start, todo, options.processes, display)
        if options.processes > 1
        else _in_turn(make, world, start, todo, display)
    )
    # Each is written as soon as it is finished, so that an interruption costs one branch at most.
    for branch in new:
        branches[branch.size] = branch
        if world.rank == 0:
            _write(folder / _name(branch.size), {"settings": known, "branch": branch._asdict()})
    missing = [size for size in sizes if size not in branches]
    if missing:
        display.say(
            f"the time was over before batch {', '.join(f'{size:,}' for size in missing)}; the same command continues "
            f"with what is missing"
        )
    if len(branches) < 2:
        return None
    return _finish(dict(sorted(branches.items())), start, state, options, folder, world, display)


def _finish(
    branches: Mapping[int, Branch],
    start: BranchStart,
    state: BranchPoint,
    options: CriticalOptions,
    folder: Path,
    world: World,
    display: Display,
) -> CriticalBatch:
    """Compares finished branches, and writes what was found into their folder."""
    # one for all sizes, in examples: a window in steps would smooth the losses of small batches less
    half_life = options.half_life or start.examples / 8
    outcome = critical_batch(_ends(branches, options, half_life), tolerance=options.tolerance)
    _tell(outcome, state, branches, options, display)
    if world.rank == 0:
        _write(folder / RESULT, _record(outcome, state, branches, options, start, half_life))
        draw_picture(
            lambda draw: _panels(draw, outcome, state, branches, half_life, options),
            folder / PICTURE,
            title=f"critical batch at {state.examples:,} examples",
            display=display,
        )
    display.say(f"branches and numbers: {folder}")
    return outcome


def _sizes(smallest: int, factors: Sequence[float]) -> list[int]:
    wanted = {factor: smallest * factor for factor in sorted(set(factors))}
    # 1e-9, because a factor such as 1.1 is not exact
    wrong = [factor for factor, size in wanted.items() if abs(size - round(size)) > 1e-9 * size or round(size) < 1]
    if wrong:
        raise ValueError(f"factors must make whole batch sizes of the smallest, {smallest}, got {wrong}")
    return [round(size) for size in wanted.values()]


def _examples(asked: int | None, job: Job, largest: int) -> int:
    """The examples of each branch, a multiple of the largest batch."""
    if asked is not None and asked < 2 * largest:
        raise ValueError(
            f"examples={asked:,} are fewer than two steps of the largest batch, {largest:,}: give more, or smaller "
            f"factors"
        )
    total = job.total.count if job.total.unit == "examples" else 0
    if job.total.unit == "tokens" and job.tokens_per_example:
        total = job.total.count // job.tokens_per_example
    wanted = asked or max(total // 20, LEAST_STEPS * largest)
    # so that all branches end after exactly as many examples; sizes that do not divide the largest overshoot by part of
    # a step
    return math.ceil(wanted / largest) * largest


def _in_turn(
    make: Callable[[], Job], world: World, start: BranchStart, sizes: Sequence[int], display: Display
) -> Iterator[Branch]:
    """The branches, one after another, each on all processes."""
    for size in sizes:
        branch = run_branch(make(), world, start, size, display=display)
        if branch is None:
            return
        yield branch


def _beside(
    arguments: Sequence[str], start: BranchStart, sizes: Sequence[int], processes: int, display: Display
) -> Iterator[Branch]:
    """The branches as they finish, several at a time, each on a process of its own."""
    if not sizes:
        return
    workers = min(processes, len(sizes))
    # each process would otherwise start a thread for every core; process_cpu_count (Python 3.13) respects affinity
    threads = max(1, (os.process_cpu_count() if hasattr(os, "process_cpu_count") else os.cpu_count() or 1) // workers)
    # not fork: torch's threads and a CUDA context do not survive it
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        # The command line rather than the job: models and data sets need not be ones that can be pickled.
        futures = [pool.submit(_alone, list(arguments), start, size, threads) for size in sizes]
        for number, future in enumerate(as_completed(futures), 1):
            branch = future.result()
            if branch is not None:
                loss = branch.losses[-1] if branch.losses else math.nan
                display.say(f"batch {branch.size:,}: loss {loss:.4f}, {branch.seconds:.1f} s ({number}/{len(sizes)})")
                yield branch


def _alone(arguments: list[str], start: BranchStart, size: int, threads: int) -> Branch | None:
    """Runs a branch in its own process."""
    # it may have waited for a free process until now
    if start.deadline is not None and time.time() > start.deadline:
        return None
    torch.set_num_threads(threads)
    world = World.from_environment()
    # nothing is shown on any rank but the first
    return run_branch(job_of(arguments), world, start, size, display=Display(rank=1))


def _ends(branches: Mapping[int, Branch], options: CriticalOptions, half_life: float) -> dict[int, float]:
    """The loss by which each branch is compared."""
    ends = {}
    for size, branch in branches.items():
        if branch.diverged:
            ends[size] = math.inf
        elif options.judge == "test":
            ends[size] = branch.test_loss
        else:
            ends[size] = float(smoothed_losses(branch.losses, branch.batch_sizes, half_life=half_life)[-1])
    return ends


def _tell(
    outcome: CriticalBatch,
    state: BranchPoint,
    branches: Mapping[int, Branch],
    options: CriticalOptions,
    display: Display,
) -> None:
    first = min(branches)
    known = 0 < state.noise_scale < math.inf
    rows = [
        (
            f"{size:,}{' <- critical' if size == outcome.size else ''}",
            f"{len(branch.losses):,}",
            f"{branch.lr:.4g}",
            "diverged" if branch.diverged else f"{outcome.losses[size]:.4f}",
            "-" if branch.diverged else f"{outcome.losses[size] / outcome.losses[first] - 1:+.2%}",
            "-" if math.isnan(branch.test_loss) else f"{branch.test_loss:.4f}",
            # what the noise scale predicts, beside what was measured
            f"{efficiency(size, state.noise_scale, reference=first):.0%}" if known else "-",
            f"{branch.seconds:.1f} s",
        )
        for size, branch in branches.items()
    ]
    what = "test loss" if options.judge == "test" else "smoothed training loss"
    display.table(f"Critical batch by {what}, tolerance {options.tolerance:.2%}", HEADER, rows)
    at_least = "at least " if outcome.is_bound else ""
    crossing = "" if outcome.is_bound else f" (the loss leaves the tolerance near {outcome.crossing:,.0f})"
    display.say(f"critical batch: {at_least}{outcome.size:,} examples{crossing}")
    if known:
        display.say(
            f"noise scale there: {state.noise_scale:,.0f} examples; critical batch over noise scale: "
            f"{at_least}{outcome.ratio(state.noise_scale):.2g}"
        )
    else:
        display.say("noise scale there: not measured by the run (--measure.monitor=true measures it)")
    if outcome.is_bound:
        display.say("every size was within the tolerance: try larger --factors")
    if outcome.size == first and not outcome.is_bound:
        display.say("the smallest size may be too large already: try a smaller --smallest")


def _record(
    outcome: CriticalBatch,
    state: BranchPoint,
    branches: Mapping[int, Branch],
    options: CriticalOptions,
    start: BranchStart,
    half_life: float,
) -> dict[str, Any]:
    rows = [
        # the losses of all steps are in the branch's own file
        {"loss": outcome.losses[size], **{name: value for name, value in branch._asdict().items() if name != "losses"}}
        for size, branch in branches.items()
    ]
    for row in rows:
        row["steps"] = len(row.pop("batch_sizes"))
    return {
        "checkpoint": str(start.checkpoint),
        "at": state._asdict(),
        "options": {**options_for_json(options), "examples": start.examples, "half_life": half_life},
        "critical_batch": outcome.size,
        "is_lower_bound": outcome.is_bound,
        "crossing": outcome.crossing,
        "noise_scale": state.noise_scale,
        "critical_batch_over_noise_scale": outcome.ratio(state.noise_scale),
        "bound": outcome.bound,
        "branches": rows,
    }


def _panels(
    draw: Any,
    outcome: CriticalBatch,
    state: BranchPoint,
    branches: Mapping[int, Branch],
    half_life: float,
    options: CriticalOptions,
) -> list[Any]:
    """Loss against batch size with the tolerance, and the loss of each branch over time."""
    finite = {size: loss for size, loss in outcome.losses.items() if math.isfinite(loss)}
    first = next(iter(finite.values()))
    sizes = list(finite)
    # nothing is a share of a loss of zero
    excess = [100 * (loss - first) / abs(first) if first else 0.0 for loss in finite.values()]
    bound = 100 * options.tolerance
    lines = [
        draw.Line("tolerance", [sizes[0], sizes[-1]], [bound, bound], "reference"),
        draw.Line("loss at the end", sizes, excess),
    ]
    marks = [draw.Mark("loss at the end", outcome.size, excess[sizes.index(outcome.size)], "critical")]
    if sizes[0] <= state.noise_scale <= sizes[-1]:
        x = [state.noise_scale, state.noise_scale]
        lines.append(draw.Line("noise scale", x, [min(0.0, *excess), max(bound, *excess)]))
    paths = []
    for size, branch in branches.items():
        if branch.losses:
            smooth = smoothed_losses(branch.losses, branch.batch_sizes, half_life=half_life)
            paths.append(draw.Line(f"batch {size:,}", np.cumsum(branch.batch_sizes), smooth))
    return [
        draw.Panel(
            "loss above that of the smallest batch (%)", lines, marks, x_title="global batch size (examples)", log="x",
            own_x=True,
        ),
        draw.Panel(
            "smoothed training loss", paths, x_title="examples since the checkpoint", log="y", own_x=True
        ),
    ]  # fmt: skip


def _name(size: int) -> str:
    return f"batch-{size:06d}.json"


def _read(folder: Path, size: int, known: Mapping[str, Any]) -> Branch | None:
    """A branch that was finished with the same settings."""
    try:
        # any damage counts as "not finished": to run a branch again costs minutes, to read a wrong one a result
        read = json.loads((folder / _name(size)).read_bytes())
        return branch_of(read["branch"]) if read["settings"] == known else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _write(path: Path, record: Mapping[str, Any]) -> None:
    # atomically: half a file must not look like a finished branch
    write_atomically(path, json.dumps(finite_or_null(record), indent=2, allow_nan=False) + "\n")
