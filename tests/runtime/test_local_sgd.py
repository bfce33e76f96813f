"""The parts of local SGD that need one process: periods, outer steps, encodings, settings, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.loops import lines, loss_of, network, regression, train, weights
from support.options import grouped
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import SGD, AdamW, Optimizer

from adabatch import (
    AdaptiveBatch,
    Constant,
    GlobalOrder,
    Limits,
    LocalSGD,
    NoiseScale,
    NormTest,
    examples,
    steps,
)
from adabatch.adaptive.options import EngineOptions, Guard
from adabatch.batch import CoordinateNormTest, Progress
from adabatch.batch.plan import tokens
from adabatch.guards import UpdatesLeftOut
from adabatch.local_sgd import (
    Average,
    Change,
    Fixed,
    Nesterov,
    OuterOptimizer,
    Period,
    Quadratic,
    RoundStart,
    SlowMo,
    Table,
)
from adabatch.runtime.local_sgd.compression import BLOCK, BFloat16, Int8
from adabatch.runtime.local_sgd.fragments import deal, due
from adabatch.runtime.local_sgd.periods import NEVER
from adabatch.runtime.local_sgd.settings import LocalSGDSettings

PERIODS: dict[str, Period] = {
    "fixed": Fixed(8),
    "table": Table(2, [Change(steps(100), 8), Change(steps(1000), 32)]),
    "quadratic": Quadratic(alpha=0.2, base=4),
    "quadratic, limited": Quadratic(alpha=0.2, base=4, longest=64, warmup=steps(10)),
}


def start(*, at: int = 0, lr: float = 0.1, peak_lr: float = 0.1) -> RoundStart:
    return RoundStart(Progress(steps=at, examples=10 * at), lr, peak_lr)


# --- periods --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("period", PERIODS.values(), ids=PERIODS.keys())
@given(st.integers(0, 10**6), st.floats(0, 10), st.floats(0, 10))
def test_a_period_is_a_pure_number_of_steps(period: Period, at: int, lr: float, peak_lr: float) -> None:
    assert isinstance(period, Period)
    begun = start(at=at, lr=lr, peak_lr=peak_lr)
    found = period.local_steps(begun)
    assert type(found) is int
    assert 1 <= found <= NEVER
    assert found == period.local_steps(begun)


@given(st.floats(1e-6, 1), st.floats(1e-6, 1))
def test_quadratic_rounds_grow_as_the_rate_falls(one: float, other: float) -> None:
    period = Quadratic(alpha=0.2, base=4)
    low, high = sorted((one, other))
    assert period.local_steps(start(lr=low)) >= period.local_steps(start(lr=high))
    assert period.local_steps(start(lr=high)) == min(NEVER, max(4, math.floor((0.2 / high) ** 2)))


def test_the_quadratic_rule_at_its_ends() -> None:
    assert Quadratic(alpha=0.2, base=1).local_steps(start(lr=0.2)) == 1
    assert Quadratic(alpha=0.2, base=1).local_steps(start(lr=0.05)) == 16
    assert Quadratic(alpha=0.2, base=1).local_steps(start(lr=0.0)) == NEVER
    assert Quadratic(alpha=0.2, base=1, longest=9).local_steps(start(lr=0.0)) == 9
    assert Quadratic(alpha=0.2, base=1, longest=9).local_steps(start(lr=0.05)) == 9
    # A rate that is small because it warms up is not meant.
    warming = Quadratic(alpha=0.2, base=1, warmup=steps(10))
    assert warming.local_steps(start(at=9, lr=1e-4, peak_lr=0.1)) == 4
    assert warming.local_steps(start(at=10, lr=0.05, peak_lr=0.1)) == 16


def test_a_run_whose_rate_ends_at_zero_begins_its_last_round() -> None:
    settings = LocalSGDSettings(
        period=Quadratic(alpha=0.2, base=2),
        outer=Average(),
        warmup=None,
        average_state=False,
        compression="none",
        weights="equal",
        measure="first",
        spread="across",
        fragments=1,
        overlap=0,
        mix=0.5,
    )
    for rate in (0.0, 1e-30):
        assert settings.begin(start(lr=rate), workers_agree=True).local_steps == NEVER
    with pytest.raises(ValueError, match="longest must be a whole number of at least 1 local step, got 1000000000"):
        Quadratic(alpha=0.2, base=2, longest=10**9)


def test_a_table_is_read_at_its_milestones() -> None:
    table = PERIODS["table"]
    assert [table.local_steps(start(at=at)) for at in (0, 99, 100, 999, 1000, 10**6)] == [2, 2, 8, 8, 32, 32]
    assert Table(2, [Change(examples(50), 4)]).local_steps(start(at=5)) == 4


# --- fragments ------------------------------------------------------------------------------------------------------


def test_layers_are_dealt_by_size_and_by_turns() -> None:
    blocks = [f"blocks.{number}" for number in range(6) for _ in ("weight", "bias")]
    assert deal(blocks, [64, 8] * 6, 3) == [(0, 1, 6, 7), (2, 3, 8, 9), (4, 5, 10, 11)]
    # an embedding as large as all others together has a fragment of its own
    assert deal(["embedding", *blocks], [6 * 72, *[64, 8] * 6], 2) == [(0,), tuple(range(1, 13))]
    assert deal(["a", "b", "c"], [0, 0, 0], 3) == [(0,), (1,), (2,)]
    with pytest.raises(ValueError, match=r"at most the number of layers that train, 2 \(a, b\), got 3"):
        deal(["a", "b", "a"], [1, 1, 1], 3)


@given(st.lists(st.integers(0, 1000), min_size=8, max_size=40), st.integers(1, 8))
def test_fragments_hold_everything_once_and_are_of_nearly_the_same_size(sizes: list[int], num_fragments: int) -> None:
    dealt = deal([str(place) for place in range(len(sizes))], sizes, num_fragments)
    assert sorted(place for fragment in dealt for place in fragment) == list(range(len(sizes)))
    filled = [sum(sizes[place] for place in fragment) for fragment in dealt]
    assert all(dealt)
    assert max(filled) - min(filled) <= max(sizes)


@given(st.integers(1, 200), st.integers(1, 8))
def test_every_fragment_has_one_turn_in_a_round_and_the_last_ends_it(local_steps: int, num_fragments: int) -> None:
    turns = [due(step, local_steps, num_fragments) for step in range(1, local_steps + 1)]
    assert [turn for each in turns for turn in each] == list(range(num_fragments))
    assert turns[-1][-1] == num_fragments - 1
    if num_fragments <= local_steps:
        assert max(map(len, turns)) == 1


# --- outer steps ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outer", [Nesterov(lr=1, momentum=0), SlowMo(momentum=0)], ids=["nesterov", "slowmo"])
def test_without_momentum_an_outer_step_is_the_average(outer: OuterOptimizer) -> None:
    anchors, means = [torch.randn(5, dtype=torch.float64)], [torch.randn(5, dtype=torch.float64)]
    moved = [means[0].clone()]
    outer.step(moved, anchors, [], lr=0.03)
    torch.testing.assert_close(moved, means, rtol=1e-12, atol=1e-12)


def test_nesterov_is_torch_sgd_on_the_outer_gradient() -> None:
    torch.manual_seed(0)
    master = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
    theirs = SGD([master], lr=0.7, momentum=0.9, nesterov=True)
    outer, mine, momenta = Nesterov(), [master.detach().clone()], []  # type: ignore[var-annotated]
    for _ in range(5):
        anchor, moved = mine[0].clone(), torch.randn(4, 3, dtype=torch.float64)
        mine[0].copy_(moved)
        outer.step(mine, [anchor], momenta, lr=0.1)
        master.grad = master.detach() - moved
        theirs.step()
        torch.testing.assert_close(mine[0], master.detach(), rtol=1e-12, atol=1e-12)


def test_slowmo_stands_still_where_the_inner_rate_is_zero() -> None:
    moved, momenta = [torch.ones(3)], [torch.ones(3)]
    SlowMo(momentum=0.5).step(moved, [torch.ones(3)], momenta, lr=0.0)
    assert torch.equal(moved[0], torch.ones(3))
    assert torch.equal(momenta[0], torch.ones(3))


# --- encodings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("encoding", "num_bytes", "step"), [(BFloat16(), 2, 2**-8), (Int8(), 1 + 4 / BLOCK, 1 / 254)])
def test_an_encoding_is_near_and_has_its_size(encoding: Any, num_bytes: float, step: float) -> None:
    rows = torch.randn(3, 2 * BLOCK, generator=torch.Generator().manual_seed(0))
    rows[1, :BLOCK] = 0
    rows[2] *= 1e-30
    encoded = encoding.encode(rows)
    assert encoded.dtype is torch.uint8
    assert encoded.shape == (3, 2 * BLOCK * num_bytes)
    decoded = encoding.decode(encoded)
    largest = rows.view(3, 2, BLOCK).abs().amax(2, keepdim=True).expand(3, 2, BLOCK).reshape(3, -1)
    assert ((decoded - rows).abs() <= largest * step * 1.001).all()
    assert (decoded[1, :BLOCK] == 0).all()


@pytest.mark.parametrize("encoding", [BFloat16(), Int8()])
@pytest.mark.parametrize("strange", [math.nan, math.inf])
def test_what_is_not_finite_stays_so(encoding: Any, strange: float) -> None:
    rows = torch.ones(1, BLOCK)
    rows[0, 7] = strange
    assert not encoding.decode(encoding.encode(rows))[0, 7].isfinite()


# --- one process ----------------------------------------------------------------------------------------------------


def trained(local: dict[str, Any] | None, optimizer_of: Any, *, num_steps: int = 10) -> tuple[Any, LocalSGD | None]:
    model = network()
    optimizer = optimizer_of(model.parameters())
    averaged = None if local is None else LocalSGD(model, optimizer, **local)
    batches = AdaptiveBatch(model, optimizer, Constant(8), micro_batch_size=4, local_sgd=averaged)
    train(batches, model, optimizer, GlobalOrder(regression(64)), until=steps(num_steps))
    if averaged is not None:
        averaged.synchronize()
    return weights(model), averaged


@pytest.mark.parametrize("options", [{}, {"compression": "int8", "average_state": True}])
def test_alone_it_changes_nothing_and_sends_nothing(options: dict[str, Any]) -> None:
    def adam(parameters: Any) -> Optimizer:
        return AdamW(parameters, lr=0.01)

    mine, local = trained({"sync_every": 4, **options}, adam)
    assert torch.equal(mine, trained(None, adam)[0])
    assert local is not None
    assert (local.rounds, local.steps, local.bytes_sent, local.bytes_saved) == (3, 10, 0, 0)


def test_steps_after_the_block_are_refused() -> None:
    model = nn.Linear(2, 1)
    optimizer = SGD(model.parameters(), lr=0.1)
    with LocalSGD(model, optimizer, sync_every=2) as local:
        batches = AdaptiveBatch(model, optimizer, Constant(4), micro_batch_size=4, local_sgd=local)
    loader = [torch.ones(4, 2)] * 4
    with pytest.raises(RuntimeError, match="has left its `with` block, or was removed"):
        next(iter(batches.steps(loader)))
    batches.remove()
    with pytest.raises(RuntimeError, match="has left its `with` block, or was removed"):
        AdaptiveBatch(model, optimizer, Constant(4), micro_batch_size=4, local_sgd=local)
    with pytest.raises(RuntimeError, match="has left its `with` block, or was removed"):
        local.synchronize()


def test_alone_with_an_outer_optimizer_it_looks_ahead() -> None:
    """One worker that goes half of the way it went (Lookahead: Zhang et al. 2019)."""
    model, other = network(), network()
    optimizer, by_hand = (SGD(each.parameters(), lr=0.1) for each in (model, other))
    data, anchor = regression(64).tensors, weights(other)
    with LocalSGD(model, optimizer, sync_every=4, outer=Nesterov(lr=0.5, momentum=0)) as local:
        for step in range(8):
            for each, update in ((model, optimizer), (other, by_hand)):
                loss_of(each, data).backward()
                update.step()
                update.zero_grad()
            if step % 4 == 3:
                halfway = (anchor + weights(other)) / 2
                nn.utils.vector_to_parameters(halfway.clone(), other.parameters())
                anchor = halfway
            torch.testing.assert_close(weights(model), weights(other), rtol=0, atol=1e-6)
            assert (local.rounds, local.step_in_round) == divmod(step + 1, 4)
            assert local.sync_every == 4


def test_alone_an_average_in_the_background_is_mixed_with_what_came_after() -> None:
    model, other = network(), network()
    optimizer, by_hand = (SGD(each.parameters(), lr=0.1) for each in (model, other))
    data, then = regression(64).tensors, weights(other)
    # A round of one step is shorter than the overlap: the average before it is then applied early.
    with LocalSGD(model, optimizer, sync_every=Table(4, [Change(steps(4), 1)]), overlap=2, mix=0.25) as local:
        for step in range(6):
            for each, update in ((model, optimizer), (other, by_hand)):
                loss_of(each, data).backward()
                update.step()
                update.zero_grad()
            if step >= 4:
                nn.utils.vector_to_parameters(0.25 * weights(other) + 0.75 * then, other.parameters())
            then = weights(other)
            torch.testing.assert_close(weights(model), weights(other), rtol=0, atol=1e-6)
        before = weights(model)
    assert (local.rounds, local.bytes_sent) == (4, 0)
    torch.testing.assert_close(weights(model), 0.25 * before + 0.75 * then, rtol=0, atol=1e-6)


def test_hooks_go_with_the_block_and_an_exception_sends_nothing() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    local = LocalSGD(model, optimizer, sync_every=4)
    with pytest.raises(KeyError), local:  # noqa: PT012
        loss_of(model, regression(8).tensors).backward()
        optimizer.step()
        raise KeyError
    assert (local.rounds, local.step_in_round) == (0, 1)
    optimizer.step()
    assert local.steps == 1


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"sync_every": 0}, ValueError, "at least 1 local step, got 0"),
        ({"sync_every": 2.5}, TypeError, "whole number"),
        ({"sync_every": True}, TypeError, "whole number"),
        ({"sync_every": "8"}, TypeError, "Fixed, Table or Quadratic"),
        ({"sync_every": Fixed}, TypeError, "Fixed, Table or Quadratic"),
        ({"sync_every": 4, "outer": "nesterov"}, TypeError, r"Average\(\), Nesterov\(\) or SlowMo\(\)"),
        ({"sync_every": 4, "outer": Nesterov}, TypeError, "outer must be"),
        ({"sync_every": 4, "warmup": 100}, TypeError, r"adabatch.steps\(100\)"),
        ({"sync_every": 4, "compression": "int4"}, ValueError, "compression must be one of none, bf16, int8"),
        ({"sync_every": 4, "weights": "size"}, ValueError, "weights must be one of examples, equal"),
        ({"sync_every": 4, "measure": "middle"}, ValueError, "measure must be one of first, last"),
        ({"sync_every": 4, "spread": "both"}, ValueError, "spread must be one of across, within"),
        ({"sync_every": 4, "fragments": 0}, ValueError, "fragments must be at least 1, got 0"),
        ({"sync_every": 2, "fragments": 3}, ValueError, "fragments must be at most sync_every=2, got 3"),
        ({"sync_every": 4, "overlap": -1}, ValueError, "overlap must be at least 0 steps, got -1"),
        ({"sync_every": 4, "overlap": 4}, ValueError, "overlap must be below sync_every=4, got 4"),
        ({"sync_every": 4, "overlap": 2, "mix": 1}, ValueError, r"mix must be in \[0, 1\), got 1"),
        ({"sync_every": 4, "overlap": 2, "average_state": True}, ValueError, "cannot be combined with overlap=2"),
        ({"sync_every": 4, "fragments": 3}, ValueError, r"number of layers that train, 2 \(0, 2\), got 3"),
    ],
)
def test_settings_that_make_no_sense(options: dict[str, Any], error: type[Exception], says: str) -> None:
    model = network()
    with pytest.raises(error, match=says):
        LocalSGD(model, SGD(model.parameters(), lr=0.1), **options)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Table(0, []), "first must be"),
        (lambda: Table(4, [Change(steps(10), 0)]), "sync_every must be"),
        (lambda: Table(4, [Change(steps(10), 8), Change(steps(10), 16)]), "must ascend"),
        (lambda: Table(4, [Change(steps(20), 8), Change(steps(10), 16)]), "must ascend"),
        (lambda: Table(4, [Change(steps(20), 8), Change(examples(100), 16)]), "share one unit"),
        (lambda: Quadratic(alpha=0, base=4), "alpha must be a positive"),
        (lambda: Quadratic(alpha=math.inf, base=4), "alpha must be a positive"),
        (lambda: Quadratic(alpha=0.1, base=0), "base must be"),
        (lambda: Quadratic(alpha=0.1, base=8, longest=4), "longest=4 is below base=8"),
        (lambda: Nesterov(lr=0), "outer lr must be"),
        (lambda: Nesterov(momentum=1), r"outer momentum must be in \[0, 1\)"),
        (lambda: SlowMo(momentum=-0.1), "outer momentum"),
        (lambda: SlowMo(momentum=0.5, lr=math.nan), "outer lr"),
    ],
)
def test_numbers_that_make_no_sense(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def test_models_and_optimizers_that_do_not_belong() -> None:
    model, other = network(), network()
    optimizer = SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="holds none of the model's parameters"):
        LocalSGD(model, SGD(other.parameters(), lr=0.1), sync_every=4)
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer"):
        LocalSGD(model, list(model.parameters()), sync_every=4)  # type: ignore[arg-type]
    local = LocalSGD(model, optimizer, sync_every=4)
    with pytest.raises(ValueError, match="another model or optimizer"):
        AdaptiveBatch(other, optimizer, Constant(8), micro_batch_size=4, local_sgd=local)
    with pytest.raises(ValueError, match="cannot be combined with a GradScaler"):
        AdaptiveBatch(
            model,
            optimizer,
            Constant(8),
            micro_batch_size=4,
            local_sgd=local,
            engine=EngineOptions(scaler=GradScaler("cpu", init_scale=8)),
        )
    with pytest.raises(ValueError, match="at least two micro-batches"):
        AdaptiveBatch(
            model, optimizer, NormTest(eta=0.5), micro_batch_size=4, limits=Limits(min=4, max=64),
            local_sgd=LocalSGD(model, optimizer, sync_every=4, spread="within"),
        )  # fmt: skip
    local = LocalSGD(model, optimizer, sync_every=4)  # the one above has taken the place of the first
    options: dict[str, Any] = {"micro_batch_size": 4, "limits": Limits(min=8, max=64), "local_sgd": local}
    with pytest.raises(ValueError, match=r"does not measure noise in the norm sign.*such as NormTest"):
        AdaptiveBatch(model, optimizer, NoiseScale(norm="sign"), **grouped(options))
    with pytest.raises(ValueError, match=r"does not measure coordinates at quantile 0.5"):
        AdaptiveBatch(model, optimizer, CoordinateNormTest(0.5, quantile=0.5), **grouped(options))
    for apart in ({"fragments": 2}, {"overlap": 3}):
        options["local_sgd"] = LocalSGD(model, optimizer, sync_every=4, **apart)
        with pytest.raises(ValueError, match=r"fragments or overlap they never do: use LocalSGD\(spread=\"within\"\)"):
            AdaptiveBatch(model, optimizer, NormTest(eta=0.5), **grouped(options))


@pytest.mark.parametrize(
    "options", [{"warmup": tokens(10), "sync_every": 4}, {"sync_every": Table(2, [Change(examples(9), 4)])}]
)
def test_only_adaptive_batch_counts_examples(options: dict[str, Any]) -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    local = LocalSGD(model, optimizer, **options)
    loss_of(model, regression(8).tensors).backward()
    with pytest.raises(ValueError, match=r"cannot count .* by itself"):
        optimizer.step()
    local.remove()


def test_states_of_another_time_model_or_number_of_workers() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    local = LocalSGD(model, optimizer, sync_every=4, outer=Nesterov())
    for _ in range(5):
        loss_of(model, regression(8).tensors).backward()
        optimizer.step()
    state = local.state_dict()
    with pytest.raises(ValueError, match="upgrade adabatch"):
        local.load_state_dict({**state, "format": 99})
    with pytest.raises(ValueError, match="saved by 4 workers, and there are 1"):
        local.load_state_dict({**state, "num_workers": 4})
    with pytest.raises(ValueError, match="other shapes"):
        local.load_state_dict({**state, "fragments": [{**state["fragments"][0], "momenta": [torch.zeros(2)]}]})
    with pytest.raises(ValueError, match="saved with outer=SlowMo, this run has Nesterov"):
        local.load_state_dict({**state, "outer": "SlowMo"})
    with pytest.raises(ValueError, match="saved with compression=int8, this run has none"):
        local.load_state_dict({**state, "compression": "int8"})
    shallow = nn.Linear(6, 1)
    with pytest.raises(ValueError, match="for 4 parameters, and this model trains 2"):
        LocalSGD(shallow, SGD(shallow.parameters(), lr=0.1), sync_every=4).load_state_dict(state)
    in_two = LocalSGD(model, optimizer, sync_every=4, outer=Nesterov(), fragments=2)
    with pytest.raises(ValueError, match="saved with fragments=1, this run has 2"):
        in_two.load_state_dict(state)
    local = LocalSGD(model, optimizer, sync_every=4, outer=Nesterov())
    local.load_state_dict(state)
    local.synchronize()
    local.load_state_dict({**local.state_dict(), "num_workers": 4})  # where all agree, their number may change
    assert (local.rounds, local.steps) == (2, 5)
    assert isinstance(Average(), OuterOptimizer)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_worker_alone_leaves_out_what_is_not_finite(tmp_path: Path, what: str) -> None:
    """The others know nothing of it, so the plan counts the step; but a run that does not train any more stops."""
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    local = LocalSGD(model, optimizer, sync_every=4)
    batches = AdaptiveBatch(
        model,
        optimizer,
        Constant(8),
        micro_batch_size=4,
        local_sgd=local,
        journal=tmp_path / "journal.jsonl",
        guard=Guard(max_left_out=3),
    )
    poison = math.nan

    def overflows(grad: Tensor) -> Tensor:
        return grad * poison

    bad = (1, 2, 4, 5, 6)

    def run() -> None:
        for number, step in enumerate(batches.steps(GlobalOrder(regression(96)))):
            hook = model[0].bias.register_hook(overflows) if what == "gradient" and number in bad else None
            for batch in step:
                step.backward(loss_of(model, batch) * (poison if what == "loss" and number in bad else 1.0))
            if hook is not None:
                hook.remove()
            before = weights(model)
            optimizer.step()
            optimizer.zero_grad()
            assert torch.equal(before, weights(model)) == (number in bad)

    with pytest.raises(UpdatesLeftOut, match="the last 3 updates in a row were left out, up to step 7"):
        run()
    assert torch.isfinite(weights(model)).all()
    assert batches.progress == batches.consumed
    assert (local.steps, local.rounds) == (7, 1)
    found = lines(tmp_path / "journal.jsonl")
    assert [(line["applied"], line["reason"] == "not finite") for line in found] == [
        (number not in bad, number in bad) for number in range(7)
    ]
