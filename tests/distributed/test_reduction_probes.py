"""The probes that read gradients where they are reduced: precisions, hooks of the user's own, and what they refuse."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.fixed_probe import FixedProbe
from support.hard_models import CASES, Batch, Case
from support.options import grouped
from support.ranks import run_ranks
from support.wrapped import check, ddp, fsdp, made, measured, part_by_part
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook, fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, ShardPlacementResult
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.optim import SGD

from adabatch import AdaptiveBatch, Constant, Limits, NormTest
from adabatch.batch.moments import GradientMoments
from adabatch.batch.needs import Needs
from adabatch.runtime.probes.comm_hook import CommHookProbe
from adabatch.runtime.probes.reduce_scatter import PlainReduceScatter, ReduceScatterProbe

pytestmark = pytest.mark.distributed

NETWORK = CASES["network"]
SIZES = [4, 4]  # equal, and powers of two: dividing the loss rounds nothing in 16 bits
Numbers = tuple[Any, ...]


def grads(model: nn.Module) -> list[Tensor]:
    """Every gradient, as this rank holds it."""
    return [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()]


def message(call: Callable[[], Any]) -> str:
    """The error of a call; empty where there was none."""
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def adaptive(model: nn.Module, **options: Any) -> AdaptiveBatch:
    optimizer = SGD(options.pop("parameters", model.parameters()), lr=0.1)
    defaults = {"criterion": NormTest(eta=0.5), "limits": Limits(min=16, max=64), "micro_batch_size": 4}
    options = defaults | {"lr_rule": "none"} | options
    return AdaptiveBatch(model, optimizer, options.pop("criterion"), **grouped(options))


# --- precisions, factors and hooks -----------------------------------------------------------------------------------


class Counted(PlainReduceScatter):
    """A reduce-scatter of the user's own."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        return super().__call__(*arguments, **options)


def fsdp_of(**policy: Any) -> nn.Module:
    return fsdp(made(NETWORK), NETWORK, mp_policy=MixedPrecisionPolicy(**policy))


def precisions(rank: int) -> dict[str, tuple[Numbers, Numbers, float]]:
    """Found, right, and the tolerance."""
    results = {}

    def run(name: str, model: nn.Module, probe: Any, tolerance: float, scale: float = 1.0, **options: Any) -> None:
        oracle_dtype = options.pop("oracle", None) or options.get("dtype", torch.float32)
        joined = options.get("sync") == "last" or isinstance(probe, CommHookProbe)
        found = measured(model, probe, NETWORK, SIZES, **options)
        oracle = part_by_part(NETWORK, SIZES, 2, joined=joined, dtype=oracle_dtype).scaled(scale)
        results[name] = tuple(found), tuple(oracle), tolerance

    wide: dict[str, Any] = {"dtype": torch.float64}
    model = fsdp(made(NETWORK, **wide), NETWORK)
    # In float64 and float16 FSDP2 divides before the reduction and after it.
    run("FSDP2 in float64", model, ReduceScatterProbe(model), 1e-12, **wide)
    run("FSDP2 in float64, last", model, ReduceScatterProbe(model), 1e-12, sync="last", **wide)
    model = ddp(made(NETWORK, **wide), NETWORK)
    run("communication hook in float64", model, CommHookProbe(model), 1e-12, **wide)

    half: dict[str, Any] = {"dtype": torch.bfloat16}
    for reduce_dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        for sync in ("each", "last"):
            model = fsdp_of(param_dtype=torch.bfloat16, reduce_dtype=reduce_dtype)
            name = f"FSDP2 in bfloat16, {sync}, reduced in {reduce_dtype}"
            # Summed in float32 before the norm is read, the gradients of two micro-batches round otherwise.
            run(name, model, ReduceScatterProbe(model), max(tolerance, 1e-4 * (sync == "last")), sync=sync, **half)
    model = fsdp_of(reduce_dtype=torch.float16)
    run("FSDP2 reduced in float16", model, ReduceScatterProbe(model), 2e-3)
    model = fsdp(made(NETWORK), NETWORK, offload_policy=CPUOffloadPolicy(pin_memory=False))
    run("FSDP2 offloaded", model, ReduceScatterProbe(model), 1e-5)

    model = fsdp(made(NETWORK), NETWORK)
    for unit in (model, model[0]):
        unit.set_force_sum_reduction_for_comms(True)
        unit.set_gradient_divide_factor(0.5)
    # The gradient is four times the mean; the moments are those of the gradient that the optimizer sees.
    run("FSDP2 with a factor", model, ReduceScatterProbe(model, gradient_divide_factor=0.5), 1e-5, 4.0)
    results["FSDP2 with a factor not told"] = message(  # type: ignore[assignment]
        lambda: measured(model, ReduceScatterProbe(model), NETWORK, SIZES)
    )
    model, counted = fsdp(made(NETWORK), NETWORK), Counted()
    probe = ReduceScatterProbe(model, inner=counted)
    run("FSDP2 with a reduce-scatter of its own", model, probe, 1e-5)
    assert counted.calls == 4  # two units, two micro-batches
    probe.remove()
    made_loss(model).backward()
    assert counted.calls == 6

    for hook in (fp16_compress_hook, bf16_compress_hook):
        model = ddp(made(NETWORK), NETWORK)
        tolerance = 1e-3 if hook is fp16_compress_hook else 1e-2
        run(hook.__name__, model, CommHookProbe(model, hook=hook), tolerance)
    model = ddp(made(NETWORK), NETWORK)
    state = PowerSGDState(dist.group.WORLD, matrix_approximation_rank=1, start_powerSGD_iter=2)
    run("PowerSGD", model, CommHookProbe(model, hook=powerSGD_hook, state=state, plain_when_probed=True), 1e-5)
    assert state.iter == 0
    for expected in (1, 2, 3):
        made_loss(model).backward()
        assert state.iter == expected  # not probed, so compressed
    assert state.compression_stats()[0] > 1
    return results


def made_loss(model: nn.Module) -> Tensor:
    return NETWORK.loss(model, 4, next(model.parameters()).dtype)


def test_every_precision_factor_and_hook(tmp_path: Path) -> None:
    for results in run_ranks(precisions, 2, tmp_path, timeout=150):
        assert "set_gradient_divide_factor" in results.pop("FSDP2 with a factor not told")
        for name, (found, oracle, tolerance) in results.items():
            try:
                check(GradientMoments(*found), GradientMoments(*oracle), tolerance)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error


# --- the gradient is left as it was ----------------------------------------------------------------------------------


def same_gradients(rank: int) -> dict[str, bool]:
    """Whether gradients are, bit by bit, what they are without a probe. Three ranks: dividing by them rounds."""
    same = {}

    def compare(name: str, wrap: Callable[[], nn.Module], probe: Callable[[Any], Any], **options: Any) -> None:
        bare, watched = wrap(), wrap()
        watcher = probe(watched)
        measured(watched, watcher, NETWORK, SIZES, keep=True, **options)
        measured(
            bare, FixedProbe(GradientMoments(1.0, 1.0, 1.0, 1.0, 1), Needs()), NETWORK, SIZES, keep=True, **options
        )
        same[name] = all(map(torch.equal, grads(bare), grads(watched)))
        watcher.remove()
        for model in (bare, watched):
            model.zero_grad()
            torch.manual_seed(rank)
            made_loss(model).backward()
        same[f"{name}, removed"] = all(map(torch.equal, grads(bare), grads(watched)))

    compare("communication hook", lambda: ddp(made(NETWORK), NETWORK), CommHookProbe)
    for sync in ("each", "last"):
        compare(f"FSDP2, {sync}", lambda: fsdp(made(NETWORK), NETWORK), ReduceScatterProbe, sync=sync)
    compare("FSDP2 in float16", lambda: fsdp_of(reduce_dtype=torch.float16), ReduceScatterProbe)
    return same


def test_gradients_are_bitwise_those_without_a_probe(tmp_path: Path) -> None:
    for same in run_ranks(same_gradients, 3, tmp_path, timeout=150):
        assert len(same) == 8
        assert all(same.values()), same


# --- refusals --------------------------------------------------------------------------------------------------------


class Twice(nn.Module):
    """One block, run twice."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Linear(6, 6)
        self.head = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(torch.tanh(self.block(x))))


class Chunked(nn.Module):
    """The head is one unit with the norm, but is called afterwards, once a chunk."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


def chunked_losses(model: nn.Module, batch: Batch) -> Tensor:
    return torch.cat([model.head(chunk).square().mean(1) for chunk in model(batch[0]).chunk(2)])


class Holder(nn.Module):
    """Not sharded itself; what it holds is."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def refusals(rank: int) -> dict[str, str]:
    """The error of each misuse, on two ranks."""
    said = {}
    twice = Case(Twice, units=["block"])
    model = fsdp(made(twice), twice)
    said["a unit that runs twice"] = message(
        lambda: check(measured(model, ReduceScatterProbe(model), twice, SIZES), part_by_part(twice, SIZES, 2))
    )
    chunked = Case(Chunked, losses=chunked_losses)
    model = made(chunked)
    fully_shard([model.norm, model.head])
    fully_shard(model)
    said["a gradient in pieces"] = message(lambda: measured(model, ReduceScatterProbe(model), chunked, SIZES))
    model = fsdp(made(chunked), chunked._replace(units=["norm", "head"]))
    said["a loss in chunks"] = message(
        lambda: check(measured(model, ReduceScatterProbe(model), chunked, SIZES), part_by_part(chunked, SIZES, 2))
    )

    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    model = made(NETWORK)
    fully_shard(model[0])
    said["a root that is not sharded"] = message(lambda: adaptive(model))
    fully_shard(model, mesh=mesh)
    said["two meshes"] = message(lambda: ReduceScatterProbe(model))
    model, grid = made(CASES["checkpointed"]), init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(model, grid["tp"], {"block.0": ColwiseParallel(use_local_output=True)})
    fully_shard(model, mesh=grid["dp"])
    said["tensor parallelism"] = message(lambda: adaptive(model))

    model = fsdp(made(NETWORK), NETWORK)
    said["parameters that the optimizer lacks"] = message(lambda: adaptive(model, parameters=model[0].parameters()))
    said["no sync at all"] = message(lambda: adaptive(model, gradient_sync="never"))
    said["a factor of zero"] = message(lambda: ReduceScatterProbe(model, gradient_divide_factor=0.0))
    model[2].requires_grad_(False)
    said["parameters that are frozen"] = message(lambda: adaptive(model, parameters=model[0].parameters()).remove())
    model = ddp(made(NETWORK), NETWORK)
    said["sync at each under DDP"] = message(lambda: adaptive(model, gradient_sync="each"))
    said["an unsharded model"] = message(lambda: ReduceScatterProbe(model))
    said["a plain model"] = message(lambda: adaptive(made(NETWORK)))
    said["the hook of a plain model"] = message(lambda: CommHookProbe(made(NETWORK)))  # type: ignore[arg-type]
    state = PowerSGDState(dist.group.WORLD)
    said["PowerSGD"] = message(lambda: CommHookProbe(model, hook=powerSGD_hook, state=state))
    CommHookProbe(model)
    said["a second hook"] = message(lambda: CommHookProbe(model))
    sparse = CASES["tied"]._replace(make=lambda: nn.Sequential(nn.Embedding(11, 4, sparse=True), nn.Linear(4, 11)))

    def step_of(model: nn.Module, probe: Any) -> None:
        probe.start(2)
        probe.begin_part()
        model(torch.tensor([1, 2])).sum().backward()

    said["a sparse gradient"] = message(lambda: step_of(model := ddp(made(sparse), sparse), CommHookProbe(model)))
    model = ddp(made(NETWORK), NETWORK)
    probe = CommHookProbe(model)
    probe.start(2)
    probe.begin_part()
    made_loss(made(NETWORK)).backward()
    probe.end_part(4, 1.0)
    said["the loss of another model"] = message(probe.collect)

    model = made(NETWORK)
    fully_shard(model[0])
    other = FSDPMeshInfo(DeviceMesh.from_group(dist.new_group(), "cpu"), shard_mesh_dim=0)
    apart = ShardPlacementResult(Shard(0), other)
    fully_shard(model, shard_placement_fn=lambda p: apart if p is model[2].weight else None)
    said["several parameter groups"] = message(lambda: ReduceScatterProbe(model))

    setter = FSDPModule.set_custom_reduce_scatter
    model = fsdp(made(NETWORK), NETWORK)
    del FSDPModule.set_custom_reduce_scatter  # as in torch 2.8
    try:
        said["an old torch"] = message(lambda: adaptive(model))
        said["an old torch, without a probe"] = message(lambda: adaptive(model, criterion=Constant(16)).remove())
    finally:
        FSDPModule.set_custom_reduce_scatter = setter
    return said


EXPECTED = {
    "a gradient in pieces": "RuntimeError: FSDP2 reduced the gradient of head in 2 pieces",
    "a root that is not sharded": "ValueError: the parameter 2.weight is not sharded",
    "two meshes": "ValueError: the parameter 2.weight is sharded over",
    "tensor parallelism": "without tensor or expert parallelism",
    "parameters that the optimizer lacks": "the optimizer does not hold 2.weight, 2.bias",
    "no sync at all": "gradient_sync must be one of each, last or None, got 'never'",
    "a factor of zero": "gradient_divide_factor must be positive, got 0.0",
    "sync at each under DDP": "gradient_sync='each' is for FSDP2",
    "an unsharded model": "is not sharded: apply torch.distributed.fsdp.fully_shard first",
    "a plain model": "2 processes are running, but the model is a plain Sequential",
    "the hook of a plain model": "CommHookProbe needs a model in DistributedDataParallel, got a Sequential",
    "PowerSGD": "use plain_when_probed=True",
    "a second hook": "the DDP model has a communication hook already",
    "a sparse gradient": "CommHookProbe does not measure sparse gradients: use MicroBatchProbe",
    "the loss of another model": "RuntimeError: no gradient was reduced in this step",
    "several parameter groups": "the unit at the root (FSDPSequential) has several parameter groups",
    "an old torch": "use torch 2.9 or newer",
}
ACCEPTED = (
    "a unit that runs twice",
    "a loss in chunks",
    "parameters that are frozen",
    "an old torch, without a probe",
)


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    for said in run_ranks(refusals, 2, tmp_path, timeout=150):
        for name, text in EXPECTED.items():
            assert text in said.pop(name), name
        assert said == dict.fromkeys(ACCEPTED, "")


def single(rank: int) -> dict[str, Any]:
    """What needs one rank only."""
    found: dict[str, Any] = {}
    model = fsdp(made(NETWORK), NETWORK)
    found["one part"] = message(lambda: adaptive(model, gradient_sync="last"))

    # After an evaluation the root still holds whole parameters.
    model = fsdp(made(NETWORK), NETWORK)
    parameters = list(model.parameters())
    with torch.no_grad():
        model(torch.zeros(2, 6))
    found["unsharded by an evaluation"] = isinstance(next(iter(model[2].parameters())), DTensor)
    batches = adaptive(model, parameters=parameters)
    found["after an evaluation"] = batches.plan.num_parts
    batches.remove()

    # A part of a model that is sharded, and a holder that is not.
    model = Holder(fsdp(made(NETWORK), NETWORK))
    held = Case(lambda: Holder(NETWORK.make()))
    for sync, sizes in (("each", SIZES), ("last", SIZES)):
        moments = measured(model, ReduceScatterProbe(model), held, sizes, sync=sync)
        found[f"held, {sync}"] = tuple(moments), tuple(part_by_part(held, sizes, 1, joined=sync == "last"))

    # Nothing keeps a probe, or a model, alive.
    for name, wrap, make in (("FSDP2", fsdp, ReduceScatterProbe), ("DDP", ddp, CommHookProbe)):
        model = wrap(made(NETWORK), NETWORK)
        probe = make(model)
        measured(model, probe, NETWORK, SIZES)
        probe.remove()
        watched = [weakref.ref(model), weakref.ref(probe)]
        del model, probe
        gc.collect()
        found[f"alive, {name}"] = [each() is not None for each in watched]

    # Deaf after remove(), and again of use.
    model = ddp(made(NETWORK), NETWORK)
    probe = CommHookProbe(model)
    first = measured(model, probe, NETWORK, SIZES)
    probe.remove()
    found["used again"] = [(each.part_sq, each.grad_sq) for each in (first, measured(model, probe, NETWORK, SIZES))]
    return found


def test_on_one_rank(tmp_path: Path) -> None:
    (found,) = run_ranks(single, 1, tmp_path)
    assert "gradient_sync='last' on a single rank leaves one part" in found["one part"]
    assert found["unsharded by an evaluation"] is False
    assert found["after an evaluation"] == 4
    for sync in ("each", "last"):
        check(*(GradientMoments(*numbers) for numbers in found[f"held, {sync}"]))
    assert found["alive, FSDP2"] == [False, False]
    assert found["alive, DDP"] == [False, False]
    first, again = found["used again"]
    assert again == pytest.approx(first, rel=1e-5)  # DDP sorts its buckets anew after the first backward
