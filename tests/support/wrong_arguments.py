"""Every public function and class with a call that works, wrong values, and a judge of the answers.

A case is one argument of one call, replaced by one value. The answer is right if it is an error of ours that names the
argument, or if the annotation allows the value and nothing in it is absurd, such as NaN.
"""

from __future__ import annotations

import collections.abc
import functools
import importlib
import inspect
import math
import re
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

import adabatch
from adabatch import AdaptiveBatch, Constant, Limits, lr
from adabatch.forecast import Cluster, Evidence, StepCost
from adabatch.lr.extend import FinishedRun, SavedSchedule
from adabatch.optim import KFAC, mup

HOME = str(Path(adabatch.__file__).parent)

MODULES = (
    "adabatch", "adabatch.batch", "adabatch.data", "adabatch.lr", "adabatch.probes", "adabatch.guards",
    "adabatch.checkpointing", "adabatch.optim", "adabatch.optim.mup", "adabatch.local_sgd", "adabatch.forecast",
    "adabatch.verification", "adabatch.recipes", "adabatch.report",
)  # fmt: skip


class Hostile:
    """An object that cannot be shown, compared or counted."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    __str__ = __repr__

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no comparison")

    def __bool__(self) -> bool:
        raise RuntimeError("no truth")

    __hash__ = None  # type: ignore[assignment]


def _itself() -> list[Any]:
    endless: list[Any] = []
    endless.append(endless)
    return endless


VALUES: Mapping[str, Callable[[], Any]] = {
    "None": lambda: None,
    "True": lambda: True,
    "False": lambda: False,
    "0": lambda: 0,
    "1": lambda: 1,
    "-1": lambda: -1,
    "3": lambda: 3,
    "10^400": lambda: 10**400,
    "10^5000": lambda: 10**5000,
    "10^15": lambda: 10**15,
    "-10^400": lambda: -(10**400),
    "0.0": lambda: 0.0,
    "0.3": lambda: 0.3,
    "-0.5": lambda: -0.5,
    "1.5": lambda: 1.5,
    "NaN": lambda: math.nan,
    "inf": lambda: math.inf,
    "-inf": lambda: -math.inf,
    "empty text": lambda: "",
    "text": lambda: "x",
    "digits": lambda: "5",
    "a zero byte": lambda: "\0",
    "bytes": lambda: b"x",
    "complex": lambda: 1j,
    "[]": list,
    "()": tuple,
    "{}": dict,
    "set()": set,
    "[None]": lambda: [None],
    "[text]": lambda: ["x"],
    "[NaN]": lambda: [math.nan],
    "[-1]": lambda: [-1],
    "[0, 0]": lambda: [0, 0],
    "a ragged list": lambda: [[1], [1, 2]],
    "a list that holds itself": _itself,
    "{text: text}": lambda: {"x": "y"},
    "{1: None}": lambda: {1: None},
    "an object": object,
    "an object without repr": Hostile,
    "a class": lambda: int,
    "a function without arguments": lambda: lambda: None,
    "a module of Python": lambda: math,
    "an exception": lambda: ValueError("x"),
    "a path": lambda: Path("\0"),
    "numpy -1": lambda: np.int64(-1),
    "numpy 2": lambda: np.int64(2),
    "numpy NaN": lambda: np.float32("nan"),
    "numpy True": lambda: np.bool_(True),
    "numpy text": lambda: np.str_("x"),
    "an array": lambda: np.array([1.0, 2.0]),
    "an empty array": lambda: np.array([]),
    "an array of objects": lambda: np.array([None, "x"], dtype=object),
    "a tensor of one number": lambda: torch.tensor(2),
    "a tensor of one truth": lambda: torch.tensor(True),
    "a tensor": lambda: torch.tensor([1.0, 2.0]),
    "a matrix": lambda: torch.zeros(2, 3),
    "a tensor with a gradient": lambda: torch.ones(2, requires_grad=True),
    "a complex tensor": lambda: torch.ones(2, dtype=torch.complex64),
    "a layer without parameters": nn.Identity,
    "a duration": lambda: adabatch.steps(3),
    "a duration of 0": lambda: adabatch.tokens(0),
}

LEAST = {"-1", "-0.5", "-inf", "numpy -1", "[-1]"}
"""Values that make sense only where a number may be negative."""


# --- calls that work --------------------------------------------------------------------------------------------------


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))


def sgd(of: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(of.parameters(), lr=0.1)


def data() -> TensorDataset:
    return TensorDataset(torch.zeros(8, 2), torch.zeros(8, 1))


def _run(**more: Any) -> dict[str, Any]:
    made = model()
    return {
        "model": made, "optimizer": sgd(made), "criterion": Constant(4), "micro_batch_size": 2,
        "limits": Limits(2, 8), **more,
    }  # fmt: skip


def _batches(**more: Any) -> AdaptiveBatch:
    return AdaptiveBatch(**_run(**more))


def _probe(**more: Any) -> dict[str, Any]:
    return {"model": model(), **more}


def _plan(width: int = 8, base: int = 4) -> mup.Plan:
    return mup.plan(_wide(width), _wide(base))


def _wide(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))


def _step_data(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(2, 2), torch.zeros(2, 1)


def _sgd_of(made: nn.Module, plan: mup.Plan, *rest: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(plan.groups(made, "sgd", lr=0.01))


def _saved() -> SavedSchedule:
    total = adabatch.steps(100)
    progress = adabatch.batch.Progress(steps=100, examples=400)
    return SavedSchedule("s", lr.wsd(cooldown=0.2), (0.1,), total, 0.0, False, "steps", progress, 4)


def _recorded() -> Any:
    lines = [
        f'{{"format": 1, "examples": {4 * k}, "plan": {{"global_batch_size": 4}}, "lr": {{"base": [0.1], "factor": 1, '
        f'"shape": [1]}}, "moments": {{"grad_sq": {1 + k}}}, "norms": {{"l2": {1 + k}, "l1": {1 + k}}}}}'
        for k in range(6)
    ]
    return lr.read_recorded(lines)


def _evidence() -> dict[str, Any]:
    evidence = Evidence(np.array([1e6, 1e6]), np.array([64.0, 64.0]), np.array([100.0, 300.0]))
    return {"evidence": evidence, "cost": StepCost(0.1, 0.01, 1e6), "cluster": Cluster(devices=8, bandwidth=1e9)}


def _training() -> Any:
    torch.manual_seed(0)
    made = model()
    return adabatch.verification.Training(
        model=made, optimizer=sgd(made), loader=adabatch.GlobalOrder(data()),
        loss=lambda m, b: nn.functional.mse_loss(m(b[0]), b[1]), micro_batch_size=2,
    )  # fmt: skip


def _optimizer(**more: Any) -> dict[str, Any]:
    return {"params": list(model().parameters()), **more}


def _shape(**more: Any) -> Callable[[], dict[str, Any]]:
    return lambda: dict(more)


FACTORS = [1.0, 0.5, 0.25]

CALLS: Mapping[str, Callable[[], dict[str, Any]]] = {
    "adabatch.AdAdaGrad": lambda: {"model": model()} | _shape(micro_batch_size=2, limits=Limits(4, 8))(),
    "adabatch.AdAdaGradNorm": lambda: {"model": model()} | _shape(micro_batch_size=2, limits=Limits(4, 8))(),
    "adabatch.AdaptiveBatch": _run,
    "adabatch.batch.AugmentedInnerProductTest": _shape(theta=0.9, nu=1.0),
    "adabatch.Checkpoints": lambda: {"folder": "nowhere", "model": model()},
    "adabatch.Constant": _shape(global_batch_size=4),
    "adabatch.Control": dict,
    "adabatch.batch.CoordinateNormTest": _shape(eta=0.5),
    "adabatch.EngineOptions": dict,
    "adabatch.GlobalOrder": lambda: {"dataset": data()},
    "adabatch.Goodput": dict,
    "adabatch.Guard": dict,
    "adabatch.batch.InnerProductTest": _shape(theta=0.9),
    "adabatch.Limits": _shape(min=2, max=8),
    "adabatch.LinearRamp": lambda: {"first": 2, "last": 8, "over": adabatch.steps(3)},
    "adabatch.LocalSGD": lambda: (lambda made: {"model": made, "optimizer": sgd(made), "sync_every": 2})(model()),
    "adabatch.Measure": dict,
    "adabatch.MicroBatchProbe": lambda: {"parameters": list(model().parameters())},
    "adabatch.NoiseScale": dict,
    "adabatch.NormTest": _shape(eta=0.5),
    "adabatch.batch.OrthogonalityTest": _shape(nu=1.0),
    "adabatch.PerExampleProbe": _probe,
    "adabatch.Preemption": lambda: {"batches": _batches()},
    "adabatch.ProgressLR": lambda: {"optimizer": sgd(model()), "shape": lr.cosine(), "total": adabatch.steps(9)},
    "adabatch.Seesaw": lambda: {"first": 2, "shape": lr.cosine(), "total": adabatch.steps(9)},
    "adabatch.Stage": lambda: {"after": adabatch.steps(3), "global_batch_size": 4},
    "adabatch.Stages": lambda: {"first": 2, "then": [adabatch.Stage(adabatch.steps(3), 4)]},
    "adabatch.StepPrice": _shape(examples=64.0),
    "adabatch.Watchdog": lambda: {"batches": _batches()},
    "adabatch.WholeSteps": lambda: {"steps": [[1, 2]]},
    "adabatch.across_ranks": lambda: {"model": model()},
    "adabatch.examples": _shape(count=5),
    "adabatch.gain_steps": _shape(count=5),
    "adabatch.load": lambda: {"folder": "nowhere", "model": model(), "missing_ok": True},
    "adabatch.monitor": lambda: (lambda made: {"model": made, "optimizer": sgd(made), "micro_batch_size": 2})(model()),
    "adabatch.steps": _shape(count=5),
    "adabatch.tokens": _shape(count=5),
    "adabatch.batch.BatchPlan": _shape(micro_batch_size=2, accumulation_steps=2, dp_size=1),
    "adabatch.batch.Duration": _shape(count=5, unit="steps"),
    "adabatch.batch.Needs": dict,
    "adabatch.batch.PlanGrid": _shape(dp_size=1, micro_sizes=(2, 4)),
    "adabatch.batch.Progress": dict,
    "adabatch.batch.adaptive_limit": _shape(noise_scales=[10.0, 20.0]),
    "adabatch.batch.critical_batch": _shape(losses={16: 1.0, 32: 1.001, 64: 1.2}),
    "adabatch.batch.efficiency": _shape(global_batch_size=8, noise_scale=4.0),
    "adabatch.batch.measure_critical_batch": lambda: {
        "branch": lambda size: [(size, 1.0 + 0.001 * size)] * (256 // size), "sizes": [16, 32, 64], "half_life": 64.0
    },
    "adabatch.batch.smoothed_losses": _shape(losses=[1.0, 0.9], batch_sizes=[2, 2], half_life=4.0),
    "adabatch.data.BlockShuffle": _shape(size=4, mixed=2),
    "adabatch.data.WeightedShuffle": _shape(weights=[1.0, 2.0]),
    "adabatch.data.num_examples_in": lambda: {"batch": torch.zeros(2, 2)},
    "adabatch.lr.Followers": dict,
    "adabatch.lr.FunctionShape": lambda: {"function": lambda p: 1 - p / 2},
    "adabatch.lr.Shape": _shape(name="cosine", settings={"floor": 0.0}),
    "adabatch.lr.UpdateRules": _shape(rule="sqrt"),
    "adabatch.lr.adjusted_infimum": _shape(infimum=0.1, last=0.2, upper_bound=1.5),
    "adabatch.lr.averaged_bound_terms": _shape(factors=FACTORS),
    "adabatch.lr.best_base_lr": _shape(factors=FACTORS),
    "adabatch.lr.bound": _shape(factors=FACTORS),
    "adabatch.lr.bound_terms": _shape(factors=FACTORS),
    "adabatch.lr.cosine": dict,
    "adabatch.lr.discretize": lambda: {"shape": lr.cosine(), "num_steps": 5},
    "adabatch.lr.exp_hyperbolic": _shape(upper_bound=1.5, infimum=0.1),
    "adabatch.lr.extended_schedules": lambda: {
        "run": FinishedRun(100, 0, 0.0, 0.2, "linear", adabatch.steps(100)), "total": adabatch.steps(200)
    },
    "adabatch.lr.finished_run": lambda: {"saved": _saved()},
    "adabatch.lr.hyperbolic": _shape(upper_bound=1.5, infimum=0.1),
    "adabatch.lr.inverse_sqrt": _shape(timescale=0.1),
    "adabatch.lr.last_iterate_guarantee": _shape(weights=FACTORS),
    "adabatch.lr.last_iterate_multipliers": _shape(weights=FACTORS),
    "adabatch.lr.linear": dict,
    "adabatch.lr.linear_cooldown_limits": _shape(cooldown=0.2),
    "adabatch.lr.linear_cooldown_ratio": lambda: {
        "source": lr.linear(), "target": lr.wsd(cooldown=0.2), "num_steps": 9
    },
    "adabatch.lr.longer_cooldown": _shape(num_steps=100, new_steps=200, cooldown=0.2),
    "adabatch.lr.median_filter": _shape(values=FACTORS, window=3),
    "adabatch.lr.piecewise": _shape(milestones=[0.5], factors=[0.1]),
    "adabatch.lr.polynomial": _shape(power=2.0),
    "adabatch.lr.read_recorded": lambda: {"lines": ['{"format": 1, "plan": {"global_batch_size": 4}}']},
    "adabatch.lr.refine": _shape(norms=[1.0, 2.0, 3.0]),
    "adabatch.lr.refine_run": lambda: {"recorded": _recorded()},
    "adabatch.lr.refined_bounds": lambda: (lambda run: {"recorded": run, "made": lr.refine_run(run)})(_recorded()),
    "adabatch.lr.refined_weights": _shape(norms=FACTORS),
    "adabatch.lr.schedule_bound": lambda: {"shape": lr.cosine(), "horizon": lr.Horizon.of_equal_steps(5)},
    "adabatch.lr.stretch": _shape(values=FACTORS, length=5),
    "adabatch.lr.tabulated": _shape(values=FACTORS),
    "adabatch.lr.to_last_iterate": _shape(iterates=[[1.0], [2.0], [3.0]], weights=FACTORS),
    "adabatch.lr.transfer": lambda: {"base_lr": 0.1, "source": lr.cosine(), "target": lr.linear(), "num_steps": 9},
    "adabatch.lr.two_stage": _shape(num_steps=100, new_steps=200, cooldown=0.2),
    "adabatch.lr.warmup_factor": _shape(fraction=0.5),
    "adabatch.lr.wsd": _shape(cooldown=0.2),
    "adabatch.probes.AdamMetric": lambda: {"optimizer": torch.optim.Adam(model().parameters())},
    "adabatch.probes.CommHookProbe": None,  # needs a process group
    "adabatch.probes.KFACMetric": lambda: (lambda made: {"optimizer": KFAC(made.parameters(), made)})(model()),
    "adabatch.probes.ReduceScatterProbe": None,
    "adabatch.save": None,
    "adabatch.optim.AdaGradNorm": _optimizer,
    "adabatch.optim.KFAC": lambda: (lambda made: {"params": list(made.parameters()), "model": made})(model()),
    "adabatch.optim.Shampoo": lambda: _optimizer(lr=0.1),
    "adabatch.optim.mup.AdamLaw": dict,
    "adabatch.optim.mup.Entry": _shape(
        shape=(8, 2), base_shape=(4, 2), layout=("out", "in"), kind="weight", role="input"
    ),
    "adabatch.optim.mup.KFACLaw": dict,
    "adabatch.optim.mup.MuonLaw": dict,
    "adabatch.optim.mup.Plan": lambda: {"entries": dict(_plan().entries)},
    "adabatch.optim.mup.ShampooLaw": dict,
    "adabatch.optim.mup.attention_scale": _shape(head_width=8, base_head_width=4),
    "adabatch.optim.mup.check_ratios": lambda: {"optimizer": sgd(model())},
    "adabatch.optim.mup.coordinate_check": lambda: {
        "make": _wide, "optimizer": _sgd_of, "data": _step_data, "loss": nn.MSELoss(), "widths": [4, 8], "base": 4
    },
    "adabatch.optim.mup.guard": lambda: {"optimizer": sgd(model())},
    "adabatch.optim.mup.init_": lambda: {"model": _wide(8), "plan": _plan()},
    "adabatch.optim.mup.named_modules": lambda: {"model": model()},
    "adabatch.optim.mup.named_parameters": lambda: {"model": model()},
    "adabatch.optim.mup.optimizers_for": lambda: {"method": "sgd", "model": _wide(8), "plan": _plan(), "lr": 0.1},
    "adabatch.optim.mup.plan": lambda: {"model": _wide(8), "base": _wide(4)},
    "adabatch.optim.mup.transfer_sweep": lambda: {
        "make": _wide, "optimizer": _sgd_of, "data": lambda seed: iter([_step_data(seed)] * 3), "loss": nn.MSELoss(),
        "widths": [4, 8], "base": 4, "lrs": [0.1], "steps": 2,
    },
    "adabatch.local_sgd.Change": lambda: {"after": adabatch.steps(3), "sync_every": 2},
    "adabatch.local_sgd.Fixed": _shape(sync_every=2),
    "adabatch.local_sgd.Nesterov": dict,
    "adabatch.local_sgd.Quadratic": _shape(alpha=0.1, base=2),
    "adabatch.local_sgd.SlowMo": _shape(momentum=0.5),
    "adabatch.local_sgd.Table": lambda: {
        "first": 2, "then": [adabatch.local_sgd.Change(adabatch.steps(3), 4)]
    },
    "adabatch.forecast.Cluster": _shape(devices=8, bandwidth=1e9),
    "adabatch.forecast.all_reduce_seconds": lambda: {"cluster": Cluster(devices=8, bandwidth=1e9), "num_bytes": 1e6},
    "adabatch.forecast.forecast": _evidence,
    "adabatch.forecast.kaplan": _shape(loss=3.0),
    "adabatch.forecast.knee": _evidence,
    "adabatch.forecast.power_lines": _shape(tokens=1e9),
    "adabatch.verification.Training": lambda: {
        name: value for name, value in vars(_training()).items() if name not in ("probe", "weigh", "scaler", "count")
    },
    "adabatch.verification.all_checks": None,  # the checks one by one
    "adabatch.verification.constant_policy": lambda: {"make": _training, "num_steps": 2},
    "adabatch.verification.cost": lambda: {"make": _training, "num_pairs": 2},
    "adabatch.verification.drift": lambda: {"make": _training},
    "adabatch.verification.probe_agrees": lambda: {"make": _training},
    "adabatch.verification.resume": lambda: {"make": _training},
    "adabatch.recipes.LogisticRegression": dict,
    "adabatch.recipes.collate": lambda: {"batch": [torch.zeros(2)]},
    "adabatch.recipes.MLP": dict,
    "adabatch.recipes.Transformer": _shape(vocab_size=8, block_size=4, width=4, depth=1, num_heads=2),
    "adabatch.recipes.Mnist": None,  # needs files
    "adabatch.recipes.Text": None,
    "adabatch.report.draw": None,
    "adabatch.report.write_charts": None,
}  # fmt: skip
"""Name -> the arguments of a call that works; None where there is no such call in one process without files."""


def methods() -> dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]]:
    """Methods that a script calls, each with the arguments of a call that works."""

    def first_step(**arguments: Any) -> Any:
        return next(iter(_batches().steps(**arguments)))

    first_step.__wrapped__ = AdaptiveBatch.steps  # type: ignore[attr-defined]

    def of(make: Callable[[], Any], name: str) -> Callable[..., Any]:
        @functools.wraps(getattr(type(make()), name))
        def call(**arguments: Any) -> Any:
            return getattr(make(), name)(**arguments)

        return call

    order = functools.partial(adabatch.GlobalOrder, data())
    schedule = functools.partial(adabatch.ProgressLR, sgd(model()), lr.cosine(), total=adabatch.steps(9))
    return {
        "AdaptiveBatch.steps": (first_step, lambda: {"loader": [torch.zeros(2, 2)] * 4}),
        "AdaptiveBatch.hold_growth_until": (of(_batches, "hold_growth_until"), lambda: {"duration": adabatch.steps(3)}),
        "AdaptiveBatch.load_state_dict": (of(_batches, "load_state_dict"), lambda: {"state": _batches().state_dict()}),
        "Control.direct": (adabatch.Control.direct, dict),
        "GlobalOrder.permutation": (of(order, "permutation"), lambda: {"epoch": 1}),
        "GlobalOrder.start_epoch": (of(order, "start_epoch"), lambda: {"epoch": 1}),
        "GlobalOrder.load_state_dict": (of(order, "load_state_dict"), lambda: {"state": order().state_dict()}),
        "ProgressLR.set_total": (of(schedule, "set_total"), lambda: {"total": adabatch.steps(12)}),
        "ProgressLR.set_base_lrs": (of(schedule, "set_base_lrs"), lambda: {"base_lrs": [0.2]}),
        "ProgressLR.load_state_dict": (
            of(schedule, "load_state_dict"),
            lambda: {"state_dict": schedule().state_dict()},
        ),
    }


def public() -> dict[str, Any]:
    """Each public function and class that takes arguments, by the first name under which it is found.

    Records (named tuples, which the library makes), protocols, base classes and exceptions are left out.
    """
    found: dict[int, tuple[str, Any]] = {}
    for module in MODULES:
        for name in importlib.import_module(module).__all__:
            thing = getattr(importlib.import_module(module), name)
            if callable(thing) and not _is_no_call(thing):
                found.setdefault(id(thing), (f"{module}.{name}", thing))
    return dict(found.values())


def _is_no_call(thing: Any) -> bool:
    if not isinstance(thing, type):
        return not isinstance(thing, types.FunctionType) or not inspect.signature(thing).parameters
    if issubclass(thing, tuple | BaseException | str) or inspect.isabstract(thing) or thing.__name__ in RESULTS:
        return True
    own = [p for p in inspect.signature(thing).parameters.values() if p.kind is not p.VAR_POSITIONAL]
    return getattr(thing, "_is_protocol", False) or not [p for p in own if p.kind is not p.VAR_KEYWORD]


RESULTS = {"NoiseMonitor", "UpdateScaling", "CoordinateCheck", "Sweep", "Law", "Probe", "Schedule"}
"""Classes whose objects the library makes, or which are bases of your own."""


# --- cases ------------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """One argument with one value."""

    call: str
    argument: str
    value: str


class Answer(NamedTuple):
    """What a call did: "ours", "accepted", "theirs" (an error in a user's function) or "unclear"; and why, in words."""

    kind: str
    told: str = ""


@functools.cache
def calls() -> dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]]:
    """All that is tried: name -> the function, and what makes its arguments."""
    made = {name: (thing, CALLS[name]) for name, thing in public().items() if CALLS[name] is not None}
    return made | methods()


def cases() -> Iterator[Case]:
    """Every argument with every value."""
    for name in calls():
        for argument in hints_of(name):
            yield from (Case(name, argument, value) for value in VALUES)


@functools.cache
def hints_of(name: str) -> dict[str, Any]:
    """The arguments of a call, and their annotations."""
    function = calls()[name][0]
    owner = function.__init__ if isinstance(function, type) else inspect.unwrap(function)  # type: ignore[misc]
    if isinstance(function, type) and not isinstance(owner, types.FunctionType):
        owner = function
    spoken = typing.get_type_hints(inspect.unwrap(owner), include_extras=True) if callable(owner) else {}
    if isinstance(function, type):
        spoken = typing.get_type_hints(function, include_extras=True) | spoken
    parameters = inspect.signature(function).parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name != "self"]
    return {p.name: spoken.get(p.name, Any) for p in named}


def answer(case: Case) -> Answer:
    """Runs a case and judges it."""
    function, arguments = calls()[case.call]
    given, value = arguments(), VALUES[case.value]()
    given[case.argument] = value
    hint = hints_of(case.call)[case.argument]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            made = function(**given)
            if isinstance(made, types.GeneratorType):
                next(made)
        except (ValueError, TypeError, FileNotFoundError, NotImplementedError) as error:
            judged = _judged(error, case.argument)
            return Answer("theirs", judged.told) if judged.kind == "unclear" and _is_users(value, hint) else judged
        except Exception as error:  # of any other type: not ours
            if _is_users(value, hint):
                return Answer("theirs", _text_of(error))
            return Answer("unclear", f"{type(error).__name__}: {_text_of(error)}")
    unknown = case.call == "adabatch.batch.efficiency" and case.value == "NaN"  # before the first probe
    if (
        not fits(value, hint)
        and not unknown
        and not (case.call in WHOLE_FLOATS and isinstance(value, float) and value == 0)
    ):
        return Answer("unclear", f"accepted, although the annotation is {hint}")
    if case.value in LEAST and _is_numeric(hint) and (case.call, case.argument) not in MAY_BE_NEGATIVE:
        return Answer("unclear", "accepted, although it is negative")
    return Answer("accepted")


def _is_users(value: Any, hint: Any) -> bool:
    """Whether the value was rightly called: what a user's own function raises or returns is its own matter."""
    return callable(value) and fits(value, hint) and "Callable" in str(hint)


def _judged(error: Exception, argument: str) -> Answer:
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    assert last is not None
    said = _text_of(error)
    told = f"{type(error).__name__}: {said}"
    if not last.tb_frame.f_code.co_filename.startswith(HOME):
        return Answer("unclear", f"raised in {last.tb_frame.f_code.co_filename.rpartition('/')[2]}: {told}")
    words = "|".join(map(re.escape, (argument, *CALLED.get(argument, ()))))
    if not re.search(rf"(?<![a-z_])({words})(?![a-z_])", said):
        return Answer("unclear", f"does not name {argument}: {told}")
    return Answer("ours", told)


def _text_of(error: Exception) -> str:
    try:
        return str(error)[:2000]
    except Exception as fault:  # it holds the user's object, which cannot be shown
        return f"no text: {type(fault).__name__}"


CALLED: Mapping[str, tuple[str, ...]] = {
    "batch": ("micro-batch",),
    "branch": ("the branch",),
    "count": ("duration",),
    "dataset": ("data set",),
    "layouts": ("parameter",),
    "lines": ("the journal",),
    "loader": ("micro-batch", "micro-batches"),
    "norms": ("norm",),
    "parameters": ("parameter",),
    "roles": ("parameter",),
    "rule": ("lr_rule",),
    "settings": ("follow",),
    "shape": ("a function",),
}
"""Arguments that an error may call by another name."""

MAY_BE_NEGATIVE = {("adabatch.lr.warmup_factor", "fraction")}
"""Arguments whose negative values are clamped, as their functions say."""

WHOLE_FLOATS = {
    "adabatch.batch.Duration",
    *(f"adabatch.{unit}" for unit in ("examples", "gain_steps", "steps", "tokens")),
}
"""Calls that take whole numbers written as floats, such as 6e6."""


def _is_numeric(hint: Any) -> bool:
    return hint in (int, float) or any(_is_numeric(each) for each in get_args(hint))


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is what an annotation says, by the slow and obvious reading of it; NaN never is."""
    origin, inside = get_origin(hint), get_args(hint)
    if hint in (Any, object) or isinstance(hint, typing.TypeVar):
        return True
    if hint in (int, float) or origin in (np.ndarray,):
        allowed: tuple[type, ...] = (int, np.integer) if hint is int else (int, float, np.integer, np.floating)
        if isinstance(value, torch.Tensor) and value.ndim == 0 and value.dtype is not torch.bool:
            value = value.item()
        if origin is np.ndarray:
            return isinstance(value, np.ndarray | torch.Tensor | list | tuple)
        if not isinstance(value, allowed) or isinstance(value, bool) or value != value:
            return False
        return bool(abs(value) < 2**64) or (hint is float and value in (math.inf, -math.inf))
    if hint is bool:
        return isinstance(value, bool | np.bool_)
    if hint is None or hint is types.NoneType:
        return value is None
    if origin is Annotated:
        return fits(value, inside[0])
    if origin in (Union, types.UnionType):
        return any(fits(value, each) for each in inside)
    if origin is Literal:
        return isinstance(value, str | bool | int) and value in inside
    if origin is collections.abc.Callable:
        return callable(value)
    if origin is tuple:
        return isinstance(value, tuple | list) and (
            all(fits(each, inside[0]) for each in value)
            if Ellipsis in inside
            else len(value) == len(inside) and all(map(fits, value, inside))
        )
    if origin is Dataset:
        return hasattr(value, "__len__") and hasattr(value, "__getitem__")
    if isinstance(origin, type):
        if isinstance(value, str | bytes):
            return False
        if isinstance(value, Mapping) and len(inside) == 2:
            return all(fits(k, inside[0]) and fits(v, inside[1]) for k, v in value.items())
        if isinstance(value, list | tuple) and inside and origin is not collections.abc.Iterable:
            return all(fits(each, inside[0]) for each in value)
        return isinstance(value, origin) or (isinstance(value, np.ndarray | torch.Tensor) and origin is not dict)
    return isinstance(hint, type) and (getattr(hint, "_is_protocol", False) or isinstance(value, hint))
