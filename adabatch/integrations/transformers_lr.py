"""The learning-rate schedules of ``TrainingArguments``, for a run whose number of steps is not known beforehand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from adabatch import lr
from adabatch.batch.plan import Duration, Progress, steps
from adabatch.lr.shapes import Shape
from adabatch.runtime.optimizers.scheduler import GrowthHold

OF_A_METRIC = ("reduce_lr_on_plateau", "greedy")
"""Schedules of the host that read losses and do not count steps."""


class ProgressBeforeBatches:
    """A progress source for a schedule that is made before the ``AdaptiveBatch`` of the run, which it follows later.

    Args:
        progress: the progress of the run so far.
        batch_size: global batch size of the next step.
    """

    # The Trainer makes its schedule in the same call as the wrapped model, before any hook can see that model.
    def __init__(self, progress: Progress, batch_size: int) -> None:
        self._progress = progress
        self._batch_size = batch_size
        self._hold: Duration | None = None
        self._batches: GrowthHold | None = None

    def follow(self, batches: GrowthHold) -> None:
        """Reads progress from ``batches`` from now on."""
        self._batches = batches
        if self._hold is not None:
            batches.hold_growth_until(self._hold)

    @property
    def progress(self) -> Progress:
        """What the applied updates consumed so far."""
        return self._progress if self._batches is None else self._batches.progress

    @property
    def progress_after_next(self) -> Progress:
        """The same, one step later."""
        if self._batches is None:
            return self._progress.after(self._batch_size)
        return self._batches.progress_after_next

    @property
    def lr_factor(self) -> float:
        """The batch factor of the next update."""
        return 1.0 if self._batches is None else self._batches.lr_factor

    def hold_growth_until(self, duration: Duration | None) -> None:
        """Keeps the batch from growing before this much of the run is over."""
        self._hold = duration
        if self._batches is not None:
            self._batches.hold_growth_until(duration)


def warmup_of(args: Any) -> Duration | float | None:
    """The warm-up: a number of steps, or a share of the run; None for none."""
    share = getattr(args, "warmup_ratio", None) or 0.0  # of older releases
    if args.warmup_steps >= 1:
        return steps(int(args.warmup_steps))
    return float(args.warmup_steps or share) or None


def warmup_start_of(args: Any) -> float:
    """The factor that the warm-up starts from."""
    name = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    settings = args.lr_scheduler_kwargs or {}
    return float(settings.get("min_lr_ratio", 0.0)) if name == "warmup_stable_decay" else 0.0


def shape_of(args: Any, total: Duration) -> Shape:
    """The shape for ``lr_scheduler_type``.

    Args:
        args: ``TrainingArguments``.
        total: length of the run.

    Raises:
        ValueError: if the schedule has no such shape, or has settings that count steps, whose number is not known.
    """
    name = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    settings = dict(args.lr_scheduler_kwargs or {})
    make = _SHAPES.get(name)
    if make is None:
        raise ValueError(
            f"lr_scheduler_type={name!r} cannot be followed by progress: use one of "
            f"{', '.join([*_SHAPES, *OF_A_METRIC])}, or make a ProgressLR in a create_scheduler of your own"
        )
    # It takes out the settings that it uses; what is left would have no effect.
    shape = make(args, settings, total)
    if settings:
        raise ValueError(
            f"lr_scheduler_kwargs of {name!r} cannot be followed by progress: leave out {', '.join(settings)}"
        )
    return shape


def _constant(args: Any, settings: dict[str, Any], total: Duration) -> Shape:
    return lr.constant()


def _linear(args: Any, settings: dict[str, Any], total: Duration) -> Shape:
    return lr.linear()


def _cosine(args: Any, settings: dict[str, Any], total: Duration) -> Shape:
    _half_a_wave(settings)
    return lr.cosine()


def _cosine_with_floor(args: Any, settings: dict[str, Any], total: Duration) -> Shape:
    _half_a_wave(settings)
    if ("min_lr" in settings) == ("min_lr_rate" in settings):
        raise ValueError("cosine_with_min_lr needs one of min_lr and min_lr_rate in lr_scheduler_kwargs")
    rate = settings.pop("min_lr_rate", None)
    return lr.cosine(floor=settings.pop("min_lr") / args.learning_rate if rate is None else rate)


def _polynomial(args: Any, settings: dict[str, Any], total: Duration) -> Shape:
    floor = settings.pop("lr_end", 1e-7) / args.learning_rate
    return lr.polynomial(power=settings.pop("power", 1.0), floor=floor)


def _wsd(args: Any, settings: dict[str, Any], total: Duration) -> Shape:
    if total.unit != "steps":
        raise ValueError(
            "warmup_stable_decay counts its decay in steps, and how many this run takes is not known: set max_steps, "
            "or make a ProgressLR with lr.wsd(cooldown=0.2) in a create_scheduler of your own"
        )
    if settings.pop("warmup_type", "linear") != "linear" or settings.pop("num_stable_steps", None) is not None:
        raise ValueError("warmup_stable_decay takes no warmup_type but linear, and no num_stable_steps: leave them out")
    warmup = warmup_of(args)
    first = warmup.count if isinstance(warmup, Duration) else round(total.count * (warmup or 0.0))
    _half_a_wave(settings)
    decay = settings.pop("decay_type", "cosine")
    cooldown = settings.pop("num_decay_steps") / max(1, total.count - first)
    return lr.wsd(cooldown=cooldown, decay=decay, floor=settings.pop("min_lr_ratio", 0.0))


def _half_a_wave(settings: dict[str, Any]) -> None:
    if settings.get("num_cycles", 0.5) != 0.5:
        raise ValueError(f"a cosine of num_cycles={settings['num_cycles']} rises again: use 0.5, or leave it out")
    settings.pop("num_cycles", None)


_SHAPES: Mapping[str, Callable[[Any, dict[str, Any], Duration], Shape]] = {
    "constant": _constant,
    "constant_with_warmup": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_min_lr": _cosine_with_floor,
    "polynomial": _polynomial,
    "warmup_stable_decay": _wsd,
}
