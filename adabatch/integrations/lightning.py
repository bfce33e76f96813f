"""Lightning, imported as ``lightning.pytorch``: callbacks for ``Trainer.fit``."""

from __future__ import annotations

from typing import final

from adabatch.integrations.lightning_hooks import AdaptiveHooks, MonitorHooks
from adabatch.integrations.lightning_loop import OLDEST, Host
from adabatch.integrations.versions import require

require("lightning", OLDEST)

from lightning.pytorch import Callback  # noqa: E402


@final
class AdaptiveBatchCallback(AdaptiveHooks, Callback):
    """``AdaptiveHooks``, which tells what it does and takes, for trainers of ``lightning.pytorch``."""

    host = Host("lightning.pytorch", "lightning.fabric")


@final
class NoiseMonitorCallback(MonitorHooks, Callback):
    """``MonitorHooks``, which tells what it does and takes, for trainers of ``lightning.pytorch``."""
