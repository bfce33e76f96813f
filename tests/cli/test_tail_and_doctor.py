"""`adabatch tail` and `adabatch doctor`, which need none of the extras."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from adabatch.cli import doctor
from adabatch.cli.doctor import Package, advice, packages
from adabatch.cli.main import main
from adabatch.cli.tail import HEADER, follow_journal, line_text


def step_line(step: int, **other) -> dict:
    return {
        "format": 1,
        "step": step,
        "examples": 32 * step,
        "plan": {"global_batch_size": 32},
        "loss": 0.25,
        "averages": {"noise_scale": 1234.5},
        "wanted": 99.6,
        "lr": {"applied": [0.003]},
        "next": 64,
        "reason": "grow",
        **other,
    }


def text(*steps: int) -> str:
    return "".join(json.dumps(step_line(step)) + "\n" for step in steps)


def test_the_last_steps_of_a_run(tmp_path, capsys):
    (tmp_path / "journal.jsonl").write_text(text(*range(20)) + '{"step": 20, "pl')
    assert main(["tail", str(tmp_path), "--lines", "3", "--once"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header == HEADER
    assert [line.split()[0] for line in lines] == ["17", "18", "19"]
    assert lines[0].split() == ["17", "544", "32", "100", "1,234", "0.25", "0.003", "64", "grow"]
    assert len(lines[0].partition("  64")[0]) == len(HEADER.partition("  next")[0])


def test_lines_that_are_missing_are_said_once(tmp_path, capsys, caplog):
    (tmp_path / "journal.jsonl").write_text(text(0, 1, 4, 5, 9))
    assert main(["tail", str(tmp_path), "--once"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 6
    (said,) = caplog.messages
    assert "journal.jsonl, step 4, begins at 128 examples, and the line before ends at 64" in said


def test_evaluations_stand_between_the_steps(tmp_path, capsys):
    evaluation = {"format": 1, "step": 2, "examples": 64, "evaluation": {"loss": 0.25, "accuracy": None}}
    (tmp_path / "journal.jsonl").write_text(text(0, 1) + json.dumps(evaluation) + "\n" + text(2))
    assert main(["tail", str(tmp_path), "--lines", "2", "--once"]) == 0
    first, second = capsys.readouterr().out.splitlines()[1:]
    assert first.split() == ["2", "64", "evaluation:", "loss", "0.25,", "accuracy", "-"]
    assert second.split()[:2] == ["2", "64"]


def test_a_terminal_has_colours():
    assert line_text(step_line(0), colored=True).endswith("\x1b[32m64 grow\x1b[0m")
    assert line_text(step_line(0, reason="hold"), colored=True) == line_text(step_line(0, reason="hold"), colored=False)
    left = line_text(step_line(0, applied=False, lr=None, loss=None, averages=None, wanted=None), colored=True)
    assert "(update left out)" in left
    assert "\x1b[31m" in left
    assert left.split()[3:7] == ["-"] * 4


def test_new_steps_come_as_they_are_written(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_text(text(0, 1))
    half, rest = text(3)[:25], text(3)[25:]

    def append(more: str) -> None:
        with path.open("a") as file:
            file.write(more)

    def resumed() -> None:  # a run that goes on from its checkpoint cuts the lines behind it
        path.write_text(text(0, 1))

    later = iter(
        [
            lambda: append(text(2) + half),
            lambda: None,
            lambda: append(rest),
            resumed,
            lambda: append(text(2)),
        ]
    )
    found = follow_journal(path, lines=1, once=False, sleep=lambda _: next(later)())
    assert [next(found)["step"] for _ in range(4)] == [1, 2, 3, 2]


def test_tail_follows_a_journal_whose_file_is_put_aside(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.with_name("journal.jsonl.1").write_text(text(0, 1))
    path.write_text(text(2))

    def put_aside(number: int, last: int) -> None:
        with path.open("a") as file:
            file.write(text(last))
        path.rename(path.with_name(f"journal.jsonl.{number}"))

    def full_twice() -> None:
        put_aside(2, 3)
        path.write_text(text(4))
        put_aside(3, 5)
        path.write_text(text(6))

    later = iter([lambda: put_aside(4, 7), lambda: path.write_text(text(8))])  # nothing has the name for a moment
    steps = iter([full_twice, lambda: None, *later])
    found = follow_journal(path, lines=2, once=False, sleep=lambda _: next(steps)())
    assert [next(found)["step"] for _ in range(8)] == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("text", ["format: 1\n", "[1]\n", "\xfe\n"])
def test_a_file_that_is_no_journal_is_not_followed(tmp_path, capsys, text):
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="latin-1")
    assert main(["tail", str(path)]) == 2
    assert "config.yaml is not a journal: its first line is not a JSON object" in capsys.readouterr().err


def test_lines_that_are_no_steps_are_passed_over(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_text("nothing\n[1]\n" + text(5))
    assert [entry["step"] for entry in follow_journal(path, lines=10, once=True)] == [5]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["nowhere"], "nowhere has no journal"), ([".", "--lines=-1"], "invalid number of lines value: '-1'")],
)
def test_mistakes_of_tail(arguments, said, capsys):
    try:
        status = main(["tail", *arguments])
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    assert said in capsys.readouterr().err


# --- doctor ---

REQUIREMENTS = [
    "torch>=2.6",
    "numpy>=1.26",
    'jsonargparse[signatures]>=4.49; extra == "cli"',
    "rich>=13; extra == 'cli'",
    'matplotlib>=3.8; extra == "report"',
    'adabatch[cli,report]; extra == "dev"',
    'hypothesis>=6; extra == "dev"',
]


def test_packages_are_those_of_the_metadata():
    here = {"torch": "2.13.0+cpu", "numpy": "1.9.1", "rich": "13.0"}
    found = {package.name: package for package in packages(REQUIREMENTS, here.get)}
    assert found["torch"] == Package("torch", "2.13.0+cpu", "2.6", "adabatch")
    assert not found["torch"].too_old  # 13 is more than 6
    assert found["numpy"].too_old  # and 9 is less than 26
    assert not found["rich"].too_old
    assert found["jsonargparse"] == Package("jsonargparse", None, "4.49", "adabatch[cli]")
    assert "hypothesis" not in found
    assert "adabatch" not in found
    assert found["trackio"].needed_for == "trackers"


def test_advice_names_the_way_out():
    here = {"torch": "2.5.1", "numpy": "2.0", "matplotlib": "3.9"}
    place = {"launched": {}, "backends": [], "cuda": "12.4", "accelerators": []}
    said = advice(packages(REQUIREMENTS, here.get), place)
    assert said[0] == "torch 2.5.1 is older than 2.6, which adabatch needs: pip install 'torch>=2.6'"
    assert "jsonargparse, rich are not installed: pip install 'adabatch[cli]', if you need it" in said
    assert any("one process only" in sentence for sentence in said)
    assert any("sees no device" in sentence for sentence in said)
    well = {"launched": {}, "backends": ["gloo"], "cuda": None, "accelerators": []}
    assert advice(packages(["torch>=2.6"], {"torch": "2.13.0"}.get), well) == []


def test_doctor_tells_of_this_process(capsys):
    assert main(["doctor"]) == 0
    told = capsys.readouterr().out
    for word in ("adabatch", "python", "backends", "rank 0 of 1, on ", "launched by nobody", "gloo", "package"):
        assert word in told
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["launched"]["size"] == 1
    assert {"torch", "numpy"} <= {package["name"] for package in found["packages"]}


def test_doctor_fails_where_something_needed_is_too_old(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "packages", lambda: [Package("torch", "1.0", "2.6", "adabatch")])
    assert main(["doctor"]) == 1
    assert "<- too old" in capsys.readouterr().out


def test_a_launcher_whose_variables_do_not_fit_is_told(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["doctor"]) == 0
    assert "the launcher's variables do not fit together" in capsys.readouterr().out


@pytest.mark.slow
def test_they_need_none_of_the_extras(tmp_path: Path):
    (tmp_path / "journal.jsonl").write_text(text(1))
    blocked = "for name in ('jsonargparse', 'rich', 'yaml', 'matplotlib'): sys.modules[name] = None"
    calls = f"main(['doctor']) + main(['tail', {str(tmp_path)!r}, '--once'])"
    code = f"import sys\n{blocked}\nfrom adabatch.cli.main import main\nsys.exit({calls})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "64 grow" in done.stdout
