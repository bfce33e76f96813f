"""Options of ``AdaptiveBatch`` in groups that one thinks of together; configs take them whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch.amp.grad_scaler import GradScaler

from adabatch.guards.finite import SkipNonfinite, check_skip_nonfinite
from adabatch.guards.memory_trials import TrialLoss
from adabatch.runtime.engines.engine import GradientSync
from adabatch.runtime.probes.layers import PerLayer


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What is measured beside what criterion and rule need.

    Args:
        monitor: measure noise and signal although neither criterion nor rule needs them.
        l1: write the l1 norm of each step's gradient to the journal, from which ``lr.refine`` makes a schedule for
            Adam, and the l2 norm, for SGD, which every run with a probe writes down. Of the gradient as the backward
            made it, reduced over the ranks and not clipped yet; one micro-batch per step is enough.
        layers: also write the noise and signal of each layer to the journal: of each "module" that holds parameters, or
            of each parameter "group" of the optimizer. For reading only; the criterion sees the whole gradient. A probe
            of your own takes ``layers=`` for it.
        layer_weights: how often the squared norm of each parameter's gradient counts in noise and signal, by name;
            ``plan.layer_weights()`` of a width plan, so that one ``eta`` means the same at every width. (The plain norm
            of a wide model is that of its readout: 97 % at width 4,096.)

    Raises:
        ValueError: both ``layers`` and ``layer_weights``.
    """

    monitor: bool = False
    l1: bool = False
    layers: PerLayer | None = None
    layer_weights: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if self.layers is not None and self.layer_weights is not None:
            raise ValueError(
                f"layer_weights sorts parameters by weight, and layers={self.layers!r} otherwise: give one"
            )


@dataclass(frozen=True, kw_only=True)
class Guard:
    """What is checked and tried while a run goes on.

    Args:
        skip_nonfinite: leave out an update whose loss or gradient is not finite on some rank, on all ranks. A step
            without a probe pays for it with one pass over the gradient, 8 bytes and a host sync; "probed" looks at the
            other steps only, which pay nothing. Local steps of ``local_sgd`` without a probe are not looked at.
        max_left_out: updates in a row that may be left out, as their numbers are not finite, before the run stops with
            ``UpdatesLeftOut``; None for any number.
        trial: micro-batch -> its mean loss, as your loop computes it, autocast included; for a micro-batch that grows
            (``max_micro_batch_size``). The first one of each larger size is run for nothing before its step, once or,
            where steps accumulate, twice. If a rank has no memory for it, all ranks stay with smaller ones and
            accumulate; the journal names it (``out_of_memory``). Not for models whose ranks gather shards from each
            other (FSDP2, DeepSpeed).
        check_every: steps from one check to the next that all ranks hold the same plan, and copies of weights the same
            bits: one pass over the weights, 24 bytes per rank and a host sync. None checks nothing.

    Raises:
        ValueError: ``check_every`` or ``max_left_out`` below 1, or another word than "probed".
    """

    skip_nonfinite: SkipNonfinite = True
    max_left_out: int | None = 50
    trial: TrialLoss | None = None
    check_every: int | None = None

    def __post_init__(self) -> None:
        if self.check_every is not None and self.check_every < 1:
            raise ValueError(f"check_every must be at least 1, got {self.check_every}")
        if self.max_left_out is not None and self.max_left_out < 1:
            raise ValueError(
                f"max_left_out must be at least 1 update in a row, or None for any number, got {self.max_left_out}"
            )
        check_skip_nonfinite(self.skip_nonfinite)


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How the engine runs, where its defaults do not suit.

    Args:
        gradient_sync: at which micro-batches of a step the ranks reduce their gradients. DDP does it at the "last".
            FSDP2 by default at "each": between micro-batches a rank then holds its shard of the gradient only, and each
            micro-batch of each rank is a part. At the "last" a step sends one gradient instead of one per micro-batch,
            a rank holds the whole gradient meanwhile, and all micro-batches of a rank are one part: fewer parts, so a
            less certain estimate.
        scaler: the ``torch.amp.GradScaler`` of a run in float16. ``step.backward`` then scales the loss, and you call
            ``scaler.step(optimizer)`` and ``scaler.update()`` in the place of ``optimizer.step()``, and
            ``scaler.unscale_(optimizer)`` before you clip. Moments, losses and the journal are unscaled. A step that
            overflows consumes its data, and moves neither the progress of the learning rate nor the averages.
    """

    gradient_sync: GradientSync | None = None
    scaler: GradScaler | None = None
