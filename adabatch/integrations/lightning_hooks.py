"""The hooks of the callbacks, independent of the name under which Lightning is installed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from adabatch.adaptive import AdaptiveBatch
from adabatch.adaptive.monitoring import NoiseMonitor, monitor
from adabatch.adaptive.options import JournalOption
from adabatch.batch.criteria import Criterion
from adabatch.batch.plan import Duration
from adabatch.integrations.evaluations import record_numbers
from adabatch.integrations.lightning_loop import Fit, Host, MakeSchedule, callback_settings
from adabatch.runtime.engines.engine import GradientSync

VALIDATION_PREFIXES = ("val_", "val/", "valid_", "valid/", "validation_", "validation/")
"""By which modules mark the metrics of their validation."""


def validation_of(trainer: Any) -> dict[str, Any]:
    """What the validation that just ended has logged; nothing outside of a fit, and none of a sanity check."""
    # `callback_metrics` would hold what training logged as well, some of it from long ago
    if trainer.sanity_checking or trainer.state.fn != "fit" or trainer._results is None:
        return {}
    return dict(trainer._results.metrics(on_step=False)["callback"])


class AdaptiveHooks:
    """A callback with which the batch of ``Trainer.fit`` follows a criterion; for automatic optimization.

        adaptive = AdaptiveBatchCallback(NormTest(eta=0.7), micro_batch_size=16, limits=Limits(min=64, max=1024))
        trainer = Trainer(max_epochs=3, callbacks=[adaptive])
        trainer.fit(module, DataLoader(dataset, batch_size=16, shuffle=True))

    The loader (or ``train_dataloader`` of the module or a data module) yields micro-batches, or is a ``GlobalOrder``,
    with which the micro-batch can grow and a run can resume in the middle of an epoch. ``training_step`` is called for
    each micro-batch. Clipping, precision, ``optimizer_step``, schedulers with ``interval="step"``, ``max_steps``,
    validation, other callbacks, loggers and checkpoints remain Lightning's, once per step. ``batch_idx`` counts steps,
    and ``on_train_batch_start`` and ``on_train_batch_end`` are called once per step, with its first micro-batch.

    It works on one device, with ``DDPStrategy``, and with ``ModelParallelStrategy`` (FSDP2, data parallelism only). The
    number of steps is not known beforehand, so ``estimated_stepping_batches`` and the length of the progress bar are
    bounds.

    Attributes:
        host: the modules of the trainer's Lightning.

    Args:
        criterion: which batch size to ask for.
        micro_batch_size: examples in one forward and backward on one rank: the ``batch_size`` of the loader.
        schedule: optimizer, batches -> scheduler that steps after each update, such as
            ``lambda optimizer, batches: ProgressLR(optimizer, lr.cosine(), batches, total=examples(1_000_000))``. None
            keeps the schedulers that ``configure_optimizers`` returns.
        until: ends the run, in addition to ``max_steps``, ``max_epochs`` and the others.
        count: as in ``AdaptiveBatch.steps``.
        weigh: as in ``AdaptiveBatch.steps``.
        gradient_sync: as in ``EngineOptions``, for FSDP2.
        log: whether ``adabatch/global_batch_size``, ``adabatch/loss`` (the mean over all ranks and micro-batches) and
            ``adabatch/noise_scale`` are logged.
        options: all other arguments of ``AdaptiveBatch``, except ``engine`` and ``local_sgd``.

    Raises:
        ValueError: if an option is chosen by the callback; in ``fit``, if trainer or module are not supported, and for
            the reasons of ``AdaptiveBatch``.
    """

    host: Host

    def __init__(
        self,
        criterion: Criterion,
        /,
        *,
        micro_batch_size: int,
        schedule: MakeSchedule | None = None,
        until: Duration | None = None,
        count: Callable[[Any], int] | None = None,
        weigh: Callable[[Any], float] | None = None,
        gradient_sync: GradientSync | None = None,
        log: bool = True,
        **options: Any,
    ) -> None:
        self._settings = callback_settings(
            criterion,
            micro_batch_size=micro_batch_size,
            schedule=schedule,
            until=until,
            count=count,
            weigh=weigh,
            gradient_sync=gradient_sync,
            log=log,
            options=options,
        )
        self._run: Fit | None = None

    @property
    def batches(self) -> AdaptiveBatch:
        """The batches of the present or the last ``fit``.

        Raises:
            RuntimeError: if model and optimizer do not exist yet.
        """
        if self._run is None or self._run.batches is None:
            raise RuntimeError("there are no batches yet: they are made when trainer.fit has set up the optimizer")
        return self._run.batches

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Replaces the training loader by one that yields whole steps."""
        if stage == "fit":
            self._run = Fit(trainer, self.host, self._settings)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Makes the batches, now that model and optimizer exist."""
        assert self._run is not None
        self._run.build()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Logs the step."""
        assert self._run is not None
        if found := self._run.logged():
            pl_module.log_dict(found, on_step=True, on_epoch=False)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Writes what the validation logged into the journal."""
        if self._run is not None and self._run.batches is not None:
            record_numbers(self._run.batches, validation_of(trainer), prefixes=VALIDATION_PREFIXES)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Restores trainer and model."""
        if stage == "fit" and self._run is not None:
            self._run.remove()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Restores trainer and model after an error."""
        if self._run is not None:
            self._run.remove()

    def state_dict(self) -> dict[str, Any]:
        """The state for Lightning's checkpoint."""
        return {} if self._run is None else self._run.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the state from Lightning's checkpoint, before or after model and optimizer exist."""
        assert self._run is not None
        self._run.load_state_dict(state)


class MonitorHooks:
    """A callback that measures the noise of the gradient in ``Trainer.fit`` and changes nothing (``adabatch.monitor``).

        Trainer(accumulate_grad_batches=4, callbacks=[NoiseMonitorCallback(micro_batch_size=16, journal="noise.jsonl")])

    A step needs at least two micro-batches, from ``accumulate_grad_batches`` or two ranks. It works on one device or
    with ``DDPStrategy``.

    Args:
        micro_batch_size: examples in one ``training_step`` on one rank.
        journal: as in ``adabatch.monitor``.
        log: whether ``adabatch/noise_scale`` and ``adabatch/efficiency`` are logged.

    Raises:
        ValueError: in ``fit``, for the reasons of ``adabatch.monitor``.
    """

    def __init__(
        self,
        *,
        micro_batch_size: int,
        journal: JournalOption = None,
        log: bool = True,
    ) -> None:
        self._micro_batch_size = micro_batch_size
        self._target = journal
        self._log = log
        self._monitors: list[NoiseMonitor] = []

    @property
    def monitors(self) -> Sequence[NoiseMonitor]:
        """The monitors of the present or the last ``fit``, one per optimizer."""
        return self._monitors

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Makes the monitors, now that model and optimizers exist."""
        if len(trainer.optimizers) > 1 and self._target is not None:
            raise ValueError(
                f"the module has {len(trainer.optimizers)} optimizers, whose lines one journal cannot tell apart: "
                f"leave journal= out, and read monitors"
            )
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        options: dict[str, Any] = {"micro_batch_size": self._micro_batch_size, "scaler": scaler}
        self._monitors = [
            monitor(trainer.strategy.model, optimizer, journal=self._target, **options)
            for optimizer in trainer.optimizers
        ]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Logs the noise scale."""
        for number, found in enumerate(self._monitors if self._log else []):
            if math.isfinite(found.noise_scale):
                suffix = f"_{number}" if number else ""
                values = {"noise_scale": found.noise_scale, "efficiency": found.efficiency}
                named = {f"adabatch/{name}{suffix}": value for name, value in values.items()}
                pl_module.log_dict(named, on_step=True, on_epoch=False)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Writes what the validation logged into the journal."""
        for found in self._monitors:
            record_numbers(found, validation_of(trainer), prefixes=VALIDATION_PREFIXES)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Removes the hooks."""
        for found in self._monitors:
            found.remove()
