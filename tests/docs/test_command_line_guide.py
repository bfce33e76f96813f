"""The config of docs/command_line.md is one, and its table of commands is that of the code."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from adabatch.cli.main import main
from adabatch.cli.overview import COMMANDS

# not importorskip, which imports it: seconds in each process that collects the tests, for the few that run them
pytestmark = pytest.mark.skipif(find_spec("sklearn") is None, reason="the digits need scikit-learn (extra cli)")

TEXT = (Path(__file__).parents[2] / "docs" / "command_line.md").read_text(encoding="utf-8")


@pytest.mark.slow  # its data set imports scikit-learn, for seconds
def test_the_config_of_the_guide_is_accepted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (config,) = re.findall(r"```yaml\n(.*?)```", TEXT, flags=re.DOTALL)
    path = tmp_path / "job.yaml"
    path.write_text(config)
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--config", str(path), "--limits.max=512", "--print_config"])
    assert stopped.value.code in (0, None)
    printed = capsys.readouterr().out
    assert "max: 512" in printed
    assert "eta: 0.7" in printed


def test_the_table_has_every_command() -> None:
    assert re.findall(r"^\| `adabatch (\w+)` \|", TEXT, flags=re.MULTILINE) == list(COMMANDS)
