"""``adabatch verify``: the checks of ``adabatch.verification`` on the model, data and processes of a config."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from adabatch.adaptive import AdaptiveBatch
from adabatch.cli.display import Display
from adabatch.cli.job import Job, batching_of
from adabatch.cli.optimizers import observe, optimizer_of
from adabatch.runtime.data import GlobalOrder
from adabatch.runtime.data.in_memory import collate
from adabatch.runtime.launch.world import World
from adabatch.verification import Check, Training, all_checks

HEADER = ("check", "result", "measured", "allowed")
DEFAULT_STEPS = 20


def verify(
    make: Callable[[], Job], world: World, *, steps: int, max_cost: float | None, display: Display
) -> list[Check]:
    """Runs all checks and shows their results; the results are the same on all ranks.

    The criterion, the limits and related settings are only checked for mistakes, because the checks use their own batch
    sizes. Nothing is written.

    Raises:
        ValueError: if settings do not fit together, or the checks cannot be run on the job.
    """

    def training_of(job: Job) -> Training:
        device = world.device

        def loss(model: nn.Module, batch: Any) -> Tensor:
            inputs, targets = (part.to(device) for part in batch)
            outputs = model(inputs)
            observe(optimizer, outputs, targets)
            value: Tensor = job.loss(outputs, targets)
            return value

        model = job.model.to(device)
        wrapped = DistributedDataParallel(model) if world.size > 1 else model
        optimizer = optimizer_of(job.optimizer, wrapped)
        return Training(
            model=wrapped,
            optimizer=optimizer,
            loader=GlobalOrder(job.train_data, seed=job.seed, collate_fn=collate, num_workers=job.num_workers),
            loss=loss,
            micro_batch_size=job.micro_batch_size,
        )

    job = make()
    if job.local_sgd is not None:
        raise ValueError(
            "verify compares with a loop that averages gradients at every step, which local_sgd leaves out: leave "
            "local_sgd out of the config to verify the rest of it"
        )
    if job.engine != "ddp":
        raise ValueError(f"verify runs on DDP, got engine: {job.engine}: leave it out to verify the rest of the config")
    # with the job's own settings first: the checks below replace them, and would pass over a mistake in them
    _check_settings(job, training_of(job))
    display.say(f"verify: {world.size} process(es) on {world.device.type}, micro-batches of {job.micro_batch_size}")
    results = []
    for check in all_checks(lambda: training_of(make()), num_steps=steps, max_cost=max_cost):
        display.say(f"{check.name}: {'passed' if check.passed else 'FAILED'}: {check.explanation}")
        results.append(check)
    display.table("Verified", HEADER, [check_row(check) for check in results])
    return results


def check_row(check: Check) -> tuple[str, ...]:
    """A check as a row under ``HEADER``."""
    result = "FAILED" if not check.passed else "passed" if check.allowed is not None else "reported"
    return check.name, result, f"{check.measured:.4g}", "-" if check.allowed is None else f"{check.allowed:.4g}"


def _check_settings(job: Job, training: Training) -> None:
    """Raises the errors that ``train`` would raise."""
    # built for its checks only; the run of a check has other sizes
    AdaptiveBatch(training.model, training.optimizer, job.criterion, **batching_of(job)).remove()
