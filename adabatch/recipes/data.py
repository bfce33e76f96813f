"""Data sets in memory, with splits that never change: MNIST and characters of a text.

They are map-style (``dataset[i]`` is a tuple of tensors) and work with any ``DataLoader``, faster with
``collate_fn=collate``. Nothing is downloaded.
"""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from adabatch.arguments import checked_but, require, shown
from adabatch.runtime.data.in_memory import InMemory

Split = Literal["train", "test"]

GZIP_MAGIC = b"\x1f\x8b"
IDX_UINT8 = 0x08


class Mnist(InMemory):
    """MNIST (LeCun, Cortes, Burges 1998): 60,000 training and 10,000 test images in their original order.

    Examples are (image, label): float32 in [0, 1], shape (1, 28, 28), not normalized; int64 in 0..9.

    Args:
        split: "train" or "test", the original halves.
        root: folder with the four IDX files, gzipped or not, or with torchvision's ``MNIST/raw`` in it; by
            default the folder ``mnist`` or ``MNIST/raw`` in the directory that the environment variable
            ADABATCH_DATA names.

    Raises:
        FileNotFoundError: if there are no such files; lists the folders and how to get the files.
        ValueError: if files are not IDX, are cut short, or do not fit together.
    """

    @checked_but("split")
    def __init__(self, split: Split = "train", root: str | os.PathLike[str] | None = None) -> None:
        prefix = "train" if check_split(split) == "train" else "t10k"
        folders = _folders(root, "mnist", "MNIST/raw")
        images_path, labels_path = (
            _find(folders, (name, f"{name}.gz"), _MNIST_HELP)
            for name in (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte")
        )
        images, labels = read_idx(images_path), read_idx(labels_path)
        if images.shape[1:] != (28, 28):
            raise ValueError(f"{images_path}: expected images of shape (28, 28), got {images.shape[1:]}")
        if labels.shape != images.shape[:1]:
            raise ValueError(
                f"{labels_path}: expected one label for each of the {len(images)} images of {images_path}, "
                f"got shape {labels.shape}"
            )
        if labels.size and labels.max() > 9:
            raise ValueError(f"{labels_path}: expected labels from 0 to 9, got {labels.max()}")
        # in place, since the training images take 188 MB in float32
        scaled = torch.from_numpy(images).unsqueeze(1).to(torch.float32).div_(255)
        super().__init__(scaled, torch.from_numpy(labels).to(torch.int64))


class Text(InMemory):
    """Consecutive characters of a text, for models that predict the next one; by default tinyshakespeare.

    Examples are (characters, next characters): int64, shape (block_size,), the second one place further in
    the text. The first nine tenths of the text are for training, the rest for test. Examples lie end to end,
    so an epoch shows every character once; what does not fill an example is left out.

    Attributes:
        vocabulary: the distinct characters of the whole text, sorted; numbers in the examples are places in
            it.

    Args:
        split: "train" or "test".
        block_size: characters in an example.
        root: a UTF-8 text file, or the folder that holds ``tinyshakespeare.txt``; by default the folder
            ``text`` in the directory that the environment variable ADABATCH_DATA names.

    Raises:
        FileNotFoundError: if there is no such file; lists where it was searched for and how to get it.
        ValueError: if the text is not UTF-8, or is too short for one example.
    """

    @checked_but("split")
    def __init__(
        self, split: Split = "train", block_size: int = 128, *, root: str | os.PathLike[str] | None = None
    ) -> None:
        check_split(split)
        require(block_size >= 1, "block_size must be at least 1 character", block_size)
        if root is not None and Path(root).is_file():
            path = Path(root)
        else:
            path = _find(_folders(root, "text"), ("tinyshakespeare.txt",), _TEXT_HELP)
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error}") from None
        # through UTF-32, in which every character is one number, so that numpy can find the distinct ones
        codes, places = np.unique(np.frombuffer(text.encode("utf-32-le"), np.uint32), return_inverse=True)
        # one cut rather than a draw of examples, so that the splits have no characters in common
        cut = len(places) * 9 // 10
        part = torch.from_numpy(places[:cut] if split == "train" else places[cut:]).to(torch.int64)
        if len(part) <= block_size:
            raise ValueError(
                f"an example of block_size={block_size} needs {block_size + 1} characters, but the {split} "
                f"split of {path} has {len(part)}: use a smaller block_size or a longer text"
            )
        self.vocabulary = "".join(map(chr, codes))
        # Two views of the same characters; unfold copies nothing.
        inputs, targets = (side.unfold(0, block_size, block_size) for side in (part[:-1], part[1:]))
        super().__init__(inputs, targets)


def read_idx(path: str | os.PathLike[str]) -> NDArray[np.uint8]:
    """The array of bytes in an IDX file, gzipped or not (the format of the MNIST files).

    The file is two zero bytes, the code of the element type, the number of dimensions, each dimension as a
    big-endian 32-bit number, then the elements. Only unsigned bytes (code 0x08) are read.

    Raises:
        ValueError: if the magic number or the number of bytes is wrong; names the file.
    """
    data = Path(path).read_bytes()
    if data.startswith(GZIP_MAGIC):
        try:
            data = gzip.decompress(data)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} is a damaged or truncated gzip file: {error}") from None
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] != IDX_UINT8 or data[3] < 1:
        raise ValueError(
            f"{path} is not an IDX file of unsigned bytes: expected a magic number 0x000008NN, "
            f"got {data[:4].hex() or 'an empty file'}"
        )
    start = 4 + 4 * data[3]
    if len(data) < start:
        raise ValueError(f"{path} is truncated: its IDX header takes {start} bytes, the file has {len(data)}")
    shape = tuple(int(size) for size in np.frombuffer(data, ">u4", count=data[3], offset=4))
    # In Python's integers: the sizes in a damaged header may overflow int64.
    size = int(np.prod(shape, dtype=object))
    if len(data) != start + size:
        raise ValueError(
            f"{path} is {'truncated' if len(data) < start + size else 'too long'}: an array of shape {shape} "
            f"takes {start + size} bytes, the file has {len(data)}"
        )
    # A copy, because a view of bytes is read-only and torch warns of that.
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape).copy()


def check_split(split: str) -> str:
    """``split`` itself, if there is one of that name.

    Raises:
        ValueError: if the name is unknown.
    """
    if not isinstance(split, str) or split not in get_args(Split):
        raise ValueError(f'split must be "train" or "test", got {shown(split)}')
    return split


_MNIST_HELP = (
    "adabatch downloads nothing. Put the four IDX files of MNIST (train-images-idx3-ubyte.gz, "
    "train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz, t10k-labels-idx1-ubyte.gz) into the folder "
    "mnist/ of a directory D and set ADABATCH_DATA=D or pass root=D; or let torchvision fetch them with "
    "torchvision.datasets.MNIST(D, download=True)."
)
_TEXT_HELP = (
    "adabatch downloads nothing. Put tinyshakespeare.txt (input.txt of data/tinyshakespeare in the GitHub "
    "repository karpathy/char-rnn) into the folder text/ of a directory D and set ADABATCH_DATA=D or pass "
    "root=D; or pass a text file of your own as root=."
)


def _folders(root: str | os.PathLike[str] | None, *subfolders: str) -> list[Path]:
    """Where to look: in ``root`` itself and its subfolders, or in the subfolders of ADABATCH_DATA."""
    if root is not None:
        return [Path(root), *(Path(root, name) for name in subfolders)]
    data = os.environ.get("ADABATCH_DATA")
    return [Path(data, name) for name in subfolders] if data else []


def _find(folders: Sequence[Path], names: Sequence[str], help_text: str) -> Path:
    """The first of ``names`` in the first of ``folders`` that has one."""
    for folder in folders:
        for name in names:
            if (folder / name).is_file():
                return folder / name
    places = (
        f"looked in {', '.join(str(folder) for folder in folders)}"
        if folders
        else "no root= was given and the environment variable ADABATCH_DATA is not set"
    )
    raise FileNotFoundError(f"no {' or '.join(names)}: {places}. {help_text}")
