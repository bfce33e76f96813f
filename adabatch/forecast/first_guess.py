"""A critical batch size without a run, from published power laws of language models. Pure.

They were fitted to pre-training of transformers on text. For anything else they are an unsupported guess. Each result
names its source, and what the law was fitted to.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from adabatch.arguments import checked, require

SEQUENCE = 2048
"""Tokens in a sequence of Bergsma et al. 2025, who count batches in sequences and data in tokens."""

POWER_LINES_TOKENS = 2.2e9, 1.4e11
"""The range of Bergsma et al. 2025 (111 million to 3.3 billion parameters, 20 to 1,280 tokens per parameter) in tokens:
20 and 1,280 per parameter of the smallest model, since larger models saw fewer tokens per parameter."""

KAPLAN_LOSSES = 3.0, 10.0
"""Losses at which Kaplan et al. 2020, figure 10, measured critical batches."""


class FirstGuess(NamedTuple):
    """A critical batch size that was not measured.

    Args:
        tokens: the batch in which a token is worth half of one in a small batch, in tokens.
        source: the law and the paper.
        fitted_to: models and data that the law was fitted to, as a phrase.
        inside: whether the arguments lie within that range.
    """

    tokens: float
    source: str
    fitted_to: str
    inside: bool


@checked
def power_lines(tokens: float) -> FirstGuess:
    """``0.0471 D^0.462`` sequences of 2048 tokens, whatever the size of the model.

    Args:
        tokens: D, the fewest tokens that reach the loss, as in a run with small batches. In batches of b sequences it
            takes ``D (1 + b / (0.0471 D^0.462))`` tokens.

    Raises:
        ValueError: if the number of tokens is not positive.

    Source: Bergsma et al. 2025, "Power Lines" (arXiv 2505.13738v2), figure 1 (right) for the two numbers, equation 6
    for the hyperbola and equation 7 for the law in D_min.
    """
    _check("tokens", tokens)
    return FirstGuess(
        # the law counts a batch in sequences
        SEQUENCE * 0.0471 * tokens**0.462,
        "Power Lines, 0.0471 D^0.462 sequences of 2048 tokens (arXiv 2505.13738v2, figure 1)",
        "models of 111 million to 3.3 billion parameters with 20 to 1,280 tokens per parameter, AdamW and muP, "
        "2.2e9 to 1.4e11 tokens",
        POWER_LINES_TOKENS[0] <= tokens <= POWER_LINES_TOKENS[1],
    )


@checked
def kaplan(loss: float) -> FirstGuess:
    """``2.1e8 / L^(1 / 0.21)`` tokens at the loss L, in nats per token, whatever the size of the model.

    The loss is that on WebText2 with 50,257 byte pairs; with another tokenizer the same model has another loss. The
    result is the critical batch at this loss. A run reaches it at its end; before that, the critical batch is smaller.

    Raises:
        ValueError: if the loss is not positive.

    Source: Kaplan et al. 2020 (arXiv 2001.08361), equations 1.4 and 5.3 (with 2e8 tokens), figure 10 and table 5 (with
    2.1e8), after McCandlish et al. 2018.
    """
    _check("loss", loss)
    return FirstGuess(
        2.1e8 / loss ** (1 / 0.21),
        "Kaplan et al. 2020, 2.1e8 / L^(1 / 0.21) tokens (arXiv 2001.08361, equation 5.3 and figure 10)",
        "models of 3 and 85 million parameters (without embeddings) on WebText2, at losses from 10 to 3 nats per token",
        KAPLAN_LOSSES[0] <= loss <= KAPLAN_LOSSES[1],
    )


def _check(name: str, value: float) -> None:
    require(0 < value < math.inf, f"{name} must be positive and finite", value)
