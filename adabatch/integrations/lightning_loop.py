"""The common part of the callbacks for ``lightning`` and ``pytorch_lightning``: one batch of Lightning is one step.

Lightning's loop over an epoch is not changed, nor are its counters, schedulers, other callbacks and checkpoints. Two
things are replaced: the loader yields the first micro-batch of each step, and the ``run`` method of the loop's
automatic optimization, which turns a batch into an update, runs all micro-batches of that step.

The number of steps in an epoch is not known beforehand. So Lightning is given a bound, and what it does after the last
batch of an epoch is done here: stepping the schedulers that step per epoch, and the validation.
"""

from __future__ import annotations

import importlib
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from adabatch.adaptive import AdaptiveBatch
from adabatch.adaptive.step import Step
from adabatch.batch.criteria import Criterion
from adabatch.batch.plan import Duration
from adabatch.integrations.host_state import HostState
from adabatch.runtime.data import GlobalOrder, num_examples_in
from adabatch.runtime.engines.choice import engine_for
from adabatch.runtime.engines.engine import GradientSync
from adabatch.runtime.wrappers.backward import Backward, factor_of

OLDEST = "2.4"
"""The oldest release of Lightning that was tried."""

MakeSchedule = Callable[[Optimizer, AdaptiveBatch], LRScheduler]
"""The optimizer and the batches -> a scheduler that steps after each update."""


class Host:
    """Modules of Lightning under one of its two names.

    Args:
        root: "lightning.pytorch" or "pytorch_lightning".
        fabric: "lightning.fabric" or "lightning_fabric".
    """

    def __init__(self, root: str, fabric: str) -> None:
        self._root = root
        self._fabric = fabric

    def __getitem__(self, path: str) -> ModuleType:
        """A module below the root."""
        return importlib.import_module(f"{self._root}.{path}")

    @property
    def fabric_data(self) -> ModuleType:
        """Fabric's module about loaders."""
        return importlib.import_module(f"{self._fabric}.utilities.data")


class CallbackSettings(NamedTuple):
    """The arguments of the callback.

    Args:
        criterion: which batch size to ask for.
        micro_batch_size: the batch size of the loader.
        schedule: makes the scheduler of the learning rate; None for the module's own.
        until: where the run ends; None if only Lightning decides.
        gradient_sync: the option for FSDP2.
        log: whether batch size, loss and noise scale are logged.
        loop: keyword arguments of ``AdaptiveBatch.steps``.
        batches: keyword arguments of ``AdaptiveBatch``.
    """

    criterion: Criterion
    micro_batch_size: int
    schedule: MakeSchedule | None
    until: Duration | None
    gradient_sync: GradientSync | None
    log: bool
    loop: Mapping[str, Any]
    batches: Mapping[str, Any]


class Fit:
    """One ``fit``: the trainer, the batches, and the current step.

    Args:
        trainer: the trainer.
        host: the modules of its Lightning.
        settings: the arguments of the callback.

    Attributes:
        batches: the batches; None until model and optimizer exist.
    """

    def __init__(self, trainer: Any, host: Host, settings: CallbackSettings) -> None:
        check_trainer(trainer, host)
        self._trainer = trainer
        self._host = host
        self._settings = settings
        self.batches: AdaptiveBatch | None = None
        self._state: HostState | None = None
        self._loader: Any = None
        self._step: Step | None = None
        self._micro_batches: Iterator[Any] = iter(())
        self._taken_before = 0  # steps of Lightning's epoch before the pass under way
        self._epoch = -1  # Lightning's, of the pass under way
        self._pass_began_at = 0  # epoch of the order
        self._exhausted = False
        self._passed = -1  # Lightning's epoch whose pass was over when the run was saved
        self._saved: Mapping[str, Any] | None = None
        self._put_in_loader()

    # --- replacements in the trainer --------------------------------------------------------------------------------

    def _put_in_loader(self) -> None:
        """Replaces the training loader by one that yields whole steps, before anything reads its length."""
        self._source = self._trainer.fit_loop._data_source
        self._trainer.fit_loop._data_source = _Source(self, self._source)

    def build(self) -> None:
        """Makes the batches and takes over the updates, once model and optimizer exist."""
        trainer, settings = self._trainer, self._settings
        check_module(trainer, self._host, schedule=settings.schedule is not None)
        optimizer = trainer.optimizers[0]
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        backward = Backward(partial(self._backward, optimizer), None if scaler is None else factor_of(scaler))
        model = trainer.strategy.model
        engine = engine_for(model, settings.gradient_sync, backward=backward)
        engine.gives_closures = True  # Lightning clips in it
        self.batches = AdaptiveBatch(
            model,
            optimizer,
            settings.criterion,
            micro_batch_size=settings.micro_batch_size,
            engine=engine,
            **settings.batches,
        )
        order = self._loader if isinstance(self._loader, GlobalOrder) else None
        self._state = HostState(self.batches, order=order, scaled=scaler is not None)
        if settings.schedule is not None:
            schedule = settings.schedule(optimizer, self.batches)
            make = self._host["utilities.types"].LRSchedulerConfig
            trainer.strategy.lr_scheduler_configs = [make(schedule, interval="step", name="adabatch")]
        # On the instance: the class keeps its method, which remove() uncovers again.
        trainer.fit_loop.epoch_loop.automatic_optimization.run = self.update
        if self._saved is not None:
            self.load_state_dict(self._saved)

    def remove(self) -> None:
        """Restores the trainer after the fit. The batches cannot take any more steps."""
        loop = self._trainer.fit_loop
        loop._data_source = self._source
        vars(loop.epoch_loop.automatic_optimization).pop("run", None)
        if self.batches is not None:
            self.batches.remove()

    # --- data -------------------------------------------------------------------------------------------------------

    def loader(self, inner: Any) -> _Steps:
        """The steps over a loader of micro-batches, or over a ``GlobalOrder``."""
        if isinstance(inner, list | tuple | Mapping) or type(inner).__name__ == "CombinedLoader":
            raise ValueError(
                f"the training data must be one loader of micro-batches or one GlobalOrder, got "
                f"{type(inner).__name__}: combine the data sets, by torch.utils.data.ConcatDataset for instance"
            )
        if not isinstance(inner, GlobalOrder):
            states = self._host["trainer.states"]
            # Lightning would treat a loader so itself if it saw it; on several ranks this adds a DistributedSampler.
            process = self._host["trainer.connectors.data_connector"]._process_dataloader
            inner = process(self._trainer, states.TrainerFn.FITTING, states.RunningStage.TRAINING, inner)
        self._loader = inner
        if self._state is not None:
            self._state.order = inner if isinstance(inner, GlobalOrder) else None
        # Lightning saves the place of a loader that has these methods. That of an order is in the HostState.
        stateful = not isinstance(inner, GlobalOrder) and hasattr(inner, "state_dict")
        return _StatefulSteps(self, inner) if stateful else _Steps(self, inner)

    def most_steps(self) -> float:
        """A bound for the steps of an epoch, which no epoch reaches, so that an epoch only ends with its data."""
        loader, limits = self._loader, self._settings.batches.get("limits")
        smallest = getattr(limits, "min", None)
        ranks: int = self._trainer.world_size
        smallest = smallest if isinstance(smallest, int) else self._settings.micro_batch_size * ranks
        if isinstance(loader, GlobalOrder):
            return math.ceil(len(loader) / smallest) + 1
        try:
            micro_batches = len(loader)
        except (TypeError, NotImplementedError):
            return math.inf
        accumulation = max(1, smallest // (self._settings.micro_batch_size * ranks))
        return math.ceil(micro_batches / accumulation) + 1

    def pass_over_data(self) -> Iterator[Any]:
        """Yields the first micro-batch of each step of an epoch."""
        assert self.batches is not None
        loader, trainer = self._loader, self._trainer
        order = loader if isinstance(loader, GlobalOrder) else None
        self._epoch, self._exhausted = trainer.current_epoch, False
        # A run that resumes in mid-epoch goes on counting, while a loader without a state begins again: a bound for the
        # whole epoch alone would cut this pass short.
        self._taken_before = int(trainer.fit_loop.epoch_loop.batch_progress.current.ready)
        self._show_total(self._taken_before + self.most_steps())
        # A run that was saved after the last step of an epoch resumes in that epoch, in which nothing is left to do.
        if self._passed != self._epoch:
            self._pass_began_at = -1 if order is None else order.epoch
            if order is None:
                # Lightning does this for loaders that it sees, and it sees the wrapper only.
                self._host.fabric_data._set_sampler_epoch(loader, self._epoch)
            for step in self.batches.steps(loader, until=self._settings.until, **self._settings.loop):
                self._step, self._micro_batches = step, iter(step)
                yield next(self._micro_batches)
        self._step, self._exhausted = None, True
        self._end_epoch()

    def _end_epoch(self) -> None:
        """Does what Lightning does after the last batch of an epoch, which it cannot recognize here."""
        trainer, loop = self._trainer, self._trainer.fit_loop.epoch_loop
        loop.batch_progress.is_last_batch = True
        self._show_total(loop.batch_progress.current.ready)
        loop.update_lr_schedulers("epoch", update_plateau_schedulers=False)
        at_end = isinstance(trainer.val_check_interval, float) and trainer.val_check_interval == 1.0
        timed = getattr(trainer, "_val_check_time_interval", None) is not None  # not in older releases
        if at_end and not timed and loop._should_check_val_epoch():
            trainer.validating = True
            # Kept and put back, as Lightning does around a validation inside an epoch.
            first = trainer._logger_connector._first_loop_iter
            self._host["trainer.call"]._call_lightning_module_hook(trainer, "on_validation_model_zero_grad")
            loop.val_loop.run()
            trainer.training = True
            trainer._logger_connector._first_loop_iter = first

    def _show_total(self, num_steps: float) -> None:
        """Updates the total of the progress bar, as far as it is known."""
        trainer = self._trainer
        trainer.fit_loop.max_batches = num_steps
        bar, bars = trainer.progress_bar_callback, self._host["callbacks"]
        total = num_steps if math.isfinite(num_steps) else None
        if isinstance(bar, bars.TQDMProgressBar) and bar._train_progress_bar is not None:
            bar.train_progress_bar.total = total
            bar.train_progress_bar.refresh()
        elif isinstance(bar, bars.RichProgressBar) and bar.train_progress_bar_id is not None:
            bar.progress.update(bar.train_progress_bar_id, total=total)

    def _expected_steps(self) -> float:
        """Steps of the epoch if the batch stays as it is now; at least one more than have begun."""
        assert self.batches is not None
        loader, done = self._loader, int(self._trainer.fit_loop.epoch_loop.batch_progress.current.ready)
        if not isinstance(loader, GlobalOrder):
            return max(self._taken_before + self.most_steps(), done + 1)
        left = 0 if loader.epoch != self._pass_began_at else len(loader) - loader.examples_seen
        return done + max(1, math.ceil(left / self.batches.plan.global_batch_size))

    # --- an update --------------------------------------------------------------------------------------------------

    def update(self, optimizer: Optimizer, batch_idx: int, kwargs: OrderedDict[str, Any]) -> dict[str, Any]:
        """Replaces ``_AutomaticOptimization.run``: runs all micro-batches of a step, and its update.

        Args:
            optimizer: Lightning's only optimizer.
            batch_idx: number of the step in the epoch.
            kwargs: arguments of ``training_step``, with the first micro-batch of the step.

        Returns:
            The mean loss over this rank's micro-batches, and what else the last ``training_step`` returned.
        """
        assert self.batches is not None
        step, trainer = self._step, self._trainer
        assert step is not None
        check_accumulation(trainer)  # again: a callback may change it from one epoch to the next
        loop = trainer.fit_loop.epoch_loop.automatic_optimization
        if loop._skip_backward:
            raise RuntimeError(
                "an epoch without backward, as StochasticWeightAveraging makes one for BatchNorm, has no steps: leave "
                "the callback out"
            )
        weights = step.portion.sizes if step.portion.weights is None else step.portion.weights.of_each
        whole = sum(weights) or 1.0
        mean: Tensor | None = None
        for index, weight in enumerate(weights):
            if index > 0:
                kwargs["batch"] = self._on_device(next(self._micro_batches))
            result = loop._training_step(kwargs)
            if result.closure_loss is None:
                raise RuntimeError(
                    "training_step returned None, and a step needs the loss of each of its micro-batches: return "
                    "loss * 0, or give steps(weigh=) a weight of 0 for it"
                )
            if index == 0:
                # As in Lightning's closure: after the first forward, before its backward.
                zero_grad = loop._make_zero_grad_fn(batch_idx, optimizer)
                assert zero_grad is not None
                zero_grad()
            step.backward(result.closure_loss)
            loss = result.loss * (weight / whole)
            mean = loss if mean is None else mean + loss
        # The step measures and decides when its iterator is exhausted, which must be before the update.
        assert next(self._micro_batches, None) is None
        # The closure only returns the loss: forward and backward have run.
        loop._optimizer_step(batch_idx, lambda: mean)
        until = self._settings.until
        if until is not None and self.batches.consumed.reached(until):
            trainer.should_stop = True
        self._show_total(self._expected_steps())
        return {**result.asdict(), "loss": mean}

    def _on_device(self, batch: Any) -> Any:
        """Moves a micro-batch after the first to the device, as the loop over the epoch does with a batch."""
        trainer = self._trainer
        batch = trainer.precision_plugin.convert_input(batch)
        batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
        batch = self._host["trainer.call"]._call_strategy_hook(trainer, "batch_to_device", batch, dataloader_idx=0)
        results = trainer._results
        results.batch, results.batch_size = batch, None  # from which self.log() takes the number of examples
        return batch

    def _backward(self, optimizer: Optimizer, loss: Tensor) -> None:
        """Lightning's own backward, with its precision, its hooks, and the module's ``backward``."""
        self._host["trainer.call"]._call_strategy_hook(self._trainer, "backward", loss, optimizer)

    def logged(self) -> dict[str, float]:
        """The numbers to log after a step."""
        batches, step = self.batches, self._step
        if not self._settings.log or batches is None or step is None:
            return {}
        found = {
            "global_batch_size": float(step.global_batch_size),
            "noise_scale": batches.noise_scale,
            "loss": math.nan if step.loss is None else step.loss,
        }
        return {f"adabatch/{name}": value for name, value in found.items() if not math.isnan(value)}

    # --- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state of the next step, for Lightning's checkpoint."""
        if self._state is None:
            return {}
        over = self._exhausted
        if self._state.order is not None and self._epoch >= 0:
            over = over or self._state.order.epoch != self._pass_began_at
        return {**self._state.state_dict(), "passed": self._epoch if over else -1}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a saved state, which is kept until the batches exist."""
        self._saved = state
        if self._state is not None:
            self._state.order = self._state.order or self._order_to_come()
            self._state.load_state_dict(state)
            self._passed = state["passed"]
            self._saved = None

    def _order_to_come(self) -> GlobalOrder | None:
        """The order that Lightning will use; makes Lightning set up its data now, if it has not done so."""
        if self._loader is None:
            self._trainer.fit_loop.setup_data()
        return self._loader if isinstance(self._loader, GlobalOrder) else None


class _Source:
    """Lightning's source of training loaders, wrapped so that the loaders yield steps."""

    def __init__(self, run: Fit, source: Any) -> None:
        self._run = run
        self._source = source
        self.instance = source.instance
        self.name = source.name

    def dataloader(self) -> _Steps:
        return self._run.loader(self._source.dataloader())

    def is_defined(self) -> bool:
        return bool(self._source.is_defined())

    def is_module(self) -> bool:
        return bool(self._source.is_module())


class _Steps:
    """The training loader for Lightning. Its length is a bound."""

    def __init__(self, run: Fit, inner: Any) -> None:
        self._run = run
        self._inner = inner

    def __iter__(self) -> Iterator[Any]:
        return self._run.pass_over_data()

    def __len__(self) -> int:
        most = self._run.most_steps()
        if math.isinf(most):
            raise TypeError(f"{type(self._inner).__name__} has no length")
        return int(most)


class _StatefulSteps(_Steps):
    """The same for a loader whose place Lightning saves."""

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self._inner.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._inner.load_state_dict(state)


def callback_settings(
    criterion: Criterion,
    *,
    micro_batch_size: int,
    schedule: MakeSchedule | None,
    until: Duration | None,
    count: Callable[[Any], int] | None,
    weigh: Callable[[Any], float] | None,
    gradient_sync: GradientSync | None,
    log: bool,
    options: Mapping[str, Any],
) -> CallbackSettings:
    """The settings of a callback, checked as far as possible without a trainer.

    Raises:
        ValueError: if an option is chosen by the callback.
    """
    for name in ("engine", "local_sgd"):
        if options.get(name) is not None:
            raise ValueError(f"the callback chooses {name}= from the trainer: leave it out")
    loop = {"count": num_examples_in if count is None else count, "weigh": weigh}
    return CallbackSettings(criterion, micro_batch_size, schedule, until, gradient_sync, log, loop, dict(options))


# --- what is refused -------------------------------------------------------------------------------------------------


def check_trainer(trainer: Any, host: Host) -> None:
    """Checks the trainer's own settings, before anything is set up.

    Raises:
        ValueError: if one of them is not possible for steps of several micro-batches.
    """
    strategies = host["strategies"]
    known: Sequence[str] = ("SingleDeviceStrategy", "DDPStrategy", "ModelParallelStrategy")
    if not isinstance(trainer.strategy, tuple(getattr(strategies, name) for name in known)):
        name = type(trainer.strategy).__name__
        way_out = {
            "FSDPStrategy": "use ModelParallelStrategy with fully_shard (FSDP2)",
            "DeepSpeedStrategy": "use ModelParallelStrategy with fully_shard (FSDP2), or deepspeed.initialize and "
            "adabatch.integrations.deepspeed.attach in a loop of your own",
        }.get(name, "use one device, DDPStrategy or ModelParallelStrategy")
        raise ValueError(f"the callback does not run on {name}: {way_out}")
    check_accumulation(trainer)
    shares = {
        "limit_train_batches": trainer.limit_train_batches,
        "val_check_interval": trainer.val_check_interval,
    }
    for name, value in shares.items():
        if isinstance(value, float) and value not in (1.0, 0.0):
            raise ValueError(
                f"{name}={value} is a share of the steps of an epoch, whose number is not known: give a whole number "
                f"of steps, or leave it at 1.0"
            )
    if trainer.overfit_batches:
        raise ValueError(
            f"overfit_batches={trainer.overfit_batches} takes its batches from the loader that adabatch steps over: "
            f"leave it out, and give a loader or a GlobalOrder(subset=) of the few examples"
        )


def check_accumulation(trainer: Any) -> None:
    """Checks that Lightning does not accumulate.

    Raises:
        ValueError: if it does.
    """
    if trainer.accumulate_grad_batches != 1:
        raise ValueError(
            f"the trainer has accumulate_grad_batches={trainer.accumulate_grad_batches}, by which it would divide the "
            f"loss: use 1 and no GradientAccumulationScheduler, adabatch accumulates by the plan"
        )


def check_module(trainer: Any, host: Host, *, schedule: bool) -> None:
    """Checks the module and its optimizers.

    Args:
        trainer: the trainer.
        host: the modules of its Lightning.
        schedule: whether the callback makes a scheduler.

    Raises:
        ValueError: if the module optimizes by hand, takes an iterator, has several optimizers, or has a scheduler while
            the callback makes one.
    """
    module = trainer.lightning_module
    if not module.automatic_optimization:
        raise ValueError(
            "the module optimizes by hand (automatic_optimization=False): leave the callback out, and use "
            "AdaptiveBatch in training_step, as docs/lightning.md shows"
        )
    if len(trainer.optimizers) != 1:
        raise ValueError(f"automatic optimization takes one optimizer, got {len(trainer.optimizers)}")
    signature = host["utilities.signature_utils"].is_param_in_hook_signature
    if signature(module.training_step, "dataloader_iter", explicit=True):
        raise ValueError("training_step(dataloader_iter) fetches its batches itself: take (batch, batch_idx) instead")
    if schedule and trainer.lr_scheduler_configs:
        made = ", ".join(type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs)
        raise ValueError(
            f"configure_optimizers returns a scheduler ({made}), and the callback has a schedule= of its own, of which "
            f"only one may set the learning rate: leave one of them out"
        )
