"""What do the published AdAdaGrad commands for MNIST reach at a twentieth of their examples, and what a constant batch?

    ADABATCH_DATA=... python benchmarks/adadagrad.py [--examples 300000] [--seeds 3]

Runs ``configs/mnist_cnn_adagrad.yaml`` (AdaGrad 8e-3, which is the authors' own command for this network) and
``configs/mnist_cnn_adadagradnorm.yaml`` (AdaGrad-Norm, the algorithm of the paper) as they are but for the number of
examples, on one process. Beside them the same AdaGrad with a constant batch of 64. No learning rate is tuned here: 8e-3
is the published one, for a first batch of 8.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from _harness import ROOT, Machine, Spread, Table, publish

ADAGRAD = "configs/mnist_cnn_adagrad.yaml"
METHODS: dict[str, tuple[str, ...]] = {
    "AdaGrad 8e-3, norm test 0.1, as published": (ADAGRAD,),
    "AdaGrad-Norm 1, norm test 0.1, as published": ("configs/mnist_cnn_adadagradnorm.yaml",),
    "AdaGrad 8e-3, constant 64": (ADAGRAD, "--criterion=adabatch.Constant", "--criterion.global_batch_size=64"),
}


class Outcome(NamedTuple):
    """What one run came to."""

    steps: int
    examples: int
    loss: float
    accuracy: float


def outcome(config: Sequence[str], *, examples: int, seed: int, folder: Path) -> Outcome:
    """Runs ``adabatch train`` on a config and the options after it."""
    name, *options = config
    out = folder / "run"
    command = [
        sys.executable, "-m", "adabatch", "train", "--config", str(ROOT / name), *options,
        f"--total.count={examples}", f"--seed={seed}", f"--out={out}", "--quiet",
    ]  # fmt: skip
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    lines: list[dict[str, Any]] = [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()]
    last = next(line for line in reversed(lines) if "evaluation" in line)
    return Outcome(last["step"], last["examples"], last["evaluation"]["loss"], last["evaluation"]["accuracy"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=300_000, help="of each run; the published runs take 6 million")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method; two at least")
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args()
    machine = Machine.here()
    found: dict[str, list[Outcome]] = {}
    for method, config in METHODS.items():
        for seed in range(options.seeds):
            with tempfile.TemporaryDirectory() as folder:
                run = outcome(config, examples=options.examples, seed=seed, folder=Path(folder))
            print(f"{method}, seed {seed}: {run}", flush=True)
            found.setdefault(method, []).append(run)

    rows = [
        (
            method,
            Spread.of([run.steps for run in runs]).show(0),
            f"{sum(run.examples for run in runs) / sum(run.steps for run in runs):,.0f}",
            Spread.of([run.loss for run in runs]).show(3),
            Spread.of([100 * run.accuracy for run in runs]).show(2),
        )
        for method, runs in found.items()
    ]
    accuracy = {method: Spread.of([100 * run.accuracy for run in runs]).mean for method, runs in found.items()}
    adagrad, norm, constant = accuracy.values()
    publish(
        "adadagrad",
        question="What do the published AdAdaGrad commands for MNIST reach, and what does a constant batch?",
        machine=machine,
        tables=[
            Table(
                f"The 28,938-parameter CNN on MNIST, one process, {options.examples:,} examples: mean ± deviation of "
                f"{options.seeds} seeds",
                ("method", "steps", "mean batch", "test loss", "test accuracy, %"),
                rows,
            )
        ],
        findings=[
            f"The authors' own command (AdaGrad) is better than their algorithm with AdaGrad-Norm at equal examples: "
            f"{'reproduced' if adagrad > norm else 'refuted'} ({adagrad:.1f} against {norm:.1f} %).",
            f"A constant batch of 64, untuned, reaches {constant:.1f} % with the same examples and many more steps.",
        ],
        data={"examples": options.examples, "outcomes": {m: [list(run) for run in runs] for m, runs in found.items()}},
        save=not options.no_save,
    )


if __name__ == "__main__":
    main()
