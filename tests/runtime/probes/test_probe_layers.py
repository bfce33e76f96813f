"""Layers: which parameters they hold, what they are called, and what a run writes down of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.loops import lines, loss_of, network, regression, train
from support.options import grouped
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader

from adabatch import AdaptiveBatch, Constant, GlobalOrder, Limits, MicroBatchProbe, NormTest, PerExampleProbe
from adabatch.adaptive.options import Measure
from adabatch.runtime.probes.layers import Layers, layers_of
from adabatch.runtime.probes.norms import column_norms


class Scaled(nn.Module):
    """Holds a parameter itself, beside its children and a list of parameters; one child is frozen, two are tied."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.first = nn.Linear(6, 6, bias=False)
        self.second = nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.extra = nn.ParameterList([torch.zeros(6)])
        self.head = nn.Linear(6, 1)


def sizes(layers: Layers, model: nn.Module) -> dict[str, int]:
    """How many numbers each layer holds."""
    found = dict.fromkeys(layers.names, 0)
    for p in model.parameters():
        if p.requires_grad:
            found[layers.names[layers.place_of(p)]] += p.numel()
    return found


def test_modules_are_named_as_inside_their_wrappers() -> None:
    model = Scaled()
    expected = {"Scaled": 1, "first": 36, "extra": 6, "head": 7}
    assert sizes(layers_of(model, SGD(model.parameters()), "module"), model) == expected
    compiled = torch.compile(model, backend="aot_eager")
    around = nn.ModuleDict({"module": compiled})  # as DDP names its inside
    for wrapped in (compiled, around, torch.compile(nn.ModuleDict({"module": model}), backend="aot_eager")):
        found = sizes(layers_of(wrapped, SGD(wrapped.parameters()), "module"), wrapped)
        assert {**found, "Scaled": found.pop(type(wrapped).__name__, 1)} == expected


def test_groups_are_named_by_their_name_or_number() -> None:
    model = network()
    groups: list[dict[str, Any]] = [{"params": model[0].parameters(), "name": "body"}, {"params": model[2].weight}]
    optimizer = SGD([*groups, {"params": network(seed=1).parameters()}])  # the last belongs to another model
    layers = layers_of(model, optimizer, "group")
    assert layers.names == ("body", "1")
    assert layers.names[layers.place_of(model[2].weight)] == "1"
    with pytest.raises(ValueError, match=r"a parameter of shape \(1,\) belongs to none of the layers body, 1"):
        layers.place_of(model[2].bias)


def test_bad_layers_are_named() -> None:
    model = network()
    twice = SGD([{"params": model[0].parameters(), "name": "1"}, {"params": model[2].parameters()}])
    with pytest.raises(ValueError, match="groups of different names, got 1, 1"):
        layers_of(model, twice, "group")
    with pytest.raises(ValueError, match="one of module, group, got 'layer'"):
        layers_of(model, twice, "layer")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got none"):
        Layers({})


def test_the_journal_holds_the_noise_of_each_layer(tmp_path: Path) -> None:
    for per_layer, names in (("module", {"0", "2"}), ("group", {"0"}), (None, set())):
        model, journal = network(dtype=torch.float64), tmp_path / f"{per_layer}.jsonl"
        optimizer = SGD(model.parameters(), lr=0.05)
        batches = AdaptiveBatch(
            model,
            optimizer,
            NormTest(eta=0.5),
            micro_batch_size=8,
            limits=Limits(min=16, max=64),
            measure=Measure(layers=per_layer),  # type: ignore[arg-type]
            journal=journal,
        )
        train(batches, model, optimizer, GlobalOrder(regression(256, dtype=torch.float64)))
        batches.remove()
        written = lines(journal)
        assert len(written) > 4
        for line in written:
            assert set(line.get("layers", {})) == names
            for what in ("noise", "signal"):
                if names:
                    total = sum(layer[what] for layer in line["layers"].values())
                    assert total == pytest.approx(
                        line["moments"][what], rel=1e-9, abs=1e-9 * line["moments"]["part_sq"]
                    )
    runs = [(tmp_path / f"{per_layer}.jsonl") for per_layer in ("module", None)]
    plans = [[line["next"] for line in lines(run)] for run in runs]
    assert plans[0] == plans[1]  # nothing but the journal reads them


def test_layers_alone_measure_the_noise_of_a_schedule(tmp_path: Path) -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.05)
    options: dict[str, Any] = {"micro_batch_size": 8, "per_layer": "module", "journal": tmp_path / "journal.jsonl"}
    batches = AdaptiveBatch(model, optimizer, Constant(16), **grouped(options))
    train(batches, model, optimizer, DataLoader(regression(64), batch_size=8))
    assert {"noise", "signal", "noise_scale"} == set(lines(tmp_path / "journal.jsonl")[0]["layers"]["2"])
    assert batches.progress.gain_steps is not None


def test_layers_of_single_examples_add_up_to_the_whole() -> None:
    model = network(dtype=torch.float64)
    layers = layers_of(model, SGD(model.parameters()), "module")
    probe = PerExampleProbe(model, layers=layers)
    dataset = regression(12, dtype=torch.float64)
    probe.start(1)
    rows: dict[str, list[torch.Tensor]] = {"0": [], "2": []}
    for part in ((0, 8), (8, 12)):
        batch = [tensor[part[0] : part[1]] for tensor in dataset.tensors]
        probe.begin_part()
        weight = (part[1] - part[0]) / 12
        (loss_of(model, batch) * weight).backward()
        probe.end_part(part[1] - part[0], weight)
    moments = probe.moments(probe.collect().tolist())
    for index in range(12):
        for name, found in rows.items():
            loss = loss_of(model, [tensor[index : index + 1] for tensor in dataset.tensors])
            grads = torch.autograd.grad(loss, list(model[int(name)].parameters()))
            found.append(torch.cat([grad.flatten() for grad in grads]))
    assert moments.layers is not None
    for name, grads in rows.items():
        stacked = torch.stack(grads)
        noise = float(stacked.var(0).sum())
        assert moments.layers[name].noise == pytest.approx(noise, rel=1e-10)
        assert moments.layers[name].signal == pytest.approx(float(stacked.mean(0).square().sum()) - noise / 12)
    assert sum(each.noise for each in moments.layers.values()) == pytest.approx(moments.noise, rel=1e-12)


def test_a_probe_of_ones_own_without_layers_is_refused() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.05)
    options: dict[str, Any] = {"micro_batch_size": 8, "limits": Limits(min=16, max=64), "per_layer": "group"}
    with pytest.raises(ValueError, match=r"needs layers, which MicroBatchProbe does not give.*made with layers="):
        AdaptiveBatch(model, optimizer, NormTest(0.5), probe=MicroBatchProbe(model.parameters()), **grouped(options))
    layers = layers_of(model, optimizer, "group")
    given = MicroBatchProbe(model.parameters(), layers=layers)
    assert AdaptiveBatch(model, optimizer, NormTest(0.5), probe=given, **grouped(options))._probe.gives.layers  # type: ignore[union-attr]


@pytest.mark.parametrize("num_rows", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_norms_of_columns(num_rows: int, dtype: torch.dtype) -> None:
    matrix = torch.randn(num_rows, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = column_norms(matrix)
    assert found.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    # At most num_rows + 1 roundings of one number each.
    torch.testing.assert_close(found.double(), matrix.double().square().sum(0).sqrt(), rtol=1e-6, atol=0)
