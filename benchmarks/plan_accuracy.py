"""How far off is `adabatch plan`, made from the first fifth of a run, on the whole run?

Some shipped configs are run under ``Goodput``, which takes the batches of the least time, as a plan does. `adabatch
plan` reads the first fifth of the journal, with the limits of the config, and says what all examples will cost. Its
steps, mean batch and seconds are set beside those of the whole run.

All runs are on one process of one thread. Times are those of the processor, so that other programs on the machine do
not count: those of the steps, as the run itself takes them, and that of the whole loop without evaluations. Configs
whose batches the published algorithm drives (``control``) are run with the default control, as a plan assumes.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import statistics
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from _harness import ROOT, Machine, Table, publish

from adabatch import Goodput, examples
from adabatch.cli.commands import job_in
from adabatch.cli.display import Display
from adabatch.cli.job import Checkpointing, Job, Result, run
from adabatch.cli.plan import run_plan
from adabatch.runtime.launch.world import World

NAMES = {"steps": "steps", "batch": "mean batch", "seconds": "seconds"}
SHARE = 5
"""A plan is made from one of so many parts of the examples."""


class Case(NamedTuple):
    """A config, and how much of it is run."""

    config: str
    examples: int
    needs_data: bool = False


CASES = (
    Case("quickstart", 28_740),
    Case("digits_adamw", 14_370),
    Case("mnist_logistic_adadagrad", 120_000, needs_data=True),
    Case("mnist_cnn_adagrad", 30_000, needs_data=True),
)
SEEDS = (0, 1)


@dataclass(frozen=True)
class Compared:
    """A number of a plan beside what came out."""

    config: str
    seed: int
    what: str
    low: float
    point: float
    high: float
    measured: float

    @property
    def held(self) -> bool:
        """Whether the range of the plan holds what came out."""
        return self.low <= self.measured <= self.high

    @property
    def off(self) -> float:
        """The factor between plan and outcome, at least 1."""
        return math.exp(abs(math.log(self.measured / self.point)))


def main() -> None:
    machine = Machine.here()
    torch.set_num_threads(1)
    logging.getLogger("adabatch").setLevel(logging.ERROR)
    found: list[Compared] = []
    accuracies: list[tuple[str, int, float]] = []
    refused: list[str] = []
    for case in CASES:
        if case.needs_data and "ADABATCH_DATA" not in os.environ:
            print(f"{case.config} is left out: ADABATCH_DATA names no folder with mnist/")
            continue
        for seed in SEEDS:
            try:
                compared, accuracy = compare(case, seed)
            except ValueError as error:
                refused.append(f"no plan for {case.config}, seed {seed}: {error}")
                continue
            found += compared
            accuracies.append((case.config, seed, accuracy))
            for each in compared:
                print(each, flush=True)
    publish(
        "plan_accuracy",
        question="How far off is `adabatch plan`, made from the first fifth of a run, on the whole run?",
        machine=machine,
        tables=[table(found, accuracies)],
        findings=[*findings(found), *refused],
        data={"compared": [asdict(each) | {"held": each.held, "off": each.off} for each in found]},
    )


def compare(case: Case, seed: int) -> tuple[list[Compared], float]:
    """The numbers of a plan from the beginning of a run beside those of the run, and its test accuracy.

    Raises:
        ValueError: if there is no plan from what the beginning holds.
    """
    with tempfile.TemporaryDirectory() as folder:
        made = job(case, seed)
        processor = partial(patch, new=time.process_time)
        with processor("time.perf_counter"), processor("adabatch.runtime.observers.stopwatch.perf_counter"):
            result = run(
                replace(made, out=Path(folder)), World.from_environment(), display=Display(1), label=case.config
            )
        first = Path(folder) / "first.jsonl"
        lines = [json.loads(text) for text in result.journal.read_text(encoding="utf-8").splitlines()]
        taken = [json.dumps(line) for line in lines if "plan" in line and line["examples"] < case.examples / SHARE]
        first.write_text("\n".join(taken) + "\n", encoding="utf-8")
        limits = made.limits
        assert limits is not None
        said = planned(first, case.examples, f"--min_batch={limits.min}", f"--max_batch={limits.max}")
    return compared(case.config, seed, said["forecast"], result), result.accuracy


def compared(config: str, seed: int, forecast: dict[str, Any], result: Result) -> list[Compared]:
    """The numbers of a forecast beside those of a run."""
    hours = forecast["hours"]
    said = {
        "steps": forecast["steps"],
        "batch": forecast["batch"],
        "seconds": {end: 3600 * hours[end] for end in ("low", "point", "high")},
    }
    measured = {"steps": result.steps, "batch": result.mean_batch, "seconds": result.seconds}
    return [
        Compared(config, seed, what, said[what]["low"], said[what]["point"], said[what]["high"], measured[what])
        for what in NAMES
    ]


def job(case: Case, seed: int) -> Job:
    """The job of a config under ``Goodput``, whose weights and data are those of the seed, without checkpoints."""
    torch.manual_seed(seed)
    made = job_in(ROOT / "configs" / f"{case.config}.yaml")
    return replace(
        made,
        criterion=Goodput(),
        total=examples(case.examples),
        control=None,
        evaluate_every=None,
        seed=seed,
        hang_timeout=None,
        checkpoint=Checkpointing(resume=False),
    )


def planned(journal: Path, num_examples: int, *options: str) -> dict[str, Any]:
    """What `adabatch plan` says."""
    with redirect_stdout(io.StringIO()) as said:
        run_plan([str(journal), f"--examples={num_examples}", "--json", *options])
    return dict(json.loads(said.getvalue()))


def table(found: list[Compared], accuracies: list[tuple[str, int, float]]) -> Table:
    """A row per number of a plan."""
    by_run = {(config, seed): accuracy for config, seed, accuracy in accuracies}
    return Table(
        "Plans from the first fifth of a run, and the whole run",
        ("config", "seed", "what", "planned (low to high)", "measured", "off by", "range held", "test accuracy"),
        [
            (
                each.config,
                str(each.seed),
                NAMES[each.what],
                f"{each.point:,.3g} ({each.low:,.3g} to {each.high:,.3g})",
                f"{each.measured:,.4g}",
                f"{each.off:.2f} x",
                "yes" if each.held else "no",
                f"{by_run[each.config, each.seed]:.1%}",
            )
            for each in found
        ],
    )


def findings(found: list[Compared]) -> list[str]:
    """How far off the plans were, over all runs."""
    said = []
    for what, name in NAMES.items():
        of = [each for each in found if each.what == what]
        offs = [each.off for each in of]
        held = sum(each.held for each in of)
        said.append(
            f"{name}: off by a factor of {statistics.median(offs):.2f} (median), {max(offs):.2f} (largest); the range "
            f"held {held} of {len(of)}"
        )
    return said


if __name__ == "__main__":
    main()
