"""How many examples a property gets if its corners are rarer or commoner than those of others."""

from __future__ import annotations

import hypothesis

USUAL = 60
"""Examples of a property under the profile "repeatable"; see ``tests/conftest.py``."""


def with_examples(count: int) -> hypothesis.settings:
    """Settings with this number of examples, and a part of it under the profile of `make fast`, which has fewer."""
    return hypothesis.settings(max_examples=max(1, count * hypothesis.settings.default.max_examples // USUAL))
