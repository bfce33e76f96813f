"""What does adabatch cost inside a host? A step of the host with it, probed every time, against the host alone.

    python benchmarks/hosts.py

One process of one thread trains the same 4.8 M-parameter transformer with AdamW and four micro-batches per step, in
Accelerate (its own ``accumulate`` against ``attach``), Lightning (``accumulate_grad_batches`` against the callback) and
Fabric (``no_backward_sync`` against the plain API); in the Trainer of Transformers it trains a Llama of that size
(``gradient_accumulation_steps`` against ``AdaptiveTrainer``). Limits hold the batch constant, so both do the same work.
Times are those of the processor, so that other programs on the machine do not count. Aim: at most 1.03.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Callable, Mapping
from threading import Semaphore, Thread
from typing import Any

import torch
from _harness import Machine, Table, Timings, interleave, publish
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import adabatch
from adabatch.recipes import NextTokenLoss, Transformer

LENGTH = 128
MICRO = 4
ACCUMULATION = 4
SIZE = MICRO * ACCUMULATION
STEPS = 1_000_000
AIM = 1.03

Steps = Mapping[str, Callable[[], None]]
LOSS = NextTokenLoss()
LIMITS = adabatch.Limits(min=SIZE, max=SIZE)


def made(width: int = 256, depth: int = 6) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Transformer(width=width, depth=depth, num_heads=8)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4)


class Endless(TensorDataset):
    """Random characters, again and again: no loop comes to its end while it is timed.

    Args:
        steps: after which it would.
    """

    def __init__(self, steps: int = STEPS) -> None:
        self.steps = steps
        text = torch.randint(65, (64, LENGTH + 1), generator=torch.Generator().manual_seed(0))
        super().__init__(text[:, :-1].contiguous(), text[:, 1:].contiguous())

    def __len__(self) -> int:
        return self.steps * SIZE

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return super().__getitem__(index % 64)


def loader() -> DataLoader[Any]:
    return DataLoader(Endless(), batch_size=MICRO)


def around(batches: adabatch.AdaptiveBatch, model: Any, update: Callable[[], None], data: Any) -> Callable[[], None]:
    steps = batches.steps(data)

    def run() -> None:
        for x, y in (step := next(steps)):
            step.backward(LOSS(model(x), y))
        update()

    return run


class Gate:
    """Lets a host's own loop, which runs in a thread of its own, go on by one step at a time.

    Args:
        loop: the whole training.
    """

    def __init__(self, loop: Callable[[], object]) -> None:
        self._loop = loop
        self._go, self._done = Semaphore(0), Semaphore(0)
        self._failed: BaseException | None = None
        self._thread: Thread | None = None

    def _run(self) -> None:
        torch.set_num_threads(1)  # each thread of Python has a number of its own
        try:
            self._loop()
        except BaseException as error:
            self._failed = error
        self._done.release()

    def wait(self) -> None:
        """Called by the host, before each step."""
        self._go.acquire()

    def passed(self) -> None:
        """Called by the host, after each step."""
        self._done.release()

    def step(self) -> None:
        if self._thread is None:
            # Not before all hosts of a turn are made: what they share in the process is then as the last one wants it.
            self._thread = Thread(target=self._run, daemon=True)
            self._thread.start()
        self._go.release()
        self._done.acquire()
        if self._failed is not None:
            raise RuntimeError("the host's own loop has ended with an error") from self._failed


def fresh_accelerate() -> None:
    """Forgets what Accelerate keeps per process: its own turn and that of the Trainer, which is built on it, differ."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def accelerate_steps(**size: int) -> Steps:
    from accelerate import Accelerator

    from adabatch.integrations.accelerate import attach

    def updates(optimizer: Any) -> Callable[[], None]:
        def update() -> None:
            optimizer.step()
            optimizer.zero_grad()

        return update

    fresh_accelerate()
    ours = Accelerator(cpu=True)
    model, optimizer, data = ours.prepare(*made(**size), loader())
    batches = attach(ours, model, optimizer, adabatch.NormTest(eta=0.5), micro_batch_size=MICRO, limits=LIMITS)
    run = around(batches, model, updates(optimizer), data)

    # A step of Accelerate's own loop divides by its accumulation, of which there is one in the process.
    other, its_optimizer = made(**size)
    other, its_optimizer, rest = ours.prepare(other, its_optimizer, loader())
    micro_batches = iter(rest)

    def alone() -> None:
        ours.gradient_accumulation_steps = ACCUMULATION
        for _ in range(ACCUMULATION):
            x, y = next(micro_batches)
            with ours.accumulate(other):
                ours.backward(LOSS(other(x), y))
                its_optimizer.step()
                its_optimizer.zero_grad()
        ours.gradient_accumulation_steps = 1
        ours.step = 0  # nobody accumulated, as far as ours is concerned

    return {"without": alone, "with": run}


def fabric_steps(**size: int) -> Steps:
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    other, its_optimizer = fabric.setup(*made(**size))
    micro_batches = iter(fabric.setup_dataloaders(loader()))

    def alone() -> None:
        for index in range(ACCUMULATION):
            x, y = next(micro_batches)
            with fabric.no_backward_sync(other, enabled=index < ACCUMULATION - 1):
                fabric.backward(LOSS(other(x), y) / ACCUMULATION)
        its_optimizer.step()
        its_optimizer.zero_grad()

    model, optimizer = fabric.setup(*made(**size))
    criterion = adabatch.NormTest(eta=0.5)
    batches = adabatch.AdaptiveBatch(model, optimizer, criterion, micro_batch_size=MICRO, limits=LIMITS)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return {"without": alone, "with": around(batches, model, update, fabric.setup_dataloaders(loader()))}


def lightning_steps(**size: int) -> Steps:
    from lightning.pytorch import Callback, LightningModule, Trainer

    from adabatch.integrations.lightning import AdaptiveBatchCallback

    class Lit(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = made(**size)[0]

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return LOSS(self.network(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-4)

    class AtSteps(Callback):
        def __init__(self, batches_per_step: int) -> None:
            self.batches_per_step = batches_per_step
            self.gate: Gate | None = None

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            assert self.gate is not None
            if batch_idx % self.batches_per_step == 0:
                if batch_idx > 0:
                    self.gate.passed()
                self.gate.wait()

    def fitted(accumulation: int, *callbacks: Callback) -> Callable[[], None]:
        at_steps = AtSteps(accumulation)
        trainer = Trainer(
            accelerator="cpu", devices=1, accumulate_grad_batches=accumulation, max_epochs=1, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[at_steps, *callbacks],
        )  # fmt: skip
        at_steps.gate = Gate(lambda: trainer.fit(Lit(), loader()))
        return at_steps.gate.step

    criterion = adabatch.NormTest(eta=0.5)
    ours = AdaptiveBatchCallback(criterion, micro_batch_size=MICRO, limits=LIMITS)
    return {"without": fitted(ACCUMULATION), "with": fitted(1, ours)}


def transformers_steps(width: int = 256, depth: int = 6) -> Steps:
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from adabatch.integrations.transformers import AdaptiveArguments, AdaptiveTrainer

    fresh_accelerate()

    class AtSteps(TrainerCallback):
        """Waits at the ends of steps: what the two runs share in Accelerate is set between there and its use."""

        def __init__(self) -> None:
            self.gate: Gate | None = None

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            assert self.gate is not None
            self.gate.wait()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            assert self.gate is not None
            self.gate.passed()
            self.gate.wait()

    def batch_of(rows: list[tuple[Tensor, ...]]) -> dict[str, Tensor]:
        tokens = torch.stack([row[0] for row in rows])
        return {"input_ids": tokens, "labels": tokens.clone()}

    def trained(kind: Any, accumulation: int, **ours: Any) -> Callable[[], None]:
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=width, intermediate_size=8 * width // 3, num_hidden_layers=depth, num_attention_heads=8,
            vocab_size=256,
        )  # fmt: skip
        at_steps, steps = AtSteps(), 4096
        arguments = TrainingArguments(
            "unused", per_device_train_batch_size=MICRO, gradient_accumulation_steps=accumulation, max_steps=steps,
            learning_rate=1e-4, report_to=[], disable_tqdm=True, save_strategy="no", logging_strategy="no",
            remove_unused_columns=False, use_cpu=True,
        )  # fmt: skip
        trainer = kind(
            LlamaForCausalLM(config), arguments, train_dataset=Endless(steps), data_collator=batch_of,
            callbacks=[at_steps], **ours,
        )  # fmt: skip
        at_steps.gate = Gate(trainer.train)
        return at_steps.gate.step

    adaptive = AdaptiveArguments(criterion="norm_test", eta=0.5, min_batch_size=SIZE, max_batch_size=SIZE)
    return {"without": trained(Trainer, ACCUMULATION), "with": trained(AdaptiveTrainer, 1, adaptive=adaptive)}


HOSTS: dict[str, Callable[..., Steps]] = {
    "Accelerate": accelerate_steps,
    "Fabric": fabric_steps,
    "Lightning": lightning_steps,
    "Trainer": transformers_steps,
}


def measure(host: str, rounds: int, **size: int) -> Timings:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return interleave(lambda: HOSTS[host](**size), trials=2, rounds=max(2, rounds // 2), clock=time.process_time)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="steps of each loop in each host")
    parser.add_argument("--only", choices=HOSTS, nargs="+", default=list(HOSTS), help="hosts")
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    machine = Machine.here()
    rows, told, raw = [], [], {}
    title = (
        f"A step of {ACCUMULATION} micro-batches of {MICRO} x {LENGTH} tokens with adabatch, against the host alone: "
        f"median (quartiles)"
    )
    for host in options.only:
        timings = measure(host, options.rounds)
        raw[host] = timings.seconds
        ratio = timings.ratio("with", "without")
        rows.append((host, timings.of("without").show(1, 1e3), ratio.show(3)))
        told.append(f"{host}: {ratio.median:.3f}, aim {AIM}: {'met' if ratio.median <= AIM else 'missed'}.")
        # after each host, so that a run which is stopped leaves what it has
        publish(
            "hosts",
            question="What does a step of a host cost with adabatch in it, probed every time?",
            machine=machine,
            tables=[
                Table(
                    title,
                    ("host", "alone, ms", "ratio"),
                    rows,
                )
            ],
            findings=told,
            data={"rounds": options.rounds, "seconds": raw},
            save=not options.no_save,
        )


if __name__ == "__main__":
    main()
