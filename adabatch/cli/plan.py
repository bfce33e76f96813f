"""``adabatch plan``: what a run will cost on a cluster, and how to set it, before it begins."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from adabatch.cli.plain_parser import PlainParser, not_negative
from adabatch.cli.runs import FoundRun, find_runs
from adabatch.forecast import Cluster, Evidence, Forecast, Range, StepCost, forecast, kaplan, knee, power_lines
from adabatch.forecast.costs import ASSUMPTIONS, LEAST_EFFICIENCY, LEAST_STEPS, RISE, extended, largest_sensible
from adabatch.forecast.network import fitted
from adabatch.report import require_matplotlib
from adabatch.report.evidence import (
    evidence_of,
    has_band,
    has_price_band,
    largest_micro_batch,
    step_cost_of,
    timed_sizes,
)
from adabatch.report.steps import read_steps

SCALES = (8, 64, 1000, 10_000)
GUESS_BAND = (1 / 3, 3.0)
"""Of a published law on data and models that it was not fitted to: a convention, not a measurement."""
# The rest is for what nobody counts: buffers of the network and of kernels, and holes between blocks.
MEMORY_SHARE = 0.9
ROUNDS = 8
"""Rounds by which the number of examples that a plan takes comes to the one that was asked for."""
WARMUP = 0.1
WASTEFUL = 0.5
"""Efficiency below which the reader is warned: the batch is beyond the noise scale."""

DESCRIPTION = """\
Plan a run before it begins: batch sizes, criterion, learning-rate rule, and what it costs in steps, hours,
device-hours, money and bytes, here and on 8, 64, 1,000 and 10,000 devices, with ranges.

From a journal, which a short run with --measure.monitor=true gives:
  adabatch plan runs/probe --devices 8 --bandwidth 25e9 --latency 1e-5 --parameters 124e6 --price_per_hour 2

Without a run, from a published power law of language models:
  adabatch plan --examples 1e6 --tokens_per_example 2048 --parameters 124e6 --flops 2e14 --devices 8 --bandwidth 25e9

With the network and the speed of this machine measured, under any launcher:
  torchrun --nproc-per-node=8 -m adabatch plan runs/probe --measure --parameters 124e6"""


class RunPlan(NamedTuple):
    """A plan and what it rests on."""

    source: str
    settings: dict[str, Any]
    noise_band: tuple[float, float]
    here: Forecast
    scales: list[Forecast]
    knee: int | None
    notes: list[str]


def run_plan(arguments: Sequence[str]) -> int:
    """Runs the command with the arguments after its name; its exit status.

    Raises:
        ValueError: if a run has no noise scale, or numbers are outside their range or too few for a plan.
        OSError: if a file cannot be read or written.
        ImportError: if a figure is requested, but matplotlib is not installed.
        SystemExit: with status 2, if there is a mistake on the command line.
    """
    asked = _parser().parse_args(arguments)
    # one process plans; under a launcher, all of them only measure
    first, found = True, dict[str, Any]()
    if asked.measure:
        # torch is loaded only where something is measured.
        from adabatch.cli.measuring import measured

        first, found = measured()
    # the other ranks have only helped to measure
    if not first:
        return 0
    made = plan_of_arguments(asked, find_runs([asked.run])[0] if asked.run is not None else None, found)
    print(json.dumps(plan_numbers(made), indent=2) if asked.json else text(made))
    # last: whoever has no matplotlib, or no network to draw over, has the plan by now
    if asked.figure is not None:
        require_matplotlib()
        if made.knee is None:
            raise ValueError("a figure over devices needs the network: give --bandwidth and --latency, or --measure it")
        from adabatch.report.costs_picture import draw_costs

        asked.figure.parent.mkdir(parents=True, exist_ok=True)
        draw_costs([*made.scales, made.here], made.knee, asked.figure, title=made.source)
        if not asked.json:
            print(f"figure: {asked.figure}")
    return 0


def plan_of_arguments(asked: Any, run: FoundRun | None, found: dict[str, Any]) -> RunPlan:
    """The plan for the arguments of the command, which take precedence over measurements.

    Args:
        asked: the arguments.
        run: the run to plan from, if any.
        found: measurements of the machine, as `adabatch.cli.measuring.measured` returns them.

    Raises:
        ValueError: for the same reasons as ``run_plan``.
    """
    notes: list[str] = []
    bytes_of_gradient = asked.gradient_bytes if asked.gradient_bytes is not None else 4 * (asked.parameters or 0)
    if not bytes_of_gradient:
        notes.append("The size of the model is not known, so the network costs its latency only: give --parameters.")
    evidence, cost, micro, source = _journal(asked, run, bytes_of_gradient, notes) if run else _guess(asked, notes)
    cost = _given_cost(asked, found, cost, bytes_of_gradient, notes)
    micro = _micro_batch(asked, micro, notes)
    cluster = _cluster(asked, found, notes)
    if run and asked.examples is not None:
        evidence = _that_takes(asked, evidence, cost, cluster)
    limits = asked.min_batch, _largest(asked, evidence, notes)
    here = forecast(evidence, cost, cluster, limits=limits, examples=asked.examples if run else None)
    if not here.price > 0:
        raise ValueError(
            "a step costs nothing beside its examples, so no batch size is worth more than another: give "
            "--step_seconds, --latency"
        )
    if here.efficiency.point < WASTEFUL:
        notes.append(
            f"In the batches of the least time an example is worth {here.efficiency.point:.2g} of one in a small "
            "batch: steps are expensive compared with examples, and the batch is beyond the noise scale. Use fewer "
            "devices, or limit the batch with --max_batch."
        )
    known = not math.isinf(cluster.bandwidth)
    scales = [forecast(evidence, cost, replace(cluster, devices=count), limits=limits) for count in SCALES if known]
    settings = {
        **_batches(here, cluster.devices, micro, asked, limits[1]),
        "criterion": "adabatch.StepPrice",
        # two digits, because the minimum is flat around the best price (`StepPrice`)
        "criterion.examples": float(f"{here.price:.2g}"),
        **_rates(run, notes),
    }
    most = knee(evidence, cost, cluster, limits=limits) if known else None
    return RunPlan(source, settings, evidence.band, here, scales, most, notes)


def _that_takes(asked: Any, evidence: Evidence, cost: StepCost, cluster: Cluster) -> Evidence:
    """The evidence for a run that takes the examples asked for in the batches of the plan, on this cluster."""
    # The same progress takes more examples in larger batches than in those of the journal, by which evidence counts.
    counted = asked.examples
    for _ in range(ROUNDS):
        found = extended(evidence, counted)
        taken = forecast(found, cost, cluster, limits=(asked.min_batch, _most(asked, found))).examples.point
        counted *= asked.examples / taken
    return extended(evidence, counted)


def _most(asked: Any, evidence: Evidence) -> float:
    given: float | None = asked.max_batch
    return max(largest_sensible(evidence), asked.min_batch or 1.0) if given is None else float(given)


def _largest(asked: Any, evidence: Evidence, notes: list[str]) -> float:
    most = _most(asked, evidence)
    if asked.max_batch is not None:
        return most
    notes.append(
        f"No batch is larger than {most:,.0f} examples (but for one per device), so that the run has {LEAST_STEPS} "
        f"steps at least, and an example is worth {LEAST_EFFICIENCY:g} of one in a small batch where the noise scale "
        "is largest. Both are conventions; --max_batch puts another number in their place."
    )
    return most


def _batches(here: Forecast, devices: int, most_micro: int | None, asked: Any, limit: float) -> dict[str, Any]:
    # each device has one example at least
    smallest = max(devices, _power_of_two(here.smallest_batch), math.ceil(asked.min_batch or 0))
    largest = min(_power_of_two(here.largest_batch, up=True), int(limit))
    found = {"limits.min": smallest, "limits.max": max(smallest, largest)}
    if most_micro is None:
        return found
    # The smallest batch must hold a micro-batch per device, and two on a single one, whose spread is the noise.
    micro = max(1, min(most_micro, smallest // (devices if devices > 1 else 2)))
    return {"micro_batch_size": _power_of_two(micro), "max_micro_batch_size": most_micro, **found}


_Source = tuple[Evidence, StepCost | None, int | None, str]


def _journal(asked: Any, run: FoundRun, num_bytes: float, notes: list[str]) -> _Source:
    steps = read_steps(run.journal, run.name)
    evidence = evidence_of(steps)
    if has_band(evidence):
        low, high = evidence.band
        notes.append(
            f"The noise scale of the run lies between {low:.2f} and {high:.2f} times what was measured, each with 95 "
            "%, by its probes' scatter."
        )
    else:
        notes.append("The journal has no error bar of the noise scale (16 probes are enough), so no range has it.")
    if asked.examples is not None:
        if asked.examples > steps.num_examples:
            notes.append(
                f"Beyond the {steps.num_examples:,.0f} examples of the journal, the noise scale is taken to rise as "
                f"examples^{RISE:g} from their last quarter on (Bergsma et al. 2025), with twice the error; ranges go "
                "from no rise to twice that exponent."
            )
        notes.append(
            f"The run takes {asked.examples:,.0f} examples on this cluster; on more devices the batches are larger, "
            f"and the same progress takes more."
        )
    else:
        notes.append(
            f"The run is as long as the journal, {steps.num_examples:,.0f} examples; --examples plans another."
        )
    cost = None
    if asked.example_seconds is None:
        cost = step_cost_of(steps, gradient_bytes=num_bytes)
        if cost is not None and asked.step_seconds is None:
            notes += _price_notes(cost, timed_sizes(steps))
    return evidence, cost, largest_micro_batch(steps), f"the journal of {run.name}"


def _price_notes(cost: StepCost, sizes: int) -> list[str]:
    if sizes < 2:
        return ["Steps of one batch size only were timed: what a step costs beside its examples is a guess."]
    if cost.step == 0:
        return [
            "By the times in the journal a step costs nothing beside its examples; the ranges take this as certain."
        ]
    if not has_price_band(cost):
        return ["The journal has no error bar of the price of a step (16 timed steps are enough), so no range has it."]
    low, high = cost.price_band
    return [
        f"The price of a step without the network lies between {low:.2f} and {high:.2f} times what was measured, each "
        "with 95 %, by the scatter of its times; the batch follows the price, and a typical step takes as long as it "
        "did."
    ]


def _guess(asked: Any, notes: list[str]) -> _Source:
    if asked.examples is None or asked.tokens_per_example is None:
        raise ValueError("without a run, give --examples and --tokens_per_example; or name a run with a journal")
    guess = kaplan(asked.loss) if asked.loss is not None else power_lines(asked.examples * asked.tokens_per_example)
    scale = max(guess.tokens / asked.tokens_per_example, 1.0)
    notes.append(
        f"No run was measured. The critical batch, {guess.tokens:,.0f} tokens, is a first guess from a law of language "
        f"models: {guess.source}. It was fitted to {guess.fitted_to}. Its range, 1/3 to 3 times, is a convention."
    )
    if not guess.inside:
        notes.append(
            "The question lies outside the range that the law was fitted to, so the answer is an extrapolation."
        )
    notes.append("--examples counts those that would be needed in small batches.")
    # an efficiency of 1 all along: --examples counts those of small batches
    return (
        Evidence(np.array([asked.examples]), np.array([1e-9]), np.array([scale]), GUESS_BAND),
        None,
        None,
        guess.source,
    )


def _given_cost(
    asked: Any, found: dict[str, Any], cost: StepCost | None, num_bytes: float, notes: list[str]
) -> StepCost:
    example = asked.example_seconds
    flops = asked.flops or found.get("flops")
    if example is None and cost is None and asked.parameters and asked.tokens_per_example and flops:
        # forward and backward: 2 and 4 operations per parameter and token (Kaplan et al. 2020)
        example = 6 * asked.parameters * asked.tokens_per_example / flops
        what = "" if asked.flops else ", of a product of float32 matrices: a model may do better or worse"
        notes.append(
            f"An example takes 6 x parameters x tokens operations, at {flops:.3g} per second and device{what}."
        )
    if example is not None:
        step = asked.step_seconds
        if step is None:
            step = 0.0
            notes.append("Beside its examples and the network a step is assumed to cost nothing: give --step_seconds.")
        return StepCost(step, example, num_bytes)
    if cost is None:
        raise ValueError(
            "nothing says how long a step takes: the journal has no step times (a criterion that reads them, such as "
            "Goodput, has them written). Give --example_seconds and --step_seconds, or --parameters, "
            "--tokens_per_example and --flops (or --measure)"
        )
    # a number that the user gives has no error bar
    return cost if asked.step_seconds is None else cost._replace(step=asked.step_seconds, price_band=(1.0, 1.0))


def _cluster(asked: Any, found: dict[str, Any], notes: list[str]) -> Cluster:
    timed = found.get("all_reduce")
    latency, bandwidth = asked.latency, asked.bandwidth
    if timed and (latency is None or bandwidth is None):
        measured_latency, measured_bandwidth = fitted(found["devices"], timed)
        latency = measured_latency if latency is None else latency
        bandwidth = measured_bandwidth if bandwidth is None else bandwidth
        notes.append(
            f"Measured over {found['devices']} processes, as a ring: {measured_latency:.2g} s per message and "
            f"{measured_bandwidth:.3g} bytes/s."
        )
    devices = asked.devices or found.get("devices") or 1
    if bandwidth is None and devices > 1:
        raise ValueError("give --bandwidth, in bytes per second and device, or --measure it with two processes or more")
    if bandwidth is None:
        notes.append("The network is not known, so more devices are left out: give --bandwidth, and --latency.")
    return Cluster(
        devices=devices,
        # only for one device, which sends nothing
        bandwidth=math.inf if bandwidth is None else bandwidth,
        latency=latency or 0.0,
        node_size=asked.node_size,
        node_bandwidth=asked.node_bandwidth,
        node_latency=asked.node_latency,
        price_per_hour=asked.price_per_hour,
    )


def _micro_batch(asked: Any, ran: int | None, notes: list[str]) -> int | None:
    """The largest micro-batch that fits into memory, or else the largest that ran."""
    if asked.memory is None or asked.example_bytes is None:
        if asked.memory is not None:
            notes.append("--memory needs --example_bytes to say which micro-batch fits.")
        return ran
    left = MEMORY_SHARE * asked.memory - asked.state_bytes * (asked.parameters or 0)
    if left < asked.example_bytes:
        raise ValueError(
            f"not one example fits into {asked.memory:.3g} bytes beside {asked.state_bytes:g} bytes per parameter: "
            "shard the model, or give a larger --memory"
        )
    notes.append(f"The micro-batch fills {MEMORY_SHARE:.0%} of the memory, beside {asked.state_bytes:g} B/parameter.")
    return _power_of_two(left / asked.example_bytes)


def _rates(run: FoundRun | None, notes: list[str]) -> dict[str, Any]:
    """Learning-rate rule, reference batch size and warm-up, from the run's config where it has them."""
    config = run.config if run is not None else {}
    rule, reference, warmup = (config.get(name) for name in ("lr_rule", "reference_batch_size", "warmup"))
    found: dict[str, Any] = {"lr_rule": rule if isinstance(rule, str) and rule != "none" else "gain"}
    if run is not None:
        if not isinstance(reference, int):
            reference = int(read_steps(run.journal, run.name).batch[0])
            notes.append(
                "The learning rate of the run is assumed to be tuned for its first batch, reference_batch_size."
            )
        found["reference_batch_size"] = reference
    if isinstance(warmup, int | float) and not isinstance(warmup, bool):
        return found | {"warmup": float(warmup)}
    notes.append(f"The warm-up, {WARMUP:.0%} of the run, is a convention and does not come from what was measured.")
    return found | {"warmup": WARMUP}


def _power_of_two(value: float, *, up: bool = False) -> int:
    # the 1e-9 below: a logarithm of a power of two may be off by its rounding
    exponent = math.log2(max(value, 1.0))
    return int(2 ** (math.ceil(exponent - 1e-9) if up else math.floor(exponent + 1e-9)))


def plan_numbers(made: RunPlan) -> dict[str, Any]:
    """The plan for JSON; ranges are objects with low, point and high."""

    def of(each: Forecast) -> dict[str, Any]:
        return {name: value._asdict() if isinstance(value, Range) else value for name, value in each._asdict().items()}

    return {
        "format": 1,
        "source": made.source,
        "settings": made.settings,
        "noise_band": made.noise_band,
        "forecast": of(made.here),
        "scales": [of(each) for each in made.scales],
        "knee_devices": made.knee,
        "notes": made.notes,
        "assumptions": list(ASSUMPTIONS),
    }


_ROWS: tuple[tuple[str, Callable[[Forecast], Range]], ...] = (
    ("mean batch", lambda each: each.batch),
    ("steps", lambda each: each.steps),
    ("efficiency", lambda each: each.efficiency),
    ("hours", lambda each: each.hours),
    ("device-hours", lambda each: each.device_hours),
    ("money", lambda each: each.money),
    ("bytes sent", lambda each: each.sent_bytes),
)


def text(made: RunPlan) -> str:
    """The plan as text."""
    parts = [f"Plan from {made.source}", ""]
    parts += [f"  {name:<20} {value}" for name, value in made.settings.items()]
    parts += ["", "As options of `adabatch train`:", f"  {_options(made.settings)}"]
    parts += ["", "Point (low to high), on this cluster and on others with as many devices as named", *_table(made)]
    if made.knee is not None:
        parts += ["", f"Knee: {made.knee:,} devices, the most (as a power of two) that cost at most twice the"]
        parts[-1] += " device-hours of one."
    parts += ["", "Assumptions", *(f"  - {line}" for line in (*made.notes, *ASSUMPTIONS))]
    return "\n".join(parts)


def _options(settings: dict[str, Any]) -> str:
    # in the order of the settings: jsonargparse needs --criterion before --criterion.examples
    return " ".join(f"--{name}={value}" for name, value in settings.items())


def _table(made: RunPlan) -> list[str]:
    others = [each for each in made.scales if each.devices != made.here.devices]
    columns = [made.here, *others]
    table = [["devices", f"{made.here.devices:,} (this cluster)", *(f"{each.devices:,}" for each in others)]]
    table += [["price of a step", *(short(each.price) for each in columns)]]
    table += [
        [name, *(range_text(value(each)) for each in columns)]
        for name, value in _ROWS
        if any(value(each).high > 0 for each in columns)  # no money without a price, no bytes from one device
    ]
    widths = [max(len(row[at]) for row in table) for at in range(len(table[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]


def range_text(value: Range) -> str:
    """``point (low to high)``."""
    return f"{short(value.point)} ({short(value.low)} to {short(value.high)})"


def short(value: float) -> str:
    """A number in three digits."""
    if value >= 1e6:
        return f"{value:.2e}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _parser() -> PlainParser:
    parser = PlainParser(prog="adabatch plan", description=DESCRIPTION)
    parser.add_argument("run", nargs="?", metavar="RUN", help="folder of a run or its journal; without, a first guess")

    def number(name: str, what: str, **more: Any) -> None:
        parser.add_argument(f"--{name}", type=not_negative, metavar="X", help=what, **more)

    parser.add_argument("--devices", type=_count, metavar="N", help="data-parallel devices; 1, or those of --measure")
    parser.add_argument("--node_size", type=_count, metavar="N", help="devices in a node; 1 by default", default=1)
    number("bandwidth", "of a device to another node, in bytes per second")
    number("latency", "of a message, in seconds; 0 by default")
    number("node_bandwidth", "within a node; that between nodes by default")
    number("node_latency", "within a node; that between nodes by default")
    number("price_per_hour", "of a device", default=0.0)
    number("memory", "of a device, in bytes")
    number("example_bytes", "of memory that an example of a micro-batch takes")
    number("state_bytes", "of memory per parameter: weights, gradients, optimizer; 16 by default", default=16.0)
    number("parameters", "of the model; its gradient has 4 bytes for each")
    number("gradient_bytes", "that a step sums over the devices, instead of 4 per parameter")
    number("example_seconds", "of an example on one device, instead of the journal's")
    number("step_seconds", "of a step beside its examples and the network, instead of the journal's")
    number("flops", "operations per second of a device that the model really reaches")
    number("tokens_per_example", "for the first guess and --flops")
    number("loss", "take the first guess at this loss in nats per token (Kaplan et al. 2020)")
    number("examples", "length of the run to plan; that of the journal by default")
    number("min_batch", "smallest batch allowed, in examples")
    number("max_batch", "largest batch allowed, in examples")
    parser.add_argument("--measure", action="store_true", help="time all-reduces and a matrix product; any launcher")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    parser.add_argument("--figure", type=Path, metavar="PNG", help="draw hours and device-hours over devices")
    return parser


def _count(text: str) -> int:
    value = float(text)
    if value < 1 or value != int(value):
        raise ValueError
    return int(value)


# argparse names the type in its error: "invalid whole number of 1 or more value"
_count.__name__ = "whole number of 1 or more"
