"""The state of a run with the Trainer of Transformers: in checkpoints, and as the Trainer is told."""

from __future__ import annotations

import math
import os
import sys
from typing import Any, Protocol

import torch
from transformers import TrainerCallback

from adabatch.adaptive import AdaptiveBatch
from adabatch.adaptive.monitoring import NoiseMonitor
from adabatch.arguments import require_format
from adabatch.batch.plan import Duration
from adabatch.integrations.evaluations import record_numbers
from adabatch.integrations.host_state import HostState
from adabatch.runtime.data import GlobalOrder

STATE_FILE = "adabatch.pt"
"""The file that is added to a checkpoint of the Trainer."""

STATE_FORMAT = 1

NOT_OF_THE_MODEL = ("epoch", "_runtime", "_per_second", "_time")
"""Ends of the names of metrics that are about the evaluation itself."""

_ORDERS = {"logging": "should_log", "eval": "should_evaluate", "save": "should_save"}
"""What the Trainer does at intervals of steps -> the flag of its control that orders it."""


def saved_state(folder: str) -> dict[str, Any]:
    """The state of batches and data in a checkpoint of the Trainer.

    Raises:
        ValueError: if the checkpoint does not contain it, or was written by a newer version.
    """
    path = os.path.join(folder, STATE_FILE)
    if not os.path.isfile(path):
        raise ValueError(
            f"{folder} holds no {STATE_FILE}: it was saved without adabatch, or with save_only_model. Its place in the "
            f"data and its batch are not known; start from its weights with from_pretrained"
        )
    state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    require_format(path, state["format"], STATE_FORMAT)
    return state


def write_host_state(state: HostState, folder: str, *, here: bool) -> None:
    """Adds the state of the next step to a checkpoint of the Trainer. All ranks must call it.

    Args:
        state: the state of the run.
        folder: the folder of the checkpoint.
        here: whether this rank writes.
    """
    numbers = {"format": STATE_FORMAT, **state.state_dict()}
    if here:
        torch.save(numbers, os.path.join(folder, STATE_FILE))


class TrainerRun(Protocol):
    """The part of a trainer that ``Bookkeeping`` reads."""

    batches: AdaptiveBatch | None
    monitor: NoiseMonitor | None
    order: GlobalOrder | None
    callback_handler: Any
    is_in_train: bool

    def total_length(self) -> Duration:
        """Length of the run."""

    def get_total_train_batch_size(self, args: Any) -> int:
        """The global batch size of the next step."""


class Bookkeeping(TrainerCallback):
    """Keeps the Trainer's state up to date for a run whose number of steps is not known."""

    def __init__(self, trainer: TrainerRun) -> None:
        self._trainer = trainer
        self._shares: dict[str, float] = {}
        self._done = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Takes over intervals that are shares of the run (``save_steps=0.1``)."""
        self._shares = {}
        if self._trainer.total_length().unit == "examples":  # else the Trainer knows the number of steps, and counts
            given = {kind: getattr(args, f"{kind}_steps") for kind in _ORDERS}
            self._shares = {kind: share for kind, share in given.items() if share is not None and 0 < share < 1}
        for kind in self._shares:
            setattr(state, f"{kind}_steps", sys.maxsize)  # never by the Trainer itself
        self._stand(state)
        state.num_train_epochs = math.ceil(self._epochs(args))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Updates the epoch and the (estimated) end of the run, and orders what is due at a share of it."""
        before = self._done
        self._stand(state)
        for kind, share in self._shares.items():
            # A little more than the share, because 3 * 0.1 is not exactly 0.3.
            if math.floor(self._done / share + 1e-9) > math.floor(before / share + 1e-9) and _is_due(args, state, kind):
                setattr(control, _ORDERS[kind], True)

    def _stand(self, state: Any) -> None:
        batches, order, total = self._trainer.batches, self._trainer.order, self._trainer.total_length()
        assert batches is not None
        assert order is not None
        consumed = batches.consumed
        state.epoch = consumed.examples / len(order)
        self._done = min(1.0, consumed.count(total.unit) / total.count)
        if consumed.reached(total):
            state.max_steps = state.global_step
        elif total.unit == "examples":
            left = math.ceil((total.count - consumed.examples) / batches.plan.global_batch_size)
            state.max_steps = state.global_step + left
        for callback in self._trainer.callback_handler.callbacks:
            bar = getattr(callback, "training_bar", None)
            if bar is not None:
                bar.total = state.max_steps

    def _epochs(self, args: Any) -> float:
        if args.max_steps <= 0:
            return float(args.num_train_epochs)
        assert self._trainer.order is not None
        return float(args.max_steps * self._trainer.get_total_train_batch_size(args) / len(self._trainer.order))


class EvaluationRecord(TrainerCallback):
    """Writes the Trainer's evaluations into the journal, without their times."""

    def __init__(self, trainer: TrainerRun) -> None:
        self._trainer = trainer

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        """Records an evaluation of the weights of the last step."""
        run = self._trainer.batches or self._trainer.monitor
        # After a run that loads its best checkpoint, the weights are not those of the last step.
        if run is None or not (self._trainer.is_in_train or not args.load_best_model_at_end):
            return
        found = {name: value for name, value in (metrics or {}).items() if not name.endswith(NOT_OF_THE_MODEL)}
        record_numbers(run, found, prefixes=("eval_",))


def _is_due(args: Any, state: Any, kind: str) -> bool:
    by_steps = getattr(getattr(args, f"{kind}_strategy"), "value", None) == "steps"
    return by_steps and (kind != "eval" or args.eval_delay <= state.global_step)
