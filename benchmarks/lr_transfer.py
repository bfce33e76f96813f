"""Does convex theory predict the best learning rate, and the better schedule, of real language-model runs?

Command:   ADABATCH_DATA=... python benchmarks/lr_transfer.py [--results benchmarks/results]

Data: the 30 logged pre-training runs of 124M-parameter Llama models in $ADABATCH_DATA/llm_logs (Schaipp et
al. 2025, MIT): 50,000 steps of AdamW at one batch size, warm-up of 300 steps, ten schedules, learning rates
1e-4 to 3e-3.

Measured: five schedules were swept over five base learning rates. The best is that of the curve ``a / lr + b
lr + c`` fitted to the final validation losses, the curve that the bound itself is. Its spread: the fit
without one of the five, and the fit to losses moved by normal noise of the size that repeated runs show.

Predicted: the last-iterate bound's best base learning rate, up to one number for the whole problem (distance
over gradient norm), which one schedule, the anchor, gives away. Gradient norms enter in three ways: constant;
as logged by the anchor's run at its best learning rate (what somebody has who tuned the anchor); as logged by
each schedule's own.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import os
import platform
import subprocess
import time
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from numpy.typing import NDArray

from adabatch.lr import BoundTerms, Shape, bound_terms, constant, cosine, discretize, wsd

matplotlib.use("agg")
from matplotlib import pyplot as plt

Array = NDArray[np.float64]

NUM_STEPS, WARMUP, WARMUP_START = 50_000, 300, 0.01
ANCHOR = "wsd 0.2"
LOSS_NOISE = 0.0018  # standard deviation between repeated configurations in the full set of logs (0.0015 to 0.002)
NUM_DRAWS = 2000
VARIANTS = ("constant", "anchor's", "own")


class Run(NamedTuple):
    """One logged run: its base learning rate, final validation loss, and gradient norm before each step."""

    schedule: str
    base_lr: float
    loss: float
    factors: Array
    norms: Array
    lr_error: float


class Sweep(NamedTuple):
    """Five runs of one schedule, and the best base learning rate that their losses show."""

    schedule: str
    rates: Array
    losses: Array
    curve: tuple[float, float, float]
    best_lr: float
    leave_one_out: tuple[float, float]
    noise: tuple[float, float]


def schedule_of(config: dict[str, Any]) -> tuple[str, Shape]:
    """The name and shape of a run. Its cooldown is a share of all steps; ours, of those after warm-up."""
    if config["scheduler"] == "cos":
        return "cosine", cosine(floor=config["cos_final_lr"] / config["lr"])
    share = config["wsd_fract_decay"]
    if share == 0:
        return "constant", constant()
    cooldown = share * NUM_STEPS / (NUM_STEPS - WARMUP)
    if config["decay_type"] == "sqrt":
        return f"wsd {share:g} 1-sqrt", wsd(cooldown=cooldown, decay="1-sqrt")
    return f"wsd {share:g}", wsd(cooldown=cooldown)


def logged(history: dict[str, list[Any]], key: str) -> dict[int, float]:
    """One series by iteration; an iteration logged twice is averaged, a missing value left out."""
    values: dict[int, list[float]] = {}
    for step, value in zip(history["iter"], history[key], strict=True):
        if value is not None and math.isfinite(value):
            values.setdefault(step, []).append(value)
    return {step: float(np.mean(values[step])) for step in sorted(values)}


def load(path: Path) -> list[Run]:
    """All runs. One restarted from the constant run of its learning rate gets that run's norms before it."""
    with lzma.open(path) as file:
        records = json.load(file)
    stable = {
        record["config"]["lr"]: record["history"]["train"]
        for record in records
        if schedule_of(record["config"])[0] == "constant"
    }
    runs = []
    for record in records:
        config, history = record["config"], record["history"]["train"]
        assert (config["iterations"], config["warmup_steps"]) == (NUM_STEPS, WARMUP)
        name, shape = schedule_of(config)
        factors = discretize(shape, NUM_STEPS, warmup_steps=WARMUP, warmup_start=WARMUP_START)
        rates = {step: rate for step, rate in logged(history, "train_lr").items() if WARMUP < step < NUM_STEPS}
        lr_error = max(abs(factors[step] - rate / config["lr"]) for step, rate in rates.items())
        norms = logged(history, "grad_norm")
        before = logged(stable[config["lr"]], "grad_norm")
        norms = {step: norm for step, norm in before.items() if step < min(norms)} | norms
        profile = np.interp(np.arange(NUM_STEPS), list(norms), list(norms.values()))
        loss = record["summary"]["final-val/loss"]
        runs.append(Run(name, config["lr"], loss, factors, profile, lr_error))
    return sorted(runs, key=lambda run: (run.schedule, run.base_lr))


def fit(rates: Array, losses: Array) -> tuple[float, float, float]:
    """Least squares of ``a / lr + b lr + c``."""
    columns = np.stack([1 / rates, rates, np.ones_like(rates)], axis=1)
    a, b, c = np.linalg.lstsq(columns, losses, rcond=None)[0]
    return float(a), float(b), float(c)


def minimum(curve: tuple[float, float, float]) -> float:
    """Where the fitted curve is least; NaN where it has no minimum."""
    a, b, _ = curve
    return math.sqrt(a / b) if a > 0 and b > 0 else math.nan


def sweep(schedule: str, runs: list[Run], rng: np.random.Generator) -> Sweep:
    """The measured best base learning rate of a schedule, with its spread."""
    rates = np.array([run.base_lr for run in runs])
    losses = np.array([run.loss for run in runs])
    curve = fit(rates, losses)
    without = [minimum(fit(np.delete(rates, i), np.delete(losses, i))) for i in range(len(rates))]
    drawn = [minimum(fit(rates, losses + rng.normal(0, LOSS_NOISE, len(rates)))) for _ in range(NUM_DRAWS)]
    low, high = np.nanquantile(drawn, [0.05, 0.95])
    spread = float(np.nanmin(without)), float(np.nanmax(without))
    return Sweep(schedule, rates, losses, curve, minimum(curve), spread, (float(low), float(high)))


def nearest(runs: list[Run], rate: float) -> Run:
    """The run whose base learning rate is nearest to ``rate`` in ratio."""
    return min(runs, key=lambda run: abs(math.log(run.base_lr / rate)))


def terms(run: Run, variant: str, anchor: Run) -> BoundTerms:
    """The bound of a run's schedule for distance 1, with the gradient norms taken in one of three ways."""
    if variant == "constant":
        return bound_terms(run.factors)
    return bound_terms(run.factors, run.norms if variant == "own" else anchor.norms)


def concordance(values: Array, losses: Array) -> dict[str, float | int]:
    """Kendall's tau, and how many pairs whose losses differ by more than noise are ordered rightly."""
    pairs = list(combinations(range(len(values)), 2))
    signs = [np.sign((values[i] - values[j]) * (losses[i] - losses[j])) for i, j in pairs]
    clear = [sign for sign, (i, j) in zip(signs, pairs, strict=True) if abs(losses[i] - losses[j]) > 2 * LOSS_NOISE]
    return {"tau": float(np.mean(signs)), "right": sum(sign > 0 for sign in clear), "clear_pairs": len(clear)}


def predict(sweeps: dict[str, Sweep], tuned: dict[str, BoundTerms]) -> dict[str, Any]:
    """Best base learning rates from the anchor's, and how far they are off."""
    distance = sweeps[ANCHOR].best_lr / tuned[ANCHOR].best_base_lr
    predicted = {name: distance * term.best_base_lr for name, term in tuned.items()}
    off = {name: math.log(predicted[name] / sweeps[name].best_lr) for name in sweeps}
    # the error between two schedules is the same whichever of them is the anchor
    errors = {pair: abs(off[pair[0]] - off[pair[1]]) for pair in combinations(sorted(sweeps), 2)}
    decaying = [error for pair, error in errors.items() if "constant" not in pair]
    return {
        "distance": distance,
        "predicted_lr": predicted,
        "ln_error": off,
        "mean_pair_error": float(np.mean(list(errors.values()))),
        "mean_pair_error_decaying": float(np.mean(decaying)),
    }


def rank(
    runs: list[Run],
    of_run: list[BoundTerms],
    sweeps: dict[str, Sweep],
    tuned: dict[str, BoundTerms],
    distance: float,
) -> dict[str, Any]:
    """Bounds against final losses: of each schedule at its best, at each learning rate, and of all runs."""
    bounds = np.array(
        [
            term._replace(distance=distance**2 * term.distance).at(run.base_lr)
            for run, term in zip(runs, of_run, strict=True)
        ]
    )
    losses, rates = np.array([run.loss for run in runs]), np.array([run.base_lr for run in runs])
    best_bound = {name: distance * term.best for name, term in tuned.items()}
    best_loss = np.array([sweeps[name].losses.min() for name in best_bound])
    groups = {"each at its best": concordance(np.array(list(best_bound.values())), best_loss)}
    for rate in np.unique(rates):
        groups[f"all at {rate:g}"] = concordance(bounds[rates == rate], losses[rates == rate])
    groups["all runs"] = concordance(bounds, losses)
    named = {f"{run.schedule} at {run.base_lr:g}": value for run, value in zip(runs, bounds.tolist(), strict=True)}
    return {"concordance": groups, "best_bound": best_bound, "bounds": named}


def evaluate(runs: list[Run]) -> dict[str, Any]:
    """Everything that is reported."""
    by_schedule: dict[str, list[Run]] = {}
    for run in runs:
        by_schedule.setdefault(run.schedule, []).append(run)
    rng = np.random.default_rng(0)
    sweeps = {name: sweep(name, group, rng) for name, group in by_schedule.items() if len(group) == 5}
    tuned = {name: nearest(by_schedule[name], found.best_lr) for name, found in sweeps.items()}
    report: dict[str, Any] = {"sweeps": sweeps, "transfer": {}, "ranking": {}}
    for variant in VARIANTS:
        of_run = [terms(run, variant, tuned[ANCHOR]) for run in runs]
        of_schedule = {name: terms(run, variant, tuned[ANCHOR]) for name, run in tuned.items()}
        report["transfer"][variant] = predict(sweeps, of_schedule)
        distance = report["transfer"][variant]["distance"]
        report["ranking"][variant] = rank(runs, of_run, sweeps, of_schedule, distance)
    report["losses"] = {f"{run.schedule} at {run.base_lr:g}": run.loss for run in runs}
    report["lr_error"] = max(run.lr_error for run in runs if run.schedule != "cosine")
    report["lr_error_cosine"] = max(run.lr_error for run in runs if run.schedule == "cosine")
    return report


HEAD = """\
# Best learning rate and schedule of 124M-parameter runs: predicted by the bound, and measured

`{command}` at commit {commit}; {hardware}; {seconds:.1f} s.

Data: 30 logged pre-training runs (Schaipp et al. 2025): 50,000 steps of AdamW, one seed each, final
validation loss. Repeated configurations differ by a standard deviation of about {noise}. After warm-up, our
shapes are the logged learning rates within {lr_error:.0e} of the base learning rate (cosine runs:
{lr_error_cosine:.0e}, since the scheduler that made them peaks and ends one step early).

![loss against learning rate, and against the bound](lr_transfer.png)

## Best base learning rate (1e-3)

Predicted from the measured best of `{anchor}` alone, with gradient norms that are constant, those of the
anchor's run, or those of each schedule's own run at its best; in brackets ln(predicted / measured). Measured:
the minimum of a / lr + b lr + c fitted to five losses; its range with one of them left out (fits without a
minimum aside); and 90 % of the fits to losses with noise added.

| schedule | measured | one left out | noise | constant norms | anchor's norms | own norms |
| --- | --- | --- | --- | --- | --- | --- |
"""
PAIRS = """
Mean |ln error| over pairs of schedules, whichever is the anchor:

| pairs | constant norms | anchor's norms | own norms |
| --- | --- | --- | --- |
"""
RANKING = """
## Ranking

Each schedule at its best: the bound relative to the anchor's, and the best loss of the five rates.

| schedule | best loss | constant norms | anchor's norms | own norms |
| --- | --- | --- | --- | --- |
"""
CONCORDANCE = """
Kendall's tau between bound and loss; in brackets the pairs ordered rightly, of those whose losses differ by
more than {least:g}. Away from a schedule's best the bound needs the distance to a minimiser, which the
anchor's best gives.

| runs | constant norms | anchor's norms | own norms |
| --- | --- | --- | --- |
"""


def row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |\n"


def tables(report: dict[str, Any], facts: dict[str, Any]) -> str:
    """The report as Markdown."""
    sweeps: dict[str, Sweep] = report["sweeps"]
    moved = [report["transfer"][variant] for variant in VARIANTS]
    ranked = [report["ranking"][variant] for variant in VARIANTS]
    errors = {"lr_error": report["lr_error"], "lr_error_cosine": report["lr_error_cosine"]}
    text = HEAD.format(**facts, **errors, noise=LOSS_NOISE, anchor=ANCHOR)
    for name, found in sorted(sweeps.items(), key=lambda item: item[1].best_lr):
        spreads = [f"{low * 1e3:.2f} to {high * 1e3:.2f}" for low, high in (found.leave_one_out, found.noise)]
        notes = ["anchor" if name == ANCHOR else f"{kind['ln_error'][name]:+.2f}" for kind in moved]
        rates = [f"{kind['predicted_lr'][name] * 1e3:.3f} ({note})" for kind, note in zip(moved, notes, strict=True)]
        text += row(name, f"{found.best_lr * 1e3:.3f}", *spreads, *rates)
    text += PAIRS + row("all ten", *(f"{kind['mean_pair_error']:.3f}" for kind in moved))
    text += row("the six without `constant`", *(f"{kind['mean_pair_error_decaying']:.3f}" for kind in moved))
    text += RANKING
    for name, found in sorted(sweeps.items(), key=lambda item: float(item[1].losses.min())):
        relative = [kind["best_bound"][name] / kind["best_bound"][ANCHOR] for kind in ranked]
        text += row(name, f"{found.losses.min():.4f}", *(f"{value:.3f}" for value in relative))
    text += CONCORDANCE.format(least=2 * LOSS_NOISE)
    for group in ranked[0]["concordance"]:
        results = [kind["concordance"][group] for kind in ranked]
        text += row(group, *(f"{r['tau']:+.2f} ({r['right']} of {r['clear_pairs']})" for r in results))
    return text


def draw(report: dict[str, Any], path: Path) -> None:
    """Loss against learning rate with measured and predicted minima; bound against loss at one rate."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    grid = np.geomspace(8e-5, 4e-3, 200)
    for index, (name, found) in enumerate(report["sweeps"].items()):
        color, (a, b, c) = f"C{index}", found.curve
        left.plot(found.rates, found.losses, "o", color=color, label=name)
        left.plot(grid, a / grid + b * grid + c, "-", color=color, lw=1)
        left.plot(found.best_lr, 2 * math.sqrt(a * b) + c, "|", color=color, ms=22, mew=2)
        predicted = report["transfer"]["constant"]["predicted_lr"][name]
        left.plot(predicted, a / predicted + b * predicted + c, "v", color=color, ms=9, mfc="none")
    left.set(xscale="log", xlabel="base learning rate", ylabel="final validation loss", ylim=(2.94, 3.26))
    left.set_title(f"measured minimum (bar), predicted from {ANCHOR} with constant norms (triangle)", fontsize=9)
    left.legend(frameon=False)
    for marker, variant in zip("osv", VARIANTS, strict=True):
        bounds = report["ranking"][variant]["bounds"]
        keys = [key for key in bounds if key.endswith(" at 0.003") and not key.startswith("constant")]
        relative = [bounds[key] / bounds[f"{ANCHOR} at 0.003"] for key in keys]
        losses = [report["losses"][key] for key in keys]
        right.plot(relative, losses, marker, mfc="none", label=f"{variant} norms")
        if variant == "constant":
            for key, x, y in zip(keys, relative, losses, strict=True):
                name = key.removesuffix(" at 0.003")
                right.annotate(name, (x, y), (4, 4), textcoords="offset points", fontsize=7, rotation=35)
    right.set(xlabel=f"bound / bound of {ANCHOR}", ylabel="final validation loss", ylim=(2.955, 3.03))
    right.set_title("the nine schedules that decay, at base learning rate 3e-3", fontsize=9)
    right.legend(frameon=False, loc="upper left")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def processor() -> str:
    """The name of the processor, as Linux gives it."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="folder to write to")
    results: Path = parser.parse_args().results
    if "ADABATCH_DATA" not in os.environ:
        parser.error("set ADABATCH_DATA to the folder that holds llm_logs/grad_norm_runs.json.xz")
    begin = time.perf_counter()
    report = evaluate(load(Path(os.environ["ADABATCH_DATA"]) / "llm_logs" / "grad_norm_runs.json.xz"))
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
    )
    facts = {
        "command": "python benchmarks/lr_transfer.py",
        "commit": commit.stdout.strip() or "unknown",
        "hardware": f"{processor()}, 1 thread, numpy {np.__version__}",
        "seconds": time.perf_counter() - begin,
    }
    text = tables(report, facts)
    results.mkdir(parents=True, exist_ok=True)
    (results / "lr_transfer.md").write_text(text)
    plain = report | {
        "sweeps": {name: found._asdict() for name, found in report["sweeps"].items()},
        "facts": facts,
    }
    (results / "lr_transfer.json").write_text(json.dumps(plain, indent=1, default=lambda x: x.tolist()) + "\n")
    draw(report, results / "lr_transfer.png")
    print(text)


if __name__ == "__main__":
    main()
