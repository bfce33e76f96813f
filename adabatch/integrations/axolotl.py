"""axolotl: a plugin that lets the batch of a supervised fine-tuning follow a criterion.

::

    plugins:
      - adabatch.integrations.axolotl.AdabatchPlugin
    adabatch_max_batch_size: 256
    gradient_accumulation_steps: 1
    sample_packing: false

axolotl validates the keys, which are those of ``AdaptiveArguments`` with ``adabatch_`` in front.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, get_type_hints

from adabatch.integrations.versions import require

OLDEST = "0.19"
"""The release of axolotl whose plugin class was read."""

require("axolotl", OLDEST)

from axolotl.integrations.base import BasePlugin  # type: ignore[import-not-found]  # noqa: E402
from pydantic import BaseModel, create_model  # noqa: E402

from adabatch.integrations.transformers import AdaptiveMixin  # noqa: E402
from adabatch.integrations.transformers_arguments import AdaptiveArguments  # noqa: E402

PREFIX = "adabatch_"

_TYPES = get_type_hints(AdaptiveArguments)
_KEYS: Any = {PREFIX + field.name: (_TYPES[field.name] | None, None) for field in fields(AdaptiveArguments)}

AdabatchArgs: type[BaseModel] = create_model("AdabatchArgs", __module__=__name__, **_KEYS)
"""The keys of axolotl's YAML, of the types of ``AdaptiveArguments``."""


class AdabatchPlugin(BasePlugin):  # type: ignore[misc]
    """Puts ``AdaptiveMixin`` in front of axolotl's trainer for supervised fine-tuning."""

    def get_input_args(self) -> str:
        """Where the keys of the YAML are described."""
        return f"{__name__}.AdabatchArgs"

    def get_trainer_cls(self, cfg: Any) -> type | None:
        """axolotl's own trainer with a batch that follows; None for reinforcement learning, which is left as it is.

        Raises:
            ValueError: if ``sample_packing`` is on, or as ``AdaptiveArguments`` raises it.
        """
        if cfg.get("rl") or cfg.get("reward_model") or cfg.get("process_reward_model"):
            raise ValueError(
                "the adabatch plugin serves supervised fine-tuning: leave it out of `plugins` with `rl` and reward "
                "models, or train with TRL and AdaptiveMixin"
            )
        if cfg.get("sample_packing"):
            raise ValueError(
                "sample_packing deals packed rows in batches of one size: set sample_packing: false, or pack the data "
                "set beforehand"
            )
        from axolotl.core.trainers.base import AxolotlTrainer  # type: ignore[import-not-found]

        return adaptive_trainer(AxolotlTrainer, arguments_from(cfg))


def arguments_from(cfg: Any) -> AdaptiveArguments:
    """The ``AdaptiveArguments`` in an axolotl config."""
    given = {field.name: cfg.get(PREFIX + field.name) for field in fields(AdaptiveArguments)}
    return AdaptiveArguments(**{name: value for name, value in given.items() if value is not None})


def adaptive_trainer(trainer: type, arguments: AdaptiveArguments) -> type:
    """A subclass of ``trainer`` with these arguments."""
    return type(f"Adaptive{trainer.__name__}", (AdaptiveMixin, trainer), {"adaptive": arguments})
