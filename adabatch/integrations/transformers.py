"""Transformers: a mixin with which the batch of any ``Trainer`` follows a criterion, or is only measured.

The Trainer keeps its loop, flags, callbacks, logs and checkpoints. One of its batches is a whole ``Step``; its own
accumulation stays at 1, and its backward is passed to ``step.backward``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from adabatch.adaptive import AdaptiveBatch
from adabatch.adaptive.monitoring import NoiseMonitor, monitor
from adabatch.adaptive.step import Step
from adabatch.batch.criteria import Criterion
from adabatch.batch.plan import Duration, Progress, examples, steps
from adabatch.batch.schedules import Schedule
from adabatch.integrations.host_state import HostState
from adabatch.integrations.versions import require_version
from adabatch.runtime.data import GlobalOrder
from adabatch.runtime.optimizers.scheduler import ProgressLR

OLDEST = "5.23"
"""The oldest release of Transformers that was tried."""

require_version("transformers", OLDEST)

from accelerate.utils import find_batch_size  # noqa: E402
from transformers import Trainer  # noqa: E402

from adabatch.integrations.accelerate import attach  # noqa: E402
from adabatch.integrations.transformers_arguments import AdaptiveArguments  # noqa: E402
from adabatch.integrations.transformers_data import StepLoader, order_of  # noqa: E402
from adabatch.integrations.transformers_lr import (  # noqa: E402
    OF_A_METRIC,
    ProgressBeforeBatches,
    shape_of,
    warmup_of,
    warmup_start_of,
)
from adabatch.integrations.transformers_refusals import refuse_arguments  # noqa: E402
from adabatch.integrations.transformers_state import (  # noqa: E402
    Bookkeeping,
    EvaluationRecord,
    saved_state,
    write_host_state,
)

__all__ = ["AdaptiveArguments", "AdaptiveMixin", "AdaptiveTrainer"]

_Host: Any = object  # any Trainer class, by the order of bases


class AdaptiveMixin(_Host):  # type: ignore[misc]
    """A mixin for a Trainer class, with which the global batch size follows a criterion.

        class MyAdaptiveTrainer(AdaptiveMixin, MyTrainer): ...

        trainer = MyAdaptiveTrainer(model, args, train_dataset=data, adaptive=AdaptiveArguments(max_batch_size=1024))
        trainer.train()

    ``per_device_train_batch_size`` is the micro-batch. The mixin works with ``Trainer`` and its subclasses, also those
    with their own ``compute_loss``, and with the SFT, DPO, KTO and reward trainers of TRL. The data set must be
    map-style. Its examples come in a ``GlobalOrder`` with the Trainer's seed, whose epochs are joined.

    ``max_steps`` counts optimizer steps. With ``num_train_epochs`` the run ends with the step that consumes the last
    example; until then the progress bar and ``state.max_steps`` show an estimate. ``lr_scheduler_type`` becomes a
    ``ProgressLR`` over the same length.

    Args:
        arguments: arguments of the Trainer.
        adaptive: which batch size to ask for.
        adaptive_options: arguments of ``AdaptiveBatch`` that override those of ``adaptive``, such as ``criterion``,
            ``control``, ``measure`` or ``guard``.
        options: keyword arguments of the Trainer.

    Attributes:
        adaptive: the argument; a subclass may set it instead.
        base_schedule_is_left_out: set it to True in a subclass to ignore the ``create_scheduler`` of the Trainer class.
            By default a class with its own ``create_scheduler`` is an error.
        batches: the ``AdaptiveBatch`` of the last call of ``train()``; None before it, and if the run only monitors.
        monitor: the ``NoiseMonitor`` of a run that only monitors.
        order: the order of the examples.

    Raises:
        ValueError: if something in ``TrainingArguments`` is not possible; the message says what to do.
        TypeError: if ``adaptive`` is missing.
    """

    adaptive: AdaptiveArguments | None = None
    base_schedule_is_left_out: bool = False
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
        refuse_arguments(self)
        if not self._adaptive.monitor_only:
            # First, so that other callbacks see the right epoch, and the Trainer's own callback ends the run.
            self.callback_handler.callbacks.insert(0, Bookkeeping(self))
        self.callback_handler.callbacks.append(EvaluationRecord(self))

    # --- a run ------------------------------------------------------------------------------------------------------

    def train(self, *arguments: Any, **options: Any) -> Any:
        """The Trainer's ``train``; afterwards the hooks on model and optimizer are removed."""
        refuse_arguments(self)
        try:
            return super().train(*arguments, **options)
        finally:
            self._release()

    def get_train_dataloader(self) -> Any:
        """A loader over the Trainer's data set that yields whole steps."""
        loader = super().get_train_dataloader()
        if self._adaptive.monitor_only:
            return loader
        self.order = order_of(loader, seed=self.args.seed if self.args.data_seed is None else self.args.data_seed)
        return StepLoader(self.order, self.steps_of_epoch, math.ceil(len(self.order) / self._smallest()) + 1)

    def set_initial_training_values(self, args: Any, dataloader: Any, *more: Any) -> Any:
        """Numbers of epochs and steps of the run; bounds if they are not known beforehand."""
        if not isinstance(dataloader, StepLoader):
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
        # No steps to skip in the epoch: the order is at the place where the run was saved.
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
        """Removes all hooks. Measurements can still be read."""
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
        """Runs the micro-batches of a step, each by the Trainer's own ``training_step``; returns the step's mean loss.

        This rank's sum is multiplied by the number of ranks and divided by the items of all ranks, so that the mean
        over the ranks, which the Trainer logs, is that of the step.
        """
        if not isinstance(inputs, Step):
            plain: Tensor = super().training_step(model, inputs, num_items_in_batch)
            return plain
        assert self.batches is not None
        step, self._step_flos, self._step_size = inputs, 0.0, inputs.global_batch_size
        self._step_factor = self.batches.lr_factor
        weights, total = step.portion.weights or (step.portion.sizes, step.portion.num_examples)
        # Each micro-batch gives its own mean loss, without the Trainer's division; the step applies the weights.
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
        # The factor of the rule "gain" uses the noise of this step, which is known once it is measured.
        if not step.waits and not self.is_deepspeed_enabled:
            self._step_factor = self.batches.lr_factor
        return loss

    @contextmanager
    def _backward_of(self, step: Step) -> Iterator[None]:
        """Redirects ``accelerator.backward``, which all trainers call, to the step."""
        accelerator: Any = self.accelerator
        # On the instance, and only while the micro-batches of a step run.
        accelerator.backward = lambda loss, **_: step.backward(loss)
        try:
            yield
        finally:
            del accelerator.backward

    @contextmanager
    def _own_items(self) -> Iterator[None]:
        """A context in which the Trainer counts the items of this rank only."""
        # adabatch sums them over the ranks itself
        asked, self.args.average_tokens_across_devices = self.args.average_tokens_across_devices, False
        try:
            yield
        finally:
            self.args.average_tokens_across_devices = asked

    def _counts_items(self) -> bool:
        """Whether losses are means over the items (tokens) of the whole step, not of micro-batches."""
        own = getattr(self, "loss_is_scaled_for_ga", None) is False  # the loss is a mean over the micro-batch
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
        """Operations of all micro-batches of a step."""
        return self._step_flos if isinstance(inputs, Step) else super().floating_point_ops(inputs)

    def _track_num_input_tokens(self, inputs: Any) -> None:
        if not isinstance(inputs, Step):  # those of a step have been counted per micro-batch
            super()._track_num_input_tokens(inputs)

    # --- the learning rate ------------------------------------------------------------------------------------------

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """``lr_scheduler_type`` as a ``ProgressLR`` over the length of the run.

        Raises:
            ValueError: if the schedule counts steps, whose number is not known.
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
        self.lr_scheduler = self.progress_lr(
            shape_of(self.args, total), warmup=warmup_of(self.args), warmup_start=warmup_start_of(self.args)
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def progress_lr(self, shape: Any, **options: Any) -> ProgressLR:
        """A schedule over the length of the run, for your own ``create_scheduler``.

            class MyTrainer(AdaptiveMixin, Trainer):
                def create_scheduler(self, num_training_steps, optimizer=None):
                    self.lr_scheduler = self.progress_lr(adabatch.lr.wsd(cooldown=0.2), warmup=adabatch.steps(100))
                    return self.lr_scheduler

        Args:
            shape: a shape of ``adabatch.lr``, or a function of the share of the run.
            options: arguments of ``ProgressLR``, such as ``warmup``.
        """
        assert self._source is not None
        return ProgressLR(self._inner_optimizer(), shape, self._source, total=self.total_length(), **options)

    def _get_learning_rate(self) -> Any:
        """The learning rate of the last update."""
        # Not the schedule's get_last_lr(), which already contains the factor of the next batch.
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
            write_host_state(self._host_state, output_dir, here=self.args.should_save)

    def _finalize_training(self, trial: Any, num_train_samples: Any, start_time: float) -> Any:
        if self.batches is not None:
            # The Trainer multiplies by the share of this call in all steps. The examples of this call are known, so
            # that share is divided out beforehand.
            consumed = self.batches.consumed.examples - self._first_examples
            here = self.state.global_step - self._initial_global_step
            num_train_samples = consumed * max(self.state.max_steps, 1) / max(here, 1)
        return super()._finalize_training(trial, num_train_samples, start_time)


class AdaptiveTrainer(AdaptiveMixin, Trainer):
    """The ``Trainer`` of Transformers, whose batch follows a criterion; see ``AdaptiveMixin``."""
