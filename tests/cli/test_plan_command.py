"""`adabatch plan` as a person types it."""

from __future__ import annotations

import json
import random
import shlex
from pathlib import Path

import pytest

from adabatch.cli.main import main
from adabatch.forecast.costs import RISE

STEP, EXAMPLE, NOISE = 0.02, 0.001, 400.0
CONFIG = {
    "format": 1,
    "model": {"class_path": "adabatch.recipes.models.DigitsCNN"},
    "loss": {"class_path": "torch.nn.CrossEntropyLoss"},
    "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
    "train_data": {"class_path": "adabatch.recipes.digits.Digits"},
    "criterion": {"class_path": "adabatch.NormTest", "init_args": {"eta": 0.5}},
    "micro_batch_size": 8,
    "limits": {"min": 16, "max": 64},
    "total": {"count": 64, "unit": "examples"},
}
CLUSTER = ["--devices=8", "--bandwidth=1e9", "--latency=1e-5", "--parameters=1e6", "--price_per_hour=3"]


def write_run(
    folder: Path, *, timed: bool = True, noise: float | None = NOISE, scatter: float = 0.3, steps: int = 40
) -> Path:
    """Steps of 32 and 64 examples, whose times are exactly those of the model and known one step late."""
    folder.mkdir()
    lines, examples, chance, past = [], 0, random.Random(1), None
    for step in range(steps):
        micro = 32 if step % 2 else 64
        averages = None if noise is None else {"noise": noise, "signal": 1.0, "noise_scale": noise}
        alone = None if noise is None else {"noise": noise * (1 + scatter * chance.uniform(-1, 1)), "signal": 1.0}
        plan = {"micro_batch_size": micro, "accumulation_steps": 1, "dp_size": 1, "global_batch_size": micro}
        line = {"format": 1, "step": step, "examples": examples, "plan": plan, "loss": 1.0, "applied": True}
        line |= {"moments": alone, "averages": averages, "next": micro, "reason": "hold"}
        if timed and past is not None:
            line |= {"seconds": STEP + EXAMPLE * past["global_batch_size"], "timed_plan": past}
        past = plan
        lines.append(json.dumps(line))
        examples += micro
    (folder / "journal.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def planned(capsys, *arguments: str) -> dict:
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_numbers_of_a_journal(tmp_path, capsys):
    told = planned(capsys, str(write_run(tmp_path / "a")), *CLUSTER, "--max_batch=4096")
    assert set(told) == {
        "format", "source", "settings", "noise_band", "forecast", "scales", "knee_devices", "notes", "assumptions"
    }  # fmt: skip
    assert told["source"] == "the journal of a"
    assert [each["devices"] for each in told["scales"]] == [8, 64, 1000, 10_000]
    here = told["forecast"]
    assert here == told["scales"][0]
    # Eight devices: a step, and the fastest all-reduce of 4 MB, which is a ring.
    reduce = 14 * (1e-5 + 4e6 / 8 / 1e9)
    assert here["price"] == pytest.approx(8 * (STEP + reduce) / EXAMPLE, rel=0.05)
    assert here["batch"]["point"] == pytest.approx((NOISE * here["price"]) ** 0.5)
    for name in ("steps", "hours", "batch"):
        assert here[name]["low"] < here[name]["point"] < here[name]["high"]
    assert here["money"]["point"] == pytest.approx(3 * here["device_hours"]["point"])
    assert told["settings"]["criterion.examples"] == pytest.approx(here["price"], rel=0.05)
    assert told["settings"]["max_micro_batch_size"] == 64
    assert told["settings"]["reference_batch_size"] == 64
    assert told["settings"]["limits.min"] <= here["batch"]["point"] <= told["settings"]["limits.max"]


def test_text_and_figure(tmp_path, capsys):
    figure = tmp_path / "pictures" / "plan.png"
    assert main(["plan", str(write_run(tmp_path / "a")), *CLUSTER, "--figure", str(figure)]) == 0
    told = capsys.readouterr().out
    assert told.startswith("Plan from the journal of a\n")
    for part in ("device-hours", "Knee: ", "Assumptions", "StepPrice", "10,000"):
        assert part in told
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_a_first_guess_says_that_it_is_one(capsys):
    told = planned(
        capsys, "--examples=2e6", "--tokens_per_example=2048", "--flops=1e14", "--step_seconds=0.1", *CLUSTER
    )
    assert "2505.13738" in told["source"]
    assert any(note.startswith("No run was measured.") for note in told["notes"])
    assert not any("is an extrapolation" in note for note in told["notes"])
    steps = told["forecast"]["steps"]
    assert steps["high"] > 1.5 * steps["low"]


def test_a_first_guess_outside_of_its_law_says_so(capsys):
    told = planned(capsys, "--examples=1e6", "--tokens_per_example=2048", "--flops=1e14", "--loss=1.5", *CLUSTER)
    assert "2001.08361" in told["source"]
    assert any("is an extrapolation" in note for note in told["notes"])


def test_a_longer_run_is_told_of(tmp_path, capsys):
    run = str(write_run(tmp_path / "a"))
    short = planned(capsys, run, *CLUSTER, "--max_batch=64")
    long = planned(capsys, run, *CLUSTER, "--max_batch=64", "--examples=19200")
    assert long["forecast"]["steps"]["point"] == pytest.approx(10 * short["forecast"]["steps"]["point"], rel=0.05)
    assert any(note.startswith("Beyond the 1,920 examples") and "examples^0.462" in note for note in long["notes"])
    assert any(note.startswith("The run is as long as the journal") for note in short["notes"])
    # A tenth of the run was measured, by a quarter of its probes at the end.
    low, high = (long / short**2 for long, short in zip(long["noise_band"], short["noise_band"], strict=True))
    assert low == pytest.approx(1 / high)
    assert 1.5 < high < 10**RISE, "the rise, which may not come or come twice"
    assert long["forecast"]["examples"]["point"] == pytest.approx(19200)
    assert long["forecast"]["examples"]["point"] < long["scales"][-1]["examples"]["point"], "for the same progress"


@pytest.mark.parametrize("option", ["--max_batch=4096", "--examples=1e6"])
def test_ranges_follow_the_scatter_of_the_probes(option, tmp_path, capsys):
    widths = []
    for name, scatter in (("none", 0.0), ("some", 0.3), ("much", 0.9)):
        run = write_run(tmp_path / name, scatter=scatter, steps=160)
        steps = planned(capsys, str(run), *CLUSTER, option)["forecast"]["steps"]
        widths.append(steps["high"] / steps["low"])
    if option.startswith("--max_batch"):  # a longer run has the range of the rise as well
        assert widths[0] == pytest.approx(1)
    least = 1.01 if option.startswith("--max_batch") else 1.0
    assert least * widths[0] < widths[1] < widths[2]


def test_ranges_follow_the_scatter_of_the_times(tmp_path, capsys):
    widths, chance = [], random.Random(2)
    for name, scatter in (("none", 0.0), ("some", 0.1)):
        journal = write_run(tmp_path / name, scatter=0, steps=160) / "journal.jsonl"
        lines = [json.loads(line) for line in journal.read_text().splitlines()]
        for line in lines:
            if "seconds" in line:
                line["seconds"] *= 1 + scatter * chance.uniform(-1, 1)
        journal.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
        told = planned(capsys, str(journal.parent), "--max_batch=4096")
        widths.append(told["forecast"]["batch"]["high"] / told["forecast"]["batch"]["low"])
        assert any(note.startswith("The price of a step without the network lies between") for note in told["notes"])
    assert widths[0] == pytest.approx(1)
    assert widths[1] > 1.05
    for given in ("--step_seconds=0.02", "--example_seconds=0.001"):
        told = planned(capsys, str(tmp_path / "some"), *CLUSTER, "--max_batch=4096", given)
        assert told["forecast"]["batch"]["high"] == pytest.approx(told["forecast"]["batch"]["low"])
        assert not any("price of a step" in note for note in told["notes"])


def test_few_timed_steps_have_no_error_bar(tmp_path, capsys):
    told = planned(capsys, str(write_run(tmp_path / "a", steps=15)), *CLUSTER)
    assert any(note.startswith("The journal has no error bar of the price of a step") for note in told["notes"])


def test_few_probes_have_no_error_bar(tmp_path, capsys):
    told = planned(capsys, str(write_run(tmp_path / "a", steps=15)), *CLUSTER)
    assert told["noise_band"] == [1, 1]
    assert any("no error bar" in note for note in told["notes"])


def test_the_largest_batch_is_sensible(tmp_path, capsys):
    run = str(write_run(tmp_path / "a"))
    dear = [run, *CLUSTER, "--step_seconds=100", "--example_seconds=0.001"]
    for examples in (2e4, 1e6):
        told = planned(capsys, *dear, f"--examples={examples}")
        assert told["forecast"]["steps"]["point"] >= 200
        assert told["settings"]["limits.max"] <= 3 * NOISE * (examples / (0.875 * 1920)) ** RISE
        assert any(note.startswith("No batch is larger than") for note in told["notes"])
    assert planned(capsys, *dear, "--max_batch=50000")["settings"]["limits.max"] > 3 * NOISE
    told = planned(capsys, *dear, "--min_batch=100", "--max_batch=100")
    assert (told["settings"]["limits.min"], told["settings"]["limits.max"]) == (100, 100)


def test_its_options_are_those_of_a_config(tmp_path, capsys, config):
    """What it prints is taken by ``train``: a config with the settings, written down and read."""
    assert main(["plan", str(write_run(tmp_path / "a")), *CLUSTER, "--max_batch=4096"]) == 0
    told = capsys.readouterr().out.splitlines()
    options = shlex.split(told[told.index("As options of `adabatch train`:") + 1])
    with pytest.raises(SystemExit) as ended:
        main(["train", "--config", config(), *options, "--print_config"])
    assert ended.value.code in (None, 0)
    assert "class_path: adabatch.StepPrice" in capsys.readouterr().out


def test_one_device_needs_no_network(tmp_path, capsys):
    run = str(write_run(tmp_path / "a"))
    told = planned(capsys, run)
    assert (told["forecast"]["devices"], told["scales"], told["knee_devices"]) == (1, [], None)
    assert any(note.startswith("The network is not known") for note in told["notes"])
    assert main(["plan", run]) == 0
    said = capsys.readouterr().out
    assert "Knee" not in said
    assert "money" not in said
    assert main(["plan", run, "--figure", str(tmp_path / "plan.png")]) == 2
    assert "--bandwidth" in capsys.readouterr().err


def test_memory_gives_the_micro_batch(tmp_path, capsys):
    run = str(write_run(tmp_path / "a"))
    told = planned(capsys, run, *CLUSTER, "--memory=1e9", "--example_bytes=1e7")
    assert told["settings"]["max_micro_batch_size"] == 64  # (0.9e9 - 16e6) / 1e7 = 88
    assert main(["plan", run, *CLUSTER, "--memory=1e7", "--example_bytes=1e7"]) == 2
    assert "not one example fits" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --examples and --tokens_per_example"),
        (["--examples=1e6", "--tokens_per_example=10", "--bandwidth=1e9"], "nothing says how long a step takes"),
        (["--examples=1e6", "--tokens_per_example=10", "--example_seconds=1"], "no batch size is worth more"),
        (["--examples=1e6", "--tokens_per_example=10", "--example_seconds=1", "--devices=2"], "give --bandwidth"),
        (["--examples=1e6", "--tokens_per_example=10", "--example_seconds=0", *CLUSTER], "positive time"),
        (["--examples=1e6", "--tokens_per_example=10", "--loss=0", *CLUSTER], "loss must be positive"),
        (["--examples=0", "--tokens_per_example=10", *CLUSTER], "tokens must be positive"),
        (["no_such_folder", *CLUSTER], "no_such_folder has no journal"),
    ],
)
def test_too_little_to_go_by(arguments, message, capsys):
    assert main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--devices=2"], "give --bandwidth"),
        (["--devices=2", "--bandwidth=0"], "bandwidth must be a positive number"),
        (["--min_batch=64", "--max_batch=32"], "must not exceed"),
        (["--examples=0"], "examples must be positive"),
        (["--step_seconds=0"], "no batch size is worth more"),
        (["--memory=1e7", "--example_bytes=1e8"], "not one example fits"),
    ],
)
def test_what_a_plan_refuses_of_a_run(options, message, tmp_path, capsys):
    assert main(["plan", str(write_run(tmp_path / "a")), *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["--devices=0", "--devices=1.5", "--bandwidth=-1", "--latency=fast", "--bandwith=1"])
def test_what_is_no_number_is_a_mistake_on_the_command_line(wrong, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["plan", wrong])
    assert ended.value.code == 2
    assert wrong.partition("=")[0] in capsys.readouterr().err


def test_a_journal_that_lacks_something(tmp_path, capsys):
    assert main(["plan", str(write_run(tmp_path / "a", timed=False)), *CLUSTER]) == 2
    assert "no step times" in capsys.readouterr().err
    assert main(["plan", str(write_run(tmp_path / "b", noise=None)), *CLUSTER]) == 2
    assert "no noise scale" in capsys.readouterr().err
    for name, before, after, message in (
        ("c", '"applied": true', '"applied": false', "no update was applied"),
        ("d", '"seconds": 0.084', '"seconds": 0.052', "took no longer with more examples"),
    ):
        journal = write_run(tmp_path / name) / "journal.jsonl"
        journal.write_text(journal.read_text().replace(before, after))
        assert main(["plan", str(journal.parent), *CLUSTER]) == 2
        assert message in capsys.readouterr().err
