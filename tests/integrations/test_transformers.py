"""``integrations.transformers`` in one process: equal to the Trainer's own run, resumed to the bit, right in counts."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.causal_lm import NUM_EXAMPLES, Sentences, by_hand, llama, training_arguments, whole
from support.hosts import environment_kept, needs
from support.loops import all_lines, lines
from support.trainers import SIZES, adaptive, fresh_state, grown, logged

import adabatch
from adabatch import Constant, Limits, ProgressLR

needs("transformers", "accelerate")

# PEFT and TRL still say gradient_checkpointing, which Transformers is renaming.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

os.environ["HF_HUB_OFFLINE"] = "1"
environment = pytest.fixture(autouse=True)(environment_kept)

fresh = pytest.fixture(autouse=True)(fresh_state)


def test_a_constant_batch_is_the_trainers_own_run_to_the_bit(tmp_path: Path) -> None:
    from transformers import Trainer

    from adabatch.integrations.transformers import AdaptiveTrainer

    found = []
    for number, kind in enumerate(("plain", "ours", "monitor")):
        mixed = {"plain": {}, "ours": {"adaptive": adaptive(criterion="constant", min_batch_size=16)}}.get(
            kind, {"adaptive": adaptive(monitor_only=True, journal=str(tmp_path / "seen.jsonl"))}
        )
        arguments = training_arguments(
            tmp_path / str(number),
            num_train_epochs=2,
            optim="adamw_torch",
            learning_rate=1e-3,
            max_grad_norm=1.0,
            gradient_accumulation_steps=1 if kind == "ours" else 4,
            eval_strategy="epoch",
        )
        trainer = (AdaptiveTrainer if mixed else Trainer)(
            llama(), arguments, train_dataset=Sentences(even=True), eval_dataset=Sentences(8), **mixed
        )
        output = trainer.train()
        found.append((whole(trainer.model), output.global_step, trainer.state.epoch, logged(trainer, "grad_norm")))
    for other in found[1:]:
        assert torch.equal(other[0], found[0][0])
        assert other[1:] == found[0][1:]
    seen = all_lines(tmp_path / "seen.jsonl")
    steps, evaluations = ([line for line in seen if name in line] for name in ("plan", "evaluation"))
    assert len(steps) == 8
    assert all(line["moments"]["noise"] > 0 for line in steps)
    assert [(line["step"], list(line["evaluation"])) for line in evaluations] == [(4, ["loss"]), (8, ["loss"])]


def test_a_growing_plan_is_the_run_by_hand_and_counts_are_right(tmp_path: Path) -> None:
    often = {"save_strategy": "steps", "save_steps": 7, "eval_strategy": "steps", "eval_steps": 0.5}
    trainer = grown(tmp_path, others=Sentences(8), **often)
    output = trainer.train()
    assert whole(trainer.model).tolist() == pytest.approx(by_hand(SIZES).tolist(), rel=1e-4, abs=1e-5)
    assert logged(trainer, "batch_size") == SIZES
    assert logged(trainer, "epoch") == pytest.approx([sum(SIZES[: k + 1]) / NUM_EXAMPLES for k in range(len(SIZES))])
    assert (output.global_step, trainer.state.max_steps) == (len(SIZES), len(SIZES))
    seconds = output.metrics["train_runtime"]
    assert output.metrics["train_samples_per_second"] * seconds == pytest.approx(sum(SIZES), rel=0.01)
    evaluated = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert evaluated == [6, 10]  # 60 of 116 examples are over after the sixth, and all after the tenth
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-7"]
    assert [line["plan"]["global_batch_size"] for line in lines(tmp_path / "journal.jsonl")] == SIZES
    after = {"loss": trainer.evaluate()["eval_loss"]}
    losses = [{"loss": entry["eval_loss"]} for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[-1] == after
    found = [line for line in all_lines(tmp_path / "journal.jsonl") if "evaluation" in line]
    assert [(line["step"], line["examples"]) for line in found] == [(6, 60), (10, 116), (10, 116)]
    assert [line["evaluation"] for line in found] == losses


def test_a_run_resumed_in_mid_epoch_repeats_the_rest_to_the_bit(tmp_path: Path) -> None:
    options = {
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "train_sampling_strategy": "random",
        "save_strategy": "steps",
        "save_steps": 4,
    }
    first = grown(tmp_path, **options)
    first.train()
    again = grown(tmp_path, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert torch.equal(whole(again.model), whole(first.model))
    for name in ("learning_rate", "epoch", "batch_size"):
        assert logged(again, name) == logged(first, name)
    (tmp_path / "checkpoint-4" / "adabatch.pt").unlink()
    with pytest.raises(ValueError, match="it was saved without adabatch"):
        grown(tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_a_run_goes_on_with_another_micro_batch(tmp_path: Path) -> None:
    first = grown(tmp_path, save_strategy="steps", save_steps=4)
    first.train()
    smaller = grown(tmp_path, per_device_train_batch_size=2)
    smaller.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert logged(smaller, "batch_size") == SIZES
    assert whole(smaller.model).tolist() == pytest.approx(whole(first.model).tolist(), rel=1e-4, abs=1e-5)


def test_the_schedule_ends_with_the_data_whatever_the_batch_did(tmp_path: Path) -> None:
    trainer = grown(tmp_path, lr_scheduler_type="linear", learning_rate=0.5)
    trainer.train()
    before = [sum(SIZES[:k]) / sum(SIZES) for k in range(len(SIZES))]
    assert logged(trainer, "learning_rate") == pytest.approx([0.5 * (1 - share) for share in before])
    assert isinstance(trainer.lr_scheduler, ProgressLR)
    by_steps = grown(tmp_path, max_steps=5, warmup_steps=0.4, lr_scheduler_type="constant_with_warmup")
    by_steps.train()
    assert logged(by_steps, "learning_rate") == pytest.approx([0.05, 0.1, 0.1, 0.1, 0.1])
    assert by_steps.state.global_step == 5


def test_a_loss_of_ones_own_and_one_that_reads_the_number_of_items(tmp_path: Path) -> None:
    from transformers import Trainer

    class Own(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            outputs = model(**inputs)
            return (outputs.loss, outputs) if return_outputs else outputs.loss  # a mean, whatever num_items_in_batch

    expected = pytest.approx(by_hand(SIZES).tolist(), rel=1e-4, abs=1e-5)
    trainer = grown(tmp_path, base=Own)
    trainer.train()
    assert whole(trainer.model).tolist() == expected

    def summed(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        logits = outputs.logits[:, :-1].flatten(0, 1)
        terms = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
        return terms / num_items_in_batch

    trainer = grown(tmp_path)
    trainer.compute_loss_func = summed
    trainer.train()
    assert whole(trainer.model).tolist() == expected


@pytest.mark.parametrize(
    "options",
    [
        {"bf16": True},
        {"checkpointing": True},
        {"checkpointing": True, "checkpointing_kwargs": {"use_reentrant": False}},
        {"torch_compile": True, "torch_compile_backend": "eager"},
        {"dataloader_num_workers": 1},
    ],
    ids=["bf16", "checkpointing", "checkpointing-not-reentrant", "compiled", "workers"],
)
def test_flags_of_the_trainer(tmp_path: Path, options: dict[str, Any]) -> None:
    from transformers import TrainingArguments

    from adabatch.integrations.transformers import AdaptiveTrainer

    # Transformers renamed gradient_checkpointing.
    kind = "activation" if "activation_checkpointing" in TrainingArguments.__dataclass_fields__ else "gradient"
    options = {name.replace("checkpointing", f"{kind}_checkpointing"): value for name, value in options.items()}
    arguments = training_arguments(tmp_path, max_steps=6, **options)
    trainer = AdaptiveTrainer(
        llama(),
        arguments,
        train_dataset=Sentences(),
        adaptive=adaptive(max_batch_size=32),
        adaptive_options={"limits": Limits(min=8, max=32)},
    )
    trainer.train()
    assert trainer.batches.noise_scale > 0
    assert logged(trainer, "batch_size")[0] == 8


def test_the_scaler_of_float16(tmp_path: Path) -> None:
    """Accelerate makes no scaler on a CPU, so it is put where Accelerate keeps it; the numbers stay in float32."""
    from transformers import Trainer

    class Scaled(Trainer):
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)

    trainer = grown(tmp_path, base=Scaled, save_strategy="steps", save_steps=4)
    trainer.train()
    assert trainer.accelerator.scaler.get_scale() == 2.0**12
    assert whole(trainer.model).tolist() == pytest.approx(by_hand(SIZES).tolist(), rel=1e-4, abs=1e-5)


def test_an_adapter_of_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    frozen = model.base_model.model.model.embed_tokens.weight.clone()
    trainer = grown(tmp_path, model=model, save_strategy="steps", save_steps=4)
    trainer.train()
    again = grown(tmp_path, model=peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"])))
    again.args.save_strategy = "no"
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert torch.equal(model.base_model.model.model.embed_tokens.weight, frozen)
    assert torch.equal(whole(again.model), whole(trainer.model))
    assert logged(trainer, "batch_size") == SIZES


def test_a_callback_may_end_an_epoch_early(tmp_path: Path) -> None:
    from transformers import TrainerCallback

    class Impatient(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_epoch_stop = state.global_step % 2 == 0

    trainer = grown(tmp_path, num_train_epochs=3)
    trainer.add_callback(Impatient())
    trainer.train()
    assert trainer.state.global_step == 6
    assert trainer.order.epoch == 2


def test_arguments_come_from_the_command_line_and_from_files(tmp_path: Path) -> None:
    from transformers import HfArgumentParser, TrainingArguments

    from adabatch.integrations.transformers import AdaptiveArguments

    parser = HfArgumentParser((AdaptiveArguments, TrainingArguments))  # no name twice
    ours, theirs = parser.parse_args_into_dataclasses(
        ["--max_batch_size", "64", "--eta", "0.5", "--follow", "betas", "eps", "--output_dir", str(tmp_path)]
    )
    assert (ours.max_batch_size, ours.eta, ours.follow, theirs.output_dir) == (64, 0.5, ["betas", "eps"], str(tmp_path))
    (tmp_path / "run.yaml").write_text(f"criterion: constant\nmin_batch_size: 8\noutput_dir: {tmp_path}\n")
    assert parser.parse_yaml_file(str(tmp_path / "run.yaml"))[0] == adaptive(criterion="constant", min_batch_size=8)
    (tmp_path / "run.json").write_text('{"max_batch_size": 8, "monitor_only": true, "output_dir": "x"}')
    assert parser.parse_json_file(str(tmp_path / "run.json"))[0].monitor_only
    for options, words in [
        ({}, "needs max_batch_size"),
        ({"max_batch_size": 0}, "at least 1 example"),
        ({"max_batch_size": 4, "min_batch_size": 8}, "is above max_batch_size=4"),
        ({"criterion": "stages"}, "give both or neither"),
        ({"criterion": "stages", "batch_stages": "8, 16"}, "such as '32; 64 from"),
    ]:
        with pytest.raises(ValueError, match=words):
            adaptive(**options)


def test_options_of_adaptive_batch_overrule_the_arguments(tmp_path: Path) -> None:
    from adabatch.integrations.transformers import AdaptiveTrainer

    trainer = AdaptiveTrainer(
        llama(), training_arguments(tmp_path, max_steps=2), train_dataset=Sentences(),
        adaptive=adaptive(max_batch_size=64),
        adaptive_options={"criterion": Constant(12), "measure": adabatch.Measure(monitor=True)},
    )  # fmt: skip
    trainer.train()
    assert logged(trainer, "batch_size") == [12, 12]
    assert trainer.batches.noise_scale > 0


def test_a_host_that_is_too_old_or_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "adabatch.integrations.transformers", raising=False)
    monkeypatch.setattr("adabatch.integrations.versions.version", lambda package: "4.40.0")
    with pytest.raises(ImportError, match=r"transformers 5.23 or newer, and 4.40.0 is installed"):
        import adabatch.integrations.transformers  # noqa: F401
