"""Width plans: the table of section-by-section rules as numbers, names under every wrapper, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from adabatch.optim import KFAC, mup
from adabatch.recipes.models import Transformer


class Net(nn.Module):
    """A layer of each role; features, classes and vocabulary are as large as the narrow width, and no width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, width)
        self.conv = nn.Conv2d(3, width, 3)
        self.norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, 2 * width)
        self.head = nn.Linear(2 * width, 64)
        self.scale = nn.Parameter(torch.ones(()))


def on_meta(make: Callable[..., nn.Module], width: int) -> nn.Module:
    with torch.device("meta"):
        return make(width)


def plan_of(make: Callable[..., nn.Module] = Net, width: int = 256, base: int = 64, **overrides: Any) -> mup.Plan:
    return mup.plan(on_meta(make, width), on_meta(make, base), **overrides)


def lrs(plan: mup.Plan, law: mup.Law) -> dict[str, float]:
    return {name: law.lr(entry) for name, entry in plan.entries.items() if law.takes(entry)}


# --- roles and laws ---------------------------------------------------------------------------------------------------


def test_roles_and_ratios_come_from_what_differs() -> None:
    entries = plan_of().entries
    assert {name: (e.role, e.r_in, e.r_out) for name, e in entries.items()} == {
        "scale": ("vector", 1, 1),
        "embed.weight": ("input", 1, 4),
        "conv.weight": ("input", 1, 4),
        "conv.bias": ("vector", 1, 4),
        "norm.weight": ("vector", 1, 4),
        "norm.bias": ("vector", 1, 4),
        "hidden.weight": ("hidden", 4, 4),
        "hidden.bias": ("vector", 1, 4),
        "head.weight": ("output", 4, 1),
        "head.bias": ("vector", 1, 1),
    }
    assert entries["conv.weight"].fan_in == 27
    assert {name: entries[name].init for name in ("embed.weight", "hidden.weight", "head.weight")} == {
        "embed.weight": 1, "hidden.weight": 0.5, "head.weight": 0.25
    }  # fmt: skip


# Multipliers for input, hidden, output and bias at four times the width: exponents of Ishikawa and Karakida's table and
# its supplements, written out.
ROWS: list[tuple[mup.Law, float, float, float, float]] = [
    (mup.SGDLaw(), 4, 1, 1 / 4, 4),
    (mup.AdamLaw(), 1, 1 / 4, 1 / 4, 1),
    (mup.ShampooLaw(), 2, 1, 1 / 2, 2),
    (mup.ShampooLaw(exponent=0.5), 1, 1, 1, 2),
    (mup.KFACLaw(), 1, 1, 1, 1),
    (mup.KFACLaw(exponents=(0.0, 1.0)), 4, 4, 1, 4),
    (mup.KFACLaw(exponents=(1.0, 0.0)), 1, 1 / 4, 1 / 4, 1),
    (mup.KFACLaw(exponents=(0.0, 0.0)), 4, 1, 1 / 4, 4),
    (mup.ShampooLaw(block_size=16), 1, 1 / 4, 1 / 4, 1),
    (mup.ShampooLaw(exponent=0.5, block_size=16), 1 / 4, 1 / 16, 1 / 4, 1),
]


@pytest.mark.parametrize(("law", "input_", "hidden", "output", "bias"), ROWS, ids=str)
def test_multipliers_of_the_learning_rate(
    law: mup.Law, input_: float, hidden: float, output: float, bias: float
) -> None:
    found = lrs(plan_of(), law)
    names = ("embed.weight", "hidden.weight", "head.weight", "hidden.bias")
    assert [found[name] for name in names] == pytest.approx([input_, hidden, output, bias])


def test_a_fixed_number_of_blocks_has_the_law_of_no_blocks() -> None:
    assert lrs(plan_of(), mup.ShampooLaw(block_size=4096)) == lrs(plan_of(), mup.ShampooLaw())


@pytest.mark.parametrize("adjust", [None, "original", "match_rms_adamw"])
def test_muons_rate_and_torchs_adjustment_make_the_square_root_together(adjust: Any) -> None:
    from torch.optim._muon import _adjust_lr  # what torch 2.9 and newer multiply the rate by

    for name, entry in plan_of(width=1024).entries.items():
        law = mup.MuonLaw(adjust)
        if law.takes(entry):
            ours = law.lr(entry) * _adjust_lr(1.0, adjust, torch.Size(entry.shape))
            base = _adjust_lr(1.0, adjust, torch.Size(entry.base_shape))
            assert ours / base == pytest.approx((entry.r_out / entry.r_in) ** 0.5), name


@pytest.mark.parametrize(
    ("law", "expected"),
    [
        (mup.AdamLaw(), {"eps": [1e-3 / 4, 1e-3 / 4, 1e-3]}),
        (mup.MuonLaw(), {"eps": [1e-3 / 2, 1e-3, 2e-3]}),
        (mup.ShampooLaw(), {"epsilon": [1e-3] * 3}),
        (mup.ShampooLaw(relative=False), {"epsilon": [1e-3 / 4, 1e-3, 4e-3]}),
        (mup.ShampooLaw(relative=False, block_size=16), {"epsilon": [1e-3 / 16, 1e-3 / 16, 1e-3]}),
        (mup.KFACLaw(), {"damping": [1e-3] * 3, "fan_in_ratio": [1, 4, 4], "fan_out_ratio": [4, 4, 1]}),
    ],
    ids=str,
)
def test_multipliers_of_the_damping(law: mup.Law, expected: dict[str, list[float]]) -> None:
    entries = plan_of().entries
    names = ("embed.weight", "hidden.weight", "head.weight")
    found = [law.options(entries[name], 1e-3) for name in names]
    assert {key: [each[key] for each in found] for key in expected} == {
        key: pytest.approx(values) for key, values in expected.items()
    }


def test_tied_weights_as_input_have_the_law_of_a_readout_with_a_multiplier() -> None:
    """Logits x 1/m turn the readout's rate into x m^2 (SGD), m (Adam), m^(2 - 4e) (Shampoo), 1 (K-FAC)."""
    plan = plan_of(lambda width: Transformer(width=width, num_heads=4, tied=True), roles={"token.weight": "input"})
    entry, m = plan.entries["token.weight"], 4
    readout = plan_of(lambda width: Transformer(width=width, num_heads=4)).entries["head.weight"]
    assert entry.tied == ("head.weight",)
    for law, power in ((mup.SGDLaw(), 2), (mup.AdamLaw(), 1), (mup.ShampooLaw(), 1), (mup.KFACLaw(), 0)):
        assert law.lr(entry) == pytest.approx(law.lr(readout) * m**power)


def test_roles_and_layouts_can_be_given_by_pattern() -> None:
    class Odd(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.features = nn.Linear(3 * width, width)
            self.positions = nn.Parameter(torch.zeros(1, 16, width))
            self.scanned = nn.Parameter(torch.zeros(12, 2 * width, width))
            self.square = nn.Parameter(torch.zeros(width, width))
            self.classes = nn.Linear(width, width // 2)

    plan = plan_of(
        Odd,
        roles={"feat*.weight": "input", "classes.weight": "output"},
        layouts={"positions": "stack stack out", "scanned": "stack out in"},
    )
    ratios = {name: (e.role, e.r_in, e.r_out) for name, e in plan.entries.items() if not name.endswith("bias")}
    assert ratios == {
        "positions": ("vector", 1, 4),
        "scanned": ("hidden", 4, 4),
        "square": ("hidden", 4, 4),
        "features.weight": ("input", 1, 4),
        "classes.weight": ("output", 4, 1),
    }
    assert "scanned" in plan.left_by("shampoo")
    assert "scanned" in plan.taken_by("adamw")


# --- groups -----------------------------------------------------------------------------------------------------------


def test_at_the_base_width_everything_is_one_and_training_the_same_bitwise() -> None:
    plan = plan_of().at(on_meta(Net, 64))
    assert all(entry.init == 1 for entry in plan.entries.values())
    for law in (
        mup.SGDLaw(),
        mup.AdamLaw(),
        mup.MuonLaw(),
        mup.ShampooLaw(),
        mup.ShampooLaw(block_size=16),
        mup.KFACLaw(),
    ):
        assert set(lrs(plan, law).values()) == {1.0}
    ours, theirs = Net(64), Net(64)
    theirs.load_state_dict(ours.state_dict())
    optimizers = [
        torch.optim.AdamW(plan.groups(ours, "adamw", lr=0.01, weight_decay=0.1)),
        torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=0.1),
    ]
    for model, optimizer in zip((ours, theirs), optimizers, strict=True):
        for _ in range(3):
            optimizer.zero_grad()
            sum((p * p).sum() for p in model.parameters()).backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_groups_hold_every_parameter_once_and_few_of_them() -> None:
    model = Transformer(width=256, num_heads=16)
    groups = plan_of(partial(_transformer, num_heads=4)).groups(model, "sgd", lr=0.2, weight_decay=0.1)
    params = [p for group in groups for p in group["params"]]
    assert {id(p) for p in params} == {id(p) for p in model.parameters()}
    assert len(params) == len(list(model.parameters()))
    assert sorted(group["lr"] for group in groups) == [0.05, 0.2, 0.8]
    # the share that decays in a step is the same everywhere
    assert [group["lr"] * group["weight_decay"] for group in groups] == pytest.approx([0.02] * 3)


def _transformer(width: int, num_heads: int) -> Transformer:
    return Transformer(width=width, num_heads=num_heads)


def test_decay_over_width() -> None:
    model = Net(256)
    groups = plan_of().groups(model, "adamw", lr=0.2, weight_decay=0.1, decay_scaling="1/width")
    shares = {group["mup_lr"]: group["lr"] * group["weight_decay"] for group in groups}
    assert shares == pytest.approx({1.0: 0.02, 0.25: 0.005})


def test_a_tensor_rate_and_frozen_parameters() -> None:
    model = Net(256)
    model.hidden.weight.requires_grad_(False)
    groups = plan_of().groups(model, "sgd", lr=torch.tensor(0.5))
    assert all(isinstance(group["lr"], Tensor) for group in groups)
    assert len({id(group["lr"]) for group in groups}) == len(groups)  # a scheduler fills them in place
    assert not any(p is model.hidden.weight for group in groups for p in group["params"])
    model.norm.weight.requires_grad_(False)
    left = plan_of().groups(model, "adamw", lr=0.1, only=plan_of().left_by("muon"))
    assert not any(p is model.norm.weight for group in left for p in group["params"])
    assert [group["params"] for group in plan_of().groups(model, "sgd", lr=0.1, only="head.bias")] == [
        [model.head.bias]
    ]


def test_muon_and_adamw_share_a_model() -> None:
    muon = getattr(torch.optim, "Muon", None)
    if muon is None:
        pytest.skip("torch.optim.Muon came with torch 2.9")
    model, plan = Net(256), plan_of()
    groups = plan.groups(model, "muon", lr=0.02, only=plan.taken_by("muon"))
    rest = plan.groups(model, "adamw", lr=1e-3, only=plan.left_by("muon"))
    muon(groups)
    assert sum(len(g["params"]) for g in (*groups, *rest)) == len(list(model.parameters()))


def test_the_plan_goes_through_json_and_prints() -> None:
    plan = plan_of(roles={"head.weight": "output"})
    assert mup.Plan.from_json(plan.to_json()) == plan
    lines = str(plan).splitlines()
    assert len(lines) == 1 + len(plan.entries)
    (head,) = [line.split() for line in lines if line.startswith("head.weight")]
    assert head == ["head.weight", "64x512", "64x128", "output", "4", "1", "0.25", "0.25", "0.25", "0.5", "0.5", "1"]


# --- names ------------------------------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """A model whose own parts have wrappers' names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.module = nn.Linear(8, width)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.module(x))


@pytest.fixture
def one_rank(tmp_path: Path) -> Any:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_names_survive_every_wrapper() -> None:
    plan = plan_of(Wrapped, width=32, base=16)
    names = ["module.weight", "module.bias", "head.weight", "head.bias"]
    assert list(plan.entries) == names

    compiled = partial(torch.compile, backend="eager")

    def checkpointed(model: Wrapped) -> nn.Module:
        model.module = checkpoint_wrapper(model.module)
        return model

    def partly_compiled(model: Wrapped) -> nn.Module:
        model.head = compiled(model.head)
        return model

    def sharded(model: Wrapped) -> nn.Module:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        return model

    wrappers: list[Callable[[Any], nn.Module]] = [
        DistributedDataParallel,
        compiled,
        lambda model: compiled(DistributedDataParallel(model)),
        lambda model: DistributedDataParallel(compiled(model)),
        AveragedModel,
        checkpointed,
        partly_compiled,
        lambda model: DistributedDataParallel(checkpointed(model)),
        sharded,
        lambda model: compiled(sharded(checkpointed(model))),
    ]
    for wrap in wrappers:
        model = wrap(Wrapped(32))
        assert list(mup.named_parameters(model)) == names
        assert sum(len(group["params"]) for group in plan.groups(model, "adamw", lr=0.1)) == 4
        mup.init_(model, plan)
        readout = mup.named_parameters(model)["head.weight"].detach()
        assert float(torch.linalg.vector_norm(readout)) == pytest.approx((4 * 32) ** 0.5 * 4 / 32, rel=1e-5)


# --- init and guard ---------------------------------------------------------------------------------------------------


def test_init_scales_readouts_only_and_twice_is_once() -> None:
    torch.manual_seed(0)
    model, plan = Net(256), plan_of()
    before = copy.deepcopy(model.state_dict())
    mup.init_(model, plan)
    once = copy.deepcopy(model.state_dict())
    mup.init_(model, plan)
    changed = [name for name, value in once.items() if not torch.equal(value, before[name])]
    assert changed == ["head.weight"]
    # sqrt(128) / 512: 1/sqrt(fan_in) at the base width, divided by r_in
    assert once["head.weight"].double().square().mean().sqrt().item() == pytest.approx(128**0.5 / 512, rel=1e-6)
    torch.testing.assert_close(model.head.weight.detach(), once["head.weight"], rtol=1e-6, atol=0)
    assert not before["head.weight"].equal(once["head.weight"])


def test_init_of_a_model_with_one_deviation_and_a_zero_readout() -> None:
    torch.manual_seed(0)
    model, plan = Net(256), plan_of()
    nn.init.zeros_(model.head.weight)
    mup.init_(model, plan, std={"*": 0.02, "embed*": 1.0})
    rms = {name: p.detach().square().mean().sqrt().item() for name, p in model.named_parameters() if p.dim() > 1}
    expected = {"embed.weight": 1.0, "conv.weight": 0.02, "hidden.weight": 0.01, "head.weight": 0.005}
    assert rms == pytest.approx(expected, rel=1e-5)
    assert model.norm.weight.eq(1).all()


def test_attention_scale() -> None:
    assert mup.attention_scale(64, 64) == 1 / 8
    assert mup.attention_scale(256, 64) == 1 / 32
    with pytest.raises(ValueError, match="heads are 1 or more wide"):
        mup.attention_scale(0, 64)


SCHEDULERS = torch.optim.lr_scheduler


@pytest.mark.parametrize(
    ("make", "kept"),
    [
        (lambda o: SCHEDULERS.LambdaLR(o, lambda step: 1 / (1 + step)), True),
        (lambda o: SCHEDULERS.CosineAnnealingLR(o, 10), True),
        (lambda o: SCHEDULERS.LinearLR(o, 0.01, total_iters=3), True),
        (lambda o: SCHEDULERS.OneCycleLR(o, [g["lr"] for g in o.param_groups], total_steps=9), True),
        (lambda o: SCHEDULERS.CosineAnnealingLR(o, 10, eta_min=1e-3), False),
        (lambda o: SCHEDULERS.OneCycleLR(o, 0.1, total_steps=9), False),
        (lambda o: SCHEDULERS.CyclicLR(o, 0.01, 0.1, cycle_momentum=False), False),
    ],
)
def test_schedulers_that_set_rates_are_refused(make: Any, kept: bool) -> None:
    model = Net(256)
    optimizer = torch.optim.SGD(plan_of().groups(model, "sgd", lr=0.1), momentum=0.9)
    handle = mup.guard(optimizer)
    scheduler = make(optimizer)

    def steps() -> None:
        for _ in range(4):
            optimizer.step()
            scheduler.step()

    if kept:
        steps()
        return
    with pytest.raises(ValueError, match="undone the plan's ratios"):
        steps()
    handle.remove()
    steps()


def test_groups_of_another_rate_are_free_and_nan_is_refused() -> None:
    model, plan = Net(256), plan_of()
    groups = plan.groups(model, "adamw", lr=0.1, only=["*.weight"])
    others = plan.groups(model, "adamw", lr=0.01, only=["*.bias", "scale"])
    optimizer = torch.optim.AdamW([*groups, *others])
    for group in optimizer.param_groups:
        if group["mup_base_lr"] == 0.01:
            group["lr"] = 0.5 * group["lr"]
    mup.check_ratios(optimizer)
    optimizer.param_groups[0]["lr"] = float("nan")
    with pytest.raises(ValueError, match="parameter group"):
        mup.check_ratios(optimizer)


def test_kfac_refuses_such_schedulers_but_not_the_rates_of_what_it_leaves_to_adamw() -> None:
    def made(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(4, width), nn.Linear(width, width), nn.Linear(width, 3))

    def step(optimizer: KFAC) -> None:
        outputs = model(torch.ones(8, 4))
        optimizer.observe(outputs)
        outputs.logsumexp(1).mean().backward()
        optimizer.step()

    model = made(16)
    groups = mup.plan(model, made(4)).groups(model, mup.KFACLaw(exponents=(0.0, 1.0)), lr=0.1)
    optimizer = KFAC(groups, model, exponents=(0.0, 1.0), others="adamw", exclude=["1"])
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.4, 1e-3, 1e-3, 0.1, 0.1])
    step(optimizer)
    SCHEDULERS.OneCycleLR(optimizer, 0.1, total_steps=9, cycle_momentum=False)
    with pytest.raises(ValueError, match="undone the plan's ratios"):
        step(optimizer)


# --- bad input --------------------------------------------------------------------------------------------------------


def tied(width: int) -> nn.Module:
    return Transformer(width=width, num_heads=4, tied=True)


class Heads(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 4)


class Positions(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(16, width))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plan_of(width=64), "same width as the model"),
        (lambda: mup.plan(on_meta(Net, 64), on_meta(Wrapped, 32)), "another architecture.*also .*lacks"),
        (lambda: plan_of(lambda w: nn.Conv2d(w, w, w // 32)), "differs in a kernel"),
        (lambda: plan_of(tied), "token.weight, head.weight share a weight .* untie"),
        (lambda: mup.plan(on_meta(tied, 128), on_meta(lambda w: _transformer(w, 4), 64)), "another architecture"),
        (lambda: plan_of(Heads), "heads of width 64, in the base model 16.*attention_scale"),
        (lambda: plan_of(Positions), "does not tell which dimension is its fan-in.*layouts="),
        (lambda: plan_of(Positions, layouts={"positions": "out"}), "has 2 dimensions"),
        (lambda: plan_of(Positions, layouts={"positions": "out width"}), "in, out, kernel or stack"),
        (lambda: plan_of(roles={"readout.*": "output"}), "no parameter is called 'readout"),
        (lambda: plan_of(roles={"head.weight": "last"}), "a role is one of"),
        (lambda: plan_of().at(on_meta(Wrapped, 32)), "another architecture"),
        (lambda: plan_of().groups(Net(128), "sgd", lr=0.1), r"use plan.at\(model\)"),
        (lambda: plan_of().groups(Net(256), "sdg", lr=0.1), "method must be one of"),
        (lambda: plan_of().groups(Net(256), "muon", lr=0.1), "muon cannot take .*left_by"),
        (lambda: plan_of().groups(Net(256), "adam", lr=0.1, weight_decay=0.1), "use adamw"),
        (lambda: plan_of().groups(Net(256), "sgd", lr=0.1, decay_scaling="width"), "decay_scaling must be one of"),
        (lambda: plan_of().groups(Net(256), "sgd", lr=0.1, damping=0.1), "sgd has no damping"),
        (lambda: plan_of().groups(Net(256), "sgd", lr=0.1, only=["tail"]), "no parameter is called 'tail'"),
        (lambda: plan_of().groups(Net(256), mup.ShampooLaw(relative=False), lr=0.1), "absolute epsilon has no default"),
        (lambda: mup.ShampooLaw(exponent=0.75), "exponent must be in"),
        (lambda: mup.ShampooLaw(block_size=0), "block_size must be 1 or more"),
        (lambda: mup.MuonLaw("largest"), "adjust_lr_fn must be"),
        (lambda: mup.KFACLaw(exponents=(2.0, 1.0)), "exponents .* must be in"),
        (lambda: mup.Plan.from_json("[]"), "no width plan"),
        (lambda: mup.Plan.from_json('{"format": 9, "parameters": {}}'), "upgrade"),
        (lambda: mup.Plan.from_json('{"format": 1, "parameters": {"a": {}}}'), "needs a field 'shape'"),
        (lambda: mup.init_(Net(256), plan_of(), std={"head.weight": 0.0}), "no zero readout"),
    ],
)
def test_mistakes_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
