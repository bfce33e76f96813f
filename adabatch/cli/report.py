"""``adabatch report``: runs as one HTML page, as pictures, or as numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from adabatch.cli.plain_parser import PlainParser, not_negative, positive
from adabatch.cli.runs import find_runs
from adabatch.cli.text_files import write_atomically
from adabatch.report import AXES, draw, write_charts
from adabatch.report.page import drawn, numbers, page, report_on
from adabatch.report.steps import read_steps
from adabatch.report.what_if import USAGE, Choice

DESCRIPTION = """\
Tell of one run or of several what happened, and why: one HTML page that needs no network, and works on a run that
still runs. Its numbers as JSON (--json), its charts as pictures (--png)."""

PICTURE = "report.png"


def run_report(arguments: Sequence[str]) -> int:
    """Runs the command with the arguments after its name; its exit status.

    Raises:
        ValueError: if a run cannot be read, or a choice is outside its range.
        OSError: if a file cannot be read or written.
        ImportError: if a picture is requested, but matplotlib is not installed.
        SystemExit: with status 2, if there is a mistake on the command line.
    """
    asked = _parser().parse_args(arguments)
    found = find_runs(asked.runs)
    # before the journals are read, which may take long
    choices = [Choice.parse(text) for text in asked.what_if]
    overrides = {
        name: value
        for name, value in (("tokens_per_example", asked.tokens_per_example), ("weight_decay", asked.weight_decay))
        if value is not None
    }
    reports = [
        report_on(
            read_steps(run.journal, run.name),
            run.config,
            choices=choices,
            price=asked.step_price,
            results=run.results,
            overrides=overrides,
        )
        for run in found
    ]
    if asked.json:
        print(json.dumps(numbers(reports), indent=2))
    if asked.png is not None:
        asked.png.mkdir(parents=True, exist_ok=True)
        several = {run.name: run.journal for run in found} if len(found) > 1 else {"": found[0].journal}
        picture = draw(several, asked.png / PICTURE, title=None if len(found) > 1 else found[0].name)
        charts = write_charts(drawn(reports), asked.png, over=asked.over)
        _say(f"pictures: {picture} and {', '.join(path.name for path in charts)}", quiet=asked.json)
    if asked.out is not None or not (asked.json or asked.png is not None):
        out = asked.out or Path("report.html")
        # atomically: a browser may reload the page at any time
        write_atomically(out, page(reports, title=asked.title or ""))
        _say(f"report: {out} ({out.stat().st_size / 1e3:,.0f} kB)", quiet=asked.json)
    return 0


def _say(line: str, *, quiet: bool) -> None:
    # --json promises that standard output is JSON and nothing else
    if not quiet:
        print(line)


def _parser() -> PlainParser:
    parser = PlainParser(prog="adabatch report", description=DESCRIPTION)
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="folder of a run, its journal, or NAME=PATH; the folder of `adabatch compare` stands for its runs",
    )
    parser.add_argument("--out", type=Path, metavar="HTML", help="page to write; report.html by default")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    parser.add_argument(
        "--png",
        type=Path,
        metavar="FOLDER",
        help=f"write a picture of each chart into this folder, and {PICTURE}, the main ones above each other",
    )
    parser.add_argument(
        "--over", choices=AXES, default="examples", help="axis of the pictures of single charts (examples)"
    )
    parser.add_argument("--title", help="title of the page")
    parser.add_argument(
        "--what_if",
        action="append",
        default=[],
        metavar="KIND=VALUE",
        help=f"compare with another choice: {', '.join(USAGE.values())}; may be repeated",
    )
    parser.add_argument(
        "--step_price",
        type=not_negative,
        default=0.0,
        metavar="N",
        help="what a step costs beside its examples, in examples",
    )
    parser.add_argument(
        "--tokens_per_example",
        type=positive,
        metavar="N",
        help="lets curves run over tokens, if the config does not say it",
    )
    parser.add_argument(
        "--weight_decay",
        type=not_negative,
        metavar="X",
        help="of the optimizer, for tau, if the config does not say it",
    )
    return parser
