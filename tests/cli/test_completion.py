"""``adabatch completion``: what shells make of its scripts."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

import pytest

from adabatch.cli.completion import SHELLS
from adabatch.cli.main import main
from adabatch.cli.overview import COMMANDS

pytest.importorskip("shtab", reason="completion needs the extra cli")


@pytest.fixture(scope="module")
def scripts() -> dict[str, str]:
    from contextlib import redirect_stdout
    from io import StringIO

    made = {}
    for shell in SHELLS:
        with redirect_stdout(StringIO()) as out:
            assert main(["completion", shell]) == 0
        made[shell] = out.getvalue()
    return made


@pytest.mark.parametrize("shell", SHELLS)
def test_every_command_and_the_fields_of_a_job_are_there(shell: str, scripts: dict[str, str]) -> None:
    text = scripts[shell]
    assert all(name in text for name in COMMANDS)
    for option in ("limits.max", "lr_rule", "sqrt_gain", "total.unit", "log_every", "lines"):
        assert option in text, option


@pytest.mark.parametrize(
    "words, expected",
    [
        (["adabatch", "tr"], {"train"}),
        (["adabatch", "train", "--limits.m"], {"--limits.min", "--limits.max"}),
        (["adabatch", "train", "--lr_rule", "sq"], {"sqrt", "sqrt_gain"}),
        (["adabatch", "schedule", "ex"], {"extend"}),
        (["adabatch", "completion", "z"], {"zsh"}),
    ],
)
def test_bash_completes(words: list[str], expected: set[str], scripts: dict[str, str]) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("needs bash")
    given = " ".join(f"'{word}'" for word in words)
    ask = f'COMP_WORDS=({given}); COMP_CWORD={len(words) - 1}; _shtab_adabatch; printf "%s\\n" "${{COMPREPLY[@]}}"'
    ended = subprocess.run([bash, "--norc", "-c", f"{scripts['bash']}\n{ask}"], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert set(ended.stdout.split()) == expected


def test_an_unknown_shell_is_one_line(capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["completion", "ksh"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
