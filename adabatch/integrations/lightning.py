"""Lightning, imported as ``lightning.pytorch``: callbacks for ``Trainer.fit``."""

from __future__ import annotations

from typing import final

from adabatch.integrations.lightning_hooks import AdaptiveHooks, MonitorHooks
from adabatch.integrations.lightning_loop import OLDEST, Host
from adabatch.integrations.versions import require_version

require_version("lightning", OLDEST)

from lightning.pytorch import Callback  # noqa: E402


@final
class AdaptiveBatchCallback(AdaptiveHooks, Callback):
    """The callback of ``AdaptiveHooks``, which documents it, for trainers of ``lightning.pytorch``."""

    host = Host("lightning.pytorch", "lightning.fabric")


@final
class NoiseMonitorCallback(MonitorHooks, Callback):
    """The callback of ``MonitorHooks``, which documents it, for trainers of ``lightning.pytorch``."""
