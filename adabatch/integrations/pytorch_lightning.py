"""Lightning, imported as ``pytorch_lightning``: callbacks for ``Trainer.fit``."""

from __future__ import annotations

from typing import final

from adabatch.integrations.lightning_hooks import AdaptiveHooks, MonitorHooks
from adabatch.integrations.lightning_loop import OLDEST, Host
from adabatch.integrations.versions import require

require("pytorch-lightning", OLDEST)

from pytorch_lightning import Callback  # noqa: E402


@final
class AdaptiveBatchCallback(AdaptiveHooks, Callback):
    """``AdaptiveHooks``, which tells what it does and takes, for trainers of ``pytorch_lightning``."""

    host = Host("pytorch_lightning", "lightning_fabric")


@final
class NoiseMonitorCallback(MonitorHooks, Callback):
    """``MonitorHooks``, which tells what it does and takes, for trainers of ``pytorch_lightning``."""
