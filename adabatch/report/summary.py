"""A run in numbers and sentences: its totals, the changes of its batch, and flags for the reader. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal, NamedTuple

import numpy as np

from adabatch.batch import criteria, goodput
from adabatch.batch.control import Reason
from adabatch.batch.criteria import Criterion
from adabatch.batch.efficiency import adaptive_limit
from adabatch.lr.follow import BETA1_FLOOR, BETA2_FLOOR
from adabatch.report.curves import moving_mean
from adabatch.report.evaluations import Floats
from adabatch.report.steps import RunSteps, filled

LOSS_WINDOW = 0.02
"""Share of the run over which the loss is averaged, in pictures and before its best value is taken."""

UNCERTAIN = 0.5
"""Share of "not significant" decisions above which the reader is told."""

Level = Literal["note", "warning"]


class RunSettings(NamedTuple):
    """The settings in the config of a run that a report reads; None if the config does not contain them.

    Args:
        criterion: the name of the criterion's class.
        limits: smallest and largest global batch size, if they are constant.
        lr_rule: how the learning rate follows the batch.
        reference: the batch size for which the base learning rate was tuned.
        weight_decay: weight decay of the optimizer.
        betas: betas of the optimizer.
        follow: which settings follow the batch.
        beta_floors: the floors of betas that follow.
        tokens_per_example: tokens in one example.
    """

    criterion: str | None = None
    limits: tuple[float | None, float | None] = (None, None)
    lr_rule: str | None = None
    reference: float | None = None
    weight_decay: float | None = None
    betas: tuple[float, ...] | None = None
    follow: tuple[str, ...] = ()
    beta_floors: tuple[float, float] = (BETA1_FLOOR, BETA2_FLOOR)
    tokens_per_example: float | None = None


def report_settings(config: Mapping[str, Any]) -> RunSettings:
    """The settings of a report, from a config with dotted names (``flat``)."""

    def number(name: str) -> float | None:
        value = config.get(name)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None

    kind, rule, betas = (
        config.get("criterion.class_path"),
        config.get("lr_rule"),
        config.get("optimizer.init_args.betas"),
    )
    floors = number("follow.beta1_floor"), number("follow.beta2_floor")
    return RunSettings(
        criterion=kind.rpartition(".")[2] if isinstance(kind, str) else None,
        limits=(number("limits.min"), number("limits.max")),
        lr_rule=rule if isinstance(rule, str) else None,
        reference=number("reference_batch_size"),
        weight_decay=number("optimizer.init_args.weight_decay"),
        betas=tuple(map(float, betas)) if isinstance(betas, list | tuple) else None,
        follow=_followed(config),
        beta_floors=(
            BETA1_FLOOR if floors[0] is None else floors[0],
            BETA2_FLOOR if floors[1] is None else floors[1],
        ),
        tokens_per_example=number("tokens_per_example"),
    )


def _followed(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The settings that follow the batch: those in the config, or else the default."""
    # The default of AdaptiveBatch, which a config does not repeat.
    follow = config.get("follow.settings", config.get("follow"))
    if isinstance(follow, list | tuple):
        return tuple(follow)
    noise = (criterion := _criterion_in(config)) is not None and criterion.needs.euclidean
    adam = config.get("optimizer.class_path") in ("torch.optim.Adam", "torch.optim.AdamW")
    return ("betas",) if config.get("lr_rule") is None and noise and adam else ()


def _criterion_in(config: Mapping[str, Any]) -> Criterion | None:
    """The criterion of a config; None if it is a user's own, or cannot be made from what the config says."""
    package, _, name = str(config.get("criterion.class_path")).rpartition(".")
    kind = getattr(criteria, name, None) or getattr(goodput, name, None)
    if package not in ("adabatch", "adabatch.batch") or not isinstance(kind, type):
        return None
    begin = "criterion.init_args."
    arguments = {key.removeprefix(begin): value for key, value in config.items() if key.startswith(begin)}
    with suppress(TypeError, ValueError):  # of another release
        made = kind(**arguments)
        return made if isinstance(made, Criterion) else None
    return None


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested config with dotted names: ``{"limits": {"min": 16}}`` is ``{"limits.min": 16}``."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def differing_settings(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The settings in which configs differ: name -> its value in each config, None if it is not there."""
    names = sorted({name for config in configs for name in config})
    rows = {name: [config.get(name) for config in configs] for name in names}
    return {name: values for name, values in rows.items() if any(value != values[0] for value in values)}


class Summary(NamedTuple):
    """A run's totals; NaN if the journal does not contain them.

    Args:
        num_steps: all steps, including those whose update was left out.
        num_left_out: steps whose update was not applied.
        num_examples: examples consumed.
        mean_batch: examples per step.
        smallest_batch: the smallest batch of all steps.
        largest_batch: the largest batch of all steps.
        efficiency: worth of an example relative to one in a small batch, ``1 / (1 + b / B)``, as a mean over the
            examples for which the noise scale is known.
        adaptive_limit: how much a batch that follows the noise scales of this run could save at most, compared with the
            best constant batch (``adabatch.batch.adaptive_limit``).
        known: share of the examples for which the noise scale is known.
        best_loss: lowest mean loss over 2 % of the run.
        last_loss: mean loss over the last 2 % of the run.
        num_changes: how often the batch size changed.
        probed: share of the steps whose gradient was measured.
        accumulated: share of the examples in steps of more than one micro-batch per rank.
        seconds: time of all steps together.
    """

    num_steps: int
    num_left_out: int
    num_examples: float
    mean_batch: float
    smallest_batch: float
    largest_batch: float
    efficiency: float
    adaptive_limit: float
    known: float
    best_loss: float
    last_loss: float
    num_changes: int
    probed: float
    accumulated: float
    seconds: float


def summarize(run: RunSteps) -> Summary:
    """The totals of a run."""
    worth, known = run.efficiency, ~np.isnan(run.efficiency)
    loss = smooth_loss(run)
    finite = loss[np.isfinite(loss)]
    return Summary(
        num_steps=run.num_steps,
        num_left_out=int((~run.applied).sum()),
        num_examples=run.num_examples,
        mean_batch=run.num_examples / run.num_steps,
        smallest_batch=float(run.batch.min()),
        largest_batch=float(run.batch.max()),
        efficiency=float(np.average(worth[known], weights=run.batch[known])) if known.any() else math.nan,
        adaptive_limit=adaptive_limit(run.noise_scale, run.batch),
        known=_share(run, known),
        best_loss=float(finite.min()) if finite.size else math.nan,
        last_loss=float(finite[-1]) if finite.size else math.nan,
        num_changes=len(changes(run)),
        probed=float(np.isfinite(run.measured).mean()),
        accumulated=_share(run, run.accumulation > 1),
        seconds=total_seconds(run),
    )


def smooth_loss(run: RunSteps) -> Floats:
    """The loss, averaged over 2 % of the examples around each step, shape (num_steps,)."""
    return moving_mean(run, run.loss, window=LOSS_WINDOW * run.num_examples)


def total_seconds(run: RunSteps) -> float:
    """Time of all steps together; NaN if none was timed."""
    return float(filled(run.seconds).sum()) if np.isfinite(run.seconds).any() else math.nan


def time_before(run: RunSteps) -> Floats | None:
    """Seconds before each step, shape (num_steps,); None if less than half of the steps were timed."""
    # a time axis of mostly filled-in steps would look like a measurement
    if np.isfinite(run.seconds).mean() < 0.5:
        return None
    taken = filled(run.seconds)
    return np.cumsum(taken) - taken


def time_constant(run: RunSteps, settings: RunSettings) -> Floats | None:
    """``tau = batch / (lr x decay x examples)``: the memory of decoupled weight decay, as a share of the run.

    AdamW's weights are an average of its past updates over ``1 / (lr x decay)`` steps. Measured in examples, as a share
    of those of the run, this number is about the same in well-tuned runs of different sizes.

    Returns:
        Shape (num_steps,); None if the config has no weight decay, or it is zero.

    Source: Wang and Aitchison 2024 (arXiv 2405.13698); as a share of the data: Bergsma et al. 2025 (arXiv 2505.13738).
    """
    if not settings.weight_decay or not run.applied_lr.shape[1]:
        return None
    decay = np.full(run.num_steps, settings.weight_decay)
    if "weight_decay" in settings.follow:  # the formula of `lr.rules.followed`
        decay = decay * run.batch / reference_of(run, settings) / run.factor
    rate = run.applied_lr[:, 0] * decay * run.num_examples
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(rate > 0, run.batch / rate, math.nan)


def betas_of(run: RunSteps, settings: RunSettings) -> Floats | None:
    """The betas of each step, shape (num_steps, num_betas); None if the config has none.

    If they follow the batch, they are ``beta ** (batch / reference)``, but not below their floors.
    """
    if not settings.betas:
        return None
    betas = np.tile(np.array(settings.betas), (run.num_steps, 1))
    if "betas" in settings.follow:
        first, others = settings.beta_floors
        # a floor never raises a beta that is below it already (`lr.follow.Followers.floors`)
        floors = np.minimum([first, *[others] * (betas.shape[1] - 1)], settings.betas)
        betas = np.maximum(betas ** (run.batch / reference_of(run, settings))[:, None], floors)
    return betas


def reference_of(run: RunSteps, settings: RunSettings) -> float:
    """The reference batch size; by default, the first batch of the run."""
    return settings.reference or float(run.batch[0])


def criterion_factor(run: RunSteps) -> tuple[float, int] | None:
    """A factor and a root with which the criterion asked for ``factor x noise scale ^ (1 / root)`` in all steps.

    A norm test or a multiple of the noise scale has root 1. A price of a step has root 2, and the factor is the square
    root of the price. For other criteria, and those that read more than noise and signal, this is None.
    """
    scale = run.noise_scale
    usable = np.isfinite(scale) & (scale > 0) & np.isfinite(run.wanted) & np.isfinite(run.freedom) & (run.wanted > 0)
    # Only steps that evaluated the criterion, which have degrees of freedom; older journals do not contain those.
    if not usable.any():
        usable = np.isfinite(scale) & (scale > 0) & np.isfinite(run.wanted) & (run.wanted > 0)
    # On a few steps, any law fits.
    if usable.sum() < 3 or np.ptp(scale[usable]) < 0.01 * scale[usable].mean():
        return None
    # read off the numbers, because a journal does not name its criterion
    for root in (1, 2):
        factors = run.wanted[usable] / scale[usable] ** (1 / root)
        middle = float(np.median(factors))
        if np.abs(factors / middle - 1).max() < 1e-3:
            return middle, root
    return None


def noise_band(run: RunSteps) -> tuple[Floats, Floats] | None:
    """One-sided bounds of the noise scale, from those of the wanted batch, each of shape (num_steps,).

    The journal contains bounds of the size that the criterion asks for. If that is a multiple of the noise scale, or of
    its root, they are converted back. For other criteria this is None.
    """
    found = criterion_factor(run)
    if found is None:
        return None
    factor, root = found
    asked = np.isfinite(run.low)
    low = np.where(asked, (np.maximum(run.low, 0.0) / factor) ** root, math.nan)
    high = np.where(asked, (run.high / factor) ** root, math.nan)
    return low, high


class BatchChange(NamedTuple):
    """A change of the planned batch size.

    Args:
        step: number of the step after which it was decided.
        examples: examples consumed before that step.
        before: batch size until then, in examples.
        after: batch size from then on.
        reason: the reason in the journal.
        text: the change and its reason as a sentence.
    """

    step: int
    examples: float
    before: float
    after: float
    reason: str
    text: str


def changes(run: RunSteps) -> list[BatchChange]:
    """All changes of the planned batch size, in their order."""
    # Planned sizes, not those that ran: the last step of a pass is shorter without any decision.
    planned = np.concatenate([run.batch[:1], run.next_batch[:-1]])
    found = []
    for index in np.flatnonzero((planned != run.next_batch) & np.isfinite(planned) & np.isfinite(run.next_batch)):
        before, after, reason = float(planned[index]), float(run.next_batch[index]), run.reason[index]
        wanted, low, high = float(run.wanted[index]), float(run.low[index]), float(run.high[index])
        verb = "grew" if after > before else "shrank"
        text = f"After step {run.step[index]:,.0f} the batch {verb} from {before:,.0f} to {after:,.0f} examples"
        text += _why(reason, wanted, low, high)
        found.append(BatchChange(int(run.step[index]), float(run.examples[index]), before, after, reason, text))
    return found


def _why(reason: str, wanted: float, low: float, high: float) -> str:
    if reason == Reason.SCHEDULED:
        return ", as its schedule says."
    if reason == Reason.AT_LIMIT:
        return " to stay within its limits."
    if reason not in (Reason.GROW, Reason.SHRINK):
        return f" ({reason})."
    if math.isinf(wanted):
        return f": no signal was seen, and at least {low:,.0f} were asked for."
    if math.isnan(wanted):
        return "."
    bounds = f" (between {low:,.0f} and {high:,.0f})" if math.isfinite(low) and math.isfinite(high) else ""
    bounds = f" (at least {low:,.0f})" if math.isfinite(low) and math.isinf(high) else bounds
    return f": the criterion asked for {wanted:,.0f}{bounds}."


class Flag(NamedTuple):
    """Something that a reader should know of a run.

    Args:
        kind: a name that stays the same between releases.
        level: "warning" if something should be changed.
        text: a sentence or two.
        share: the share of the examples that it concerns; NaN if it does not concern examples.
    """

    kind: str
    level: Level
    text: str
    share: float = math.nan


def flags(run: RunSteps, settings: RunSettings) -> list[Flag]:
    """The flags of a run, warnings first."""
    found = [
        *_left_out(run),
        *_at_limits(run, settings),
        *_past_the_noise_scale(run),
        *_rule(run, settings),
        *_floors(run),
        *_estimates(run),
        *_memory(run),
    ]
    return sorted(found, key=lambda flag: flag.level != "warning")


def _share(run: RunSteps, where: Any) -> float:
    """Share of the examples in the steps that are marked."""
    return float(run.batch[where].sum() / run.batch.sum())


def percent(share: float) -> str:
    """A share as text: 76 %, below 1 % with one digit more."""
    return f"{100 * share:.0f} %" if share >= 0.0095 or share == 0 else f"{100 * share:.1g} %"


def counted(number: int, noun: str) -> str:
    """A number of things: "1 update", "2 updates", "1,200 updates"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _left_out(run: RunSteps) -> list[Flag]:
    number = int((~run.applied).sum())
    if not number:
        return []
    first = run.step[int(np.argmin(run.applied))]
    be = "was" if number == 1 else "were"
    text = f"{counted(number, 'update')} {be} left out, the first at step {first:,.0f}: their examples moved nothing."
    return [Flag("updates_left_out", "warning", text, _share(run, ~run.applied))]


def largest_allowed(run: RunSteps, settings: RunSettings) -> float | None:
    """The largest batch: ``limits.max`` of the config, or the size at which a limit held it according to the
    journal."""
    if settings.limits[1] is not None:
        return settings.limits[1]
    # the reason is the same for the smallest limit, but the criterion then wants less
    held = np.array([reason == Reason.AT_LIMIT for reason in run.reason]) & (run.wanted > run.batch)
    largest = float(run.batch.max())
    return largest if held.any() and bool((run.batch[held] == largest).any()) else None


def _at_limits(run: RunSteps, settings: RunSettings) -> list[Flag]:
    found, largest, smallest = [], largest_allowed(run, settings), settings.limits[0]
    if largest is not None and largest != smallest and (share := _share(run, run.batch >= largest)) > 0:
        wants = run.wanted[(run.batch >= largest) & ~np.isnan(run.wanted)]
        text = f"{percent(share)} of the examples ran at limits.max ({largest:,.0f})."
        more = bool(wants.size) and float(np.median(wants)) > 1.2 * largest
        if more and math.isfinite(np.median(wants)):
            text += f" There the criterion asked for {np.median(wants):,.0f} (median): a larger limit would be used."
        found.append(Flag("at_limits_max", "warning" if more and share > 0.5 else "note", text, share))
    if smallest is not None and largest != smallest and (share := _share(run, run.batch <= smallest)) > 0.5:
        text = f"{percent(share)} of the examples ran at limits.min ({smallest:,.0f})."
        found.append(Flag("at_limits_min", "note", text, share))
    return found


def _past_the_noise_scale(run: RunSteps) -> list[Flag]:
    with np.errstate(invalid="ignore"):
        past = run.batch > run.noise_scale
    share = _share(run, past)
    if share < 0.01:  # a single estimate that came out small
        return []
    text = (
        f"{percent(share)} of the examples ran in batches past the noise scale, where an example is worth less than "
        f"half of one in a small batch."
    )
    return [Flag("past_the_noise_scale", "warning" if share > 0.5 else "note", text, share)]


def rule_of(run: RunSteps, settings: RunSettings) -> str | None:
    """The rule by which the learning rate followed the batch: that of the config, or a simple one that matches the
    factors."""
    if settings.lr_rule is not None:
        return settings.lr_rule
    known = np.isfinite(run.factor) & run.applied
    if not known.any() or np.ptp(run.batch[known]) == 0:
        return None
    ratio = run.batch[known] / reference_of(run, settings)
    for rule, power in (("none", 0.0), ("sqrt", 0.5), ("linear", 1.0)):
        # not "gain", whose factor depends on the noise at each step
        if np.allclose(run.factor[known], ratio**power, rtol=1e-6):
            return rule
    return None


def _rule(run: RunSteps, settings: RunSettings) -> list[Flag]:
    rule = rule_of(run, settings)
    with np.errstate(invalid="ignore"):
        past = (run.batch > run.noise_scale) & (run.batch > reference_of(run, settings))
    share = _share(run, past)
    found = []
    if rule in ("sqrt", "linear") and share > 0.01:
        safe = {"sqrt": "sqrt_gain", "linear": "gain"}[rule]
        text = (
            f"The rule {rule} was used outside the noise-dominated range for {percent(share)} of the examples. It is "
            f"derived for batches well below the noise scale; lr_rule={safe!r} holds on both sides."
        )
        found.append(Flag("rule_outside_its_range", "warning" if share > 0.1 else "note", text, share))
    if rule == "none" and np.ptp(run.batch) > 0:
        grown = float(run.batch.max() / run.batch.min())
        text = (
            f"The learning rate did not follow the batch (lr_rule none), which changed by a factor of {grown:.3g}: "
            f"under a schedule on examples that acts as a decay of the learning rate."
        )
        found.append(Flag("rate_did_not_follow", "note", text))
    return found


def _floors(run: RunSteps) -> list[Flag]:
    found = []
    for beta, values in run.floors.items():
        share = _share(run, np.isfinite(values))
        text = f"{beta} was at its floor ({np.nanmax(values):g}) for {percent(share)} of the examples."
        found.append(Flag(f"{beta}_at_floor", "note", text, share))
    return found


def _estimates(run: RunSteps) -> list[Flag]:
    counts = Counter(run.reason)
    probes = int(np.isfinite(run.measured).sum())
    if not probes and not np.isfinite(run.noise).any():
        text = "The noise was not measured: Measure(monitor=True), or --measure.monitor=true, records it in any run."
        return [Flag("noise_not_measured", "note", text)]
    found = []
    if bad := counts[Reason.NOT_FINITE]:
        text = f"{counted(bad, 'step')} had a loss or a gradient that was not finite, or too large to be averaged."
        found.append(Flag("not_finite", "warning", text))
    decided = sum(
        number for reason, number in counts.items() if reason not in (Reason.NOT_PROBED, Reason.SCHEDULED, "")
    )
    if decided and (unsure := counts[Reason.NOT_SIGNIFICANT] / decided) > UNCERTAIN:
        text = (
            f"In {percent(unsure)} of the decisions the estimate was too uncertain for a change of the batch. More "
            f"parts per step (smaller micro-batches) or a longer Control(memory=) narrow its error bar."
        )
        found.append(Flag("uncertain", "note", text))
    if decided and (silent := counts[Reason.NO_SIGNAL] / decided) > 0.1:
        text = f"In {percent(silent)} of the decisions no signal was seen above the noise, so the batch was held."
        found.append(Flag("no_signal", "note", text))
    return found


def _memory(run: RunSteps) -> list[Flag]:
    if not run.out_of_memory:
        return []
    step = min(run.out_of_memory)
    text = (
        f"A trial of a larger micro-batch ran out of memory at step {step:,}; from there on steps accumulate instead."
    )
    return [Flag("out_of_memory", "note", text)]
