"""Jobs whose optimizer is K-FAC or Shampoo: the loop of the guide, on every engine that has whole matrices."""

from __future__ import annotations

import os
import re
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.ranks import run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from adabatch import AdaptiveBatch, Constant, GlobalOrder, Limits, NormTest, examples
from adabatch.checkpointing.files import checkpoints_in
from adabatch.cli.display import Display
from adabatch.cli.job import Job, run
from adabatch.cli.main import main
from adabatch.cli.optimizers import MakeOptimizer, optimizer_of
from adabatch.guards.preemption import EXIT_PREEMPTED
from adabatch.optim import KFAC, Shampoo
from adabatch.recipes import collate
from adabatch.runtime.launch.world import World

pytest.importorskip("sklearn", reason="the digits need scikit-learn (extra cli)")
from adabatch.recipes.digits import Digits
from adabatch.recipes.models import MLP

DIGITS = "adabatch.recipes.digits.Digits"
GUIDE = Path(__file__).parents[2] / "docs" / "kfac.md"
(YAML,) = re.findall(r"```yaml\n(.*?)```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL)
OPTIMIZER = yaml.safe_load(YAML)["optimizer"]


class StoppingLoss(nn.CrossEntropyLoss):
    """Cross-entropy, in whose so-manieth call a signal comes."""

    calls_left: int | None = None

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        if StoppingLoss.calls_left is not None:
            StoppingLoss.calls_left -= 1
            if StoppingLoss.calls_left == 0:
                os.kill(os.getpid(), signal.SIGUSR1)
        return super().forward(inputs, targets)


CONFIG: dict[str, Any] = {
    "format": 1,
    "model": {"class_path": "adabatch.recipes.models.MLP"},
    "loss": {"class_path": f"{__name__}.StoppingLoss"},
    "optimizer": OPTIMIZER,
    "train_data": {"class_path": DIGITS, "init_args": {"split": "train"}},
    "test_data": {"class_path": DIGITS, "init_args": {"split": "test"}},
    "criterion": {"class_path": "adabatch.NormTest", "init_args": {"eta": 0.5}},
    "micro_batch_size": 8,
    "max_micro_batch_size": 32,
    "limits": {"min": 16, "max": 64},
    "total": {"count": 1000, "unit": "examples"},
}


def weights_of(run: Path) -> dict[str, Tensor]:
    newest = next(iter(checkpoints_in(run / "checkpoints").values()))
    state: dict[str, Tensor] = torch.load(newest / "state.pt", weights_only=True)["model"]
    return state


def by_hand() -> nn.Module:
    """The loop of docs/kfac.md."""
    torch.manual_seed(0)
    model = MLP()
    optimizer = KFAC(model.parameters(), model, **OPTIMIZER["init_args"])
    batches = AdaptiveBatch(
        model,
        optimizer,
        NormTest(eta=0.5),
        micro_batch_size=8,
        max_micro_batch_size=32,
        limits=Limits(min=16, max=64),
    )
    order = GlobalOrder(Digits(split="train"), seed=0, collate_fn=collate)
    for step in batches.steps(order, until=examples(1000)):
        for inputs, targets in step:
            outputs = model(inputs)
            optimizer.observe(outputs, targets)
            step.backward(nn.functional.cross_entropy(outputs, targets))
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_a_config_trains_by_kfac_as_the_loop_of_the_guide_does_and_resumes(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Larger micro-batches are tried meanwhile, which leaves no trace in the factors."""
    monkeypatch.setattr(StoppingLoss, "calls_left", 20)
    assert main(["train", "--config", config()]) == EXIT_PREEMPTED
    assert main(["train", "--config", config()]) == 0
    expected = by_hand().state_dict()
    found = weights_of(tmp_path / "run")
    assert set(found) == set(expected)
    for name, value in found.items():
        assert torch.equal(value, expected[name])


def test_the_checks_of_a_config_pass_for_kfac(config: Any) -> None:
    assert main(["verify", "--config", config(), "--steps=4"]) == 0


def job(name: str, engine: Any, out: Path) -> Job:
    torch.manual_seed(0)
    make: MakeOptimizer = partial(KFAC, lr=0.01, fisher="gauss-newton")
    if name == "shampoo":
        make = partial(Shampoo, lr=0.05)
    return Job(
        model=MLP(),
        loss=nn.CrossEntropyLoss(),
        optimizer=make,
        train_data=Digits(split="train"),
        test_data=Digits(split="test"),
        criterion=Constant(32),
        micro_batch_size=16,
        total=examples(320),
        engine=engine,
        out=out / name / engine,
    )


def on_rank(rank: int, folder: Path) -> dict[tuple[str, str], float]:
    ranks = World(rank=rank, size=2)
    losses = {}
    for name, engine in (("kfac", "ddp"), ("kfac", "fsdp2"), ("shampoo", "fsdp2")):
        losses[name, engine] = run(job(name, engine, folder), ranks, display=Display(rank), label="job").test_loss
    owned = optimizer_of(partial(Shampoo, lr=0.1), DistributedDataParallel(nn.Linear(2, 2)))
    assert isinstance(owned, Shampoo)
    assert not owned._owner.owns("0") or not owned._owner.owns("1")
    return losses


@pytest.mark.distributed
def test_two_ranks_train_as_one_does(tmp_path: Path) -> None:
    world = World()
    alone = {
        name: run(job(name, "ddp", tmp_path / "alone"), world, display=Display(0), label="job").test_loss
        for name in ("kfac", "shampoo")
    }
    for losses in run_ranks(on_rank, 2, tmp_path, tmp_path):
        for (name, _), loss in losses.items():
            assert loss == pytest.approx(alone[name], rel=1e-3)
            assert loss < 2.0  # of ten classes, which begin at 2.3


def test_deepspeed_is_refused_before_it_starts(config: Any, tmp_path: Path, capsys: Any) -> None:
    settings = tmp_path / "engine.json"
    settings.write_text("{}")
    path = config(engine="deepspeed", engine_config=str(settings))
    for optimizer in (OPTIMIZER, {"class_path": "adabatch.optim.Shampoo", "init_args": {"lr": 0.1}}):
        assert main(["train", "--config", path, f"--optimizer={optimizer}"]) == 2
        assert "use engine: ddp or fsdp2 for K-FAC and Shampoo" in capsys.readouterr().err


def test_an_argument_that_kfac_does_not_have_is_named(config: Any, capsys: Any) -> None:
    optimizer = {"class_path": "adabatch.optim.KFAC", "init_args": {"rate": 0.1}}
    with pytest.raises(SystemExit):
        main(["train", "--config", config(optimizer=optimizer)])
    assert "'rate' is not accepted" in capsys.readouterr().err
