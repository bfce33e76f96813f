"""Groups of options that a config takes whole: what is measured, what guards, and how the engine runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adabatch.cli.main import main
from adabatch.recipes.models import MLP

CONFIG: dict[str, Any] = {
    "model": {"class_path": "adabatch.recipes.models.MLP"},
    "loss": {"class_path": "torch.nn.CrossEntropyLoss"},
    "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.002}},
    "train_data": {"class_path": "adabatch.recipes.digits.Digits", "init_args": {"split": "train"}},
    "criterion": {"class_path": "adabatch.NormTest", "init_args": {"eta": 0.7}},
    "micro_batch_size": 8,
    "limits": {"min": 16, "max": 64},
    "total": {"count": 400, "unit": "examples"},
    "hang_timeout": None,
}
WEIGHTS = {name: 1.0 + name.endswith("weight") for name, _ in MLP().named_parameters()}


def test_every_group_arrives(config: Any, tmp_path: Path) -> None:
    path = config(
        lr_rule="sqrt",
        follow=["betas", "weight_decay"],
        measure={"l1": True, "layer_weights": WEIGHTS},
        guard={"skip_nonfinite": "probed", "check_every": 5},
        engine_options={
            "gradient_sync": "last",
            "scaler": {"class_path": "torch.amp.GradScaler", "init_args": {"device": "cpu"}},
        },
    )
    assert main(["train", "--config", path]) == 0
    texts = (tmp_path / "run" / "journal.jsonl").read_text().splitlines()
    lines = [line for text in texts if "plan" in (line := json.loads(text))]
    assert sum(line["plan"]["global_batch_size"] for line in lines) >= 400
    assert all(line["norms"]["l1"] > line["norms"]["l2"] and line["applied"] for line in lines)
    assert {name for line in lines for name in line["layers"]} == {"weight 1", "weight 2"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"follow": ["momentum"]}, "follow"),
        ({"guard": {"check_every": 0}}, "check_every must be at least 1 step"),
        ({"measure": {"layers": "module", "layer_weights": WEIGHTS}}, "give only one"),
        ({"engine_options": {"gradient_sync": "never"}}, "gradient_sync"),
    ],
    ids=["follow", "guard", "measure", "engine"],
)
def test_what_does_not_fit_is_said(change: dict[str, Any], said: str, config: Any, capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(main(["train", "--config", config(**change)]))
    assert ended.value.code not in (0, None)
    assert said in capsys.readouterr().err
