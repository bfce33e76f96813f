"""What the Trainer's own tests ask of stepping, resuming and logging, asked of a Trainer whose batch is ours.

Restated from `tests/trainer` of Transformers: `test_trainer.py`, `test_trainer_callback.py` (the order of events),
`test_trainer_checkpointing.py` (resuming, the best checkpoint, early stopping), `test_trainer_resume.py`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support.causal_lm import NUM_EXAMPLES, Sentences, by_hand, llama, training_arguments, whole
from support.hosts import environment_kept, needs
from support.loops import all_lines
from support.trainers import EPOCHS, SIZES, adaptive, fresh_state, grown, logged

needs("transformers", "accelerate")

os.environ["HF_HUB_OFFLINE"] = "1"
environment = pytest.fixture(autouse=True)(environment_kept)
fresh = pytest.fixture(autouse=True)(fresh_state)

SAVED = {"save_strategy": "steps", "save_steps": 1}


def recorder() -> Any:
    """A callback that notes every event, and what the state says at it."""
    from transformers import TrainerCallback

    seen: list[Any] = []

    def noted(event: str) -> Any:
        def note(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
            epoch = None if state.epoch is None else round(state.epoch, 6)
            seen.append((event, state.global_step, epoch, state.max_steps, state.num_train_epochs))

        return note

    events = {name: noted(name) for name in dir(TrainerCallback) if name.startswith("on_")}
    made = type("Recorder", (TrainerCallback,), events)()
    made.seen = seen
    return made


def with_dropout() -> Any:
    model = llama()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    return model


@pytest.mark.parametrize(
    "options",
    [
        {"logging_steps": 3, "logging_first_step": True, "save_strategy": "steps", "save_steps": 3},
        {
            "eval_strategy": "steps", "eval_steps": 3, "eval_delay": 4, "save_strategy": "steps", "save_steps": 6,
            "load_best_model_at_end": True, "include_num_input_tokens_seen": "all", "eval_on_start": True,
        },
        {"logging_strategy": "epoch", "eval_strategy": "epoch", "save_strategy": "epoch"},
        {"max_steps": 7, "logging_steps": 0.3, "save_strategy": "steps", "save_steps": 0.5},
    ],
    ids=["steps", "evaluated", "epochs", "shares"],
)  # fmt: skip
def test_a_constant_batch_has_the_events_logs_and_files_of_the_trainers_own_run(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    from transformers import Trainer

    from adabatch.integrations.transformers import AdaptiveTrainer

    found = []
    for kind, made, ours in [
        (Trainer, {"gradient_accumulation_steps": 4}, {}),
        (AdaptiveTrainer, {}, {"adaptive": adaptive(criterion="constant", min_batch_size=16)}),
    ]:
        folder = tmp_path / kind.__name__
        recorded = recorder()
        trainer = kind(
            llama(), training_arguments(folder, **({"num_train_epochs": 2} | options | made)),
            train_dataset=Sentences(even=True), eval_dataset=Sentences(8), callbacks=[recorded], **ours,
        )  # fmt: skip
        trainer.train()
        kept = ("loss", "grad_norm", "learning_rate", "epoch", "step", "eval_loss", "num_input_tokens_seen")
        # The loss of several steps is summed in another order.
        logs = [{name: each[name] for name in kept if name in each} for each in trainer.state.log_history]
        files = sorted(path.name for path in folder.glob("checkpoint-*"))
        counts = (trainer.state.total_flos, trainer.state.num_input_tokens_seen, trainer.state.best_metric)
        found.append((whole(trainer.model).tolist(), recorded.seen, logs, files, counts))
    (weights, events, logs, files, counts), own = found
    assert own[0] == weights
    assert own[1] == events
    assert own[2] == [pytest.approx(each, rel=1e-6) for each in logs]
    assert own[3:] == (files, counts)


def test_a_run_is_resumed_from_any_of_its_checkpoints_to_the_bit(tmp_path: Path) -> None:
    """In the first epoch, at the step that ends it, and in the next; random numbers go on too."""
    options = {"optim": "adamw_torch", "learning_rate": 1e-2, "train_sampling_strategy": "random"}
    first = grown(tmp_path, model=with_dropout(), **SAVED, **options)
    first.train()
    final = json.loads((tmp_path / "checkpoint-10" / "trainer_state.json").read_text())
    for step in (2, 7, 9):
        again = grown(tmp_path, model=with_dropout(), **SAVED, **options)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert torch.equal(whole(again.model), whole(first.model))
        state = json.loads((tmp_path / "checkpoint-10" / "trainer_state.json").read_text())
        assert state == final
    # True stands for the newest one, after which nothing is left.
    done = grown(tmp_path, model=with_dropout(), **options)
    output = done.train(resume_from_checkpoint=True)
    assert output.global_step == len(SIZES)
    assert torch.equal(whole(done.model), whole(first.model))


def test_a_run_that_a_callback_stops_can_go_on(tmp_path: Path) -> None:
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = control.should_save = state.global_step == 5

    stopped = grown(tmp_path)
    stopped.add_callback(Stop())
    output = stopped.train()
    assert output.global_step == 5
    seconds = output.metrics["train_runtime"]
    assert output.metrics["train_samples_per_second"] * seconds == pytest.approx(sum(SIZES[:5]), rel=0.01)
    again = grown(tmp_path)
    output = again.train(resume_from_checkpoint=True)
    assert logged(again, "batch_size") == SIZES
    assert whole(again.model).tolist() == pytest.approx(by_hand(SIZES).tolist(), rel=1e-4, abs=1e-5)
    seconds = output.metrics["train_runtime"]
    assert output.metrics["train_samples_per_second"] * seconds == pytest.approx(sum(SIZES[5:]), rel=0.01)


def test_stopping_early_loads_the_best_checkpoint(tmp_path: Path) -> None:
    from transformers import EarlyStoppingCallback

    options = {
        "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2,
        "load_best_model_at_end": True, "metric_for_best_model": "falling", "greater_is_better": True,
    }  # fmt: skip
    trainer = grown(tmp_path, others=Sentences(8), **options)
    trainer.compute_metrics = lambda _: {"falling": -float(trainer.state.global_step)}
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=2))
    trainer.train()
    assert trainer.state.global_step == 6  # the first was the best, and the two after it are the patience
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-2"
    trainer.evaluate()  # of the best weights, which are not those of the last step: it is not in the journal
    evaluations = [line for line in all_lines(tmp_path / "journal.jsonl") if "evaluation" in line]
    assert [(line["step"], line["evaluation"]["falling"]) for line in evaluations] == [(2, -2), (4, -4), (6, -6)]
    assert set(evaluations[0]["evaluation"]) == {"falling", "loss"}
    assert whole(trainer.model).tolist() == pytest.approx(by_hand(SIZES[:2]).tolist(), rel=1e-4, abs=1e-5)


def test_epochs_are_joined_and_end_with_the_step_that_crosses_them(tmp_path: Path) -> None:
    often = {"save_strategy": "epoch", "eval_strategy": "epoch"}
    trainer = grown(tmp_path, others=Sentences(8), **often)
    trainer.train()
    crossing = next(k + 1 for k in range(len(SIZES)) if sum(SIZES[: k + 1]) >= NUM_EXAMPLES)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-10", f"checkpoint-{crossing}"]
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == [crossing, 10]
    assert trainer.state.epoch == pytest.approx(EPOCHS)
    assert trainer.state.num_train_epochs == 2


def test_shares_of_a_run_are_shares_of_its_examples(tmp_path: Path) -> None:
    trainer = grown(tmp_path, save_strategy="steps", save_steps=0.5, logging_steps=0.25)
    trainer.train()
    ends = [next(k + 1 for k in range(10) if sum(SIZES[: k + 1]) >= share * sum(SIZES)) for share in (0.25, 0.5, 0.75)]
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [*ends, 10]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-10", f"checkpoint-{ends[1]}"]


def test_the_progress_bar_ends_full(tmp_path: Path) -> None:
    from transformers import TrainerCallback
    from transformers.trainer_callback import ProgressCallback

    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            (bar,) = [
                each.training_bar for each in trainer.callback_handler.callbacks if type(each) is ProgressCallback
            ]
            seen.append((bar.n, bar.total))

    trainer = grown(tmp_path, disable_tqdm=False, logging_strategy="no")
    trainer.add_callback(Look())
    trainer.train()
    assert [n for n, _ in seen] == list(range(1, 11))
    assert seen[0][1] == 1 + (116 - 4) // 4  # an estimate by the present batch
    assert seen[-1] == (10, 10)


def test_training_again_starts_again(tmp_path: Path) -> None:
    trainer = grown(tmp_path)
    hooks = [len(each._forward_hooks) + len(each._forward_pre_hooks) for each in trainer.model.modules()]
    for _ in range(2):
        trainer.train()
        assert logged(trainer, "batch_size") == SIZES
        assert trainer.state.epoch == pytest.approx(EPOCHS)
    assert [len(each._forward_hooks) + len(each._forward_pre_hooks) for each in trainer.model.modules()] == hooks
    for parameter in trainer.model.parameters():
        assert not parameter._backward_hooks
        assert not parameter._post_accumulate_grad_hooks


def test_an_update_that_is_not_finite_is_left_out(tmp_path: Path) -> None:
    from transformers import Trainer

    class Spoiled(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
            loss = super().compute_loss(model, inputs, *arguments, **options)
            return loss * torch.inf if self.state.global_step == 4 else loss

    trainer = grown(tmp_path, base=Spoiled, save_strategy="steps", save_steps=4)
    trainer.train()
    assert torch.isfinite(whole(trainer.model)).all()
    assert logged(trainer, "batch_size") == SIZES
    assert trainer.state.epoch == pytest.approx(EPOCHS)
    assert trainer.batches.progress.steps == len(SIZES) - 1
