"""What is trained: small models on real data, each with examples to train, to choose by and to report.

The validation split is cut from the training data, so that every choice (learning rate, warm-up, setting) is made on
examples that are neither trained on nor reported. Sizes are such that a run of the short budget takes a few seconds on
one core."""

from __future__ import annotations

import io
import itertools
import os
import sys
import sysconfig
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from _harness import ROOT
from torch import Tensor, nn
from torch.nn import functional as F

from adabatch.recipes.data import Mnist
from adabatch.recipes.models import MLP, MnistCNN, Transformer

STUDY = Path(
    os.environ.get("ADABATCH_STUDY", ROOT / "runs" / "frontier")
)  # where runs, and data once decoded, are kept
CONTEXT = 32  # bytes of a language model's example
VOCABULARY = 128  # ASCII; any other byte is read as the last one

Pair = tuple[Tensor, Tensor]


class Splits(NamedTuple):
    """Inputs and targets of each split, in memory."""

    train: Pair
    validation: Pair
    test: Pair


@dataclass(frozen=True)
class Workload:
    """A model and its data.

    Args:
        about: both in words, for the report.
        model: makes the model; its weights come from torch's generator.
        load: reads the data.
        budgets: training examples of the runs, each three times those before it.
    """

    about: str
    model: Callable[[], nn.Module]
    load: Callable[[], Splits]
    budgets: tuple[int, ...]


class PooledCNN(nn.Module):
    """``MnistCNN`` with half its channels, for images of 14x14 pixels: 4,874 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, kernel_size=5, padding=2)
        self.conv2 = nn.Conv2d(8, 16, kernel_size=5, padding=2)
        self.linear = nn.Linear(16 * 3 * 3, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)  # (batch, 8, 7, 7)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)  # (batch, 16, 3, 3)
        logits: Tensor = self.linear(x.flatten(1))
        return logits


def group_norm_cnn() -> nn.Module:
    """Three 3x3 convolutions of stride 2 (16, 32, 64 channels), GroupNorm, and a linear layer: 24,458 parameters."""
    widths = (3, 16, 32, 64)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(4, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


def byte_transformer() -> nn.Module:
    """One block of width 32 over bytes: 21,984 parameters."""
    return Transformer(VOCABULARY, CONTEXT, width=32, depth=1, num_heads=4)


def _rows(pair: Pair, start: int, stop: int) -> Pair:
    return pair[0][start:stop].contiguous(), pair[1][start:stop].contiguous()


def _mnist(*, pooled: bool) -> Splits:
    def images(split: Mnist) -> Pair:
        x, y = split.tensors
        return (F.avg_pool2d(x, 2) if pooled else x), y

    train = images(Mnist("train"))
    return Splits(_rows(train, 0, 56_000), _rows(train, 56_000, 60_000), images(Mnist("test")))


def _bytes(text: bytes) -> Splits:
    """Examples end to end; the last tenth for the report, the tenth before it to choose by, of each 1,024 examples."""
    codes = torch.from_numpy(np.minimum(np.frombuffer(text, np.uint8), VOCABULARY - 1).astype(np.int64))
    x, y = (side.unfold(0, CONTEXT, CONTEXT) for side in (codes[:-1], codes[1:]))
    tenth = len(x) // 10

    def spread(start: int) -> Pair:
        rows = torch.linspace(start, start + tenth - 1, min(tenth, 1024)).long()
        return x[rows], y[rows]

    return Splits(_rows((x, y), 0, len(x) - 2 * tenth), spread(len(x) - 2 * tenth), spread(len(x) - tenth))


def _shakespeare() -> Splits:
    return _bytes((_data() / "text" / "tinyshakespeare.txt").read_bytes())


def _python() -> Splits:
    """The top level of the standard library's source, files in an order that does not follow the alphabet."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    order = np.random.default_rng(0).permutation(len(files))
    return _bytes(b"\n".join(files[place].read_bytes() for place in order))


def _cifar() -> Splits:
    """CIFAR-10 from a copy that was stored as JPEG of quality 75, not from the original pixels."""
    decoded = STUDY / "cifar10_jpeg.npz"  # opening 60,000 files takes longer than a run
    if not decoded.exists():
        STUDY.mkdir(parents=True, exist_ok=True)
        part = decoded.with_suffix(".part.npz")
        np.savez(part, **_decode_cifar())
        part.replace(decoded)
    with np.load(decoded) as arrays:

        def pair(split: str) -> Pair:
            x = torch.from_numpy(arrays[f"{split}_images"]).permute(0, 3, 1, 2).float().div_(255)
            y = torch.from_numpy(arrays[f"{split}_labels"]).long()
            order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))  # the files go class by class
            return x.sub_(0.47).div_(0.25)[order].contiguous(), y[order]

        train = pair("train")
        return Splits(_rows(train, 0, 46_000), _rows(train, 46_000, 50_000), _rows(pair("test"), 0, 10_000))


def _decode_cifar() -> dict[str, np.ndarray]:
    from PIL import Image

    images: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    labels: dict[str, list[str]] = {"train": [], "test": []}
    with tarfile.open(_data() / "cifar10_jpeg" / "cifar10_jpeg.tar.xz") as archive:
        for member in archive:
            file = archive.extractfile(member) if member.isfile() else None
            if file is not None:
                split, label, _ = member.name.split("/")
                images[split].append(np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB")))
                labels[split].append(label)
    arrays = {f"{split}_images": np.stack(images[split]) for split in images}
    # numpy's unique sorts the names of classes, so that both splits number them alike.
    return arrays | {f"{split}_labels": np.unique(labels[split], return_inverse=True)[1] for split in labels}


def _digits() -> Splits:
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = torch.from_numpy(data.data).float().div_(16), torch.from_numpy(data.target).long()
    return Splits(_rows((x, y), 0, 1200), _rows((x, y), 1200, 1500), _rows((x, y), 1500, 1797))


def _data() -> Path:
    folder = os.environ.get("ADABATCH_DATA")
    if not folder:
        raise FileNotFoundError("set ADABATCH_DATA to the folder that holds text/, mnist/ and cifar10_jpeg/")
    return Path(folder)


WORKLOADS: Mapping[str, Workload] = {
    "mnist14": Workload(
        "MNIST averaged to 14x14 pixels, the project's MnistCNN with half its channels (4,874 parameters)",
        lambda: PooledCNN().to(memory_format=torch.channels_last),  # type: ignore[call-overload]
        lambda: _mnist(pooled=True),
        (16_384, 49_152, 147_456),
    ),
    "mlp14": Workload(
        "MNIST averaged to 14x14 pixels, one hidden layer of 64 (13,258 parameters)",
        lambda: MLP((14 * 14, 64, 10)),
        lambda: _mnist(pooled=True),
        (16_384, 49_152),
    ),
    "mnist28": Workload(
        "MNIST, the project's MnistCNN (28,938 parameters)",
        lambda: MnistCNN().to(memory_format=torch.channels_last),  # type: ignore[call-overload]
        lambda: _mnist(pooled=False),
        (16_384, 49_152),
    ),
    "shakespeare": Workload(
        f"tinyshakespeare by bytes, {CONTEXT} an example, a one-block transformer of width 32 (21,984 parameters)",
        byte_transformer,
        _shakespeare,
        (12_288, 36_864),
    ),
    "python": Workload(
        f"source of the standard library of Python {sys.version_info[0]}.{sys.version_info[1]} by bytes, {CONTEXT} an "
        "example, the same transformer",
        byte_transformer,
        _python,
        (12_288, 36_864),
    ),
    "cifar": Workload(
        "CIFAR-10 from a JPEG copy (not the original pixels), three strided convolutions with GroupNorm "
        "(24,458 parameters)",
        group_norm_cnn,
        _cifar,
        (16_384, 49_152),
    ),
    "digits": Workload(
        "scikit-learn's digits, one hidden layer: for tests only", lambda: MLP((64, 32, 10)), _digits, (512, 1536)
    ),
}


@lru_cache(maxsize=1)
def splits_of(name: str) -> Splits:
    """The data of a workload, read once per process."""
    return WORKLOADS[name].load()
