"""Trackers: the journal's numbers in TensorBoard, Weights & Biases, MLflow and trackio, by the same names in each.

Pass one to ``AdaptiveBatch(journal=[path, tracker])``, or name it in a config (``trackers: [tensorboard]``). Each
package is optional, and is imported when the first step is written. Like the journal, a tracker is opened on the first
rank only. A tracker that fails is logged once and not used any more; it never stops a run.

``metrics_of`` lists the numbers.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

from adabatch.arguments import checked
from adabatch.lr.journal_lines import part_of

TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]

NAMES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "loss": ("loss",),
        "examples": ("examples",),
        "seconds": ("seconds",),
        "batch/taken": ("plan", "global_batch_size"),
        "batch/micro": ("plan", "micro_batch_size"),
        "batch/accumulation": ("plan", "accumulation_steps"),
        "batch/wanted": ("wanted",),
        "batch/low": ("low",),
        "batch/high": ("high",),
        "batch/next": ("next",),
        "noise/scale": ("averages", "noise_scale"),
        "noise/noise": ("averages", "noise"),
        "noise/signal": ("averages", "signal"),
        "noise/scale_of_step": ("moments", "noise_scale"),
        "noise/freedom": ("freedom",),
        "gradient/l2": ("norms", "l2"),
        "gradient/l1": ("norms", "l1"),
        "lr/factor": ("lr", "factor"),
    }
)
"""The numbers of every tracker, and their places in a line of the journal."""


def metrics_of(entry: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line by their names in every tracker; missing ones are omitted.

    For a step, in addition to ``NAMES``, these are ``lr/applied``, ``lr/base`` and ``lr/shape`` (``lr/applied_1`` for
    the second parameter group), ``update/applied`` (1 or 0), ``efficiency`` (1 / (1 + batch / noise scale)) and
    ``layers/NAME/noise_scale``. For an evaluation it is ``evaluation/NAME`` for each metric, and nothing else.

    Args:
        entry: a line of the journal.
    """
    if "evaluation" in entry:
        metrics = {f"evaluation/{name}": _number(value) for name, value in part_of(entry, "evaluation").items()}
        return {name: value for name, value in metrics.items() if value is not None}
    found = {name: _at(entry, path) for name, path in NAMES.items()}
    found["update/applied"] = float(entry["applied"]) if isinstance(entry.get("applied"), bool) else None
    for part in ("base", "shape", "applied"):
        values = part_of(entry, "lr").get(part)
        for group, value in enumerate(values if isinstance(values, list | tuple) else ()):
            # most optimizers have one group, whose curve needs no number
            found[f"lr/{part}_{group}" if group else f"lr/{part}"] = _number(value)
    scale, batch = found["noise/scale"], found["batch/taken"]
    # not in the journal, which has the two numbers that it is made of
    if scale is not None and batch is not None and scale > 0:
        found["efficiency"] = 1 / (1 + batch / scale)
    for name, layer in part_of(entry, "layers").items():
        found[f"layers/{name}/noise_scale"] = _at(layer, ("noise_scale",))
    return {name: value for name, value in found.items() if value is not None}


def _at(entry: Mapping[str, Any], path: tuple[str, ...]) -> float | None:
    *parts, last = path
    for part in parts:
        entry = part_of(entry, part)
    return _number(entry.get(last))


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


class Tracker(ABC):
    """Logs the numbers of each step to a tracker, which is opened with the first step.

    A subclass implements how to open it, to log and to close it.

    Args:
        packages: packages of which at least one must be installed.

    Raises:
        ImportError: if none of them is installed; says what to install.
    """

    def __init__(self, *packages: str) -> None:
        if not any(importlib.util.find_spec(package) for package in packages):
            raise ImportError(f"{type(self).__name__} needs a package: pip install {packages[0]}")
        self._opened = False

    def write(self, entry: Mapping[str, Any]) -> None:
        """Logs a line of the journal under the number of its step, and an evaluation under that of the last step."""
        step = int(entry["step"])
        if not self._opened:
            self._open(str(entry.get("run", "")), step)
            self._opened = True
        # A resumed run hides what is logged from its first step on, which an evaluation before that step outlives.
        self._log(max(0, step - 1) if "evaluation" in entry else step, metrics_of(entry))

    def close(self) -> None:
        """Writes what is left, and closes the tracker; a later line opens it again."""
        if self._opened:
            self._opened = False
            self._close()

    @abstractmethod
    def _open(self, run: str, step: int) -> None:
        """Opens the tracker for the run with this token, whose next step has this number."""

    @abstractmethod
    def _log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs the numbers of a step."""

    @abstractmethod
    def _close(self) -> None:
        """Closes the tracker."""


class TensorBoardTracker(Tracker):
    """Event files for TensorBoard, by ``torch.utils.tensorboard``, or by tensorboardX if only that is installed.

    A resumed run replaces the steps that it repeats (TensorBoard's purge_step).

    Args:
        folder: the folder of the event files.

    Raises:
        ImportError: if neither package is installed.
    """

    @checked
    def __init__(self, folder: str | Path) -> None:
        super().__init__("tensorboard", "tensorboardX")
        self._folder = str(folder)
        self._writer: Any = None

    def _open(self, run: str, step: int) -> None:
        # torch's writer is a part of torch, and needs the package of TensorBoard all the same
        torchs = importlib.util.find_spec("tensorboard") is not None
        module = importlib.import_module("torch.utils.tensorboard" if torchs else "tensorboardX")
        self._writer = module.SummaryWriter(self._folder, purge_step=step or None)

    def _log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def _close(self) -> None:
        self._writer.close()


class WandbTracker(Tracker):
    """A run of Weights & Biases. Its id is the run's token in the journal, so a resumed run continues it.

    Args:
        project: the project of Weights & Biases.
        folder: the folder of its files.
        name: the name of the run; by default the service chooses one.
        mode: "online", "offline" or "disabled"; by default as in the environment variable WANDB_MODE.

    Raises:
        ImportError: if wandb is not installed.
    """

    @checked
    def __init__(
        self,
        project: str = "adabatch",
        *,
        folder: str | Path | None = None,
        name: str | None = None,
        mode: Literal["online", "offline", "disabled"] | None = None,
    ) -> None:
        super().__init__("wandb")
        self._settings = {
            "project": project,
            "dir": None if folder is None else str(folder),
            "name": name,
            "mode": mode,
            # An offline run cannot be resumed, since the service does not know it.
            "resume": None if mode in ("offline", "disabled") else "allow",
        }
        self._run: Any = None

    def _open(self, run: str, step: int) -> None:
        wandb = importlib.import_module("wandb")
        self._run = wandb.init(**self._settings, id=run or None)

    def _log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def _close(self) -> None:
        self._run.finish()


class MLflowTracker(Tracker):
    """A run of MLflow, on a server or in a folder. A resumed run continues the run with its token.

    Args:
        tracking_uri: the address of a server, or a folder (for which recent releases of MLflow need
            MLFLOW_ALLOW_FILE_STORE=true in the environment). By default MLflow's own settings are used, such as
            MLFLOW_TRACKING_URI.
        experiment: the experiment; created if it does not exist.
        name: the name of the run.

    Raises:
        ImportError: if mlflow is not installed.
    """

    @checked
    def __init__(
        self, tracking_uri: str | Path | None = None, *, experiment: str = "adabatch", name: str | None = None
    ) -> None:
        super().__init__("mlflow")
        is_folder = tracking_uri is not None and "://" not in str(tracking_uri)
        self._uri = Path(str(tracking_uri)).absolute().as_uri() if is_folder else tracking_uri
        self._experiment, self._name = experiment, name
        self._client: Any = None
        self._id = ""

    def _open(self, run: str, step: int) -> None:
        mlflow = importlib.import_module("mlflow")
        # A client and not mlflow's functions, which log to one active run per process: the user may have one.
        client = self._client = mlflow.MlflowClient(tracking_uri=self._uri)
        found = client.get_experiment_by_name(self._experiment)
        experiment = client.create_experiment(self._experiment) if found is None else found.experiment_id
        known = client.search_runs([experiment], f"tags.adabatch_run = '{run}'", max_results=1) if run else []
        if known:
            self._id = known[0].info.run_id
            client.update_run(self._id, status="RUNNING")
        else:
            self._id = client.create_run(experiment, tags={"adabatch_run": run}, run_name=self._name).info.run_id

    def _log(self, step: int, metrics: Mapping[str, float]) -> None:
        entities = importlib.import_module("mlflow.entities")
        now = int(1000 * time.time())
        self._client.log_batch(
            self._id, metrics=[entities.Metric(name, value, now, step) for name, value in metrics.items()]
        )

    def _close(self) -> None:
        self._client.set_terminated(self._id)


class TrackioTracker(Tracker):
    """A run of trackio, which stores its numbers on this machine.

    Args:
        project: the project of trackio.
        name: the name of the run; by default the run's token in the journal, so that a resumed run continues it.

    Raises:
        ImportError: if trackio is not installed.
    """

    @checked
    def __init__(self, project: str = "adabatch", *, name: str | None = None) -> None:
        super().__init__("trackio")
        self._project, self._name = project, name
        self._run: Any = None

    def _open(self, run: str, step: int) -> None:
        trackio = importlib.import_module("trackio")
        self._run = trackio.init(project=self._project, name=self._name or run or None, resume="allow")

    def _log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def _close(self) -> None:
        self._run.finish()


@checked
def tracker_of(name: str, folder: Path) -> Tracker:
    """The tracker with this name in a config, for the run in this folder.

    TensorBoard and Weights & Biases store their files in the folder; MLflow and trackio use their own settings.

    Raises:
        ValueError: if the name is unknown.
        ImportError: if its package is not installed.
    """
    if name == "tensorboard":
        return TensorBoardTracker(folder / "tensorboard")
    if name == "wandb":
        return WandbTracker(folder=folder, name=folder.name)
    if name == "mlflow":
        return MLflowTracker(name=folder.name)
    if name == "trackio":
        return TrackioTracker(name=folder.name)
    raise ValueError(f"a tracker is one of {', '.join(get_args(TrackerName))}, got {name!r}")
