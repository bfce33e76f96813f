"""AdaScale and Pollux by the code of other packages: fairscale's ``AdaScale``, and adaptdl's gradient noise scale,
scaling rules and goodput.

Neither package is a dependency. They are imported when a run needs them, and ``missing`` says how to get one."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Protocol

from torch import Tensor
from torch.optim import AdamW, Optimizer

PackageRule = Literal["adascale", "pollux"]
SPEEDUP = 1.05  # of adaptdl's data loader: a batch is kept unless another has so many times its goodput
REPLICAS = 2  # of Pollux: as many parts as the first batch of what follows the noise has
INSTALL = {
    "adascale": ("fairscale.optim", "pip install fairscale"),
    "pollux": ("adaptdl.torch", "pip install adaptdl 'setuptools<81'"),  # which imports pkg_resources
}


def missing(rule: PackageRule) -> str:
    """Why the package of a rule cannot be used, and the way out; empty if it can."""
    module, command = INSTALL[rule]
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"not installed ({error}): {command}"
    return ""


class Rule(Protocol):
    """What decides the batch size and the factor of the learning rate."""

    parts: int

    def wanted(self) -> int:
        """Examples of the next step."""

    def step(self, size: int, losses: Iterable[Tensor]) -> None:
        """Takes a step of so many examples, by the mean losses of its equal parts."""

    @property
    def noise_scale(self) -> float:
        """In examples; NaN where the rule does not say."""


class AdaScale:
    """A constant batch under fairscale's ``AdaScale``, by the spread of the parts that it accumulates.

    The package documents it for SGD. It wraps any optimizer, and multiplies the learning rate by the gain of each step.
    """

    noise_scale = float("nan")

    def __init__(self, optimizer: Optimizer, number: float, first: int) -> None:
        from fairscale.optim import AdaScale as Package

        self.size = int(number)
        self.parts = self.size // first
        self.scaled = Package(optimizer, num_gradients_to_accumulate=self.parts)

    def wanted(self) -> int:
        return self.size

    def step(self, size: int, losses: Iterable[Tensor]) -> None:
        self.scaled.zero_grad()
        for loss in losses:
            (loss / self.parts).backward()
        self.scaled.step()


class Pollux:
    """The batch of the largest goodput, by adaptdl: what it does on two replicas, here one after the other.

    The package measures step times, and chooses a batch at each pass over the data set only. These runs are shorter
    than a pass, and none may depend on a clock: so the package's model of step times is given the price (a step costs
    as much as so many examples), and its goodput is asked before every step.

    Its data loader and its ``AdaptiveDataParallel`` need a process group, and take no part: the one attribute of theirs
    that the package's noise scale reads (``require_backward_grad_sync``) is here.
    """

    parts = REPLICAS

    def __init__(self, optimizer: Optimizer, number: float, first: int) -> None:
        from adaptdl.goodput import PerfParams
        from adaptdl.torch.gradient_noise_scale import GradientNoiseScale
        from adaptdl.torch.scaling_rules import AdamScale, AdaScale

        none = 1e-8  # the least that the package fits
        # T = beta_c x examples of a replica + alpha_r: proportional to examples of both + price
        self.times = PerfParams(none, 1.0, none, none, number / REPLICAS, none, 1.0)
        self.first, self.size, self.largest = first, first, 1024
        self.optimizer = optimizer
        # What AdaptiveDataParallel makes of an optimizer if it is given no rule.
        self.rule = AdamScale() if isinstance(optimizer, AdamW) else AdaScale()
        self.gns = GradientNoiseScale(self, optimizer, num_replicas=1)
        self.require_backward_grad_sync = False
        self.rule.initialize(self, optimizer)

    def wanted(self) -> int:
        from adaptdl.goodput import GoodputFunction

        if not self.gns.get_progress():
            return self.size
        goodput = GoodputFunction(self.times, (self.gns.sqr_avg(), self.gns.var_avg()), self.first)
        range_of_replica = (self.first // REPLICAS, self.largest // REPLICAS)
        best, of_replica, _ = goodput.optimize(
            1, REPLICAS, max_batch_size=self.largest, atomic_bsz_range=range_of_replica, accumulation=True
        )
        if best > SPEEDUP * goodput(1, REPLICAS, self.size // REPLICAS, 0):
            self.size = REPLICAS * of_replica
        return self.size

    def step(self, size: int, losses: Iterable[Tensor]) -> None:
        self.gns.set_accum_scale(size / REPLICAS / self.first)
        self.rule.zero_grad()
        for part, loss in enumerate(losses, start=1):
            self.require_backward_grad_sync = part == REPLICAS
            loss.backward()
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad.div_(REPLICAS)  # the mean of replicas, which their all-reduce would have left
        self.rule.step()

    @property
    def noise_scale(self) -> float:
        square = self.gns.sqr_avg()
        return float(self.first * self.gns.var_avg() / square) if square > 0 else float("nan")


RULES: Mapping[PackageRule, Callable[[Optimizer, float, int], Any]] = {"adascale": AdaScale, "pollux": Pollux}
