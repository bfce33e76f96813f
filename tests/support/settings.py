"""Runs of two ranks that differ in one setting: what each rank says of it; for tests and the benchmark of faults."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW

import adabatch
from adabatch import AdaptiveBatch, Control, EngineOptions, GlobalOrder, Guard, Limits, Measure, NormTest
from adabatch.lr import Followers
from support.loops import network, regression


class Case:
    """A run of two ranks as it should be; a difference changes something of it on the second."""

    def __init__(self) -> None:
        self.criterion: Any = NormTest(eta=0.5)
        self.micro_batch_size = 4
        self.options: dict[str, Any] = {"limits": Limits(min=16, max=32), "max_micro_batch_size": 8}
        self.adam: dict[str, Any] = {"lr": 0.01}
        self.order: dict[str, Any] = {"seed": 1}
        self.length = 96
        self.frozen = 0
        self.steps: dict[str, Any] = {"until": adabatch.steps(2)}
        self.prepare: Callable[[AdaptiveBatch], Any] = lambda batches: None

    def run(self) -> int:
        """Two steps; how many were applied."""
        model = DistributedDataParallel(network())
        # After it is wrapped: DDP itself compares what trains, and FSDP2 does not.
        for parameter in list(model.parameters())[: self.frozen]:
            parameter.requires_grad_(False)
        optimizer = AdamW(model.parameters(), **self.adam)
        options = {"micro_batch_size": self.micro_batch_size, **self.options}
        batches = AdaptiveBatch(model, optimizer, self.criterion, **options)
        self.prepare(batches)
        for step in batches.steps(GlobalOrder(regression(self.length), **self.order), **self.steps):
            for x, y in step:
                step.backward((model(x) - y).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        return batches.progress.steps


def _advanced(batches: AdaptiveBatch) -> None:
    """As from a checkpoint of another step."""
    state = batches.state_dict()
    state["progress"]["examples"] = state["consumed"]["examples"] = 160
    state["progress"]["steps"] = state["consumed"]["steps"] = 10
    batches.load_state_dict(state)


def _option(name: str, value: Any) -> Callable[[Case], None]:
    return lambda case: case.options.update({name: value})


def _adam(**options: Any) -> Callable[[Case], None]:
    return lambda case: case.adam.update(options)


def _order(**options: Any) -> Callable[[Case], None]:
    return lambda case: case.order.update(options)


def _steps(**options: Any) -> Callable[[Case], None]:
    return lambda case: case.steps.update(options)


def _set(name: str, value: Any) -> Callable[[Case], None]:
    return lambda case: setattr(case, name, value)


def _versions(torch_version: str | None = None, own: str | None = None) -> Callable[[Case], None]:
    def change(case: Case) -> None:
        # ``said`` puts them back.
        if torch_version is not None:
            torch.__version__ = torch_version
        if own is not None:
            metadata.version = lambda name: own  # type: ignore[assignment]

    return change


DIFFERENCES: dict[str, tuple[Callable[[Case], None], str]] = {
    "eta of the criterion": (_set("criterion", NormTest(eta=0.6)), "criterion is NormTest(eta=0.5"),
    "criterion": (_set("criterion", adabatch.Constant(16)), "criterion is NormTest("),
    "limits": (_option("limits", Limits(min=16, max=64)), "limits is Limits(min=16, max=32)"),
    "limits refused on one rank": (_option("limits", Limits(min=9, max=64)), "limits.min=9"),
    "micro_batch_size": (_set("micro_batch_size", 2), "micro-batch sizes is [4, 8]"),
    "max_micro_batch_size": (_option("max_micro_batch_size", 16), "micro-batch sizes is [4, 8]"),
    "control": (_option("control", Control(memory=5)), "control is Control("),
    "lr_rule": (_option("lr_rule", "sqrt"), "lr_rule is 'gain' on rank 0 and 'sqrt' on rank 1"),
    "follow": (_option("follow", ("betas", "eps")), "follow is Followers("),
    "floor of the betas": (_option("follow", Followers(("betas",), beta2_floor=0.9)), "follow is Followers("),
    "reference_batch_size": (_option("reference_batch_size", 64), "reference batch size is 16"),
    "tokens_per_example": (_option("tokens_per_example", 5), "tokens_per_example is None"),
    "lr": (_adam(lr=0.02), "lr of optimizer group 0 is 0.01 on rank 0 and 0.02 on rank 1"),
    "weight_decay": (_adam(weight_decay=0.5), "weight_decay of optimizer group 0 is "),
    "betas": (_adam(betas=(0.8, 0.99)), "betas of optimizer group 0 is "),
    "eps": (_adam(eps=1e-6), "eps of optimizer group 0 is "),
    "frozen layer": (_set("frozen", 2), "frozen parameters of optimizer group 0 is [] on rank 0 and [0, 1] on rank 1"),
    "seed of the order": (_order(seed=2), "seed of the data order is 1 on rank 0 and 2 on rank 1"),
    "shuffle": (_order(shuffle=False), "order of the data order is "),
    "length of the data": (_set("length", 100), "length of the data order is 96"),
    "until": (_steps(until=adabatch.steps(3)), "until is Duration("),
    "no until": (_steps(until=None), "until is Duration("),
    "until of a wrong type": (_steps(until=3), "until is Duration("),
    "weigh": (_steps(weigh=lambda batch: 1.0), "weigh= of steps() is False"),
    "skip_nonfinite": (_option("guard", Guard(skip_nonfinite="probed")), "guard is Guard(skip_nonfinite=True"),
    "check_every": (_option("guard", Guard(check_every=1)), "guard is Guard("),
    "max_left_out": (_option("guard", Guard(max_left_out=3)), "guard is Guard("),
    "trial": (_option("guard", Guard(trial=lambda batch: torch.zeros(()))), "trial= is False"),
    "monitor": (_option("measure", Measure(monitor=True)), "measure is Measure("),
    "l1": (_option("measure", Measure(l1=True)), "measure is Measure("),
    "scaler": (_option("engine", EngineOptions(scaler=torch.amp.GradScaler("cpu"))), "scaler is None"),
    "saved state": (_set("prepare", _advanced), "progress is Progress("),
    "Preemption": (_set("prepare", lambda batches: batches.votes.listen()), "whether Preemption or Checkpoints listen"),
    "version of torch": (_versions(torch_version="2.99"), "version of torch is "),
    "version of adabatch": (_versions(own="9.9"), "version of adabatch is "),
}
"""What differs on rank 1 -> how, and what the error says on both ranks."""


def said(rank: int) -> dict[str, str]:
    """What this rank says of each difference in turn; how many steps it took where it says nothing."""
    found = {}
    before = torch.__version__, metadata.version
    for name, (change, _) in {"": (lambda case: None, ""), **DIFFERENCES}.items():
        case = Case()
        try:
            if rank == 1:
                change(case)
            found[name] = str(case.run())
        except (ValueError, RuntimeError, TypeError) as error:
            found[name] = f"{type(error).__name__}: {error}"
        finally:
            torch.__version__, metadata.version = before  # type: ignore[assignment]
    return found


def other_optimizers(rank: int) -> str:
    """Another class of optimizer on each rank."""
    model = DistributedDataParallel(network())
    optimizer = (AdamW, SGD)[rank](model.parameters(), lr=0.1)
    try:
        next(AdaptiveBatch(model, optimizer, adabatch.Constant(8), micro_batch_size=4).steps([]))
    except ValueError as error:
        return str(error)
    return ""
