"""Lightning, imported as ``pytorch_lightning``: callbacks for ``Trainer.fit``."""

from __future__ import annotations

from typing import final

from adabatch.integrations.lightning_hooks import AdaptiveHooks, MonitorHooks
from adabatch.integrations.lightning_loop import OLDEST, Host
from adabatch.integrations.versions import require_version

require_version("pytorch-lightning", OLDEST)

from pytorch_lightning import Callback  # noqa: E402


@final
class AdaptiveBatchCallback(AdaptiveHooks, Callback):
    """The callback of ``AdaptiveHooks``, which documents it, for trainers of ``pytorch_lightning``."""

    host = Host("pytorch_lightning", "lightning_fabric")


@final
class NoiseMonitorCallback(MonitorHooks, Callback):
    """The callback of ``MonitorHooks``, which documents it, for trainers of ``pytorch_lightning``."""
