"""How far off is `adabatch plan` on runs that were then made?

For each of some shipped configs a measuring run takes a fifth of the examples under ``Goodput``. `adabatch plan` reads
its journal, and says how to set the run of all examples and what it will cost. That run is made with those settings,
for as many examples as the plan names, and its steps, mean batch and time are set beside the plan's numbers and ranges.

All runs are on one process of one thread; the time of a run is that of its loop, without evaluations. Configs whose
batches the published algorithm drives (``control``) are run with the default control, as a plan assumes.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import statistics
import tempfile
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _harness import ROOT, Machine, Table, publish

from adabatch import Goodput, Limits, StepPrice, examples
from adabatch.cli.commands import job_in
from adabatch.cli.display import Display
from adabatch.cli.job import Checkpointing, Job, Result, run
from adabatch.cli.plan import run_plan
from adabatch.runtime.launch.world import World

NAMES = {"steps": "steps", "batch": "mean batch", "seconds": "seconds"}
SHARE = 5
"""The measuring run takes one of so many parts of the examples."""


class Case(NamedTuple):
    """A config, and how much of it is run."""

    config: str
    examples: int
    needs_data: bool = False


CASES = (
    Case("quickstart", 57_480),
    Case("digits_adamw", 28_740),
    Case("mnist_logistic_adadagrad", 300_000, needs_data=True),
    Case("mnist_cnn_adagrad", 60_000, needs_data=True),
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
    for case in CASES:
        if case.needs_data and "ADABATCH_DATA" not in os.environ:
            print(f"{case.config} is left out: ADABATCH_DATA names no folder with mnist/")
            continue
        for seed in SEEDS:
            compared, accuracy = compare(case, seed)
            found += compared
            accuracies.append((case.config, seed, accuracy))
            for each in compared:
                print(each, flush=True)
    publish(
        "plan_accuracy",
        question="How far off is `adabatch plan`, from a fifth of a run, on the whole run that it sets?",
        machine=machine,
        tables=[table(found, accuracies)],
        findings=findings(found),
        data={"compared": [asdict(each) | {"held": each.held, "off": each.off} for each in found]},
    )


def compare(case: Case, seed: int) -> tuple[list[Compared], float]:
    """Measures, plans and runs; the numbers of the plan beside those of the run, and its test accuracy."""
    with tempfile.TemporaryDirectory() as folder:
        made = job(case, seed)
        limits = made.limits
        probe = Path(folder) / "probe"
        trained(
            replace(
                made,
                criterion=Goodput(),
                total=examples(case.examples // SHARE),
                limits=replace(limits, max=min(limits.max, case.examples // SHARE // 10)),  # type: ignore[type-var]
                test_data=None,
                evaluate_every=None,
            ),
            probe,
        )
        said = planned(probe, case.examples)
        forecast, settings = said["forecast"], said["settings"]
        result = trained(
            replace(
                job(case, seed),
                criterion=StepPrice(settings["criterion.examples"]),
                micro_batch_size=settings["micro_batch_size"],
                max_micro_batch_size=settings["max_micro_batch_size"],
                limits=Limits(min=settings["limits.min"], max=settings["limits.max"]),
                lr_rule=settings["lr_rule"],
                reference_batch_size=settings["reference_batch_size"],
                warmup=settings["warmup"],
                total=examples(round(forecast["examples"]["point"])),
                evaluate_every=None,
            ),
            Path(folder) / "run",
        )
    return compared(case.config, seed, forecast, result), result.accuracy


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
    """The job of a config, whose weights and data are those of the seed."""
    torch.manual_seed(seed)
    made = job_in(ROOT / "configs" / f"{case.config}.yaml")
    return replace(made, seed=seed, control=None, hang_timeout=None)


def trained(made: Job, out: Path) -> Result:
    """Runs a job into a folder, without checkpoints."""
    made = replace(made, out=out, checkpoint=Checkpointing(resume=False))
    return run(made, World.from_environment(), display=Display(1), label="run")


def planned(probe: Path, num_examples: int) -> dict[str, Any]:
    """What `adabatch plan` says."""
    with redirect_stdout(io.StringIO()) as said:
        run_plan([str(probe), f"--examples={num_examples}", "--json"])
    return dict(json.loads(said.getvalue()))


def table(found: list[Compared], accuracies: list[tuple[str, int, float]]) -> Table:
    """A row per number of a plan."""
    by_run = {(config, seed): accuracy for config, seed, accuracy in accuracies}
    return Table(
        "A plan from a fifth of the examples, and the run that was made by it",
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
