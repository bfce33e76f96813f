"""How the batch changes an update: its learning rate, betas, eps, weight decay and gain, from one progress.

``UpdateRules`` are the rules of a run. From the size of a step and the progress at which that size was chosen, they
compute an ``UpdateScaling``, which holds all numbers of that update. Both read the same progress: if the batch size
read one count and the decay another, they would diverge as soon as an update is left out.

**Floors of the betas.** ``beta ** ratio`` keeps the memory of an average constant in examples, but leaves hardly any
memory if the batch grows far: (0.9, 0.95) at 64 reference batches become (0.0012, 0.0375). Each beta therefore has a
floor, which is never above the user's own value:

- beta2 stops at 0.95. Marek et al. 2025 (arXiv 2507.07101) derive the rule and use it to go *down* to small batches;
  upwards, marin-community/marin #2447 reports spikes in large-batch runs, and bounds beta2 from below for it; the
  recipe in #4567 of the same project clips beta2 to [0.95, 0.9999], and in its sweep of five values at width 1,024 the
  best falls from 0.995 at the smallest batch to 0.95 at the largest.
- beta1 stops at 0.5, a memory of two updates: below it the average hardly averages.

**One count of steps for two corrections.** Adam divides its averages by ``1 - beta1 ** step`` and ``1 - beta2 ** step``
with one ``step``. If both follow with the same exponent, one count corrects both exactly (see ``StepHooks``). Two
floors lead to two exponents. While the first average needs its correction, both therefore follow with the smaller
exponent; afterwards each goes to its own floor, and the count is that of the second average. (From (0.9, 0.999) at 64
reference batches, beta2 stays at 0.9934 for 511 updates, and then falls to 0.95.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adabatch.arguments import check_fields, require
from adabatch.batch.plan import Progress
from adabatch.lr.rules import LRRule, Setting, check_follow, check_lr_rule, followed, gain, lr_factor

BETA1_FLOOR = 0.5
BETA2_FLOOR = 0.95

FORGOTTEN = 1e-3
"""Weight of its initial zero in the first average below which the two betas follow separately."""


@dataclass(frozen=True)
class Followers:
    """Settings of an Adam-like optimizer that follow the batch, and how far down the betas may go.

    Args:
        settings: any of "betas", "eps" and "weight_decay".
        beta1_floor: following does not lower the first beta below this, in [0, 1]; a beta that is below it already does
            not change. 0 sets no floor, 1 keeps the first beta fixed while the batch grows.
        beta2_floor: the same for the second beta and any further ones.

    Raises:
        ValueError: if a setting is unknown, or a floor is outside [0, 1].
        TypeError: if ``settings`` is a string.
    """

    settings: Collection[Setting] = ()
    beta1_floor: float = BETA1_FLOOR
    beta2_floor: float = BETA2_FLOOR

    def __post_init__(self) -> None:
        check_follow(self.settings)
        check_fields(self)
        for name in ("beta1_floor", "beta2_floor"):
            floor = getattr(self, name)
            require(0 <= floor <= 1, f"{name} must lie in [0, 1], where 0 sets no floor", floor)
        object.__setattr__(self, "settings", tuple(sorted(set(self.settings))))  # the same order on all ranks

    @classmethod
    def of(cls, follow: Followers | Collection[Setting]) -> Followers:
        """The ``Followers`` for a user's ``follow=``: names of settings get the default floors."""
        return follow if isinstance(follow, Followers) else cls(follow)

    def floors(self, betas: Sequence[float]) -> tuple[float, ...]:
        """The floor of each beta: never above the beta itself."""
        wanted = (self.beta1_floor, *[self.beta2_floor] * (len(betas) - 1))
        return tuple(min(floor, float(beta)) for floor, beta in zip(wanted, betas, strict=True))

    def room(self, betas: Sequence[float]) -> tuple[float, ...]:
        """How many reference batches a step may have before each beta meets its floor: at least 1, infinite for no
        floor."""
        return tuple(
            # the ratio r at which beta ** r has come down to the floor
            math.inf if floor <= 0 else 1.0 if floor == beta else math.log(floor) / math.log(beta)
            for beta, floor in zip(map(float, betas), self.floors(betas), strict=True)
        )


@dataclass(frozen=True, kw_only=True)
class UpdateScaling:
    """All changes of one update by the batch.

    Args:
        ratio: batch size over reference batch size.
        rule_factor: the factor of the rule.
        factor: the batch factor on the learning rate: ``rule_factor``, times the decay of the criterion.
        gain: number of steps of the reference batch size that this one is worth, between 1 and ``ratio``; 1 while the
            noise is unknown.
        updates: updates of the run before this one.
        followers: the other settings that follow.
    """

    ratio: float
    rule_factor: float
    factor: float
    gain: float
    updates: int
    followers: Followers

    def exponents(self, betas: Sequence[float]) -> tuple[float, ...]:
        """``r`` of each beta, which is ``beta ** r`` in this update: the ratio, or less if a floor applies."""
        own = tuple(min(self.ratio, room) for room in self.followers.room(betas))
        if len(own) < 2:
            return own
        # What the first average holds of its beginning is beta1 ** n after n updates of the reference batch, and its
        # correction takes it for (beta1 ** own[0]) ** (n / own[-1]): both must be next to nothing.
        share = min(1.0, own[0] / own[-1])
        remembers = float(betas[0]) ** (share * self.updates) > FORGOTTEN
        # the common exponent keeps Adam's correction of both averages exact while it still matters
        return (min(own),) * len(own) if remembers else own

    def settings(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of a parameter group that change in this update, with their values.

        Args:
            group: the group's settings at the reference batch size.
        """
        names = [name for name in self.followers.settings if name in group]  # one of several may lack some
        if not names:
            return {}
        exponents = self.exponents(group["betas"]) if "betas" in names else None
        # Without the decay of the criterion, which applies to weight decay as to the learning rate, down to zero.
        return followed(group, names, ratio=self.ratio, factor=self.rule_factor, exponents=exponents)

    def averaged(self, group: Mapping[str, Any]) -> float:
        """As how many updates of the reference batch size this one counts in the group's averages."""
        # of the last average: its memory is the longest, and so its correction matters for longest
        return self.exponents(group["betas"])[-1] if "betas" in self.followers.settings and "betas" in group else 1.0

    def binding_floors(self, groups: Collection[Mapping[str, Any]]) -> dict[str, float]:
        """The floors that apply in this update: "beta1", "beta2" -> the floor; the highest of the groups."""
        binding: dict[str, float] = {}
        averaging = [group for group in groups if "betas" in group] if "betas" in self.followers.settings else []
        for group in averaging:
            betas = group["betas"]
            pairs = zip(self.followers.floors(betas), self.followers.room(betas), strict=True)
            for number, (floor, room) in enumerate(pairs, 1):
                if room < self.ratio:
                    # the highest: the journal has one number per beta, and following stops first at that one
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
        followers: the other settings that follow.
        lr_decay: a decay of the learning rate by the criterion, as for ``Seesaw``: progress -> factor. It multiplies
            the factor of the rule; under the rule "none" it is not used.

    Raises:
        ValueError: if the rule is unknown.
    """

    rule: LRRule
    followers: Followers = Followers()
    lr_decay: Callable[[Progress], float] = _no_decay

    def __post_init__(self) -> None:
        check_lr_rule(self.rule)
        check_fields(self)

    def at(
        self,
        global_batch_size: float,
        progress: Progress,
        *,
        reference: float,
        noise: float = math.nan,
        signal: float = math.nan,
    ) -> UpdateScaling:
        """The changes of an update of this many examples.

        Args:
            global_batch_size: examples of the step, positive.
            progress: of the run when the size of the step was chosen: what was consumed before it, including by updates
                that were left out.
            reference: the batch size for which the base learning rate was tuned, positive.
            noise, signal: averages in per-example units; NaN while unknown.

        Raises:
            ValueError: if sizes are not positive, or the decay is negative or not finite.
        """
        # "none" means that the batch changes nothing, and this decay is there only because of the batch
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
