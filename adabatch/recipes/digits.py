"""The handwritten digits of scikit-learn: real images without a download."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from adabatch.recipes.data import Split, check_split
from adabatch.runtime.data.in_memory import InMemory

try:
    from sklearn.datasets import load_digits
except ImportError:
    load_digits = None

SEED = 1797


class Digits(InMemory):
    """1,797 images of digits, 8x8 (Alpaydin and Kaynak 1998, UCI), as 1,437 for training and 360 for test.

    Examples are (image, label): float32 in [0, 1] (the pixels 0..16 divided by 16); int64 in 0..9. The split
    is stratified and fixed, see ``split_digits``.

    Args:
        split: "train" or "test".
        flatten: shape (64,) if true, otherwise (1, 8, 8).

    Raises:
        ImportError: if scikit-learn is not installed.
    """

    def __init__(self, split: Split = "train", *, flatten: bool = False) -> None:
        check_split(split)
        if load_digits is None:
            raise ImportError(
                "Digits reads images that come with scikit-learn: install it with pip install 'adabatch[cli]'"
            )
        digits = load_digits()
        train, test = split_digits(digits.target)
        chosen = train if split == "train" else test
        images = torch.from_numpy(digits.images[chosen]).to(torch.float32).div_(16)
        super().__init__(
            images.flatten(1) if flatten else images.unsqueeze(1),
            torch.from_numpy(digits.target[chosen]).to(torch.int64),
        )


def split_digits(labels: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows for training and the rows for test, each ascending.

    Rows are sorted by class, in a fixed random order within a class, and every fifth is for the test: each class
    gives a fifth of its rows, rounded up or down. The order comes from ``RandomState(1797)``, whose stream numpy
    guarantees forever (NEP 19); that of ``default_rng`` may change.

    Args:
        labels: class of each row, shape (num_examples,).
    """
    shuffled = np.random.RandomState(SEED).permutation(len(labels))
    # stable, since another sort would make the split depend on the version of numpy
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    is_test = np.zeros(len(labels), dtype=bool)
    is_test[by_class[::5]] = True
    return np.flatnonzero(~is_test), np.flatnonzero(is_test)
