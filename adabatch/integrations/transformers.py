"""Transformers: a mixin that lets the batch of any ``Trainer`` follow a criterion, and one that only measures.

The Trainer keeps its loop, its flags, its callbacks, its logs and its checkpoints. One of its batches is a whole
``Step``: its own accumulation stays at 1, and its backward goes to ``step.backward``.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler

from adabatch.adaptive import AdaptiveBatch
from adabatch.batch.criteria import Criterion
from adabatch.batch.plan import Duration, Progress, examples, steps
from adabatch.batch.schedules import Schedule
from adabatch.integrations.host_state import HostState
from adabatch.integrations.versions import require
from adabatch.monitoring import NoiseMonitor, monitor
from adabatch.runtime.data import GlobalOrder
from adabatch.runtime.scheduler import ProgressLR
from adabatch.step import Step

OLDEST = "5.23"
"""The oldest release of Transformers that was tried."""

require("transformers", OLDEST)

from accelerate.data_loader import SeedableRandomSampler  # noqa: E402
from accelerate.utils import find_batch_size  # noqa: E402
from transformers import Trainer, TrainerCallback  # noqa: E402

from adabatch.integrations.accelerate import attach  # noqa: E402
from adabatch.integrations.transformers_arguments import AdaptiveArguments  # noqa: E402
from adabatch.integrations.transformers_lr import (  # noqa: E402
    OF_A_METRIC,
    ProgressBeforeBatches,
    shape_of,
    warmup_of,
    warmup_start_of,
)

__all__ = ["AdaptiveArguments", "AdaptiveMixin", "AdaptiveTrainer"]

STATE_FILE = "adabatch.pt"
"""What a checkpoint of the Trainer holds beside the Trainer's own files."""

STATE_FORMAT = 1

_Host: Any = object  # any Trainer class, by the order of bases

_ORDERS = {"logging": "should_log", "eval": "should_evaluate", "save": "should_save"}
"""What the Trainer does every so many steps, and the order for it."""


class AdaptiveMixin(_Host):  # type: ignore[misc]
    """Put in front of a Trainer class, lets the global batch size follow a criterion.

    ::

        class MyAdaptiveTrainer(AdaptiveMixin, MyTrainer): ...

        trainer = MyAdaptiveTrainer(model, args, train_dataset=data, adaptive=AdaptiveArguments(max_batch_size=1024))
        trainer.train()

    ``per_device_train_batch_size`` is the micro-batch. Works with ``Trainer`` and its subclasses, also those with a
    ``compute_loss`` of their own, and with the SFT, DPO, KTO and reward trainers of TRL. The data set must be
    map-style; its examples come in a ``GlobalOrder`` of the Trainer's seed, whose epochs are joined.

    ``max_steps`` counts optimizer steps. With ``num_train_epochs`` the run ends with the step that consumes the last
    example. The progress bar and ``state.max_steps`` show an estimate until then. ``lr_scheduler_type`` becomes a
    ``ProgressLR`` over the same length.

    Args:
        arguments: those of the Trainer.
        adaptive: which batch size to ask for.
        adaptive_options: arguments of ``AdaptiveBatch`` that overrule those of ``adaptive``, such as ``criterion``,
            ``control``, ``measure`` or ``guard``.
        options: keyword arguments of the Trainer.

    Attributes:
        adaptive: as given; a subclass may set it instead.
        batches: the ``AdaptiveBatch`` of the last call of ``train()``; None before it, and if the run only monitors.
        monitor: the ``NoiseMonitor`` of a run that only monitors.
        order: the order of the examples.

    Raises:
        ValueError: if ``TrainingArguments`` ask for what cannot be carried out, with the way out in the message.
        TypeError: if ``adaptive`` is missing.
    """

    adaptive: AdaptiveArguments | None = None
    control: Any
    lr_scheduler: Any

    def __init__(
        self,
        *arguments: Any,
        adaptive: AdaptiveArguments | None = None,
        adaptive_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        if adaptive is not None:
            self.adaptive = adaptive
        if not isinstance(self.adaptive, AdaptiveArguments):
            raise TypeError(
                f"{type(self).__name__} needs adaptive=AdaptiveArguments(max_batch_size=...), got {self.adaptive!r}"
            )
        self._adaptive = self.adaptive
        self._adaptive_options = dict(adaptive_options or {})
        self.batches: AdaptiveBatch | None = None
        self.monitor: NoiseMonitor | None = None
        self.order: GlobalOrder | None = None
        self._host_state: HostState | None = None
        self._saved: dict[str, Any] | None = None
        self._source: ProgressBeforeBatches | None = None
        self._first_examples = 0
        self._step_flos = 0.0
        self._step_size = 0  # global batch size of the step that was run last
        self._step_factor = 1.0  # batch factor of its update
        self._refuse()
        if not self._adaptive.monitor_only:
            # First, so that the others see the right epoch, and the Trainer's own ends the run.
            self.callback_handler.callbacks.insert(0, _Bookkeeping(self))

    # --- a run ------------------------------------------------------------------------------------------------------

    def train(self, *arguments: Any, **options: Any) -> Any:
        """As the Trainer's; the hooks on model and optimizer are taken off at its end."""
        self._refuse()
        try:
            return super().train(*arguments, **options)
        finally:
            self._release()

    def get_train_dataloader(self) -> Any:
        """The Trainer's data set, dealt in whole steps."""
        loader = super().get_train_dataloader()
        if self._adaptive.monitor_only:
            return loader
        self.order = order_of(loader, seed=self.args.seed if self.args.data_seed is None else self.args.data_seed)
        return _StepLoader(self, math.ceil(len(self.order) / self._smallest()) + 1)

    def set_initial_training_values(self, args: Any, dataloader: Any, *more: Any) -> Any:
        """Epochs and steps of the run: bounds, where they are not known beforehand."""
        if not isinstance(dataloader, _StepLoader):
            return super().set_initial_training_values(args, dataloader, *more)
        order, per_epoch = self._order(), len(dataloader)
        if args.max_steps > 0:
            num_epochs = max_steps = args.max_steps  # a step takes a whole epoch at most
        else:
            num_epochs = math.ceil(args.num_train_epochs)
            max_steps = math.ceil(args.num_train_epochs * len(order) / self._smallest())
        total = self._smallest()
        return num_epochs, per_epoch, len(order), max_steps * total, total, per_epoch, max_steps

    def get_total_train_batch_size(self, args: Any) -> int:
        """The global batch size of the next step."""
        if self._adaptive.monitor_only:
            return int(super().get_total_train_batch_size(args))
        return self._smallest() if self.batches is None else self.batches.plan.global_batch_size

    def _init_training_state(self, *arguments: Any, **options: Any) -> tuple[int, int]:
        first, skipped = super()._init_training_state(*arguments, **options)
        if self._adaptive.monitor_only:
            return first, skipped
        resumed = options.get("resume_from_checkpoint", arguments[3] if len(arguments) > 3 else None)
        self._saved = None if resumed is None else saved_state(resumed)
        if self._saved is None:
            return 0, 0
        self._order().load_state_dict(self._saved["order"])
        return self._order().epoch, 0

    def _prepare_for_training(self, *arguments: Any, **options: Any) -> Any:
        self._release()
        if self._adaptive.monitor_only:
            model, loader = super()._prepare_for_training(*arguments, **options)
            self.monitor = monitor(
                model,
                self._inner_optimizer(),
                micro_batch_size=self._train_batch_size,
                journal=self._adaptive.journal,
                scaler=self.accelerator.scaler,
            )
            return model, loader
        progress = Progress() if self._saved is None else Progress(**self._saved["batches"]["progress"])
        progress = Progress(examples=progress.examples, steps=progress.steps)
        self._source = ProgressBeforeBatches(progress, self._smallest())
        model, loader = super()._prepare_for_training(*arguments, **options)
        self.batches = batches = self._make_batches(model)
        self._host_state = HostState(batches, order=self.order, scaled=self.accelerator.scaler is not None)
        self._source.follow(batches)
        if self._saved is not None:
            self._host_state.load_state_dict(self._saved)
        if isinstance(self.lr_scheduler, ProgressLR):
            self.lr_scheduler.step()  # writes the rates of the next update, whose plan is known now
        self._first_examples = batches.consumed.examples
        return model, loader

    def _make_batches(self, model: Any) -> AdaptiveBatch:
        options, smallest = dict(self._adaptive_options), self._smallest()
        criterion: Criterion = options.pop("criterion", None) or self._adaptive.criterion_for(smallest)
        if isinstance(criterion, Schedule):
            smallest = min(criterion.fixed_sizes, default=smallest)
        elif self.args.world_size == 1:
            smallest *= 2  # one micro-batch has no spread
        made = self._adaptive.options_for(criterion, smallest) | options
        return attach(
            self.accelerator, model, self._inner_optimizer(), criterion, micro_batch_size=self._train_batch_size, **made
        )

    def _release(self) -> None:
        """Takes all hooks off; what was measured can still be read."""
        for made in (self.batches, self.monitor):
            if made is not None:
                made.remove()
        self._host_state = None

    def steps_of_epoch(self) -> Iterator[Step]:
        """The steps from the present place on, to the end of the epoch or of the run."""
        if self.batches is not None and not self.batches.consumed.reached(self.total_length()):
            yield from self.batches.steps(self._order(), weigh=self._num_items if self._counts_items() else None)

    def total_length(self) -> Duration:
        """Length of the run, by ``max_steps`` or ``num_train_epochs``."""
        if self.args.max_steps > 0:
            return steps(self.args.max_steps)
        return examples(math.ceil(self.args.num_train_epochs * len(self._order())))

    def _order(self) -> GlobalOrder:
        assert self.order is not None
        return self.order

    def _smallest(self) -> int:
        return int(self._train_batch_size * self.args.world_size)

    def _inner_optimizer(self) -> Any:
        wrapped = getattr(self.accelerator, "deepspeed_engine_wrapped", None)
        return self.optimizer.optimizer if wrapped is None else wrapped.engine.basic_optimizer

    # --- a step -----------------------------------------------------------------------------------------------------

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Runs the micro-batches of a step, each by the Trainer's own ``training_step``; the step's mean loss.

        The mean is that of this rank, times the number of ranks and over the items of all ranks, so that the mean over
        the ranks, which the Trainer logs, is that of the step.
        """
        if not isinstance(inputs, Step):
            plain: Tensor = super().training_step(model, inputs, num_items_in_batch)
            return plain
        assert self.batches is not None
        step, self._step_flos, self._step_size = inputs, 0.0, inputs.global_batch_size
        self._step_factor = self.batches.lr_factor
        weights, total = step.portion.weights or (step.portion.sizes, step.portion.num_examples)
        # Each micro-batch hands over the mean of its own loss, and is weighed by the step.
        self.current_gradient_accumulation_steps = 1
        loss = torch.zeros((), device=self.args.device)
        with self._backward_of(step), self._own_items():
            for index, micro_batch in enumerate(step):
                if index > 0:
                    self.control = self.callback_handler.on_substep_end(self.args, self.state, self.control)
                self._step_flos += float(super().floating_point_ops(micro_batch))
                super()._track_num_input_tokens(micro_batch)
                num_items = super()._get_num_items_in_batch([micro_batch], self.args.device)
                part = super().training_step(model, micro_batch, num_items if self._counts_items() else None)
                if weights[index]:
                    loss = loss + part.to(loss) * (weights[index] * self.args.world_size / total)
        if not step.waits and not self.is_deepspeed_enabled:  # that of "gain" knows the noise of this step by now
            self._step_factor = self.batches.lr_factor
        return loss

    @contextmanager
    def _backward_of(self, step: Step) -> Iterator[None]:
        """Sends the backward of every trainer to the step: all of them call ``accelerator.backward``."""
        accelerator: Any = self.accelerator
        accelerator.backward = lambda loss, **_: step.backward(loss)
        try:
            yield
        finally:
            del accelerator.backward

    @contextmanager
    def _own_items(self) -> Iterator[None]:
        """Items are counted on this rank, as adabatch weighs micro-batches of all ranks by itself."""
        asked, self.args.average_tokens_across_devices = self.args.average_tokens_across_devices, False
        try:
            yield
        finally:
            self.args.average_tokens_across_devices = asked

    def _counts_items(self) -> bool:
        """Whether the Trainer takes losses as means over items (tokens) of the whole step, not of micro-batches."""
        own = getattr(self, "loss_is_scaled_for_ga", None) is False  # a loss that is a mean over the micro-batch
        return not own and bool(self.model_accepts_loss_kwargs or self.compute_loss_func is not None)

    def _num_items(self, micro_batch: Any) -> float:
        """Items of a micro-batch, or its examples if it has no labels to count."""
        with self._own_items():
            items = super()._get_num_items_in_batch([micro_batch], self.args.device)
        return float(find_batch_size(micro_batch) if items is None else items)

    def _get_num_items_in_batch(self, batch_samples: Any, device: Any) -> Any:
        of_steps = bool(batch_samples) and isinstance(batch_samples[0], Step)
        return None if of_steps else super()._get_num_items_in_batch(batch_samples, device)

    def floating_point_ops(self, inputs: Any) -> Any:
        """Of all micro-batches of a step."""
        return self._step_flos if isinstance(inputs, Step) else super().floating_point_ops(inputs)

    def _track_num_input_tokens(self, inputs: Any) -> None:
        if not isinstance(inputs, Step):  # those of a step were counted as they came
            super()._track_num_input_tokens(inputs)

    # --- the learning rate ------------------------------------------------------------------------------------------

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """``lr_scheduler_type`` as a ``ProgressLR`` over the length of the run.

        Raises:
            ValueError: if the schedule counts steps of which nobody knows how many there will be.
        """
        name = str(getattr(self.args.lr_scheduler_type, "value", self.args.lr_scheduler_type))
        if self._adaptive.monitor_only:
            return super().create_scheduler(num_training_steps, optimizer)
        given = self.lr_scheduler
        if given is not None:
            if self.args.max_steps <= 0 and type(given).__name__ not in ("ProgressLR", "ReduceLROnPlateau", "GreedyLR"):
                raise ValueError(
                    f"the {type(given).__name__} that the Trainer was given counts steps, and how many this run takes "
                    f"is not known: set max_steps, or give optimizers=(optimizer, None) and an lr_scheduler_type"
                )
            return given
        if name in OF_A_METRIC:
            return super().create_scheduler(num_training_steps, optimizer)
        total = self.total_length()
        self.lr_scheduler = ProgressLR(
            self._inner_optimizer(),
            shape_of(self.args, total),
            self._source,
            total=total,
            warmup=warmup_of(self.args),
            warmup_start=warmup_start_of(self.args),
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _get_learning_rate(self) -> Any:
        """What the last update was made with; by now, the schedule's own knows the next batch."""
        if isinstance(self.lr_scheduler, ProgressLR):
            return self.lr_scheduler.optimizer.param_groups[0]["lr"] * self._step_factor
        return super()._get_learning_rate()

    # --- logs and checkpoints ---------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        """Adds the batch size, the noise scale (if it is known) and the batch factor to the Trainer's logs."""
        if "loss" in logs:
            logs = {**logs, **self._figures()}
        super().log(logs, *arguments, **options)

    def _figures(self) -> dict[str, float]:
        found: dict[str, float] = {}
        if self.batches is not None:
            found = {"batch_size": self._step_size, "lr_factor": self._step_factor}
        source = self.batches or self.monitor
        if source is not None and math.isfinite(source.noise_scale):
            found["noise_scale"] = source.noise_scale
        return found

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._host_state is not None:
            state = {"format": STATE_FORMAT, **self._host_state.state_dict()}
            if self.args.should_save:
                torch.save(state, os.path.join(output_dir, STATE_FILE))

    def _finalize_training(self, trial: Any, num_train_samples: Any, start_time: float) -> Any:
        if self.batches is not None:
            # The Trainer takes the share of this call in all steps; what was consumed in it is known.
            consumed = self.batches.consumed.examples - self._first_examples
            here = self.state.global_step - self._initial_global_step
            num_train_samples = consumed * max(self.state.max_steps, 1) / max(here, 1)
        return super()._finalize_training(trial, num_train_samples, start_time)

    # --- what is refused --------------------------------------------------------------------------------------------

    def _refuse(self) -> None:
        """Refuses arguments under which the run would be wrong."""
        for reason, holds in _refusals(self).items():
            if holds:
                raise ValueError(f"adabatch cannot run in this {type(self).__name__}: {reason}")


class AdaptiveTrainer(AdaptiveMixin, Trainer):
    """The ``Trainer`` of Transformers with a batch that follows a criterion; see ``AdaptiveMixin``."""


class _StepLoader:
    """What the Trainer takes for its loader: each batch is a ``Step``.

    Args:
        trainer: whose steps they are.
        length: no epoch has more steps.
    """

    def __init__(self, trainer: AdaptiveMixin, length: int) -> None:
        self._trainer = trainer
        self._length = length
        self.dataset = trainer._order().dataset

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Step]:
        return self._trainer.steps_of_epoch()

    def set_epoch(self, epoch: int) -> None:
        """Goes to the epoch's beginning if a callback ended the one before early."""
        order = self._trainer._order()
        if order.epoch < epoch:
            order.start_epoch(epoch)


class _Bookkeeping(TrainerCallback):
    """Tells the Trainer where a run stands whose number of steps is not known."""

    def __init__(self, trainer: AdaptiveMixin) -> None:
        self._trainer = trainer
        self._shares: dict[str, float] = {}
        self._done = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Takes over what is counted in shares of the run (``save_steps=0.1``)."""
        given = {kind: getattr(args, f"{kind}_steps") for kind in _ORDERS}
        self._shares = {kind: share for kind, share in given.items() if share is not None and 0 < share < 1}
        for kind in self._shares:
            setattr(state, f"{kind}_steps", sys.maxsize)  # never by the Trainer itself
        self._stand(state)
        state.num_train_epochs = math.ceil(self._epochs(args, state))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The epoch, the end of the run or an estimate of it, and what is due at a share of it."""
        before = self._done
        self._stand(state)
        for kind, share in self._shares.items():
            # a little more, as 0.1 + 0.2 is above 0.3
            if math.floor(self._done / share + 1e-9) > math.floor(before / share + 1e-9) and _is_due(args, state, kind):
                setattr(
                    control, {"logging": "should_log", "eval": "should_evaluate", "save": "should_save"}[kind], True
                )

    def _stand(self, state: Any) -> None:
        batches, order, total = self._trainer.batches, self._trainer._order(), self._trainer.total_length()
        assert batches is not None
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

    def _epochs(self, args: Any, state: Any) -> float:
        if args.max_steps <= 0:
            return float(args.num_train_epochs)
        return float(args.max_steps * self._trainer.get_total_train_batch_size(args) / len(self._trainer._order()))


def _is_due(args: Any, state: Any, kind: str) -> bool:
    by_steps = getattr(getattr(args, f"{kind}_strategy"), "value", None) == "steps"
    return by_steps and (kind != "eval" or args.eval_delay <= state.global_step)


def order_of(loader: Any, *, seed: int) -> GlobalOrder:
    """The examples of a loader in an order that all ranks share, loaded by the same options.

    Args:
        loader: of a map-style data set, with torch's random or sequential sampler.
        seed: of the order.

    Raises:
        ValueError: if the data set is only iterable, or another sampler orders it.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        raise ValueError(
            "a data set that is only iterable cannot be dealt in steps of other sizes, nor resumed at an example: use "
            "one with __len__ and __getitem__ (datasets: load it without streaming=True)"
        )
    batch_sampler: Any = loader.batch_sampler
    while hasattr(batch_sampler, "batch_sampler"):
        batch_sampler = batch_sampler.batch_sampler
    sampler = getattr(batch_sampler, "sampler", batch_sampler)
    if type(sampler) not in (RandomSampler, SeedableRandomSampler, SequentialSampler):
        raise ValueError(
            f"{type(sampler).__name__} orders the examples in batches of one size: use train_sampling_strategy="
            f"'random' or 'sequential'"
        )
    pinned = loader.pin_memory and torch.accelerator.is_available()  # torch warns of it otherwise
    options = {} if loader.num_workers == 0 else {
        "prefetch_factor": loader.prefetch_factor,
        "persistent_workers": loader.persistent_workers,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        "timeout": loader.timeout,
    }  # fmt: skip
    return GlobalOrder(
        loader.dataset,
        seed=seed,
        shuffle=not isinstance(sampler, SequentialSampler),
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=pinned,
        **options,
    )


def saved_state(folder: str) -> dict[str, Any]:
    """What a checkpoint of the Trainer holds of the batch and the data.

    Raises:
        ValueError: if it holds nothing of it, or was written by a newer version.
    """
    path = os.path.join(folder, STATE_FILE)
    if not os.path.isfile(path):
        raise ValueError(
            f"{folder} holds no {STATE_FILE}: it was saved without adabatch, or with save_only_model. Its place in the "
            f"data and its batch are not known; start from its weights with from_pretrained"
        )
    state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    if state["format"] > STATE_FORMAT:
        raise ValueError(
            f"{path} was saved in format {state['format']}, this version reads up to {STATE_FORMAT}: upgrade adabatch"
        )
    return state


def _refusals(trainer: Any) -> dict[str, bool]:
    """Reasons why a run would be wrong, and whether they hold."""
    args, adaptive = trainer.args, trainer.adaptive
    by_threads = {
        "torch.nn.DataParallel splits each micro-batch over the GPUs of one process; start one process per GPU with "
        "torchrun, or show one GPU with CUDA_VISIBLE_DEVICES": args.n_gpu > 1,
    }
    if adaptive.monitor_only:
        return by_threads
    config = getattr(trainer.accelerator, "parallelism_config", None)
    sizes = [getattr(config, f"{name}_size", 1) or 1 for name in ("tp", "cp", "sp")]
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    deepspeed = getattr(args, "hf_deepspeed_config", None)
    lomo = str(getattr(args.optim, "value", args.optim))
    return by_threads | {
        f"gradient_accumulation_steps={args.gradient_accumulation_steps} would make windows of its own; use 1, and "
        f"min_batch_size, adabatch accumulates by the plan": args.gradient_accumulation_steps != 1,
        "auto_find_batch_size changes the micro-batch in the middle of a run; leave it out, and set "
        "per_device_train_batch_size (larger ones can be tried with max_micro_batch_size)": args.auto_find_batch_size,
        "tensor, context and sequence parallelism give several ranks the same examples; use data parallelism (DDP, "
        "FSDP2 or DeepSpeed)": max(sizes) > 1 or trainer.get_tp_size() > 1,
        "its model is spread over several devices of one process (device_map), as a pipeline; use FSDP2 or DeepSpeed "
        "ZeRO 3": bool(getattr(trainer, "is_model_parallel", False)),
        "FSDP1 does not show the gradients of a rank; set fsdp_version: 2 in fsdp_config": (
            plugin is not None and getattr(plugin, "fsdp_version", 1) != 2
        ),
        "the scheduler of DeepSpeed's JSON counts steps; leave `scheduler` out of it, and set lr_scheduler_type": (
            deepspeed is not None and "scheduler" in deepspeed.config
        ),
        f"optim={lomo!r} updates weights inside the backward of each micro-batch; use adamw_torch": (
            "lomo" in lomo or "layerwise" in lomo
        ),
        "it generates its data for a fixed number of micro-batches (steps_per_generation), and a step that takes more "
        "would train on rollouts of older weights; train with a constant batch, and monitor_only=True": hasattr(
            args, "steps_per_generation"
        ),
    }
