"""Real DeepSpeed engines: the ladder of ZeRO stages, and what a person does with an engine.

One job of two ranks runs all of it, as each start takes long; the tests read what it found.
"""

from __future__ import annotations

import math
import re
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.deepspeed_engines import as_launched, connect, engine_of, whole
from support.ladder import BY_ACCUMULATION, BY_MICRO_BATCH, JUMP, LR, WINDOWS, check_same, climb, climb_with, growths
from support.loops import lines, network, regression, weights
from support.options import grouped
from support.ports import free_port
from support.ranks import run_ranks
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer

import adabatch
from adabatch import AdaptiveBatch, Control, GlobalOrder, Limits, NoiseScale, NormTest
from adabatch.batch import CoordinateNormTest
from adabatch.batch.criteria import Criterion
from adabatch.optim import KFAC

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]  # many engines, which a busy machine starts slowly

if find_spec("deepspeed") is None:  # an import would change the environment of this process
    pytest.skip("needs DeepSpeed", allow_module_level=True)

STAGES = (0, 1, 2, 3)
COORDINATE_CRITERIA: dict[str, Criterion] = {
    "sign": NoiseScale(norm="sign"),
    "coordinates": CoordinateNormTest(eta=0.7, quantile=0.5),
}
SGD_OF = partial(SGD, lr=LR)
ADAM_OF = partial(AdamW, lr=0.01)


# --- what the ranks of the job run -----------------------------------------------------------------------------------


def attached(engine: Any, criterion: Any = None, **options: Any) -> AdaptiveBatch:
    from adabatch.integrations.deepspeed import attach

    return attach(engine, criterion or NormTest(eta=0.5), **grouped({"limits": Limits(min=8, max=64), **options}))


def rung(stage: int, ladder: dict[str, Any], num_steps: int, *, managed: bool = True) -> dict[str, Any]:
    engine = engine_of(stage, SGD_OF, managed=managed)
    batches = attached(engine, **ladder)
    found = climb(batches, engine, engine.step, num_steps=num_steps, whole=lambda: whole(engine))
    consumed = sum(size for size, _ in found["decisions"])
    return {**found, "counted": engine.global_samples == consumed, "steps": engine.global_steps}


def ladder() -> dict[str, Any]:
    found: dict[str, Any] = {"micro-batch": {}, "accumulation": {}, "jump": {}}
    for stage in STAGES:
        found["micro-batch"][f"ZeRO {stage}"] = rung(stage, BY_MICRO_BATCH, 200)
        found["accumulation"][f"ZeRO {stage}"] = rung(stage, BY_ACCUMULATION, 80, managed=False)
        for managed in (True, False):
            jumped = rung(stage, JUMP, len(WINDOWS), managed=managed)
            found["jump"][f"ZeRO {stage}, {'managed' if managed else 'ours'}"] = jumped
    return found


def by_coordinates() -> dict[str, Any]:
    """ZeRO 0 has the step's gradient itself, so criteria can look at its coordinates."""
    return {name: rung(0, BY_MICRO_BATCH | {"criterion": each}, 60) for name, each in COORDINATE_CRITERIA.items()}


def run(engine: Any, batches: AdaptiveBatch, num_steps: int, *, spoil: int | None = None, order: Any = None) -> None:
    """The loop of the README; in step ``spoil`` the loss of rank 1 is not a number."""
    until = adabatch.steps(batches.consumed.steps + num_steps)
    precision = next(engine.module.parameters()).dtype
    for step in batches.steps(order or GlobalOrder(regression(256)), until=until):
        for x, y in step:
            loss = functional.mse_loss(engine(x.to(precision)).float(), y)
            spoiled = spoil == batches.consumed.steps and dist.get_rank() == 1
            step.backward(loss * math.nan if spoiled else loss)
        engine.step()


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters()), "lr": 0.003}]


FOLLOWED: dict[str, Any] = {
    "micro_batch_size": 4,
    "lr_rule": "sqrt",
    "follow": ("betas", "weight_decay"),
    "control": Control(growth=2.0, hold=3, pace=math.inf),
}


def groups(place: Path) -> dict[str, Any]:
    """Two parameter groups, and more pieces under ZeRO 3: each is stepped by itself, and the factor is on in each."""
    found = {}
    model = network()
    optimizer = ADAM_OF(two_groups(model))
    model = DistributedDataParallel(model)
    journal = place / "ddp.jsonl"
    batches = AdaptiveBatch(
        model, optimizer, NormTest(eta=0.5), limits=Limits(min=8, max=64), journal=journal, **grouped(FOLLOWED)
    )
    for step in batches.steps(GlobalOrder(regression(256)), until=adabatch.steps(25)):
        for x, y in step:
            step.backward(functional.mse_loss(model(x), y))
        optimizer.step()
        optimizer.zero_grad()
    found["DDP"] = {"weights": weights(model).tolist(), "journal": str(journal), "lr": [0.01, 0.003]}
    for stage in STAGES:
        pieces = {"sub_group_size": 20} if stage == 3 else {}
        engine = engine_of(stage, ADAM_OF, groups=two_groups, zero_optimization=pieces)
        journal = place / f"zero{stage}.jsonl"
        batches = attached(engine, journal=journal, **FOLLOWED)
        run(engine, batches, 25)
        stored = [group["lr"] for group in engine.basic_optimizer.param_groups]
        found[f"ZeRO {stage}"] = {"weights": whole(engine).tolist(), "journal": str(journal), "lr": stored}
        batches.remove()
    return found


def precision(place: Path) -> dict[str, Any]:
    """bf16, float16 with a dynamic loss scale, clipping and a scheduler inside the engine."""
    found = {}
    for stage in STAGES:
        engine = engine_of(stage, SGD_OF, bf16={"enabled": True})
        found[f"bf16, ZeRO {stage}"] = measured(engine, place / f"bf16{stage}.jsonl")
    engine = engine_of(1, SGD_OF, bf16={"enabled": True}, data_types={"grad_accum_dtype": "fp32"})
    found["bf16 with float32 sums"] = measured(engine, place / "sums.jsonl")
    for stage in STAGES:
        warmup = {"type": "WarmupLR", "params": {"warmup_num_steps": 8, "warmup_max_lr": LR, "warmup_type": "linear"}}
        engine = engine_of(stage, SGD_OF, gradient_clipping=0.5, scheduler=warmup)
        eager = {"lr_rule": "sqrt", "control": Control(memory=6, confidence=0.6, pace=math.inf)}
        found[f"clipped, ZeRO {stage}"] = measured(engine, place / f"clipped{stage}.jsonl", **eager)
    # float16 runs on any CPU; DeepSpeed asks for a fast one first.
    import deepspeed

    accelerator = deepspeed.accelerator.get_accelerator()
    accelerator.is_fp16_supported = lambda: True
    accelerator.supported_dtypes = lambda: [torch.float32, torch.bfloat16, torch.float16]
    for stage in (1, 2, 3):
        engine = engine_of(stage, SGD_OF, fp16={"enabled": True, "loss_scale": 128})
        found[f"half, ZeRO {stage}"] = measured(engine, place / f"half{stage}.jsonl")
        engine = engine_of(stage, SGD_OF, fp16={"enabled": True, "initial_scale_power": 17, "hysteresis": 1})
        found[f"overflows, ZeRO {stage}"] = measured(engine, place / f"overflows{stage}.jsonl")
    return found


def measured(engine: Any, journal: Path, **options: Any) -> dict[str, Any]:
    batches = attached(engine, journal=journal, **options)
    run(engine, batches, 14)
    state, steps = batches.state_dict(), [batches.progress.steps, batches.consumed.steps]
    batches.settle()  # between two steps, also after one that overflowed
    batches.remove()
    return {
        "journal": str(journal), "skipped": engine.skipped_steps, "optimizer": type(engine.optimizer).__name__,
        "steps": steps, "plan": state["plan"],
    }  # fmt: skip


def not_finite(place: Path) -> dict[str, Any]:
    """One rank's loss is not a number in the third of five steps: no rank's weights move in it."""
    found = {}
    for stage in STAGES:
        engine = engine_of(stage, SGD_OF)
        batches = attached(engine, limits=Limits(min=8, max=8), journal=place / f"nan{stage}.jsonl")
        moved = []
        for index in range(5):
            before = whole(engine)
            run(engine, batches, 1, spoil=2 if index == 2 else None)
            moved.append(not torch.equal(before, whole(engine)))
        found[f"ZeRO {stage}"] = {
            "moved": moved, "steps": [batches.progress.steps, batches.consumed.steps],
            "finite": bool(whole(engine).isfinite().all()),
        }  # fmt: skip
        batches.remove()
    return found


def resumed(place: Path) -> dict[str, Any]:
    """A run that is saved by the engine, with our state in ``client_state``, and goes on in a new engine."""
    found = {}
    for stage in STAGES:
        through, before, after = (engine_of(stage, ADAM_OF, model=network(seed=seed)) for seed in (0, 0, 1))
        options: dict[str, Any] = {"lr_rule": "sqrt", "control": Control(growth=2.0, hold=3, pace=math.inf)}
        orders = [GlobalOrder(regression(96)) for _ in range(3)]
        runs = [attached(engine, **options) for engine in (through, before, after)]
        run(through, runs[0], 20, order=orders[0])
        run(before, runs[1], 9, order=orders[1])
        folder = str(place / f"zero{stage}")
        before.save_checkpoint(folder, client_state={"batches": runs[1].state_dict(), "order": orders[1].state_dict()})
        _, state = after.load_checkpoint(folder)
        runs[2].load_state_dict(state["batches"])
        orders[2].load_state_dict(state["order"])
        run(after, runs[2], 11, order=orders[2])
        found[f"ZeRO {stage}"] = {
            "weights": torch.equal(whole(through), whole(after)),
            "batches": runs[0].state_dict() == runs[2].state_dict(),
            "order": orders[0].state_dict() == orders[2].state_dict(),
            "grew": runs[2].plan.global_batch_size > 8,
            "steps": after.global_steps == through.global_steps == 20,
            "samples": after.global_samples == through.global_samples,
        }
        for each in runs:
            each.remove()
    return found


class Custom(Optimizer):
    """Stands for an optimizer that is none of torch's."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1, "betas": (0.9, 0.99)})

    def step(self, closure: Any = None) -> None:
        """Does nothing."""


def refused() -> dict[str, str]:
    found = {}

    def note(name: str, make: Any, **options: Any) -> None:
        try:
            attached(make(), **options)
            found[name] = "accepted"
        except (ValueError, TypeError) as error:
            found[name] = f"{type(error).__name__}: {error}"

    sgd = partial(engine_of, optimizer_of=SGD_OF)
    note("no engine", network)
    note("no norm", lambda: sgd(1, zero_optimization={"stage": 1, "compute_grad_norm": False}))
    note("late and clipped", lambda: sgd(0, managed=False, gradient_clipping=1.0))
    note("probe", lambda: sgd(1), probe=object())
    note("l1", lambda: sgd(2), record_l1=True)
    note("layers", lambda: sgd(2), per_layer="module")
    for name, criterion in COORDINATE_CRITERIA.items():
        note(name, lambda: sgd(1), criterion=criterion)
    note("betas", lambda: engine_of(0, Custom), follow=("betas",))
    note("float16", lambda: sgd(0, fp16={"enabled": True}))  # after precision(), which lets a CPU have it
    note("whole gradients", lambda: engine_of(1, adabatch.optim.AdaGradNorm))
    note("K-FAC", k_fac)
    note("limits", lambda: sgd(1), limits=Limits(min=7, max=64))
    note("pipeline", pipeline)  # last: DeepSpeed makes no other kind of engine after it
    return found


def k_fac() -> Any:
    model = network()
    return engine_of(0, lambda _: KFAC(model.parameters(), model, likelihood="gaussian"), model=model)


def pipeline() -> Any:
    import deepspeed
    from deepspeed.pipe import PipelineModule

    model = PipelineModule([nn.Linear(6, 7), nn.Linear(7, 1)], num_stages=2, loss_fn=functional.mse_loss)
    config = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1}
    return deepspeed.initialize(model=model, optimizer=SGD(model.parameters(), lr=0.1), config=config)[0]


def forgotten(stage: int) -> str:
    """A step after which ``engine.step()`` was not called."""
    engine = engine_of(stage, SGD_OF)
    batches = attached(engine)
    steps = batches.steps(GlobalOrder(regression(64)))
    for x, y in (step := next(steps)):
        step.backward(functional.mse_loss(engine(x), y))
    try:
        next(steps)
    except RuntimeError as error:
        return str(error)
    return "accepted"


def everything(folder: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    place = Path(folder)
    connect()
    found = {
        "ladder": ladder(),
        "by coordinates": by_coordinates(),
        "groups": groups(place),
        "precision": precision(place),
        "not finite": not_finite(place),
        "resumed": resumed(place),
        "forgotten": forgotten(2),
        "refused": refused(),
    }
    dist.barrier()
    return found


def on_rank(rank: int, port: int, folder: str) -> dict[str, Any]:
    return as_launched(everything, rank, 2, port, folder)  # type: ignore[no-any-return]


# --- what they found -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the first rank found, and the other to the bit."""
    place = tmp_path_factory.mktemp("deepspeed")
    first, second = run_ranks(on_rank, 2, place, free_port(), str(place), timeout=560, connect=False)
    assert first == second
    return first  # type: ignore[no-any-return]


def references(rank: int) -> dict[str, Any]:
    return {
        name: climb_with(DistributedDataParallel(network()), run, num_steps=num_steps)
        for name, run, num_steps in (
            ("micro-batch", BY_MICRO_BATCH, 200), ("accumulation", BY_ACCUMULATION, 80), ("jump", JUMP, len(WINDOWS)),
            *((name, BY_MICRO_BATCH | {"criterion": each}, 60) for name, each in COORDINATE_CRITERIA.items()),
        )
    }  # fmt: skip


@pytest.fixture(scope="module")
def on_ddp(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same runs on DDP, which test_ladder holds against a plain model and FSDP2."""
    return run_ranks(references, 2, tmp_path_factory.mktemp("ddp"), timeout=120)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["micro-batch", "accumulation", "jump"])
def test_every_stage_takes_the_run_that_ddp_takes(name: str, found: dict[str, Any], on_ddp: dict[str, Any]) -> None:
    reference = on_ddp[name]
    assert growths(reference) >= (1 if name == "jump" else 5)
    for stage, taken in found["ladder"][name].items():
        check_same(f"{name}, {stage}", taken, reference)
        assert taken["counted"], stage  # the engine knows how many examples it saw
        assert taken["steps"] == len(reference["decisions"]), stage


@pytest.mark.parametrize("name", COORDINATE_CRITERIA)
def test_zero_0_is_measured_by_coordinates_as_ddp_is(name: str, found: dict[str, Any], on_ddp: dict[str, Any]) -> None:
    assert growths(on_ddp[name]) >= 2
    check_same(name, found["by coordinates"][name], on_ddp[name])


def test_no_window_is_short_after_a_change(found: dict[str, Any]) -> None:
    assert len(found["ladder"]["jump"]) == 8
    for stage, taken in found["ladder"]["jump"].items():
        assert taken["windows"] == WINDOWS, stage


def test_groups_and_pieces_are_stepped_with_the_factor_once_each(found: dict[str, Any]) -> None:
    reference = found["groups"]["DDP"]
    theirs = lines(Path(reference["journal"]))
    assert max(line["lr"]["factor"] for line in theirs) > 1
    for stage in [name for name in found["groups"] if name != "DDP"]:
        run_of = found["groups"][stage]
        assert run_of["weights"] == pytest.approx(reference["weights"], rel=1e-4, abs=1e-5), stage
        assert run_of["lr"] == reference["lr"], stage  # the factor is stored nowhere
        for mine, their in zip(lines(Path(run_of["journal"])), theirs, strict=True):
            assert mine["next"] == their["next"], stage
            for part in ("base", "shape", "applied"):
                assert mine["lr"][part] == pytest.approx(their["lr"][part]), (stage, part)
            assert mine["lr"]["factor"] == pytest.approx(their["lr"]["factor"]), stage
            assert mine["moments"] == pytest.approx(their["moments"], rel=2e-4), stage


def test_precision_clipping_and_schedulers_are_the_engines(found: dict[str, Any]) -> None:
    runs = found["precision"]
    exact = lines(Path(found["groups"]["ZeRO 0"]["journal"]))[0]["moments"]
    assert runs["bf16 with float32 sums"]["optimizer"] == "BF16_Optimizer"
    for name, run_of in runs.items():
        journal = lines(Path(run_of["journal"]))
        measured_steps = [line for line in journal if line["moments"]["grad_sq"] is not None]
        if not name.startswith("overflows"):
            # Before clipping, without the loss scale, and of the same weights and examples as the run in float32.
            rel = {"bf16": 2**-5, "half": 2**-8}.get(name[:4], 1e-5)
            for key in ("part_sq", "grad_sq"):
                assert journal[0]["moments"][key] == pytest.approx(exact[key], rel=rel), name
            assert len(measured_steps) == 14, name
            assert run_of["steps"] == [14, 14], name
        if name.startswith("clipped"):  # WarmupLR, whose first two rates are zero, times a factor it never hears of
            assert max(line["lr"]["factor"] for line in journal) > 1
            for index, line in enumerate(journal):
                shape = LR * min(1.0, max(0, index - 1) / 8)
                assert line["lr"]["applied"] == pytest.approx([shape * line["lr"]["factor"]], abs=1e-9), (name, index)
        if name.startswith("overflows"):
            assert 0 < run_of["skipped"] < 14, name
            assert run_of["steps"] == [14 - run_of["skipped"], 14], name
            assert len(measured_steps) == 14 - run_of["skipped"], name
            assert [line["applied"] for line in journal] == [line in measured_steps for line in journal], name


def test_a_loss_that_is_not_finite_moves_no_rank(found: dict[str, Any]) -> None:
    for stage, seen in found["not finite"].items():
        assert seen["moved"] == [True, True, False, True, True], stage
        assert seen["steps"] == [4, 5], stage
        assert seen["finite"], stage


def test_the_engines_checkpoint_carries_the_run(found: dict[str, Any]) -> None:
    for stage, same in found["resumed"].items():
        assert all(same.values()), (stage, same)


def test_what_cannot_be_measured_is_refused(found: dict[str, Any]) -> None:
    expected = {
        "no engine": "TypeError: engine must be a DeepSpeedEngine, got Sequential",
        "pipeline": "ValueError: .*PipelineEngine.train_batch runs .* in one call",
        "no norm": "ValueError: .*leave `compute_grad_norm` out",
        "late and clipped": "ValueError: .*ZeRO 0 without managed accumulation .*use ZeRO 1",
        "probe": "ValueError: attach chooses probe= from the DeepSpeed engine",
        "l1": r"ValueError: Measure\(l1=\) needs the step's gradient .* use ZeRO 0",
        "layers": r"ValueError: Measure\(layers=\) needs the step's gradient .* use ZeRO 0",
        "sign": "ValueError: norm cannot be measured .* use ZeRO 0, DDP or FSDP2, or a criterion in the Euclidean norm",
        "coordinates": "ValueError: quantile cannot be measured .* use ZeRO 0, DDP or FSDP2",
        "betas": "ValueError: follow='betas' needs the step counts of torch's own Adam",
        "float16": "ValueError: .*ZeRO 0 in float16 .*use ZeRO 1",
        "whole gradients": "ValueError: .*needs whole gradients or layers, .*use ZeRO 0",
        "K-FAC": "ValueError: .*K-FAC cannot share its factors among the ranks of an engine, .*use DDP or FSDP2",
        "limits": "ValueError: limits.min=7 cannot be shared equally by 2 ranks",
    }
    assert set(found["refused"]) == set(expected)
    for name, says in expected.items():
        assert re.search(says, found["refused"][name]), (name, found["refused"][name])
    assert "call engine.step()" in found["forgotten"]
