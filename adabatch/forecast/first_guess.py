"""A critical batch size without a run: published power laws of language models. Pure.

They were fitted to pre-training of transformers on text. On anything else they are a guess without support; each result
carries its name and where it comes from.
"""

from __future__ import annotations

import math
from typing import NamedTuple

SEQUENCE = 2048
"""Tokens in a sequence of Bergsma et al. 2025, whose batch sizes are counted in sequences."""


class FirstGuess(NamedTuple):
    """A critical batch size that nobody measured.

    Args:
        tokens: the batch in which a token is worth half of one in a small batch, in tokens.
        source: the law and the paper.
    """

    tokens: float
    source: str


def power_lines(tokens: float) -> FirstGuess:
    """``0.0471 D^0.462`` sequences of 2048 tokens, where D tokens are trained on, whatever the size of the model.

    Raises:
        ValueError: a number of tokens that is not positive.

    Source: Bergsma et al. 2025, "Power Lines" (arXiv 2505.13738), figure 1.
    """
    _check("tokens", tokens)
    return FirstGuess(SEQUENCE * 0.0471 * tokens**0.462, "Power Lines, 0.0471 D^0.462 sequences (arXiv 2505.13738)")


def kaplan(loss: float) -> FirstGuess:
    """``2.1e8 / L^(1 / 0.21)`` tokens at the loss L, in nats per token.

    Raises:
        ValueError: a loss that is not positive.

    Source: Kaplan et al. 2020 (arXiv 2001.08361), equation 1.4, after McCandlish et al. 2018.
    """
    _check("loss", loss)
    return FirstGuess(2.1e8 / loss ** (1 / 0.21), "Kaplan et al. 2020, 2.1e8 / L^(1 / 0.21) tokens (arXiv 2001.08361)")


def _check(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")
