"""What the batch makes of an update: its learning rate, betas, eps, weight decay and gain, asked with one progress.

``UpdateRules`` are the rules of a run. Asked with the size of a step and the progress at which that size was chosen,
they answer with an ``UpdateScaling``, which holds all numbers of that update. There is one progress, not two: a batch
size that reads one count and a decay that reads another come apart as soon as an update is left out.

**Floors of the betas.** ``beta ** ratio`` keeps an average's memory constant in examples, and leaves it none where the
batch grows far: (0.9, 0.95) at 64 reference batches are (0.0012, 0.0375). So each beta has a floor, which is never
above the user's own value:

- beta2 stops at 0.95. Marek et al. 2025 (arXiv 2507.07101) derive the rule and use it to go *down* to small batches;
  upwards, marin-community/marin #2447 reports spikes in large-batch runs, and bounds beta2 from below for it; the
  recipe in #4567 of the same project clips beta2 to [0.95, 0.9999], and in its sweep of five values at width 1,024 the
  best falls from 0.995 at the smallest batch to 0.95 at the largest.
- beta1 stops at 0.5, a memory of two updates: below it the average is hardly one any more.

**One count of steps for two corrections.** Adam divides its averages by ``1 - beta1 ** step`` and ``1 - beta2 ** step``
with one ``step``. If both follow with the same exponent, one count corrects both exactly (see ``StepHooks``). Two
floors make two exponents. So as long as the first average needs its correction, both follow with the smaller exponent;
afterwards each goes to its own floor, and the count is that of the second average. (From (0.9, 0.999) at 64 reference
batches, beta2 waits at 0.9934 until 511 updates are done, and then falls to 0.95.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adabatch.arguments import require
from adabatch.batch.plan import Progress
from adabatch.lr.rules import LRRule, Setting, check_follow, check_lr_rule, followed, gain, lr_factor

BETA1_FLOOR = 0.5
BETA2_FLOOR = 0.95

FORGOTTEN = 1e-3
"""What the first average may still hold of its zero beginning when the two betas begin to follow on their own."""


@dataclass(frozen=True)
class Followers:
    """Settings of an Adam-like optimizer that follow the batch, and how far down the betas may go.

    Args:
        settings: any of "betas", "eps" and "weight_decay".
        beta1_floor: the first beta does not fall below this by following, in [0, 1]; one that is below it already stays
            where it is. 0 sets no floor, 1 keeps the first beta fixed (against a batch that grows).
        beta2_floor: the same for the second beta and any further ones.

    Raises:
        ValueError: an unknown setting, or a floor outside [0, 1].
        TypeError: settings that are a string.
    """

    settings: Collection[Setting] = ()
    beta1_floor: float = BETA1_FLOOR
    beta2_floor: float = BETA2_FLOOR

    def __post_init__(self) -> None:
        check_follow(self.settings)
        for name in ("beta1_floor", "beta2_floor"):
            floor = getattr(self, name)
            require(0 <= floor <= 1, f"{name} must lie in [0, 1], where 0 sets no floor", floor)
        object.__setattr__(self, "settings", tuple(sorted(set(self.settings))))  # one order on all ranks

    @classmethod
    def of(cls, follow: Followers | Collection[Setting]) -> Followers:
        """What a user gave as ``follow=``: these, or the names of settings, which then have the default floors."""
        return follow if isinstance(follow, Followers) else cls(follow)

    def floors(self, betas: Sequence[float]) -> tuple[float, ...]:
        """The floor of each beta: never above the beta itself."""
        wanted = (self.beta1_floor, *[self.beta2_floor] * (len(betas) - 1))
        return tuple(min(floor, float(beta)) for floor, beta in zip(wanted, betas, strict=True))

    def room(self, betas: Sequence[float]) -> tuple[float, ...]:
        """How many reference batches a step may take until each beta meets its floor: at least 1, infinite for none."""
        return tuple(
            math.inf if floor <= 0 else 1.0 if floor == beta else math.log(floor) / math.log(beta)
            for beta, floor in zip(map(float, betas), self.floors(betas), strict=True)
        )


@dataclass(frozen=True, kw_only=True)
class UpdateScaling:
    """All that the batch makes of one update.

    Args:
        ratio: batch size over reference batch size.
        rule_factor: what the rule makes of the batch.
        factor: the batch factor on the learning rate: ``rule_factor``, times the decay that the criterion stands for.
        gain: steps of the reference batch size that this one is worth, between 1 and ``ratio``; 1 while no noise is
            known.
        updates: updates of the run before this one.
        followers: what else follows.
    """

    ratio: float
    rule_factor: float
    factor: float
    gain: float
    updates: int
    followers: Followers

    def exponents(self, betas: Sequence[float]) -> tuple[float, ...]:
        """``r`` of each beta, which is ``beta ** r`` in this update: the ratio, or less where a floor binds."""
        own = tuple(min(self.ratio, room) for room in self.followers.room(betas))
        if len(own) < 2:
            return own
        # What the first average holds of its beginning is beta1 ** n after n updates of the reference batch, and its
        # correction takes it for (beta1 ** own[0]) ** (n / own[-1]): both must be next to nothing.
        share = min(1.0, own[0] / own[-1])
        remembers = float(betas[0]) ** (share * self.updates) > FORGOTTEN
        return (min(own),) * len(own) if remembers else own

    def settings(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of a parameter group that change in this update, with their values.

        Args:
            group: the group's settings at the reference batch size.
        """
        names = [name for name in self.followers.settings if name in group]  # of several optimizers one may lack some
        if not names:
            return {}
        exponents = self.exponents(group["betas"]) if "betas" in names else None
        # Without the decay of the criterion, which weight decay shares with the learning rate, down to zero.
        return followed(group, names, ratio=self.ratio, factor=self.rule_factor, exponents=exponents)

    def averaged(self, group: Mapping[str, Any]) -> float:
        """As how many updates of the reference batch size this one counts in the memory of the group's averages."""
        return self.exponents(group["betas"])[-1] if "betas" in self.followers.settings and "betas" in group else 1.0

    def binding_floors(self, groups: Collection[Mapping[str, Any]]) -> dict[str, float]:
        """The floors that hold a beta back in this update: "beta1", "beta2" -> the floor; the highest of the groups."""
        binding: dict[str, float] = {}
        averaging = [group for group in groups if "betas" in group] if "betas" in self.followers.settings else []
        for group in averaging:
            betas = group["betas"]
            pairs = zip(self.followers.floors(betas), self.followers.room(betas), strict=True)
            for number, (floor, room) in enumerate(pairs, 1):
                if room < self.ratio:
                    name = f"beta{number}"
                    binding[name] = max(floor, binding.get(name, 0.0))
        return binding


def _no_decay(progress: Progress) -> float:
    return 1.0


@dataclass(frozen=True)
class UpdateRules:
    """How the updates of a run follow its batch.

    Args:
        rule: how the learning rate follows.
        followers: what else does.
        lr_decay: a decay of the learning rate that comes with the batch size, as a ``Seesaw`` has one: progress ->
            factor. It multiplies whatever the rule makes of the batch; under the rule "none" nothing moves the rate,
            and it is left out.

    Raises:
        ValueError: an unknown rule.
    """

    rule: LRRule
    followers: Followers = Followers()
    lr_decay: Callable[[Progress], float] = _no_decay

    def __post_init__(self) -> None:
        check_lr_rule(self.rule)

    def at(
        self,
        global_batch_size: float,
        progress: Progress,
        *,
        reference: float,
        noise: float = math.nan,
        signal: float = math.nan,
    ) -> UpdateScaling:
        """What a step of so many examples makes of its update.

        Args:
            global_batch_size: examples of the step, positive.
            progress: where the run stood when the size of the step was chosen: what was consumed before it, by updates
                that were left out too.
            reference: the batch size that the base learning rate is meant for, positive.
            noise, signal: averages in per-example units; NaN while unknown.

        Raises:
            ValueError: sizes that are not positive, or a decay that is negative or not finite.
        """
        decay = 1.0 if self.rule == "none" else self.lr_decay(progress)
        if not 0 <= decay < math.inf:
            raise ValueError(f"lr_decay(progress) must be finite and not negative, got {decay} at {progress}")
        factor = lr_factor(self.rule, global_batch_size, reference=reference, noise=noise, signal=signal)
        ratio = global_batch_size / reference
        return UpdateScaling(
            ratio=ratio,
            rule_factor=factor,
            factor=factor * decay,
            gain=gain(ratio, reference, noise=noise, signal=signal),
            updates=progress.steps,
            followers=self.followers,
        )
