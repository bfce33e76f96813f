"""Is there a wrong argument that gives an error which is not ours, or is taken without a word?

    python benchmarks/arguments.py

Each argument of each public function and class, and of the methods that a script calls, is replaced by each of the
wrong values in tests/support/wrong_arguments.py, one at a time, in a call that otherwise works. The answer is ours if
it is a ValueError or TypeError raised in the package that names the argument. A value that the annotation allows may be
accepted, except for NaN and most negative numbers. If a function that the user passed raises the error itself, or
returns nonsense, the error is the user's. All else is unclear."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections import Counter
from typing import Any

import torch
from _harness import Machine, Table, publish
from support.wrong_arguments import CALLS, VALUES, Answer, Case, answer, calls, cases, hints_of

QUESTION = "Which wrong values of which arguments give an error that is not ours, or none although they make no sense?"
KINDS = ("ours", "accepted", "theirs", "unclear")


def module_of(call: str) -> str:
    """The module whose ``__all__`` names it; methods are under "methods"."""
    return call.rpartition(".")[0] if call.startswith("adabatch.") else "methods"


def tables(answers: dict[Case, Answer]) -> list[Table]:
    counts: dict[str, Counter[str]] = {}
    for case, found in answers.items():
        counts.setdefault(module_of(case.call), Counter())[found.kind] += 1
    total = sum(counts.values(), Counter())
    rows = [
        (name, f"{found.total():,}", *(f"{found[kind]:,}" for kind in KINDS))
        for name, found in [*sorted(counts.items()), ("all", total)]
    ]
    unclear = [(*case, found.told[:160]) for case, found in answers.items() if found.kind == "unclear"]
    return [
        Table("Answers, by the module that names the function", ["module", "cases", *KINDS], rows),
        *([Table("Unclear", ["call", "argument", "value", "answer"], unclear)] if unclear else []),
    ]


def findings(answers: dict[Case, Answer]) -> list[str]:
    unclear = sum(found.kind == "unclear" for found in answers.values())
    untried = sorted(name for name, arguments in CALLS.items() if arguments is None)
    arguments = sum(len(hints_of(name)) for name in calls())
    return [
        f"{len(calls())} functions, classes and methods with {arguments} arguments, {len(VALUES)} values each: "
        f"{len(answers):,} cases, {unclear} of them unclear.",
        f"Not tried, since they need files, a process group, or call others that are tried: {', '.join(untried)}.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    machine = Machine.here()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # a text is a path to whoever asks for one
        answers = {case: answer(case) for case in cases()}
    counted = Counter(found.kind for found in answers.values())
    data: dict[str, Any] = {
        "counts": {kind: counted[kind] for kind in KINDS},
        "values": list(VALUES),
        "unclear": [[*case, found.told] for case, found in answers.items() if found.kind == "unclear"],
    }
    publish(
        "arguments",
        question=QUESTION,
        machine=machine,
        tables=tables(answers),
        findings=findings(answers),
        data=data,
        save=not options.no_save,
    )


if __name__ == "__main__":
    main()
