"""Does everything that runs differently on a GPU do there what it does elsewhere? One command, which checks itself.

    python benchmarks/gpu_checks.py                   # one GPU, under nine minutes
    python benchmarks/gpu_checks.py --device cpu      # two minutes: the same checks, and nothing is saved
    python benchmarks/gpu_checks.py --only float16    # one of them

Each check runs in a process of its own, since an error on a device spoils all that comes after it in the same process.
The page says for each what was compared and how far it was off, or how it failed. A check that finds no time left is
listed as not run. What the probes cost on a GPU, and where the host waits, `probes_gpu.py` measures.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _harness import Machine, Table, publish
from probes_gpu import endless
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import TensorDataset

import adabatch
from adabatch.adaptive.options import EngineOptions, Guard, Measure
from adabatch.batch.moments import GradientMoments
from adabatch.optim import KFAC, Shampoo
from adabatch.optim.products import check_bfloat16
from adabatch.optim.shampoo import leading
from adabatch.probes import CommHookProbe

QUESTION = "Does everything that runs differently on a GPU do there what it does elsewhere?"
BUDGET = 520.0
"""Seconds for all checks together."""
LONGEST = 150.0
"""Seconds for one check, with its compilations."""
MICRO_BATCH, ACCUMULATION = 8, 4
FEATURES, CLASSES = 24, 10
WIDE = 384
"""A width at which the statistics of a batch of 64 have a steep spectrum."""
ROUNDED = 0.012
"""Largest error of a statistic in units of its trace, by the rounding of both factors and of the sums to bfloat16."""


class Missing(Exception):
    """What a check needs is not there."""


# --- a small task ----------------------------------------------------------------------------------------------------


def network(device: torch.device, *, dropout: float = 0.0) -> nn.Module:
    """The same weights at each call, on any device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(FEATURES, 64),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(64, 64),
            nn.GELU(),
            nn.Linear(64, CLASSES),
        )
    return model.to(device)


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(512, FEATURES, generator=generator)
    labels = (x @ torch.randn(FEATURES, CLASSES, generator=generator)).argmax(1)
    return TensorDataset(x, labels)


def loss_of(model: nn.Module, batch: Any, device: torch.device) -> Tensor:
    x, labels = (each.to(device) for each in batch)
    kind = next(model.parameters()).dtype
    return F.cross_entropy(model(x.to(kind)).to(torch.promote_types(kind, torch.float32)), labels)


def adaptive(model: nn.Module, optimizer: Optimizer, *, grows: bool = True, **options: Any) -> adabatch.AdaptiveBatch:
    size = MICRO_BATCH * ACCUMULATION
    return adabatch.AdaptiveBatch(
        model,
        optimizer,
        adabatch.NormTest(eta=0.5) if grows else adabatch.Constant(size),
        micro_batch_size=MICRO_BATCH,
        limits=adabatch.Limits(min=size, max=8 * size) if grows else None,
        **options,
    )


def train(
    batches: adabatch.AdaptiveBatch,
    model: nn.Module,
    optimizer: Optimizer,
    device: torch.device,
    num_steps: int,
    *,
    order: Any = None,
    scaler: Any = None,
    precision: torch.dtype | None = None,
    each: Callable[[Any], None] = lambda step: None,
) -> None:
    """The loop of the README."""
    until = adabatch.steps(batches.consumed.steps + num_steps)
    for step in batches.steps(order or adabatch.GlobalOrder(data(), seed=0), until=until):
        for batch in step:
            with nullcontext() if precision is None else torch.autocast(device.type, dtype=precision):
                loss = loss_of(model, batch, device)
            step.backward(loss)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
        each(step)


def measured(model: nn.Module, device: torch.device, **options: Any) -> list[GradientMoments]:
    """What three steps of a constant batch measure, at a learning rate of 0."""
    optimizer = SGD(model.parameters(), lr=0.0)
    found: list[GradientMoments] = []
    keywords = {name: options.pop(name) for name in ("scaler", "precision") if name in options}
    batches = adaptive(model, optimizer, grows=False, measure=Measure(monitor=True), **options)
    train(batches, model, optimizer, device, 3, each=lambda step: found.append(step.moments), **keywords)
    return found


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().cpu() for p in model.parameters()])


def off_by(found: Iterable[GradientMoments], right: Iterable[GradientMoments]) -> float:
    """The largest relative difference of noise and of the squared norm."""
    pairs = list(zip(found, right, strict=True))
    assert pairs, "nothing was measured"
    return max(
        abs(getattr(a, name) / getattr(b, name) - 1) for a, b in pairs for name in ("noise", "grad_sq", "part_sq")
    )


def at_most(value: float, most: float) -> str:
    assert value <= most, f"off by {value:.1e}, allowed {most:.0e}"
    return f"off by {value:.1e} at most (allowed {most:.0e})"


def to_the_bit(found: Tensor, right: Tensor) -> None:
    assert torch.equal(found, right), f"weights differ by {(found - right).abs().max():.1e}"


@contextmanager
def alone(device: torch.device) -> Iterator[None]:
    """A process group of this process only."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


# --- the checks: each returns what it found, and raises if that is wrong ---------------------------------------------


def optimizers_on(device: torch.device) -> dict[str, Callable[[Any], Optimizer]]:
    found: dict[str, Callable[[Any], Optimizer]] = {
        "SGD": partial(SGD, lr=0.1, momentum=0.9),
        "AdamW": partial(AdamW, lr=0.01),
        "AdamW, foreach": partial(AdamW, lr=0.01, foreach=True),
        "AdamW, fused": partial(AdamW, lr=0.01, fused=True),
    }
    if device.type == "cuda":
        # a tensor, since a captured step would have a number of Python in it for good
        found["AdamW, capturable"] = lambda p: AdamW(p, lr=torch.tensor(0.01, device=device), capturable=True)
    return found


def by_hand(device: torch.device) -> str:
    """A constant batch equals the loop by hand, bit for bit."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    for make in optimizers_on(device).values():
        ours, theirs = network(device), network(device)
        optimizer = make(ours.parameters())
        train(adaptive(ours, optimizer, grows=False), ours, optimizer, device, 10)
        optimizer = make(theirs.parameters())
        order, size = adabatch.GlobalOrder(data(), seed=0), MICRO_BATCH * ACCUMULATION
        for index, batch in zip(range(10 * ACCUMULATION), endless(order, MICRO_BATCH), strict=False):
            (loss_of(theirs, batch, device) * (MICRO_BATCH / size)).backward()
            if index % ACCUMULATION == ACCUMULATION - 1:
                optimizer.step()
                optimizer.zero_grad()
        to_the_bit(weights(ours), weights(theirs))
    return f"10 steps of {', '.join(optimizers_on(device))}: equal"


def rates(device: torch.device) -> str:
    """The factor on the learning rate is on during an update only, whatever the optimizer."""
    for name, make in optimizers_on(device).items():
        model = network(device)
        optimizer = make(model.parameters())
        stored = rate_of(optimizer)
        sizes: list[int] = []
        used: list[float] = []
        batches = adaptive(model, optimizer, lr_rule="sqrt", control=adabatch.Control(hold_until=None))
        # after ours, which are on by then
        optimizer.register_step_pre_hook(partial(keep_rate, used))
        train(batches, model, optimizer, device, 15, each=partial(keep_size, sizes))
        assert sizes[-1] > sizes[0], f"{name}: the batch did not grow"
        for rate, size in zip(used, sizes, strict=True):
            assert math.isclose(rate, stored * math.sqrt(size / sizes[0]), rel_tol=1e-5), f"{name}: {rate} at {size}"
        assert math.isclose(rate_of(optimizer), stored, rel_tol=1e-6), f"{name}: {rate_of(optimizer)} is stored"
    return "right in 15 steps of each optimizer, in which the batch grew"


def rate_of(optimizer: Optimizer) -> float:
    return float(optimizer.param_groups[0]["lr"])


def keep_rate(used: list[float], optimizer: Optimizer, *_: object) -> None:
    used.append(rate_of(optimizer))


def keep_size(sizes: list[int], step: Any) -> None:
    sizes.append(step.plan.global_batch_size)


def noise(device: torch.device) -> str:
    """Noise and signal equal those of gradients in float64 on the CPU."""
    found = measured(network(device), device)
    right = measured(network(torch.device("cpu")).double(), torch.device("cpu"))
    return at_most(off_by(found, right), 1e-4)


def per_example(device: torch.device) -> str:
    """Norms of single examples' gradients equal those on the CPU in float64."""

    def one(where: torch.device, kind: torch.dtype) -> list[GradientMoments]:
        model = network(where).to(kind)
        return measured(model, where, probe=adabatch.PerExampleProbe(model))

    return at_most(off_by(one(device, torch.float32), one(torch.device("cpu"), torch.float64)), 1e-4)


def bfloat16(device: torch.device) -> str:
    """Under autocast to bfloat16 the noise is that of float32, up to the precision of bfloat16."""
    right = measured(network(device), device)
    return at_most(off_by(measured(network(device), device, precision=torch.bfloat16), right), 0.05)


def float16(device: torch.device) -> str:
    """With a scaler whose first factor overflows: updates are left out, numbers are unscaled, data are consumed."""
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**24)
    model = network(device)
    optimizer = SGD(model.parameters(), lr=0.0)
    found: list[GradientMoments | None] = []
    batches = adaptive(
        model, optimizer, grows=False, measure=Measure(monitor=True), engine=EngineOptions(scaler=scaler)
    )
    keep = partial(train, scaler=scaler, precision=torch.float16, each=lambda step: found.append(step.moments))
    keep(batches, model, optimizer, device, 20)
    right: list[GradientMoments] = []
    plain = network(device)
    other = SGD(plain.parameters(), lr=0.0)
    monitored = adaptive(plain, other, grows=False, measure=Measure(monitor=True))
    train(monitored, plain, other, device, 20, each=lambda step: right.append(step.moments))
    finite = [step for step, each in enumerate(found) if each is not None and math.isfinite(each.grad_sq)]
    left_out = len(found) - len(finite)
    assert 0 < left_out < 20, f"{left_out} of 20 updates were left out"
    assert batches.consumed.examples == 20 * MICRO_BATCH * ACCUMULATION
    worst = off_by([found[step] for step in finite], [right[step] for step in finite])  # type: ignore[misc]
    return f"{left_out} of 20 updates left out; {at_most(worst, 0.02)}"


def compiled(device: torch.device) -> str:
    """A compiled model is measured as the model is."""
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    model = torch.compile(network(device), backend=backend)
    assert isinstance(model, nn.Module)
    return f"{backend}: {at_most(off_by(measured(model, device), measured(network(device), device)), 1e-3)}"


def ddp(device: torch.device) -> str:
    """DDP's probes, by hooks on tensors and on its communication, measure what the plain probe does."""
    right = measured(network(device), device)
    ids = [device.index or 0] if device.type == "cuda" else None
    with alone(device):
        hooks = measured(DistributedDataParallel(network(device), device_ids=ids), device)
        model = DistributedDataParallel(network(device), device_ids=ids)
        # a rank is one part of the hook, so a single rank has the norm and no spread
        norm = measured(model, device, probe=CommHookProbe(model))
    by_hook = max(abs(a.grad_sq / b.grad_sq - 1) for a, b in zip(norm, right, strict=True))
    return at_most(max(off_by(hooks, right), by_hook), 1e-5)


def fsdp2(device: torch.device) -> str:
    """FSDP2 with parameters in bfloat16 and reduction in float32 measures what autocast to bfloat16 does."""
    right = measured(network(device), device, precision=torch.bfloat16)
    with alone(device):
        mesh = dist.device_mesh.init_device_mesh(device.type, (1,))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        model = network(device)
        for layer in model:
            if any(True for _ in layer.parameters()):
                fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        found = measured(model, device)
    return at_most(off_by(found, right), 0.1)


def deepspeed(device: torch.device) -> str:
    """ZeRO 1 and 2 measure what the plain probe does, and choose batches."""
    if find_spec("deepspeed") is None:
        raise Missing("DeepSpeed is not installed")
    import deepspeed as ds

    from adabatch.integrations.deepspeed import attach

    if device.type == "cpu":  # an operator for inference, which would be compiled first
        ds.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    right = measured(network(device), device)
    worst = 0.0
    os.environ.setdefault("LOCAL_RANK", "0")  # as its launcher sets it
    with alone(device):
        for stage in (1, 2):
            model = network(device)
            config = {
                "train_micro_batch_size_per_gpu": MICRO_BATCH,
                "zero_optimization": {"stage": stage},
                "gradient_clipping": 0.0,
                "zero_allow_untested_optimizer": True,
            }
            engine, *_ = ds.initialize(model=model, optimizer=SGD(model.parameters(), lr=0.0), config=config)
            size = MICRO_BATCH * ACCUMULATION
            batches = attach(engine, adabatch.Constant(size), measure=Measure(monitor=True))
            found: list[GradientMoments] = []
            for step in batches.steps(adabatch.GlobalOrder(data(), seed=0), until=adabatch.steps(3)):
                for batch in step:
                    step.backward(loss_of(engine, batch, device))
                engine.step()
                found.append(step.moments)
            worst = max(worst, off_by(found, right))
    return at_most(worst, 1e-4)


def checkpoints(device: torch.device) -> str:
    """A run that is resumed equals one that was not interrupted, bit for bit, dropout included."""
    torch.use_deterministic_algorithms(True, warn_only=True)

    def run(folder: Path, *lengths: int) -> Tensor:
        torch.manual_seed(3)
        for length in lengths:
            model = network(device, dropout=0.2)
            optimizer = AdamW(model.parameters(), lr=0.01)
            batches = adaptive(model, optimizer)
            order = adabatch.GlobalOrder(data(), seed=0)
            parts = {"model": model, "optimizer": optimizer, "batches": batches, "order": order}
            with adabatch.Checkpoints(folder, **parts) as saving:
                saving.load(missing_ok=True)
                train(batches, model, optimizer, device, length, order=order)
                saving.save()
            torch.manual_seed(99)  # what a new process would start from
        return weights(model)

    with tempfile.TemporaryDirectory() as folder:
        to_the_bit(run(Path(folder) / "two", 6, 6), run(Path(folder) / "one", 12))
    return "6 + 6 steps equal 12"


def memory(device: torch.device) -> str:
    """A micro-batch that does not fit is tried, given up on all ranks, and steps accumulate instead."""
    model = network(device)
    optimizer = SGD(model.parameters(), lr=0.01)

    def trial(batch: Any) -> Tensor:
        if len(batch[0]) > 2 * MICRO_BATCH:
            torch.empty(1 << 60, dtype=torch.uint8, device=device)  # no machine has it
        return loss_of(model, batch, device)

    size = MICRO_BATCH * ACCUMULATION
    batches = adabatch.AdaptiveBatch(
        model,
        optimizer,
        adabatch.Stages(size, [adabatch.Stage(adabatch.steps(2), 4 * size)]),
        micro_batch_size=MICRO_BATCH,
        max_micro_batch_size=64,
        guard=Guard(trial=trial),
    )
    taken: list[tuple[int, int]] = []
    train(batches, model, optimizer, device, 4, each=partial(keep_plan, taken))
    assert taken[-1] == (2 * MICRO_BATCH, 2 * ACCUMULATION), f"the last plan was {taken[-1]}"
    return f"{taken[-1][1]} micro-batches of {taken[-1][0]} in the place of {ACCUMULATION} of {4 * MICRO_BATCH}"


def keep_plan(taken: list[tuple[int, int]], step: Any) -> None:
    taken.append((step.plan.micro_batch_size, step.plan.accumulation_steps))


def shampoo(device: torch.device) -> str:
    """Steps of Shampoo, whose roots come from eigenvalues, are those of the CPU in float64."""
    moved = []
    for where, kind in ((device, torch.float32), (torch.device("cpu"), torch.float64)):
        model = network(where).to(kind)
        start = weights(model).double()
        optimizer = Shampoo(model.parameters(), lr=0.01)
        train(adaptive(model, optimizer, grows=False), model, optimizer, where, 3)
        moved.append(weights(model).double() - start)
    return at_most(float((moved[0] - moved[1]).norm() / moved[1].norm()), 0.01)


def leading_roots(device: torch.device) -> str:
    """Shampoo's updates by leading eigenvectors, followed over refreshes, are those by all of them in float64."""
    right = wide(torch.device("cpu")).double()
    found = wide(device)
    exact, ours = (Shampoo(model.parameters(), lr=0.05, refresh_warmup=4, refresh_every=3) for model in (right, found))
    images, labels = data().tensors
    middle, its_copy = right.get_parameter("2.weight"), found.get_parameter("2.weight")
    state = ours.state[its_copy]
    worst, followed = 0.0, 0
    for rows in torch.arange(20 * 64).remainder(512).split(64):
        exact.zero_grad()
        F.cross_entropy(right(images[rows].double()), labels[rows]).backward()
        # Of one gradient, so that the updates differ by the roots alone, and not by where earlier ones have led.
        for p, theirs in zip(found.parameters(), right.parameters(), strict=True):
            p.detach().zero_()
            p.grad = theirs.grad.to(p)  # type: ignore[union-attr]
        before = middle.detach().clone()
        known = {side: kept_rows(state, side) for side in ("left", "right")}
        exact.step()
        ours.step()
        moved = middle.detach() - before
        worst = max(worst, float((its_copy.detach().cpu().double() - moved).norm() / moved.norm()))
        followed += sum(was_followed(state, side, of_old) for side, of_old in known.items())
    ranks = [int(state[f"{side}_rank"]) for side in ("left", "right")]
    assert all(0 < rank <= WIDE // 4 for rank in ranks), f"the ranks of the roots are {ranks}: not the leading ones"
    assert followed >= 12, f"eigenvectors were followed in {followed} refreshes of both sides"
    # An eigenvalue that the damping hides changes the root of one side by at most 0.1 of its exponent of 1/4.
    return f"ranks {ranks[0]} and {ranks[1]} of {WIDE}, followed {followed} times; {at_most(worst, 2 * 0.1 * 0.25)}"


def wide(device: torch.device) -> nn.Module:
    """A network with a matrix whose statistics fall steeply on both sides."""
    torch.manual_seed(0)
    layers = nn.Linear(FEATURES, WIDE), nn.GELU(), nn.Linear(WIDE, WIDE), nn.GELU(), nn.Linear(WIDE, CLASSES)
    return nn.Sequential(*layers).to(device)


def kept_rows(state: dict[str, Tensor], side: str) -> Tensor:
    """The rows of a root by leading eigenvectors; none of a root by all of them."""
    return state[f"{side}_root"][:, : int(state[f"{side}_rank"])].clone()


def was_followed(state: dict[str, Tensor], side: str, rows: Tensor) -> bool:
    """Whether the last step made new rows, and these eigenvectors of the old ones sufficed for it."""
    new = kept_rows(state, side)
    if not rows.shape[1] or not new.shape[1] or torch.equal(new, rows):
        return False
    return leading.followed(state[side], rows, epsilon=0.01, seed=int(state["step"])) is not None


def bfloat16_products(device: torch.device) -> str:
    """Statistics from products in bfloat16 are float32, and off from float64 by at most what rounding explains."""
    try:
        check_bfloat16(torch.float32, device, "the check")
    except ValueError as error:
        raise Missing(str(error)) from error
    makes: tuple[Callable[..., Optimizer], ...] = (
        lambda model, **options: Shampoo(model.parameters(), lr=0.05, **options),
        # Without draws, which differ between devices.
        lambda model, **options: KFAC(model.parameters(), model, fisher="gauss-newton", **options),
    )
    worst = 0.0
    for found, right in (pair for make in makes for pair in both_statistics(make, device)):
        assert found.dtype is torch.float32, f"a statistic is {found.dtype}"
        trace = right.diagonal(dim1=-2, dim2=-1).sum(-1)
        off = torch.linalg.matrix_norm(found.cpu().double() - right, 2)
        worst = max(worst, float((off / trace).max()))
    assert worst > 1e-6, "the products were not computed from bfloat16"
    return at_most(worst, ROUNDED)


def both_statistics(make: Callable[..., Optimizer], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Each statistic from products in bfloat16 on a device, and in float64 on the CPU, along the same weights."""
    right, found = wide(torch.device("cpu")).double(), wide(device)
    exact, ours = make(right), make(found, bfloat16_products=True)
    pairs = list(zip(found.parameters(), right.parameters(), strict=True))
    images = data().tensors[0]
    for rows in torch.arange(8 * 64).split(64):
        for model, optimizer in ((right, exact), (found, ours)):
            optimizer.zero_grad()
            outputs = model(images[rows].to(next(model.parameters())))
            if isinstance(optimizer, KFAC):
                optimizer.observe(outputs)
            outputs.square().mean().backward()
        exact.step()
        ours.step()
        with torch.no_grad():
            for p, theirs in pairs:
                p.copy_(theirs)
    for p, theirs in pairs:
        for key in {"left", "right", "input_moment", "output_moment"} & ours.state[p].keys():
            yield ours.state[p][key], exact.state[theirs][key]


def kfac(device: torch.device) -> str:
    """K-FAC, which draws labels on the device, halves the loss in 30 steps."""
    model = network(device)
    optimizer = KFAC(model.parameters(), model, lr=0.01, kl_clip=1e-3)
    batches = adaptive(model, optimizer, grows=False)
    losses: list[float] = []
    for step in batches.steps(adabatch.GlobalOrder(data(), seed=0), until=adabatch.steps(30)):
        for x, labels in step:
            outputs = model(x.to(device))
            optimizer.observe(outputs)
            loss = F.cross_entropy(outputs, labels.to(device))
            step.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2, f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f}"
    return f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f}"


CHECKS: dict[str, Callable[[torch.device], str]] = {
    "loop by hand": by_hand,
    "learning rates": rates,
    "noise": noise,
    "per-example": per_example,
    "bfloat16": bfloat16,
    "float16": float16,
    "compiled": compiled,
    "DDP": ddp,
    "FSDP2": fsdp2,
    "DeepSpeed": deepspeed,
    "checkpoints": checkpoints,
    "memory": memory,
    "Shampoo": shampoo,
    "Shampoo, leading": leading_roots,
    "bfloat16 products": bfloat16_products,
    "K-FAC": kfac,
}


# --- one after the other ---------------------------------------------------------------------------------------------


def result_of(name: str, device: torch.device) -> tuple[str, str]:
    """ "passed", "FAILED" or "not run", and what was found."""
    try:
        return "passed", CHECKS[name](device)
    except Missing as missing:
        return "not run", str(missing)
    except Exception as error:
        traceback.print_exc()
        return "FAILED", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def in_a_process(name: str, device: str, seconds: float) -> tuple[str, str]:
    """The same, in a new process."""
    command = [sys.executable, __file__, "--check", name, "--device", device]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return "FAILED", f"not over after {seconds:.0f} s"
    try:
        status, found = json.loads(ended.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        sys.stderr.write(ended.stderr)
        return "FAILED", f"its process ended with status {ended.returncode} and no result"
    if status == "FAILED":
        sys.stderr.write(ended.stderr)
    return status, found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", choices=CHECKS, action="append", help="this check; again for another one")
    parser.add_argument("--check", choices=CHECKS, help=argparse.SUPPRESS)
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here: --device cpu runs the same checks on the CPU")
    if options.check is not None:
        device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
        print(json.dumps(result_of(options.check, device)))
        return 0
    machine, start = Machine.here(), time.monotonic()
    rows: list[tuple[str, str, str, str]] = []
    for name in options.only or CHECKS:
        left = BUDGET - (time.monotonic() - start)
        began = time.monotonic()
        status, found = (
            ("not run", "no time left") if left < 5 else in_a_process(name, options.device, min(left, LONGEST))
        )
        rows.append((name, (CHECKS[name].__doc__ or "").split("\n")[0], status, found))
        print(f"{name}: {status}, {found} ({time.monotonic() - began:.0f} s)", file=sys.stderr, flush=True)
    failed = [name for name, _, status, _ in rows if status == "FAILED"]
    not_run = [name for name, _, status, _ in rows if status == "not run"]
    publish(
        "gpu_checks",
        question=QUESTION,
        machine=machine,
        tables=[Table("Checks", ("check", "what must hold", "result", "what was found"), rows)],
        findings=[
            f"{len(rows) - len(failed) - len(not_run)} of {len(rows)} passed.",
            *([f"Failed: {', '.join(failed)}."] if failed else []),
            *([f"Not run: {', '.join(not_run)}."] if not_run else []),
        ],
        data={"checks": [list(row) for row in rows], "device": options.device},
        save=not (options.no_save or options.only or options.device == "cpu"),
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
