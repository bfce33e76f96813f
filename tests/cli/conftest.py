"""What the tests of the command share: a job of theirs, written down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml


@pytest.fixture
def config(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Writes the ``CONFIG`` of the test's module with changes; returns its path."""

    def write(**changes: Any) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({**request.module.CONFIG, "out": str(tmp_path / "run"), **changes}))
        return str(path)

    return write
