"""The shared data sets: splits that never change, clear refusals of files, batches gathered at once."""

from __future__ import annotations

import gzip
import hashlib
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Subset, TensorDataset, default_collate

from adabatch.recipes import InMemory, Mnist, Text, collate
from adabatch.recipes import digits as digits_module
from adabatch.recipes.data import read_idx
from adabatch.recipes.digits import Digits, split_digits

DATA = os.environ.get("ADABATCH_DATA")
needs_data = pytest.mark.skipif(
    not DATA, reason="needs the real data: ADABATCH_DATA names no folder with mnist/ and text/"
)


def digest(values) -> str:
    return hashlib.sha256(np.asarray(values, dtype="<i8").tobytes()).hexdigest()[:16]


def idx_bytes(array: np.ndarray, code: int = 8) -> bytes:
    header = bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.tobytes()


def write_mnist(folder: Path, num: int = 5, zipped: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Four IDX files of random images, the test half one image shorter; returns the training half."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(num)
    images = random.integers(256, size=(num, 28, 28), dtype=np.uint8)
    labels = random.integers(10, size=num, dtype=np.uint8)
    for prefix, count in (("train", num), ("t10k", num - 1)):
        for name, array in (("images-idx3", images[:count]), ("labels-idx1", labels[:count])):
            data = idx_bytes(array)
            path = folder / f"{prefix}-{name}-ubyte{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(data) if zipped else data)
    return images, labels


# Digits


def test_the_split_of_the_digits_never_changes():
    """Golden values: figures of other days stand on this split."""
    train, test = Digits("train"), Digits("test")
    assert (len(train), len(test)) == (1437, 360)
    assert digest(train.tensors[1]) == "0c089243c21456b1"
    assert digest(test.tensors[1]) == "b2e99ae07614b9dc"
    assert digest((test.tensors[0] * 16).to(torch.int64)) == "bd77225f2edc553d"


def test_the_split_of_the_digits_is_stratified_and_disjoint():
    train, test = (split.tensors[1].bincount() for split in (Digits("train"), Digits("test")))
    assert ((test - (train + test) / 5).abs() < 1).all()
    rows = split_digits(np.repeat(np.arange(10), 7))
    assert sorted(np.concatenate(rows).tolist()) == list(range(70))


def test_the_digits_are_scaled_images():
    image, label = Digits()[0]
    assert image.shape == (1, 8, 8)
    assert image.dtype == torch.float32
    assert label.dtype == torch.int64
    flat = Digits(flatten=True)
    assert flat[0][0].shape == (64,)
    assert torch.equal(flat.tensors[0], Digits().tensors[0].flatten(1))
    assert flat.tensors[0].min() == 0
    assert flat.tensors[0].max() == 1


def test_digits_without_scikit_learn_name_the_extra(monkeypatch):
    monkeypatch.setattr(digits_module, "load_digits", None)
    with pytest.raises(ImportError, match=r"adabatch\[cli\]"):
        Digits()


@pytest.mark.parametrize("dataset", [Digits, Mnist, Text])
def test_an_unknown_split_is_refused(dataset):
    with pytest.raises(ValueError, match='must be "train" or "test", got \'valid\''):
        dataset("valid")


# MNIST


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("subfolder", ["", "mnist", "MNIST/raw"])
def test_mnist_reads_what_the_files_say(tmp_path, subfolder, zipped):
    images, labels = write_mnist(tmp_path / subfolder, zipped=zipped)
    train, test = Mnist("train", tmp_path), Mnist("test", str(tmp_path))
    assert (len(train), len(test)) == (5, 4)
    assert train[0][0].dtype == torch.float32
    assert torch.equal(train.tensors[0], torch.from_numpy(images[:, None] / np.float32(255)))
    assert train.tensors[1].tolist() == labels.tolist()
    assert torch.equal(test[3][0], train[3][0])


@pytest.mark.parametrize("subfolder", ["mnist", "MNIST/raw"])
def test_mnist_is_found_through_the_environment(tmp_path, monkeypatch, subfolder):
    write_mnist(tmp_path / subfolder)
    monkeypatch.setenv("ADABATCH_DATA", str(tmp_path))
    assert len(Mnist()) == 5


def test_a_given_root_goes_before_the_environment(tmp_path, monkeypatch):
    write_mnist(tmp_path / "ours" / "mnist", num=3)
    write_mnist(tmp_path / "theirs", num=4)
    monkeypatch.setenv("ADABATCH_DATA", str(tmp_path / "ours"))
    assert len(Mnist(root=tmp_path / "theirs")) == 4


def test_missing_files_say_where_they_were_looked_for(tmp_path, monkeypatch):
    monkeypatch.delenv("ADABATCH_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"ADABATCH_DATA is not set.*downloads nothing.*torchvision"):
        Mnist()
    with pytest.raises(FileNotFoundError) as error:
        Mnist("test", tmp_path)
    for part in ("t10k-images-idx3-ubyte.gz", tmp_path, tmp_path / "mnist", tmp_path / "MNIST" / "raw"):
        assert str(part) in str(error.value)
    monkeypatch.setenv("ADABATCH_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Mnist()
    with pytest.raises(FileNotFoundError, match=r"nowhere.*karpathy/char-rnn"):
        Text()


def test_one_missing_file_of_four_is_named(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"no train-labels-idx1-ubyte or train-labels-idx1-ubyte\.gz"):
        Mnist("train", tmp_path)
    assert len(Mnist("test", tmp_path)) == 4


@pytest.mark.parametrize(
    "name, array, message",
    [
        ("train-images-idx3-ubyte", np.zeros((5, 27, 28), np.uint8), r"shape \(28, 28\), got \(27, 28\)"),
        ("train-images-idx3-ubyte", np.zeros(5, np.uint8), r"shape \(28, 28\), got \(\)"),
        ("train-images-idx3-ubyte", np.zeros((4, 28, 28), np.uint8), "one label for each of the 4 images"),
        ("train-labels-idx1-ubyte", np.zeros((5, 2), np.uint8), "one label for each of the 5 images"),
        ("train-labels-idx1-ubyte", np.full(5, 10, np.uint8), "labels from 0 to 9, got 10"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, name, array, message):
    write_mnist(tmp_path, zipped=False)
    (tmp_path / name).write_bytes(idx_bytes(array))
    with pytest.raises(ValueError, match=message):
        Mnist("train", tmp_path)


@given(
    shape=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    zipped=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_idx_files_come_back(tmp_path_factory, shape, zipped, seed):
    array = np.random.default_rng(seed).integers(256, size=shape, dtype=np.uint8)
    path = tmp_path_factory.mktemp("idx") / "file"
    data = idx_bytes(array)
    path.write_bytes(gzip.compress(data) if zipped else data)
    back = read_idx(path)
    assert back.flags.writeable
    np.testing.assert_array_equal(back, array)


@pytest.mark.parametrize("zipped", [True, False])
def test_an_idx_file_cut_at_any_byte_is_refused(tmp_path, zipped):
    data = idx_bytes(np.arange(12, dtype=np.uint8).reshape(3, 4))
    data = gzip.compress(data) if zipped else data
    path = tmp_path / "file"
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=str(path)):
            read_idx(path)


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "not an IDX file.*an empty file"),
        (b"\x89PNG\r\n\x1a\n", "not an IDX file.*89504e47"),
        (idx_bytes(np.zeros((2, 4), np.uint8), code=0x0D), "not an IDX file of unsigned bytes.*00000d02"),
        (idx_bytes(np.zeros(3, np.uint8)) + b"\0", r"too long.*shape \(3,\) takes 11 bytes.* has 12"),
        (idx_bytes(np.zeros(3, np.uint8))[:-1], r"truncated.*shape \(3,\) takes 11 bytes.* has 10"),
        (struct.pack(">4B4I", 0, 0, 8, 4, *[2**32 - 1] * 4), "truncated"),  # 2^128 elements: no overflow
        (b"\x1f\x8bnot gzip at all", "damaged or truncated gzip"),
    ],
)
def test_what_is_no_idx_file_is_refused(tmp_path, data, message):
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_idx(path)


@needs_data
def test_the_real_mnist():
    train, test = Mnist("train"), Mnist("test")
    assert (len(train), len(test)) == (60_000, 10_000)
    assert train.tensors[1][:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert test.tensors[1][:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    # The mean and deviation that everybody normalizes with.
    assert train.tensors[0].mean().item() == pytest.approx(0.1307, abs=5e-5)
    assert train.tensors[0].std().item() == pytest.approx(0.3081, abs=5e-5)


# Text


def test_text_pairs_characters_with_the_next(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("aéb\n" * 25, encoding="utf-8")
    train, test = Text("train", 4, root=path), Text("test", 4, root=path)
    assert train.vocabulary == "\nabé"
    assert (len(train), len(test)) == (22, 2)  # 89 // 4 and 9 // 4 examples of characters that have a next
    for x, y in train:
        assert "".join(train.vocabulary[i] for i in x) == "aéb\n"
        assert "".join(train.vocabulary[i] for i in y) == "éb\na"
    assert x.dtype == torch.int64


@given(length=st.integers(20, 300), block_size=st.integers(1, 17))
def test_text_shows_every_character_once(tmp_path_factory, length, block_size):
    path = tmp_path_factory.mktemp("text") / "own.txt"
    text = "".join(chr(0x4E00 + i) for i in range(length))  # all different: places are the characters
    path.write_text(text, encoding="utf-8")
    cut = length * 9 // 10
    for split, part in (("train", range(cut)), ("test", range(cut, length))):
        if len(part) <= block_size:
            with pytest.raises(ValueError, match=f"needs {block_size + 1} characters.*has {len(part)}"):
                Text(split, block_size, root=path)
            continue
        x, y = Text(split, block_size, root=path).tensors
        seen = x.flatten().tolist()
        assert seen == list(part)[: len(seen)]
        assert len(part) - 1 - len(seen) < block_size
        assert torch.equal(y, x + 1)


def test_what_text_refuses(tmp_path):
    (tmp_path / "tinyshakespeare.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"tinyshakespeare\.txt is not UTF-8"):
        Text(root=tmp_path)
    with pytest.raises(ValueError, match="block_size must be at least 1 character, got 0"):
        Text("train", 0, root=tmp_path)


@needs_data
def test_the_real_text():
    train, test = Text("train"), Text("test")
    assert len(train.vocabulary) == 65
    assert (len(train), len(test)) == (7842, 871)
    assert "".join(train.vocabulary[i] for i in train[0][0][:14]) == "First Citizen:"


# Batches


def dataset(num: int = 20) -> InMemory:
    return InMemory(torch.arange(num * 6.0).reshape(num, 2, 3), torch.arange(num))


@given(st.lists(st.integers(0, 19), min_size=1, max_size=30))
def test_gathered_batches_equal_those_of_torch(indices):
    ours = dataset()
    expected = default_collate([TensorDataset(*ours.tensors)[i] for i in indices])
    for batch in (collate(ours.__getitems__(indices)), default_collate(ours.__getitems__(indices))):
        assert type(batch) is type(expected)
        assert len(batch) == 2
        for ours_part, expected_part in zip(batch, expected, strict=True):
            assert ours_part.dtype == expected_part.dtype
            assert torch.equal(ours_part, expected_part)


@pytest.mark.parametrize("function", [collate, None])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_loader_gives_the_batches_of_the_plain_data_set(function, num_workers):
    ours, rows = dataset(), [3, 1, 4, 1, 5, 9, 2, 6]
    plain = TensorDataset(*ours.tensors)
    loader = DataLoader(Subset(ours, rows), batch_size=3, collate_fn=function, num_workers=num_workers)
    expected = DataLoader(Subset(plain, rows), batch_size=3)
    for batch, other in zip(loader, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, other, strict=True))


def test_collate_serves_other_data_sets_too():
    assert torch.equal(collate([1, 2]), torch.tensor([1, 2]))
    assert torch.equal(collate([{"x": torch.ones(2)}])["x"], torch.ones(1, 2))


def test_rows_are_a_sequence_of_examples():
    rows = dataset().__getitems__([4, 0, 7])
    assert len(rows) == 3
    assert [int(label) for _, label in rows] == [4, 0, 7]
    assert [int(label) for _, label in rows[1:]] == [0, 7]
    with pytest.raises(IndexError):
        collate(dataset().__getitems__([20]))
