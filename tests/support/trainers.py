"""What the tests of the Trainer of Transformers share: a mixed trainer whose batch follows a plan of awkward sizes."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support.causal_lm import NUM_EXAMPLES, Sentences, llama, training_arguments

STAGES = "4; 16 from 3 steps; 8 from 6 steps; 20 from 8 steps"
SIZES = [4] * 3 + [16] * 3 + [8] * 2 + [20] * 2
"""To 4 micro-batches after 3 steps, which is no multiple of 4, to 2, to 5; 116 examples."""

EPOCHS = sum(SIZES) / NUM_EXAMPLES


def fresh_state() -> Iterator[None]:
    """For a fixture: Accelerate's state of the process before this one is forgotten."""
    state = importlib.import_module("accelerate.state")
    state.AcceleratorState._reset_state(reset_partial_state=True)
    state.GradientState._reset_state()
    yield


def adaptive(**options: Any) -> Any:
    return importlib.import_module("adabatch.integrations.transformers").AdaptiveArguments(**options)


def mixed(base: Any = None) -> Any:
    """A class with the mixin in front of ``base``, by default of the Trainer."""
    mixin = importlib.import_module("adabatch.integrations.transformers").AdaptiveMixin
    return type("Mixed", (mixin, base or importlib.import_module("transformers").Trainer), {})


def grown(
    folder: Path, *, base: Any = None, model: Any = None, data: Any = None, others: Any = None, **options: Any
) -> Any:
    """A trainer on one process whose steps take ``SIZES``.

    Args:
        folder: of checkpoints and journal.
        base: the class that is mixed with ours.
        model: the small Llama by default.
        data: ``Sentences`` by default.
        others: to evaluate on.
        options: of ``TrainingArguments``.
    """
    arguments = training_arguments(folder, **{"num_train_epochs": EPOCHS, **options})
    stages = adaptive(criterion="stages", batch_stages=STAGES, journal=str(folder / "journal.jsonl"))
    made = {"train_dataset": data or Sentences(), "eval_dataset": others, "adaptive": stages}
    return mixed(base)(model or llama(), arguments, **made)


def logged(trainer: Any, name: str) -> list[Any]:
    """What the trainer logged under a name at its steps."""
    return [entry[name] for entry in trainer.state.log_history if "loss" in entry]
