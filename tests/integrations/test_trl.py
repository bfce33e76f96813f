"""Trainers of TRL through ``AdaptiveMixin``: SFT (padded, packed), DPO, KTO and reward; GRPO and RLOO are refused."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support.causal_lm import MICRO, VOCABULARY, llama, whole
from support.hosts import environment_kept, needs

needs("trl", "transformers", "datasets", "tokenizers")

os.environ["HF_HUB_OFFLINE"] = "1"
# PEFT and TRL still say gradient_checkpointing, which Transformers is renaming.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
environment = pytest.fixture(autouse=True)(environment_kept)

STAGES = "4; 16 from 2 steps; 8 from 4 steps"
SIZES = [4, 4, 16, 16, 8, 8]


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {
        word: index for index, word in enumerate(["<pad>", "<s>", "</s>", *(f"w{k}" for k in range(3, VOCABULARY))])
    }
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def text(number: int, length: int) -> str:
    return " ".join(f"w{3 + (number * 7 + place) % (VOCABULARY - 3)}" for place in range(length))


def rows(kind: str) -> Any:
    from datasets import Dataset

    numbers = range(64)
    if kind == "SFT":
        return Dataset.from_list([{"text": text(k, 3 + k % 6)} for k in numbers])
    if kind == "KTO":
        return Dataset.from_list(
            [{"prompt": text(k, 3), "completion": " " + text(k + 1, 3), "label": k % 2 == 0} for k in numbers]
        )
    pairs = [{"chosen": " " + text(k + 1, 4), "rejected": " " + text(k + 2, 3)} for k in numbers]
    prompts = [{"prompt": text(k, 3)} for k in numbers]
    return Dataset.from_list([{**prompt, **pair} for prompt, pair in zip(prompts, pairs, strict=True)])


def model_for(kind: str) -> Any:
    if kind != "Reward":
        return llama()
    host = importlib.import_module("transformers")
    torch.manual_seed(0)
    config = llama().config
    config.num_labels = 1
    return host.LlamaForSequenceClassification(config)


def trainer_of(kind: str, folder: Path, ours: dict[str, Any] | None, **options: Any) -> Any:
    trl = importlib.import_module("trl")
    integration = importlib.import_module("adabatch.integrations.transformers")
    base, config = getattr(trl, f"{kind}Trainer"), getattr(trl, f"{kind}Config")
    arguments = config(
        **{
            "output_dir": str(folder),
            "use_cpu": True,
            "bf16": False,
            "report_to": [],
            "disable_tqdm": True,
            "per_device_train_batch_size": MICRO,
            "learning_rate": 1e-2,
            "optim": "sgd",
            "lr_scheduler_type": "constant",
            "max_steps": len(SIZES),
            "train_sampling_strategy": "sequential",
            "save_strategy": "no",
            "logging_steps": 1,
            "gradient_checkpointing": False,
            **options,
        }
    )
    made = {"args": arguments, "train_dataset": rows(kind), "processing_class": tokenizer()}
    if kind in ("DPO", "KTO"):
        made["ref_model"] = model_for(kind)
    if ours is None:
        return base(model_for(kind), **made)
    mixed = type(f"Adaptive{kind}Trainer", (integration.AdaptiveMixin, base), {})
    return mixed(model_for(kind), adaptive=integration.AdaptiveArguments(**ours), **made)


@pytest.mark.parametrize("kind", ["SFT", "DPO", "KTO", "Reward"])
def test_a_constant_batch_is_the_trainers_own_and_a_growing_one_grows(kind: str, tmp_path: Path) -> None:
    """To 1e-6 and not to the bit: examples differ in length, so losses are divided in another order."""
    plain = trainer_of(kind, tmp_path / "plain", None, gradient_accumulation_steps=2, max_steps=3)
    plain.train()
    constant = trainer_of(kind, tmp_path / "ours", {"criterion": "constant", "min_batch_size": 8}, max_steps=3)
    constant.train()
    assert torch.allclose(whole(constant.model), whole(plain.model), rtol=0, atol=1e-6)
    grown = trainer_of(kind, tmp_path / "grown", {"criterion": "stages", "batch_stages": STAGES})
    grown.train()
    assert [entry["batch_size"] for entry in grown.state.log_history if "loss" in entry] == SIZES
    assert grown.batches.consumed.examples == sum(SIZES)
    assert torch.isfinite(whole(grown.model)).all()


def test_packed_rows_of_sft(tmp_path: Path) -> None:
    options = {"packing": True, "max_length": 16, "packing_strategy": "wrapped", "num_train_epochs": 1, "max_steps": -1}
    trainer = trainer_of("SFT", tmp_path, {"max_batch_size": 16}, **options)
    trainer.train()
    assert trainer.batches.consumed.examples >= len(trainer.train_dataset)
    assert trainer.state.epoch >= 1


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_trainers_that_generate_are_refused(kind: str, tmp_path: Path) -> None:
    from datasets import Dataset

    trl = importlib.import_module("trl")
    integration = importlib.import_module("adabatch.integrations.transformers")
    mixed = type("Mixed", (integration.AdaptiveMixin, getattr(trl, f"{kind}Trainer")), {})
    config = getattr(trl, f"{kind}Config")(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to=[],
        per_device_train_batch_size=4,
        num_generations=2,
        beta=0.0,
    )
    with pytest.raises(ValueError, match="generates its data for a fixed number of micro-batches"):
        mixed(
            model=llama(), reward_funcs=lambda completions, **_: [0.0] * len(completions), args=config,
            train_dataset=Dataset.from_list([{"prompt": "w3 w4"}] * 8), processing_class=tokenizer(),
            adaptive=integration.AdaptiveArguments(max_batch_size=32),
        )  # fmt: skip
