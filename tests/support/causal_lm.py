"""A tiny causal language model and its data, for the tests of hosts that train such; Transformers is imported late."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

VOCABULARY = 64
LENGTH = 10
NUM_EXAMPLES = 64
MICRO = 4
LR = 0.1


class Sentences(Dataset[Any]):
    """Random tokens, of which example i hides the labels of the first few; each example carries its number.

    Args:
        even: whether all labels count, so that all examples have equally many.
    """

    def __init__(self, num_examples: int = NUM_EXAMPLES, *, even: bool = False) -> None:
        self._tokens = torch.randint(0, VOCABULARY, (num_examples, LENGTH), generator=torch.Generator().manual_seed(5))
        self._even = even

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = self._tokens[index]
        labels = tokens.clone()
        # The first is never predicted, and older releases of Transformers count it among the items of a loss.
        labels[: 1 if self._even else max(1, index % (LENGTH - 2))] = -100
        return {"input_ids": tokens, "labels": labels, "attention_mask": torch.ones_like(tokens)}


def llama() -> Any:
    """Two layers of width 16, the same weights each time."""
    host = importlib.import_module("transformers")
    torch.manual_seed(0)
    config = host.LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return host.LlamaForCausalLM(config)


def training_arguments(folder: Path, **options: Any) -> Any:
    """Arguments of a run on the CPU with SGD at a constant rate, one example after the other."""
    host = importlib.import_module("transformers")
    given: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "per_device_train_batch_size": MICRO,
        "optim": "sgd",
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "logging_steps": 1,
    }
    return host.TrainingArguments(**given | options)


def whole(model: nn.Module) -> Tensor:
    """All weights in one vector, on any engine but ZeRO 3."""
    parts = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return torch.cat([part.detach().flatten().float() for part in parts])


def by_hand(sizes: Iterable[int], *, even: bool = False) -> Tensor:
    """SGD on whole batches of these sizes, in the order of the data: each token of a batch counts the same."""
    data, model = Sentences(even=even), llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    seen = 0
    for size in sizes:
        batch = [data[index % len(data)] for index in range(seen, seen + size)]
        tokens, labels = (torch.stack([example[name] for example in batch]) for name in ("input_ids", "labels"))
        logits = model(input_ids=tokens).logits[:, :-1].flatten(0, 1)
        functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        seen += size
    return whole(model)
