"""Each message that docs/errors.md quotes is one that the code gives."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
MESSAGES = [
    match[1] for line in TEXT.splitlines() if (match := re.match(r"\| `(.+?)` \| .+ \| .+ \|$", line)) is not None
]
PLACEHOLDER = "\0"


@cache
def texts() -> tuple[str, ...]:
    """Every text in the package's code, with a placeholder for each value that is put into it."""
    found = []
    for path in (ROOT / "adabatch").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [
                    part.value if isinstance(part, ast.Constant) and isinstance(part.value, str) else PLACEHOLDER
                    for part in node.values
                ]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return tuple(found)


def test_the_page_has_its_messages() -> None:
    rows = [line for line in TEXT.splitlines() if line.startswith("| ") and not line.startswith(("| message", "| ---"))]
    assert len(MESSAGES) == len(rows) >= 20
    assert len(set(MESSAGES)) == len(MESSAGES)


@pytest.mark.parametrize("message", MESSAGES)
def test_the_code_gives_the_message(message: str) -> None:
    pattern = re.compile(f"[^{PLACEHOLDER}]*?{PLACEHOLDER}".join(map(re.escape, message.split("…"))))
    assert any(pattern.search(text) for text in texts()), message
