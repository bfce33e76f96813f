"""The plugin of axolotl: against axolotl itself where it is installed, and against stand-ins of what it touches.

axolotl pins its neighbours exactly (0.19.0: transformers 5.16.1, trl 1.9.0, tokenizers 0.23.1, peft 0.20.0), so it is
not installed beside the releases that the other tests run on. docs/transformers.md says how it was tried.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.causal_lm import LR, MICRO, Sentences, llama, training_arguments
from support.hosts import environment_kept, needs
from support.trainers import fresh_state, logged

needs("transformers", "accelerate", "pydantic")

os.environ["HF_HUB_OFFLINE"] = "1"
environment = pytest.fixture(autouse=True)(environment_kept)
fresh = pytest.fixture(autouse=True)(fresh_state)

INSTALLED = importlib.util.find_spec("axolotl") is not None
KEYS = {"adabatch_criterion": "constant", "adabatch_min_batch_size": 12}


def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """The names and signatures of axolotl's `integrations/base.py` and `core/trainers/base.py` that the plugin uses."""
    from transformers import Trainer

    importlib.import_module("adabatch.integrations.transformers")  # before the version below is told to it

    class BasePlugin:
        def get_input_args(self) -> str | None: ...
        def get_trainer_cls(self, cfg: Any) -> Any: ...

    class AxolotlTrainer(Trainer):
        def __init__(self, *arguments: Any, bench_data_collator: Any = None, **options: Any) -> None:
            super().__init__(*arguments, **options)

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            raise AssertionError("it knows of schedules that count steps")

    for name in ("axolotl", "axolotl.integrations", "axolotl.core", "axolotl.core.trainers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for name, found in (("integrations.base", BasePlugin), ("core.trainers.base", AxolotlTrainer)):
        module = types.ModuleType(f"axolotl.{name}")
        setattr(module, found.__name__, found)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("adabatch.integrations.versions.version", lambda package: "0.19.0")


@pytest.fixture
def integration(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """``adabatch.integrations.axolotl``."""
    monkeypatch.delitem(sys.modules, "adabatch.integrations.axolotl", raising=False)
    if not INSTALLED:
        _stand_ins(monkeypatch)
    yield importlib.import_module("adabatch.integrations.axolotl")
    sys.modules.pop("adabatch.integrations.axolotl", None)


def arguments(folder: Path) -> Any:
    if not INSTALLED:
        return training_arguments(folder, max_steps=3)
    kind = importlib.import_module("axolotl.core.training_args").AxolotlTrainingArguments
    return kind(
        output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True, per_device_train_batch_size=MICRO,
        optim="sgd", learning_rate=LR, lr_scheduler_type="linear", max_grad_norm=0.0, save_strategy="no",
        logging_steps=1, max_steps=3,
    )  # fmt: skip


def dataset() -> Any:
    if not INSTALLED:
        return Sentences()
    examples = Sentences()
    return importlib.import_module("datasets").Dataset.from_list(
        [{name: values.tolist() for name, values in examples[index].items()} for index in range(len(examples))]
    )


def test_the_plugin_trains(integration: Any, tmp_path: Path) -> None:
    plugin = integration.AdabatchPlugin()
    module, _, name = plugin.get_input_args().rpartition(".")
    keys = getattr(sys.modules[module], name)
    with pytest.raises(ValueError, match="adabatch_eta"):
        keys(adabatch_eta="much")
    kind = plugin.get_trainer_cls(keys(**KEYS).model_dump())
    trainer = kind(model=llama(), args=arguments(tmp_path), train_dataset=dataset())
    trainer.train()
    assert kind.__name__ == "AdaptiveAxolotlTrainer"
    assert logged(trainer, "batch_size") == [12] * 3
    assert type(trainer.lr_scheduler).__name__ == "ProgressLR"


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"rl": "dpo"}, "serves supervised fine-tuning"),
        ({"reward_model": True}, "serves supervised fine-tuning"),
        ({"process_reward_model": True}, "serves supervised fine-tuning"),
        ({"sample_packing": True}, "sample_packing: false"),
        ({"trainer_cls": "my.Trainer"}, "AdaptiveMixin in front of it"),
        ({"model_config_type": "mamba"}, "models of type mamba"),
        ({"lr_scheduler": "rex"}, "use linear, cosine"),
        ({"lr_scheduler": "one_cycle"}, "use linear, cosine"),
        ({"cosine_min_lr_ratio": 0.1}, "cosine_with_min_lr"),
        ({"cosine_constant_lr_ratio": 0.8}, "cosine_with_min_lr"),
        ({"lr_quadratic_warmup": True}, "cosine_with_min_lr"),
        ({"jagged_restart_steps": 100}, "cosine_with_min_lr"),
        ({"relora": True}, "restarts the learning rate"),
    ],
)
def test_keys_that_would_have_no_effect_are_refused(integration: Any, keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        integration.AdabatchPlugin().get_trainer_cls(keys | KEYS)


@pytest.mark.skipif(not INSTALLED, reason="needs axolotl, which pins other releases of transformers, trl and torch")
def test_axolotl_validates_the_keys(integration: Any) -> None:
    config = importlib.import_module("axolotl.utils.config")
    made = importlib.import_module("axolotl.utils.dict").DictDefault
    given = {
        "base_model": "a/model", "plugins": ["adabatch.integrations.axolotl.AdabatchPlugin"], "micro_batch_size": 4,
        "gradient_accumulation_steps": 1, "num_epochs": 1, "learning_rate": 1e-3,
        "datasets": [{"path": "a/data", "type": "alpaca"}], **KEYS,
    }  # fmt: skip
    config.prepare_plugins(made(given))
    valid = config.validate_config(made(given))
    assert integration.arguments_from(valid).min_batch_size == 12
    with pytest.raises(ValueError, match="adabatch_min_batch_size"):
        config.validate_config(made(given | {"adabatch_min_batch_size": "many"}))


@pytest.mark.skipif(not INSTALLED, reason="needs axolotl, which pins other releases of transformers, trl and torch")
def test_the_plugin_has_the_hooks_of_axolotl(integration: Any) -> None:
    import inspect

    theirs = importlib.import_module("axolotl.integrations.base").BasePlugin
    for name in ("get_input_args", "get_trainer_cls"):
        own = inspect.signature(getattr(integration.AdabatchPlugin, name)).parameters
        assert list(own) == list(inspect.signature(getattr(theirs, name)).parameters)
