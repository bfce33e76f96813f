"""The Trainer of Transformers on two gloo ranks: DDP, FSDP2 and DeepSpeed, in one start of two processes."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.causal_lm import MICRO, Sentences, by_hand, llama, training_arguments, whole
from support.hosts import environment_kept, needs, rank_variables
from support.ports import free_port
from support.ranks import run_ranks
from support.trainers import fresh_state

from adabatch import GlobalOrder

needs("transformers", "accelerate")
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None

STAGES = "8; 32 from 3 steps; 16 from 5 steps; 40 from 7 steps"
SIZES = [8] * 3 + [32] * 2 + [16] * 2 + [40]
"""To four times as much after 3 steps, down to twice and up to five times; 160 examples are two and a half epochs."""

EPOCHS = 136 / 64


def trainer_of(kind: str, folder: Path, adaptive: dict[str, Any] | None, **options: Any) -> Any:
    host = importlib.import_module("transformers")
    ours = importlib.import_module("adabatch.integrations.transformers")
    if kind.startswith("ZeRO"):
        options["deepspeed"] = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": int(kind[-1])},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
    arguments = training_arguments(folder, **options)
    made = {"args": arguments, "train_dataset": Sentences()}
    if adaptive is None:
        return host.Trainer(llama(), **made)
    kinds = ours.AdaptiveTrainer
    if kind == "FSDP2":

        class OnCPU(ours.AdaptiveTrainer):  # type: ignore[misc, name-defined]
            def create_accelerator_and_postprocess(self) -> None:
                super().create_accelerator_and_postprocess()
                # Accelerate runs FSDP2 on accelerators only, and falls back to DDP without a word.
                state = importlib.import_module("accelerate.utils")
                self.accelerator.state.distributed_type = state.DistributedType.FSDP
                self.accelerator.state.fsdp_plugin = state.FullyShardedDataParallelPlugin(
                    fsdp_version=2, auto_wrap_policy="no_wrap"
                )
                self.is_fsdp_enabled = True

        kinds = OnCPU
    return kinds(llama(), adaptive=ours.AdaptiveArguments(**adaptive), **made)


def planned(folder: Path, **options: Any) -> Any:
    """A trainer with the plan of this module, on as many ranks as there are."""
    plan = {"criterion": "stages", "batch_stages": STAGES}
    return trainer_of("DDP", folder, plan, num_train_epochs=EPOCHS, **options)


def weights(trainer: Any, kind: str) -> Any:
    if kind == "ZeRO 3":
        zero = importlib.import_module("deepspeed").zero
        with zero.GatheredParameters(list(trainer.model.parameters())):
            return whole(trainer.model).tolist()
    return whole(trainer.accelerator.unwrap_model(trainer.model)).tolist()


def job(rank: int, port: int, folder: Path, kinds: list[str]) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    os.environ["HF_HUB_OFFLINE"] = "1"
    rank_variables(rank, 2, port)
    if HAS_DEEPSPEED:
        importlib.import_module("deepspeed").ops.__compatible_ops__["deepspeed_shm_comm"] = False
    found: dict[str, Any] = {}
    plain = trainer_of("DDP", folder / "plain", None, gradient_accumulation_steps=2, num_train_epochs=1)
    plain.train()
    constant = trainer_of(
        "DDP", folder / "constant", {"criterion": "constant", "min_batch_size": 16}, num_train_epochs=1
    )
    # The Trainer deals whole micro-batches to the ranks in turn, as the order does: the batches are the same.
    constant.train()
    found["plain"], found["constant"] = weights(plain, "DDP"), weights(constant, "DDP")
    losses = [[entry["loss"] for entry in each.state.log_history if "loss" in entry] for each in (plain, constant)]
    found["losses"] = losses
    seen = trainer_of(
        "DDP", folder / "monitor", {"monitor_only": True}, gradient_accumulation_steps=2, num_train_epochs=1
    )
    seen.train()
    found["monitored"], found["noise"] = weights(seen, "DDP"), seen.monitor.noise_scale

    # Before DeepSpeed, which stays on for the process. The folder holds a checkpoint of a run on one process.
    joined = planned(folder / "alone")
    joined.train(resume_from_checkpoint=str(folder / "alone" / "checkpoint-4"))
    found["from one process"] = weights(joined, "DDP")
    growing = {"criterion": "stages", "batch_stages": "8; 32 from 3 steps", "max_micro_batch_size": 16}
    larger = trainer_of("DDP", folder / "larger", growing, num_train_epochs=120 / 64)
    larger.train()
    found["micro-batch"] = {"weights": weights(larger, "DDP"), "largest": larger.batches.plan.micro_batch_size}

    for kind in kinds:
        place = folder / kind.replace(" ", "")
        stages = {"criterion": "stages", "batch_stages": STAGES}
        saving = {"num_train_epochs": EPOCHS, "save_strategy": "steps", "save_steps": 6}
        trainer = trainer_of(kind, place, stages, **saving)
        trainer.train()
        found[kind] = {
            "weights": weights(trainer, kind),
            "sizes": [entry["batch_size"] for entry in trainer.state.log_history if "loss" in entry],
            "model": type(trainer.model_wrapped).__name__,
            "consumed": trainer.batches.consumed.examples,
        }
        resumed = trainer_of(kind, place, stages, **saving)
        resumed.train(resume_from_checkpoint=str(place / "checkpoint-6"))
        found[kind]["resumed"] = weights(resumed, kind)
        if kind in ("FSDP2", "ZeRO 0"):
            try:
                trainer_of(kind, place, {"monitor_only": True}, gradient_accumulation_steps=2).train()
            except ValueError as error:
                found[kind]["monitor"] = str(error)
    return found


@contextmanager
def accelerate_at_rest() -> Iterator[None]:
    """Nothing that Accelerate keeps of this process, nor variables that it leaves, reach other tests."""
    kept = (fresh_state(), environment_kept())
    for each in kept:
        next(each)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    for each in kept:
        next(each, None)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank of the job found."""
    folder = tmp_path_factory.mktemp("ranks")
    with accelerate_at_rest():
        planned(folder / "alone", save_strategy="steps", save_steps=4).train()
    kinds = ["DDP", "FSDP2"] + (["ZeRO 0", "ZeRO 2", "ZeRO 3"] if HAS_DEEPSPEED else [])
    found = run_ranks(job, 2, folder, free_port(), folder, kinds, timeout=240.0, connect=False)
    with accelerate_at_rest():
        left = planned(folder / "DDP")
        left.train(resume_from_checkpoint=str(folder / "DDP" / "checkpoint-6"))
        found[0]["on one process"] = weights(left, "DDP")
    return found


@pytest.mark.distributed
def test_a_constant_batch_is_the_trainers_own_run(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["constant"] == pytest.approx(rank["plain"], abs=1e-6)
        assert rank["losses"][1] == pytest.approx(rank["losses"][0], abs=1e-5)
        assert rank["constant"] == found[0]["constant"]


@pytest.mark.distributed
def test_measuring_alone_changes_no_bit(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["monitored"] == rank["plain"]
        assert rank["noise"] == found[0]["noise"] > 0


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["FSDP2", "ZeRO 0"])
def test_measuring_alone_is_refused_where_gradients_are_not_seen(found: list[dict[str, Any]], kind: str) -> None:
    if kind not in found[0]:
        pytest.skip("needs DeepSpeed")
    for rank in found:
        assert "FSDP2 and DeepSpeed do not show: use" in rank[kind]["monitor"]


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["DDP", "FSDP2", "ZeRO 0", "ZeRO 2", "ZeRO 3"])
def test_a_batch_that_grows_is_the_run_by_hand_on_every_engine(found: list[dict[str, Any]], kind: str) -> None:
    if kind not in found[0]:
        pytest.skip("needs DeepSpeed")
    expected = by_hand(SIZES).tolist()
    for rank in found:
        got = rank[kind]
        assert got["sizes"] == SIZES
        assert got["consumed"] == sum(SIZES)
        assert got["weights"] == found[0][kind]["weights"]
        assert got["weights"] == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert got["resumed"] == got["weights"]
    assert found[0]["FSDP2"]["model"].startswith("FSDP")


@pytest.mark.distributed
def test_a_run_goes_on_with_another_number_of_ranks(found: list[dict[str, Any]]) -> None:
    """From one process to two, and from two to one, each in mid-epoch."""
    expected = pytest.approx(by_hand(SIZES).tolist(), rel=1e-4, abs=1e-5)
    assert found[0]["on one process"] == expected
    for rank in found:
        assert rank["from one process"] == expected


@pytest.mark.distributed
def test_a_micro_batch_grows(found: list[dict[str, Any]]) -> None:
    expected = by_hand([8] * 3 + [32] * 3).tolist()
    for rank in found:
        assert rank["micro-batch"]["largest"] == 4 * MICRO
        assert rank["micro-batch"]["weights"] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_the_order_is_that_of_the_data() -> None:
    """What `by_hand` takes for granted."""
    assert GlobalOrder(Sentences(), shuffle=False).permutation(0).tolist() == list(range(64))
    assert torch.equal(by_hand([8]), by_hand([8]))
