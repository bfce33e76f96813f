"""The norm of Muon: roots of Gram matrices against decompositions, and noise and signal against what they estimate."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.loops import lines, loss_of, network, regression, train
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from adabatch import AdaptiveBatch, Control, GlobalOrder, Limits, MicroBatchProbe, NoiseScale, examples
from adabatch.batch.moments import GradientMoments
from adabatch.probes import PerExampleProbe
from adabatch.runtime.collectives import Collectives
from adabatch.runtime.optimizers.matrix_owners import dealt_out
from adabatch.runtime.probes.matrices import MatrixGrams, _shortened, newton_schulz, root_trace
from adabatch.runtime.probes.metrics import SpectralNorm, norm_of

SPECTRA: dict[str, Callable[[int], Tensor]] = {
    "equal": lambda k: torch.ones(k),
    "of a normal matrix": lambda k: torch.linalg.svdvals(torch.randn(k, k)).square(),
    "falling": lambda k: torch.arange(1.0, k + 1) ** -2,
    "falling fast": lambda k: torch.arange(1.0, k + 1) ** -4,
    "of low rank": lambda k: (torch.arange(k) < 3).float(),
    "of rank one": lambda k: (torch.arange(k) < 1).float(),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("k", [8, 96])
def test_traces_of_roots_are_those_of_the_eigenvalues(spectrum: str, k: int) -> None:
    torch.manual_seed(1)
    values = SPECTRA[spectrum](k).double()
    turn = torch.linalg.qr(torch.randn(k, k, dtype=torch.float64))[0]
    gram = ((turn * values) @ turn.T).float()
    exact = float(values.sqrt().sum())
    # Rounding of the matrix to float32 moves eigenvalues by 1e-7 of the largest, and their roots by 3e-4 of its root.
    assert float(root_trace(gram)) == pytest.approx(exact, rel=2e-3)
    for scale in (1e-12, 1.0, 1e12):
        assert float(newton_schulz(gram * scale)) == pytest.approx(exact * math.sqrt(scale), rel=0.02)


def test_a_matrix_of_zeros_has_no_root() -> None:
    assert float(root_trace(torch.zeros(3, 3))) == float(newton_schulz(torch.zeros(3, 3))) == 0


def test_how_much_too_short_the_singular_values_of_noise_are() -> None:
    for aspect in (0.0, 0.1, 0.5, 0.9, 1.0):
        found = float(_shortened(torch.tensor(aspect, dtype=torch.float64)))
        term = exact = 1.0
        for j in range(5000):  # F(-1/2, 1/2; 2; aspect), whose terms fall as j^-3
            term *= (j - 0.5) * (j + 0.5) / ((j + 2) * (j + 1)) * aspect
            exact += term
        assert found == pytest.approx(exact, abs=1.5e-3)


def moments_of(draws: Tensor, part_size: int, gradient: Tensor) -> GradientMoments:
    """Of parts, shape (num_parts, k, n), whose noise is ``draws / sqrt(part_size)``."""
    weight = nn.Parameter(torch.zeros(draws.shape[1:]))
    probe = MicroBatchProbe([weight], norm=SpectralNorm(SGD([weight], lr=0.1)))
    probe.start(1)
    for draw in draws:
        probe.begin_part()
        ((gradient + draw / math.sqrt(part_size)) * weight).sum().div(len(draws)).backward()
        probe.end_part(part_size, 1 / len(draws))
    moments = probe.moments(probe.collect().tolist())
    probe.remove()
    return moments


@pytest.mark.parametrize(("k", "n"), [(8, 8), (16, 6), (6, 40)])
@pytest.mark.parametrize("num_parts", [2, 6])
def test_noise_is_unbiased_and_pure_noise_has_no_signal(k: int, n: int, num_parts: int) -> None:
    torch.manual_seed(2)
    trials, part_size = 60, 4
    short, long = min(k, n), max(k, n)
    noise = (short * math.sqrt(long)) ** 2  # (tr C^(1/2))^2, with C = long * 1
    found = [moments_of(torch.randn(num_parts, k, n), part_size, torch.zeros(k, n)) for _ in range(trials)]
    noises = torch.tensor([each.noise for each in found]) / noise
    signals = torch.tensor([each.signal for each in found]) / (noise / (part_size * num_parts))
    # Within five standard errors, and 3 %: the first order in 1 / size is corrected, the second is not.
    assert float(noises.mean()) == pytest.approx(1, abs=0.03 + 5 * float(noises.std()) / math.sqrt(trials))
    assert float(signals.mean()) == pytest.approx(0, abs=0.06 + 5 * float(signals.std()) / math.sqrt(trials))


def test_a_large_batch_has_the_nuclear_norm_of_the_true_gradient() -> None:
    torch.manual_seed(3)
    gradient = torch.randn(12, 20)
    found = moments_of(torch.randn(4, 12, 20), 40_000, gradient)
    assert found.signal == pytest.approx(float(torch.linalg.matrix_norm(gradient, "nuc")) ** 2, rel=1e-3)
    assert found.norm == "spectral"


def test_a_linear_problem() -> None:
    """Examples of a least-squares problem, whose gradients ``(W x - y) x^T`` are of rank one and heavy-tailed."""
    torch.manual_seed(4)
    x, y = torch.randn(4096, 6, dtype=torch.float64), torch.randn(4096, 4, dtype=torch.float64)
    weight = nn.Parameter(torch.randn(4, 6, dtype=torch.float64))
    residuals = 2 / 4 * (x @ weight.detach().T - y)
    gradients = residuals[:, :, None] * x[:, None, :]
    apart = gradients - gradients.mean(0)
    exact = float(root_trace(torch.einsum("ekn,eln->kl", apart, apart) / len(x))) ** 2
    length = float(torch.linalg.matrix_norm(gradients.mean(0), "nuc")) ** 2
    probe = MicroBatchProbe([weight], norm=SpectralNorm(SGD([weight], lr=0.1)))
    noises, signals = [], []
    for _ in range(150):
        weight.grad = None
        probe.start(1)
        for rows in torch.randint(len(x), (8, 16)):
            probe.begin_part()
            (nn.functional.mse_loss(x[rows] @ weight.T, y[rows]) / 8).backward()
            probe.end_part(16, 1 / 8)
        moments = probe.moments(probe.collect().tolist())
        noises.append(moments.noise / exact)
        signals.append(moments.signal / length)
    assert sum(noises) / 150 == pytest.approx(1, abs=0.05)
    # A gradient of full rank is measured too short, see `from_matrices`.
    assert 0.7 < sum(signals) / 150 < 1.1


def test_only_what_muon_holds_counts() -> None:
    muon = getattr(torch.optim, "Muon", None)
    if muon is None:
        pytest.skip("torch.optim.Muon came with torch 2.9")
    model = network()
    first, *rest = model.parameters()
    from adabatch.runtime.optimizers.joined import JoinedOptimizers

    norm: Any = norm_of("spectral", JoinedOptimizers([muon([first], lr=0.02), AdamW(rest)]))
    assert [norm.takes(p) for p in model.parameters()] == [True, False, False, False]
    alone: Any = norm_of("spectral", AdamW(model.parameters()))
    assert [alone.takes(p) for p in model.parameters()] == [True, False, True, False]


def test_what_cannot_be_measured_is_refused() -> None:
    vector = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="measures matrices, and the SGD holds no parameter of two dimensions"):
        norm_of("spectral", SGD([vector], lr=0.1))
    model, other = network(), network()
    with pytest.raises(ValueError, match=r"mixes coordinates, .* use a plain model or DistributedDataParallel"):
        PerExampleProbe(model, norm=SpectralNorm(SGD(model.parameters(), lr=0.1)))
    probe = MicroBatchProbe(model.parameters(), norm=SpectralNorm(SGD(other.parameters(), lr=0.1)))
    with pytest.raises(ValueError, match="finds none of the measured parameters"):
        probe.start(1)
    with pytest.raises(ValueError, match="the squares of matrices are to be added up over 2 ranks"):
        MicroBatchProbe(model.parameters(), norm=SpectralNorm(SGD(model.parameters(), lr=0.1))).start(2)


def test_work_is_shared_out_and_memory_is_let_go() -> None:
    assert dealt_out({0: 8, 1: 7, 2: 6, 3: 5, 4: 1}, 2) == {0: 0, 1: 1, 2: 1, 3: 0, 4: 0}
    model = network()
    from adabatch.runtime.probes.layers import LayerSums

    parameters = list(model.parameters())
    sums = LayerSums(parameters, None, device=torch.device("cpu"))
    grams = MatrixGrams(parameters, sums, device=torch.device("cpu"), takes=lambda p: p.ndim == 2, same=Collectives())
    assert grams.num_bytes == 0
    grams.start()
    assert grams.num_bytes == 4 * (6 * 6 + 1 + 1)
    loss_of(model, regression(4)[:]).backward()
    grams.numbers([(n, p.grad) for n, p in enumerate(parameters) if p.grad is not None], 1)
    assert grams.num_bytes == 0


@pytest.mark.parametrize("interval", [1, 3])
def test_muon_and_adamw_are_one_run(interval: int, tmp_path: Path) -> None:
    """Muon for the matrices and AdamW for the rest; the batch follows the noise as Muon sees it."""
    muon = getattr(torch.optim, "Muon", None)
    if muon is None:
        pytest.skip("torch.optim.Muon came with torch 2.9")
    model = network()
    optimizers = [
        muon([p for p in model.parameters() if p.ndim == 2], lr=0.02),
        AdamW([p for p in model.parameters() if p.ndim < 2], lr=0.01),
    ]
    batches = AdaptiveBatch(
        model,
        optimizers,
        NoiseScale(norm="spectral"),
        micro_batch_size=4,
        limits=Limits(min=16, max=64),
        lr_rule="sqrt_gain",
        control=Control(interval=interval),
        journal=tmp_path / "journal.jsonl",
    )

    class Both:
        def step(self) -> None:
            for each in optimizers:
                each.step()

        def zero_grad(self) -> None:
            for each in optimizers:
                each.zero_grad()

    train(batches, model, Both(), GlobalOrder(regression(1600)), until=examples(3200))  # type: ignore[arg-type]
    written = lines(tmp_path / "journal.jsonl")
    probed = [line for line in written if line["moments"]]
    assert {line["moments"]["norm"] for line in probed} == {"spectral"}
    assert len(probed) * interval >= len(written)
    assert all(line["applied"] for line in written)
    assert written[-1]["plan"]["global_batch_size"] > 16
    batches.remove()
