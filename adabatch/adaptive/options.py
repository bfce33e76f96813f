"""Options of ``AdaptiveBatch``, grouped by what they are about. Configs take the groups as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch.amp.grad_scaler import GradScaler

from adabatch.arguments import MOST_STEPS, check_fields, require, shown
from adabatch.guards.finite import SkipNonfinite, check_skip_nonfinite
from adabatch.guards.memory_trials import TrialLoss
from adabatch.journal.writer import JournalTarget
from adabatch.runtime.engines.engine import GradientSync
from adabatch.runtime.probes.layers import PerLayer

JournalOption: TypeAlias = JournalTarget | Sequence[JournalTarget] | None
"""The ``journal`` of ``AdaptiveBatch`` and ``monitor``: a path, a tracker, or several of them; None for no journal."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What is measured in addition to what the criterion and the rule need.

    Args:
        monitor: measure noise and signal even if neither the criterion nor the rule needs them.
        l1: write the l1 norm of each step's gradient to the journal, from which ``lr.refine`` makes a schedule for
            Adam. The l2 norm, for SGD, is always written if there is a probe. Both are norms of the gradient after the
            reduction and before clipping. One micro-batch per step is enough.
        layers: also write the noise and signal of each layer to the journal: of each "module" that holds parameters, or
            of each parameter "group" of the optimizer. The criterion still reads the whole gradient. If you give your
            own probe, pass ``layers=`` to it instead.
        layer_weights: weight of each parameter's squared gradient norm in noise and signal, by parameter name; use
            ``plan.layer_weights()`` of a width plan, so that an ``eta`` means the same at every width. (The plain norm
            of a wide model is dominated by its readout: 97 % at width 4,096.)
        late: read the numbers of a probed step at the end of the next step, so that the host does not wait for them
            before the update. Every decision then comes one step later, on all ranks. Needs
            ``Guard(skip_nonfinite=False)``, since whether to leave out an update cannot be decided after it. See
            docs/costs.md.

    Raises:
        ValueError: if both ``layers`` and ``layer_weights`` are given.
    """

    monitor: bool = False
    l1: bool = False
    layers: PerLayer | None = None
    layer_weights: Mapping[str, float] | None = None
    late: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.layers is not None and self.layer_weights is not None:
            raise ValueError(
                f"layer_weights groups the parameters by weight, layers={self.layers!r} groups them otherwise: give "
                f"only one of the two"
            )


@dataclass(frozen=True, kw_only=True)
class Guard:
    """What is checked and tried during a run.

    Args:
        skip_nonfinite: if loss or gradient is not finite on some rank, leave out the update on all ranks. In a step
            without a probe this check costs one pass over the gradient, 8 bytes and a host sync. "probed" checks only
            steps with a probe, where it costs nothing. Local steps of ``local_sgd`` without a probe are not checked.
        max_left_out: how many updates in a row may be left out for numbers that are not finite, before the run stops
            with ``UpdatesLeftOut``; None for no limit. If such updates are made nevertheless, the run stops after as
            many steps in which nothing that was measured was finite.
        trial: micro-batch -> its mean loss, computed as in your loop, including autocast. For a micro-batch that grows
            (``max_micro_batch_size``). Before the first step with a larger micro-batch, one of that size is run without
            an update (twice if steps accumulate). If a rank runs out of memory, all ranks keep to smaller ones and
            accumulate, and the journal records it (``out_of_memory``). Not available if ranks gather shards from each
            other (FSDP2, DeepSpeed).
        check_every: number of steps between checks that all ranks have the same plan, and that copies of the weights
            have the same bits. A check costs one pass over the weights, 16 bytes (24 per rank with FSDP2, or if
            ranks differ) and a host sync. The end of a loop is checked too; after ten such checks, from 20 steps
            after the last one on. "auto" checks the first step and every 1,000th, if several ranks hold copies (not
            under local SGD). None for no checks.

    Raises:
        ValueError: if ``check_every`` or ``max_left_out`` is below 1, or ``skip_nonfinite`` or ``check_every`` is a
            word other than "probed" or "auto".
    """

    skip_nonfinite: SkipNonfinite = True
    max_left_out: int | None = 50
    trial: TrialLoss | None = None
    check_every: int | Literal["auto"] | None = "auto"

    def __post_init__(self) -> None:
        check_skip_nonfinite(self.skip_nonfinite)
        if isinstance(self.check_every, str) and self.check_every != "auto":
            raise ValueError(f"check_every must be a number of steps, 'auto' or None, got {shown(self.check_every)}")
        check_fields(self)
        for name in ("check_every", "max_left_out"):
            most = getattr(self, name)
            require(
                not isinstance(most, int) or most <= MOST_STEPS,
                f"{name} must be at most {MOST_STEPS} steps, or None",
                most,
            )
        if isinstance(self.check_every, int) and self.check_every < 1:
            raise ValueError(f"check_every must be at least 1 step, or None for no checks, got {self.check_every}")
        if self.max_left_out is not None and self.max_left_out < 1:
            raise ValueError(
                f"max_left_out must be at least 1 update in a row, or None for any number, got {self.max_left_out}"
            )


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How the engine runs, if its defaults do not suit.

    Args:
        gradient_sync: at which micro-batches of a step the ranks reduce their gradients. DDP reduces at the "last".
            FSDP2 reduces at "each" by default: between micro-batches a rank holds only its shard of the gradient, and
            each micro-batch of each rank is a part. With "last", a step sends one gradient instead of one per
            micro-batch, but a rank holds the whole gradient until then, and all micro-batches of a rank are one part.
            Fewer parts make the estimate less certain.
        scaler: the ``torch.amp.GradScaler`` of a run in float16. ``step.backward`` then scales the loss. Call
            ``scaler.step(optimizer)`` and ``scaler.update()`` instead of ``optimizer.step()``, and
            ``scaler.unscale_(optimizer)`` before you clip. Moments, losses and the journal are unscaled. A step that
            overflows consumes its data, but changes neither the progress of the learning rate nor the averages.
    """

    gradient_sync: GradientSync | None = None
    scaler: GradScaler | None = None

    def __post_init__(self) -> None:
        check_fields(self)
