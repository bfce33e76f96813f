"""How the command is started, what it says about itself and about mistakes, and how it ends."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.jobs import Attempt

import adabatch
from adabatch.batch import Duration
from adabatch.cli import main as command
from adabatch.cli.display import Display, PlainConsole
from adabatch.cli.job import COUNTS
from adabatch.cli.main import main
from adabatch.cli.mistakes import one_line
from adabatch.cli.overview import COMMANDS
from adabatch.cli.parser import build_parser
from adabatch.cli.yaml_text import GivenTwice, TooManyNodes, load_yaml

pytest.importorskip("sklearn", reason="the digits need scikit-learn (extra cli)")

ROOT = Path(__file__).parents[2]
CONFIG: dict[str, Any] = {
    "format": 1,
    "model": {"class_path": "adabatch.recipes.models.MLP"},
    "loss": {"class_path": "torch.nn.CrossEntropyLoss"},
    "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
    "train_data": {"class_path": "adabatch.recipes.digits.Digits", "init_args": {"split": "train"}},
    "criterion": {"class_path": "adabatch.NormTest", "init_args": {"eta": 0.5}},
    "micro_batch_size": 8,
    "limits": {"min": 16, "max": 64},
    "total": {"count": 300, "unit": "examples"},
}
LONG = {"count": 10**9, "unit": "examples"}


def environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}


def script(*arguments: str) -> list[str]:
    """The command as its entry point starts it: the working folder is not on the path."""
    return [sys.executable, "-P", "-c", "import sys; from adabatch.cli.main import main; sys.exit(main())", *arguments]


def status_of(arguments: list[str]) -> Any:
    try:
        return main(arguments)
    except SystemExit as stopped:
        return stopped.code


def said_in_one_line(capsys: Any) -> str:
    error: str = capsys.readouterr().err
    assert error.endswith("\n")
    assert error.count("\n") == 1, error
    return error


# --- help and version -----------------------------------------------------------------------------------------------

ASK = """
import contextlib, io, json, runpy, sys

found = []
for asked in sys.argv[1:]:
    sys.argv[1:] = [asked]
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(io.StringIO()) as error:
        try:
            runpy.run_module("adabatch", run_name="__main__")  # as python -m adabatch does
        except SystemExit as ended:
            found.append([ended.code, said.getvalue(), error.getvalue()])
print(json.dumps(found))
"""


def test_help_and_version_need_no_extras(tmp_path: Path) -> None:
    """With modules of the extras' names that fail, first on the path."""
    for name in command.EXTRAS:
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('not here', name='{name}')")
    (tmp_path / "ask.py").write_text(ASK)
    asked = ["--help", "--version", "train"]
    ended = subprocess.run(
        [sys.executable, "ask.py", *asked], env=environment(), cwd=tmp_path, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    shown, version, refused = json.loads(ended.stdout)
    for (status, said, error), word in ((shown, "train the model"), (version, adabatch.__version__)):
        assert (status, error) == (0, "")
        assert word in said
    status, _, error = refused
    assert status == 2
    assert "pip install adabatch[cli]" in error
    assert error.count("\n") == 1


def test_help_names_every_command(capsys: Any) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in COMMANDS)
    assert main([]) == 2


@pytest.mark.parametrize("name", ["train", "compare", "cbs", "verify"])
def test_help_of_a_job_is_short_and_every_option_in_it_exists(name: str, capsys: Any) -> None:
    assert status_of([name, "--help"]) == 0
    short = capsys.readouterr().out
    assert len(short.splitlines()) < 45
    assert status_of([name, "--help=all"]) == 0
    full = capsys.readouterr().out
    assert status_of([name, "--help-all"]) == 0
    assert capsys.readouterr().out == full
    for option in re.findall(r"--[\w.-]+", short):
        of_a_class = option in ("--model.NAME", "--optimizer.lr", "--criterion.eta", "--limits.min", "--limits.max")
        # torchrun's own, and the sample line that stands for all fields
        others = ("--nproc-per-node", "--FIELD", "--help", "--help-all", "--print_config")
        assert of_a_class or option in others or option in full, option


def test_every_field_is_in_the_full_help(capsys: Any) -> None:
    status_of(["train", "--help-all"])
    full = capsys.readouterr().out
    names = [action for action in build_parser()._subcommands_action.choices["train"]._option_string_actions]
    assert all(name in full for name in names)


# --- where classes come from ----------------------------------------------------------------------------------------


def test_a_model_file_in_the_working_folder_is_found(config: Any, tmp_path: Path) -> None:
    (tmp_path / "my_model.py").write_text(
        "import torch\n\nclass Mine(torch.nn.Sequential):\n"
        "    def __init__(self):\n        super().__init__(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n"
    )
    path = config(model={"class_path": "my_model.Mine"})
    start = [each for each in script("train", "--config", path) if each != "-P"]
    ended = subprocess.run(start, env=environment(), cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    safe = subprocess.run(script("train", "--config", path), env=environment(), cwd=tmp_path, capture_output=True)
    assert safe.returncode == 2, "python -P keeps the working folder off the path"


def test_the_path_is_left_as_it_was(config: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert status_of(["train", "--config", config(seed=-1)]) == 2
    assert sys.path == before


# --- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--micro_batch_size=eight", ["micro_batch_size must be a whole number", "'eight'"]),
        ("--micro_batch_sise=8", ["micro_batch_sise", "did you mean micro_batch_size?", "--help-all"]),
        ("--lr_rule=cubic", ["lr_rule must be one of none, linear, sqrt", "'cubic'"]),
        ("--total.unit=epochs", ["total.unit must be one of examples, tokens, steps, gain_steps", "'epochs'"]),
        ("--limits=5", ["limits must be", "a mapping of its arguments", "'5'"]),
        ("--control=[1]", ["control must be", "a mapping of its arguments"]),
        ("--total=5", ["total has fields of its own", "'5'"]),
        ("--model=5", ["model must be a class path", "'5'"]),
        ("--checkpoint.every=5", ["checkpoint.every must be", "'5'"]),
        ("--criterion=[1, 2]", ["criterion must be a class path", "[1, 2]"]),
        ("--criterion.zeta=1", ["criterion: adabatch.NormTest", "zeta", "--criterion.help adabatch.NormTest"]),
        ("--criterion=adabatch.NoSuchTest", ["criterion", "NoSuchTest"]),
        ("--optimizer.lr=abc", ["optimizer.lr must be a number", "'abc'"]),
        ("--optimizer.init_args.nope=1", ["optimizer", "'nope' is not accepted", "--optimizer.help"]),
        ("--optimizer=torch.nn.Linear", ["optimizer must be a class of kind Optimizer", "torch.nn.Linear"]),
        ("--local_sgd=adabatch.LocalSGD", ["local_sgd", "sync_every", "--local_sgd.help"]),
        ("--engine=horovod", ["engine must be one of ddp, fsdp2, deepspeed", "'horovod'"]),
        ("--seed=-1", ["seed must be a whole number from 0", "-1"]),
        ("--config=/no/such/file", ["config", "/no/such/file"]),
        ("--guard.check_every=2147483648", ["error: guard.check_every must be at most 100000000 steps", "2147483648"]),
        ("--control.interval=2147483648", ["error: control.interval must be at least 1", "at most 100,000,000"]),
        ("--control.growth=0.5", ["error: control.growth must be above 1, got 0.5"]),
        ("--limits.min=-4", ["error: limits.min must be at least 1 example, got -4"]),
        *((f"--{name}={most + 1}", [name, f"at most {most:,}", f"{most + 1:,}"]) for name, most in COUNTS.items()),
    ],
)
def test_a_mistake_is_one_line_with_field_value_and_way_out(
    config: Any, tmp_path: Path, capsys: Any, flag: str, words: list[str]
) -> None:
    assert status_of(["train", "--config", config(), flag]) == 2
    said = said_in_one_line(capsys)
    assert said.startswith("adabatch train: error: ")
    for word in words:
        assert word in said
    assert not (tmp_path / "run").exists()


def test_a_missing_field_is_named(config: Any, capsys: Any, tmp_path: Path) -> None:
    fields = {name: value for name, value in CONFIG.items() if name != "model"}
    (tmp_path / "part.yaml").write_text(yaml.safe_dump(fields))
    assert status_of(["train", "--config", str(tmp_path / "part.yaml")]) == 2
    assert "model" in said_in_one_line(capsys)


def test_messages_that_nobody_foresaw_are_passed_on_in_one_line() -> None:
    assert one_line("first\n   second\tthird") == "first second third"
    assert len(one_line("word " * 1000)) < 320


def test_schedule_and_mup_say_mistakes_in_one_line(capsys: Any) -> None:
    assert status_of(["schedule", "compare", "--steps=many"]) == 2
    assert "steps must be a whole number" in said_in_one_line(capsys)
    assert status_of(["mup", "check", "--seeds=x"]) == 2
    assert "seeds must be a whole number, got 'x'" in said_in_one_line(capsys)


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 40)
)


@pytest.mark.parametrize("text", [BOMB, "a: &a [*a]\n", "a: &a {b: *a}\n"], ids=["billion laughs", "list", "mapping"])
def test_a_text_whose_aliases_expand_beyond_all_bounds_is_refused(text: str, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(TooManyNodes, match="aliases"):
        load_yaml(text)
    (tmp_path / "bomb.yaml").write_text(text)
    assert status_of(["train", "--config", str(tmp_path / "bomb.yaml")]) == 2
    assert "aliases" in said_in_one_line(capsys)


@pytest.mark.parametrize("text", ["eta: 1\nlimits:\n  min: 1\n  max: 2\n  min: 3\n", "a: [{min: 1,\n\n min: 2}]\n"])
def test_a_key_that_is_given_twice_is_refused(text: str, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(GivenTwice, match=r"'min' is given twice, in lines \d and \d: give it once"):
        load_yaml(text)
    (tmp_path / "twice.yaml").write_text(text)
    assert status_of(["train", "--config", str(tmp_path / "twice.yaml")]) == 2
    assert "'min' is given twice" in said_in_one_line(capsys)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "broken.yaml: a config must be a mapping of fields to values"),
        ("- 1\n- 2\n", "broken.yaml: a config must be a mapping of fields to values"),
        ("limits: [1,\n", "broken.yaml: while parsing a flow node expected the node content"),
    ],
)
def test_a_file_that_is_no_config_is_named(text: str, said: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "broken.yaml").write_text(text)
    assert status_of(["train", "--config", str(tmp_path / "broken.yaml")]) == 2
    assert said in said_in_one_line(capsys)


def test_a_link_that_leads_nowhere_is_said(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "gone")
    assert status_of(["train", "--config", "configs/quickstart.yaml", f"--out={tmp_path / 'out'}"]) == 2
    said = said_in_one_line(capsys)
    assert "out: a link to" in said
    assert "which does not exist" in said


def test_a_few_aliases_are_fine() -> None:
    assert load_yaml("a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}\n") == {
        "a": {"x": 1},
        "b": {"x": 1},
        "c": {"x": 1, "y": 2},
    }


def test_a_config_that_is_nested_without_end_is_refused(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "deep.yaml").write_text("model: " + "[" * 5000 + "]" * 5000)
    assert status_of(["train", "--config", str(tmp_path / "deep.yaml")]) == 2
    said_in_one_line(capsys)


@pytest.mark.parametrize("place", ["file/below", "file"])
def test_a_folder_that_cannot_be_made_is_one_line(config: Any, tmp_path: Path, capsys: Any, place: str) -> None:
    (tmp_path / "file").write_text("")
    assert status_of(["train", "--config", config(out=str(tmp_path / place))]) == 2
    assert str(tmp_path / "file") in said_in_one_line(capsys)


@pytest.mark.parametrize(
    "error, status, words",
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/journal.jsonl"),
            1,
            "runs/journal.jsonl: No space left",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/root/x"), 2, "/root/x: Permission denied"),
        (OSError("the ranks cannot reach each other"), 1, "cannot reach"),
        (adabatch.checkpointing.CheckpointError("two\nlines"), 1, "two lines"),
        (adabatch.guards.RankLost("rank 1 has died"), 76, "rank 1 has died"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (RecursionError(), 2, "too deeply"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_kind_of_end_has_its_status_and_one_line(error: BaseException, status: int, words: str) -> None:
    ended = command._ending(error)
    assert ended is not None
    assert ended[0] == status
    assert words in ended[1]
    assert "\n" not in ended[1]


def test_an_error_of_a_users_model_keeps_its_traceback() -> None:
    assert command._ending(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert command._ending(SystemExit(3)) is None


def test_a_full_disk_is_one_line(config: Any, small_disk: Path, capsys: Any) -> None:
    (small_disk / "filler").write_bytes(b"x" * 56 * 1024)
    assert status_of(["train", "--config", config(out=str(small_disk / "run"))]) == 1
    assert "o space left" in said_in_one_line(capsys)


# --- text of users --------------------------------------------------------------------------------------------------


def test_text_of_users_is_not_markup(capsys: Any) -> None:
    display = Display(0, PlainConsole(width=200))
    for text in ("runs/[bold]/x", "[/red]", ":smile:"):
        display.say(text)
        display.table(text, ["run", "[b]value[/b]"], [[text, "1"]])
    said = capsys.readouterr().out
    for text in ("runs/[bold]/x", "[/red]", ":smile:", "[b]value[/b]"):
        assert said.count(text) >= 2


def test_a_folder_with_brackets_in_its_name(config: Any, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "[/a] [red]run"
    assert main(["train", "--config", config(out=str(out))]) == 0
    assert str(out) in capsys.readouterr().out


# --- how a run ends -------------------------------------------------------------------------------------------------


def await_lines(journal: Path, running: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 100
    while not (journal.exists() and journal.read_text().count("\n") >= 3):
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def check_saved_and_goes_on(config_path: str, run: Path) -> None:
    before = (run / "journal.jsonl").read_text()
    assert list((run / "checkpoints").iterdir())
    done = json.loads(before.splitlines()[-1])["examples"] + 100
    assert main(["train", "--config", config_path, f"--total.count={done}"]) in (0, 2)
    assert (run / "journal.jsonl").read_text().startswith(before)


SLOW_TORCH = """
import time
print("importing", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize(
    "command_line", [["-m", "adabatch", "train"], ["adabatch", "train"], ["-c", "import adabatch"]]
)
def test_ctrl_c_during_the_import_of_torch_is_one_line(tmp_path: Path, command_line: list[str]) -> None:
    (tmp_path / "torch.py").write_text(SLOW_TORCH)
    (tmp_path / "adabatch").write_text("from adabatch.cli.main import main\n")  # as the installed command does
    variables = environment()
    variables["PYTHONPATH"] = os.pathsep.join([str(tmp_path), variables.get("PYTHONPATH", ""), str(ROOT)])
    start = [sys.executable, *command_line]
    with subprocess.Popen(start, cwd=tmp_path, env=variables, stdout=-1, stderr=-1, text=True) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "importing\n"
        running.send_signal(signal.SIGINT)
        _, error = running.communicate(timeout=60)
    if command_line[0] == "-c":  # another program that imports the package
        assert "KeyboardInterrupt" in error
    else:
        assert (running.returncode, error) == (130, "adabatch: interrupted\n")


@pytest.mark.parametrize("how", ["ctrl-c", "twice"])
def test_ctrl_c_saves_says_one_line_and_exits_75(config: Any, tmp_path: Path, how: str) -> None:
    path = config(total=LONG)
    start = [sys.executable, "-m", "adabatch", "train", "--config", path]
    with subprocess.Popen(start, env=environment(), stdout=-1, stderr=-1, text=True) as running:
        await_lines(tmp_path / "run" / "journal.jsonl", running)
        for _ in range(2 if how == "twice" else 1):  # a launcher hands on what the terminal sent already
            running.send_signal(signal.SIGINT)
        _, error = running.communicate(timeout=60)
    assert running.returncode == adabatch.EXIT_PREEMPTED
    assert re.fullmatch(r"stopped by a signal: saved at [\d,]+ examples; the same command continues\n", error)
    check_saved_and_goes_on(path, tmp_path / "run")


def test_a_reader_that_leaves_ends_the_run_after_it_is_saved(config: Any, tmp_path: Path) -> None:
    """As `adabatch train | head -1` does: the progress line of a log comes once a tenth of the run."""
    path = config(total={"count": 400_000, "unit": "examples"})
    start = [sys.executable, "-m", "adabatch", "train", "--config", path]
    with subprocess.Popen(start, env=environment(PYTHONUNBUFFERED="1"), stdout=-1, stderr=-1, text=True) as running:
        assert running.stdout is not None
        running.stdout.readline()
        running.stdout.close()
        running.stdout = None
        _, error = running.communicate(timeout=200)
    assert running.returncode == adabatch.EXIT_PREEMPTED
    assert re.fullmatch(
        r"the reader of its output is gone: saved at [\d,]+ examples; the same command continues\n", error
    )
    assert list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize("arguments", [["--help"], ["schedule", "compare", "--steps=50"]], ids=lambda value: value[0])
def test_other_commands_end_with_the_status_of_a_broken_pipe(arguments: list[str], tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    start = script(*arguments)
    ended = subprocess.run(start, env=environment(), cwd=tmp_path, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert ended.returncode == command.OUTPUT_CLOSED, ended.stderr
    assert re.fullmatch(r"adabatch( schedule)?: the reader of its output is gone\n", ended.stderr)


def test_a_file_that_cannot_be_written_is_one_line_of_every_command(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "file").write_text("")
    assert status_of(["schedule", "compare", "--steps=50", f"--out={tmp_path}/file/x.png"]) == 2
    assert f"{tmp_path}/file" in said_in_one_line(capsys)


def test_the_statuses_are_in_the_guide() -> None:
    guide = (ROOT / "docs" / "checkpoints.md").read_text()
    found = {int(each) for each in re.findall(r"^\| (\d+) \|", guide, flags=re.MULTILINE)}
    known = (command.FILE_FAILED, command.MISTAKE, command.INTERRUPTED, command.OUTPUT_CLOSED)
    assert {0, adabatch.EXIT_PREEMPTED, adabatch.guards.EXIT_RANK_LOST, *known} <= found


# --- several ranks --------------------------------------------------------------------------------------------------

FAILING = """
import os

import torch


class Failing(torch.nn.Sequential):
    def __init__(self, when: str):
        super().__init__(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        self.when = when if os.environ["RANK"] == "1" else "never"
        if self.when == "built":
            raise ValueError("no weights on this machine")

    def forward(self, x):
        if self.when == ("trained" if self.training else "tested"):
            raise ValueError("no weights on this machine")
        return super().forward(x)
"""


@pytest.mark.distributed
@pytest.mark.parametrize("when", ["built", "trained", "tested"])
def test_the_error_of_one_rank_shows_on_the_others_by_name(config: Any, tmp_path: Path, when: str) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    path = config(
        model={"class_path": "failing.Failing", "init_args": {"when": when}},
        test_data={"class_path": "adabatch.recipes.digits.Digits", "init_args": {"split": "test"}},
    )
    codes = Attempt(tmp_path, ["train", "--config", path], 2, cwd=tmp_path, apart=True).join(100)
    other, failed = ((tmp_path / f"output.{rank}").read_text() for rank in (0, 1))
    assert codes[1] == 2, failed
    assert "no weights on this machine" in failed
    assert codes[0] == adabatch.guards.EXIT_RANK_LOST, other
    assert re.search(r"rank 1 raised ValueError: .*no weights on this machine", other), other
    assert "Traceback" not in other


def test_the_version_stands_in_one_place_and_its_release_in_the_changelog() -> None:
    assert "attr: adabatch.__version__" in (ROOT / "setup.cfg").read_text()
    assert adabatch.__version__ not in (ROOT / "pyproject.toml").read_text()
    headings = re.findall(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert headings[:2] == ["Unreleased", adabatch.__version__.partition(".dev")[0]]


def test_every_config_is_in_the_table_of_the_guide() -> None:
    guide = (ROOT / "docs" / "command_line.md").read_text()
    assert all(f"| `configs/{path.name}` |" in guide for path in (ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("name", ["mnist_logistic_adadagrad", "mnist_cnn_adagrad", "mnist_cnn_adadagradnorm"])
def test_configs_that_say_as_published_have_the_control_of_the_papers(name: str) -> None:
    config = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    given = dict(config["control"])
    given["hold_until"] = Duration(**given["hold_until"])
    assert adabatch.Control(**given) == adabatch.Control.direct()
    assert (config["lr_rule"], "shape" in config) == ("none", False)
