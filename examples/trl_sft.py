"""TRL: supervised fine-tuning whose batch grows with the noise of the gradient.

python examples/trl_sft.py
"""

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer

from adabatch.integrations.transformers import AdaptiveArguments, AdaptiveMixin


class AdaptiveSFTTrainer(AdaptiveMixin, SFTTrainer): ...


set_seed(0)
tokens = (torch.randint(0, 16, (2048, 1)) + torch.arange(16)) % 16  # they count upwards, with a slip now and then
tokens = torch.where(torch.rand(2048, 16) < 0.04, torch.randint(0, 16, (2048, 16)), tokens)
config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=16)
words = Tokenizer(models.WordLevel({f"{number}": number for number in range(16)}, unk_token="0"))
trainer = AdaptiveSFTTrainer(
    LlamaForCausalLM(config),
    args=SFTConfig(
        "runs/sft",
        per_device_train_batch_size=8,  # the micro-batch
        num_train_epochs=4,
        learning_rate=3e-3,
        report_to=[],
        save_strategy="no",
        bf16=False,
        gradient_checkpointing=False,
    ),
    train_dataset=Dataset.from_dict({"input_ids": tokens.tolist()}),
    processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="0"),
    adaptive=AdaptiveArguments(max_batch_size=128),
)
trainer.train()
last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
print(f"after {trainer.state.global_step} steps: global batch {last['batch_size']}, loss={last['loss']:.3f}")
