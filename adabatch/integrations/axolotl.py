"""axolotl: a plugin with which the batch of a supervised fine-tuning follows a criterion.

    plugins:
      - adabatch.integrations.axolotl.AdabatchPlugin
    adabatch_max_batch_size: 256
    gradient_accumulation_steps: 1
    sample_packing: false

axolotl validates the keys, which are the fields of ``AdaptiveArguments`` with the prefix ``adabatch_``.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, get_type_hints

from adabatch.integrations.versions import require_version

OLDEST = "0.19"
"""The release of axolotl whose source was read."""

require_version("axolotl", OLDEST)

from axolotl.integrations.base import BasePlugin  # type: ignore[import-not-found]  # noqa: E402
from pydantic import BaseModel, create_model  # noqa: E402

from adabatch.integrations.transformers import AdaptiveMixin  # noqa: E402
from adabatch.integrations.transformers_arguments import AdaptiveArguments  # noqa: E402

PREFIX = "adabatch_"

_SUPERVISED = "it serves supervised fine-tuning; leave it out of `plugins`, or train with TRL and AdaptiveMixin"
_SCHEDULE = (
    "axolotl's own schedule counts steps, and how many the run takes is not known; leave it out, and for a floor use "
    "lr_scheduler: cosine_with_min_lr with min_lr_rate in lr_scheduler_kwargs"
)
_REFUSED = {
    "rl": _SUPERVISED,
    "reward_model": _SUPERVISED,
    "process_reward_model": _SUPERVISED,
    "sample_packing": (
        "it deals packed rows in batches of one size; set sample_packing: false, or pack the data set beforehand"
    ),
    "trainer_cls": "it would replace that class; put AdaptiveMixin in front of it, and leave the plugin out",
    "cosine_min_lr_ratio": _SCHEDULE,
    "cosine_constant_lr_ratio": _SCHEDULE,
    "lr_quadratic_warmup": _SCHEDULE,
    "jagged_restart_steps": _SCHEDULE,
    "relora": "it restarts the learning rate at a fixed number of steps; leave it out",
}
"""Keys of axolotl that would have no effect or a wrong one with the plugin -> what to do instead."""

_TYPES = get_type_hints(AdaptiveArguments)
# None stands for a key that the YAML leaves out, so that the defaults are those of AdaptiveArguments.
_KEYS: Any = {PREFIX + field.name: (_TYPES[field.name] | None, None) for field in fields(AdaptiveArguments)}

AdabatchArgs: type[BaseModel] = create_model("AdabatchArgs", __module__=__name__, **_KEYS)
"""The keys of axolotl's YAML, with the types of ``AdaptiveArguments``."""


class AdabatchPlugin(BasePlugin):  # type: ignore[misc]
    """Adds ``AdaptiveMixin`` to axolotl's trainer for supervised fine-tuning."""

    def get_input_args(self) -> str:
        """The path of the class that describes the keys of the YAML."""
        return f"{__name__}.AdabatchArgs"

    def get_trainer_cls(self, cfg: Any) -> type:
        """axolotl's own trainer with ``AdaptiveMixin``.

        Raises:
            ValueError: if the config contains something that is not possible with the plugin, such as
                ``sample_packing``, and for the reasons of ``AdaptiveArguments``.
        """
        for key, advice in _REFUSED.items():
            if cfg.get(key):
                raise ValueError(f"the adabatch plugin does not run with {key}={cfg.get(key)!r}: {advice}")
        if cfg.get("model_config_type") == "mamba":
            raise ValueError("the adabatch plugin does not run with models of type mamba, which need another trainer")
        if cfg.get("lr_scheduler") in ("one_cycle", "rex"):
            raise ValueError(
                f"lr_scheduler={cfg.get('lr_scheduler')!r} counts steps, and how many the run takes is not known: use "
                f"linear, cosine, cosine_with_min_lr or constant_with_warmup"
            )
        from axolotl.core.trainers.base import AxolotlTrainer  # type: ignore[import-not-found]

        return adaptive_trainer(AxolotlTrainer, arguments_from(cfg))


def arguments_from(cfg: Any) -> AdaptiveArguments:
    """The ``AdaptiveArguments`` in an axolotl config."""
    given = {field.name: cfg.get(PREFIX + field.name) for field in fields(AdaptiveArguments)}
    return AdaptiveArguments(**{name: value for name, value in given.items() if value is not None})


def adaptive_trainer(trainer: type, arguments: AdaptiveArguments) -> type:
    """A subclass of ``trainer`` with these arguments."""
    # axolotl's create_scheduler only adds the schedules of keys that are refused above, so it may be ignored.
    members = {"adaptive": arguments, "base_schedule_is_left_out": True}
    return type(f"Adaptive{trainer.__name__}", (AdaptiveMixin, trainer), members)
