"""Transformers: fine-tuning with the Trainer, whose batch grows with the noise of the gradient.

python examples/transformers_trainer.py
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from adabatch.integrations.transformers import AdaptiveArguments, AdaptiveTrainer

torch.manual_seed(0)
tokens = (torch.randint(0, 16, (2048, 1)) + torch.arange(16)) % 16  # they count upwards, with a slip now and then
tokens = torch.where(torch.rand(2048, 16) < 0.04, torch.randint(0, 16, (2048, 16)), tokens)
dataset = [{"input_ids": sentence, "labels": sentence} for sentence in tokens]
config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=16)
arguments = TrainingArguments(
    output_dir="runs/trainer",
    per_device_train_batch_size=8,  # the micro-batch
    num_train_epochs=4,
    learning_rate=3e-3,
    lr_scheduler_type="cosine",
    logging_steps=10,
    disable_tqdm=True,
    report_to=[],
    save_strategy="no",
    use_cpu=True,
)
trainer = AdaptiveTrainer(
    model=LlamaForCausalLM(config),
    args=arguments,
    train_dataset=dataset,
    adaptive=AdaptiveArguments(criterion="norm_test", eta=0.7, min_batch_size=16, max_batch_size=128),
)
trainer.train()
last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
print(f"after {trainer.state.global_step} steps: global batch {last['batch_size']}, loss={last['loss']:.3f}")
