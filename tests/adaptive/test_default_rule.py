"""What follows a batch of noise if nothing is said: the learning rate by the gain, and the betas of torch's Adam."""

from __future__ import annotations

import math
import warnings
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.deepspeed_engines import as_launched
from support.ports import free_port
from support.ranks import run_ranks
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, Optimizer, RAdam

import adabatch
from adabatch import Goodput, Limits, NoiseScale, NormTest, StepPrice, examples
from adabatch.adaptive.validation import checked_rules
from adabatch.batch import InnerProductTest
from adabatch.lr import Followers
from adabatch.report.summary import report_settings

LIMITS = Limits(min=8, max=64)
BETAS = Followers(("betas",))


class AdamOfAnother(Adam):
    """As DeepSpeed's FusedAdam, which is no optimizer of torch."""


class WithoutRate(SGD):
    """As Adafactor with relative steps."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters)
        for group in self.param_groups:
            group["lr"] = None


def model_of() -> nn.Linear:
    return nn.Linear(3, 2)


def rules_of(optimizer: Any, criterion: Any, **given: Any) -> tuple[str, Followers]:
    rules = checked_rules(model_of(), optimizer, criterion, **{"lr_rule": None, "follow": None} | given)
    return rules.rule, rules.followers


def made(kind: Any) -> Optimizer:
    optimizer: Optimizer = kind(model_of().parameters())
    return optimizer


@pytest.mark.parametrize("criterion", [NormTest(0.7), StepPrice(32), NoiseScale(), Goodput(), InnerProductTest(0.9)])
@pytest.mark.parametrize(
    ("kind", "followers"),
    [
        (Adam, BETAS),
        (AdamW, BETAS),
        (SGD, Followers()),
        (Adagrad, Followers()),
        (NAdam, Followers()),
        (RAdam, Followers()),
        (AdamOfAnother, Followers()),
    ],
)
def test_the_rate_follows_by_the_gain_if_the_batch_follows_noise(
    criterion: Any, kind: Any, followers: Followers
) -> None:
    assert rules_of(made(kind), criterion) == ("gain", followers)


def test_a_batch_that_is_planned_moves_no_rate() -> None:
    stages = adabatch.Stages(8, [adabatch.Stage(examples(80), 16)])
    for criterion in (adabatch.Constant(8), stages):
        assert rules_of(made(AdamW), criterion) == ("none", Followers())


def test_no_rule_is_a_default_in_another_norm_or_without_a_rate() -> None:
    for criterion in (NoiseScale(norm="adam"), Goodput(norm="adam")):
        assert rules_of(made(AdamW), criterion) == ("none", Followers())
    assert rules_of(made(WithoutRate), NormTest(0.7)) == ("none", Followers())


def test_optimizers_and_schedules_with_a_rule_of_their_own_keep_it() -> None:
    model = model_of()
    shampoo = adabatch.optim.Shampoo(model.parameters(), lr=0.1)
    kfac = adabatch.optim.KFAC(model.parameters(), model=model, lr=0.1)
    assert rules_of(shampoo, NormTest(0.7)) == ("sqrt", Followers())
    assert rules_of(kfac, NormTest(0.7)) == ("sqrt", Followers())
    seesaw = adabatch.Seesaw(8, adabatch.lr.cosine(floor=0.1), examples(800))
    assert rules_of(made(AdamW), seesaw) == ("sqrt", Followers())
    assert rules_of(made(SGD), seesaw) == ("linear", Followers())


def test_whatever_is_named_stands() -> None:
    assert rules_of(made(AdamW), NormTest(0.7), lr_rule="gain") == ("gain", Followers())
    assert rules_of(made(AdamW), NormTest(0.7), lr_rule="none") == ("none", Followers())
    assert rules_of(made(AdamW), NormTest(0.7), follow=()) == ("gain", Followers())
    assert rules_of(made(AdamW), NormTest(0.7), follow=("eps",)) == ("gain", Followers(("eps",)))


def test_several_optimizers_follow_if_all_their_betas_can() -> None:
    first, second = nn.Linear(3, 2), nn.Linear(2, 2)
    model = nn.Sequential(first, second)
    others: list[tuple[Any, Followers]] = [(SGD, BETAS), (NAdam, Followers())]
    for kind, followers in others:
        optimizers = [AdamW(first.parameters()), kind(second.parameters())]
        batches = adabatch.AdaptiveBatch(model, optimizers, NormTest(0.7), micro_batch_size=4, limits=LIMITS)
        given = batches._planner.given()
        assert (given["lr_rule"], given["follow"]) == ("gain", followers)
        batches.remove()


def test_a_default_does_not_warn_of_betas_without_room() -> None:
    model = model_of()
    optimizer = AdamW(model.parameters(), betas=(0.9, 0.95))
    options: dict[str, Any] = {"micro_batch_size": 4, "limits": LIMITS}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adabatch.AdaptiveBatch(model, optimizer, NormTest(0.7), **options).remove()
    with pytest.warns(UserWarning, match="cannot lower beta2=0.95"):
        adabatch.AdaptiveBatch(model, optimizer, NormTest(0.7), follow=("betas",), **options).remove()


def test_warnings_of_the_constructor_name_the_line_of_the_user() -> None:
    model = model_of()
    optimizer = AdamW(model.parameters(), betas=(0.9, 0.95))
    options: dict[str, Any] = {"micro_batch_size": 4, "limits": LIMITS}
    causes: list[dict[str, Any]] = [{"follow": ("betas",)}, {"lr_rule": "linear"}]
    for given in causes:
        with pytest.warns(UserWarning, match=r"cannot lower|multiplies the learning rate") as caught:
            adabatch.AdaptiveBatch(model, optimizer, NormTest(0.7), **options, **given).remove()
        assert [each.filename for each in caught] == [__file__]


def checked_by_deepspeed() -> str:
    from adabatch.integrations.deepspeed import check_options

    engine = SimpleNamespace(zero_optimization_stage=lambda: 1, basic_optimizer=made(AdamOfAnother))
    check_options(engine, {})
    check_options(engine, {"follow": None})
    with pytest.raises(ValueError) as refused:
        check_options(engine, {"follow": ("betas",)})
    return str(refused.value)


def in_a_fork(rank: int, port: int) -> str:
    return as_launched(checked_by_deepspeed, rank, 1, port)  # type: ignore[no-any-return]


@pytest.mark.distributed
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed")
def test_deepspeeds_own_adam_is_refused_nothing_by_default(tmp_path: Path) -> None:
    # To import DeepSpeed would change the environment of this process.
    (refused,) = run_ranks(in_a_fork, 1, tmp_path, free_port(), connect=False)
    assert "follow='betas' needs the step counts of torch's own Adam" in refused


def test_an_update_has_the_rate_and_the_betas_of_its_batch() -> None:
    torch.manual_seed(0)
    model = nn.Linear(20, 1, bias=False)
    optimizer = AdamW(model.parameters(), lr=1e-12)
    batches = adabatch.AdaptiveBatch(
        model, optimizer, NormTest(0.5), micro_batch_size=4, limits=LIMITS, control=adabatch.Control.direct()
    )
    (group,), size = optimizer.param_groups, 0
    seen: list[tuple[int, float, tuple[float, float]]] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append((size, group["lr"], group["betas"])))
    stream = adabatch.GlobalOrder(torch.utils.data.TensorDataset(torch.randn(512, 20), torch.randn(512, 1)), seed=0)
    for step in batches.steps(stream, until=examples(400)):
        size = 0
        for x, y in step:
            step.backward(nn.functional.mse_loss(model(x), y))
            size += len(x)
        optimizer.step()
        optimizer.zero_grad()
    grown = [each for each in seen if each[0] > 8]
    assert grown
    for examples_of_step, rate, betas in grown:
        ratio = examples_of_step / 8
        followed = min(ratio, math.log(0.5) / math.log(0.9))  # where the first is at its floor, so is the second
        assert 1e-12 < rate <= ratio * 1e-12 * (1 + 1e-9)
        assert betas == pytest.approx((0.9**followed, 0.999**followed))


def test_the_pairs_are_as_they_were_published() -> None:
    named: list[tuple[dict[str, Any], str]] = [({}, "none"), ({"lr_rule": "gain"}, "gain")]
    for pair in (adabatch.AdAdaGrad, adabatch.AdAdaGradNorm):
        for given, rule in named:
            batches = pair(model_of(), micro_batch_size=4, limits=LIMITS, **given).batches
            assert batches._planner.given()["lr_rule"] == rule
            batches.remove()


def test_a_report_knows_the_default() -> None:
    config: dict[str, Any] = {
        "criterion.class_path": "adabatch.NormTest",
        "criterion.init_args.eta": 0.5,
        "optimizer.class_path": "torch.optim.AdamW",
    }
    assert report_settings(config).follow == ("betas",)
    changes: list[dict[str, Any]] = [
        {"lr_rule": "gain"},
        {"follow": []},
        {"optimizer.class_path": "torch.optim.SGD"},
        {"criterion.class_path": "adabatch.Constant"},
        {"criterion.class_path": "adabatch.Limits"},
        {"criterion.class_path": "mine.NormTest"},
        {"criterion.init_args.of_another_release": 1},
    ]
    for change in changes:
        assert report_settings(config | change).follow == ()
    assert report_settings(config | {"follow": ["eps"]}).follow == ("eps",)
    others = (
        ("StepPrice", {"examples": 64}),
        ("Goodput", {}),
        ("batch.InnerProductTest", {"theta": 0.9}),
        ("NoiseScale", {"norm": "euclidean"}),
    )
    for name, arguments in others:
        asked = {f"criterion.init_args.{key}": value for key, value in arguments.items()}
        without = {key: value for key, value in config.items() if not key.startswith("criterion.")}
        assert report_settings(without | asked | {"criterion.class_path": f"adabatch.{name}"}).follow == ("betas",)
    in_another_norm = {"criterion.class_path": "adabatch.NoiseScale", "criterion.init_args.norm": "adam"}
    assert report_settings(without | in_another_norm).follow == ()


def test_the_arguments_of_transformers_leave_the_default_alone() -> None:
    transformers_arguments = pytest.importorskip("adabatch.integrations.transformers_arguments")
    arguments = transformers_arguments.AdaptiveArguments(max_batch_size=64)
    options = arguments.options_for(NormTest(0.7), 8)
    assert (options["lr_rule"], options["follow"]) == (None, None)
    named = transformers_arguments.AdaptiveArguments(max_batch_size=64, follow=["betas"])
    assert named.options_for(NormTest(0.7), 8)["follow"] == ("betas",)
