"""``adabatch doctor``: what is installed, where this process runs, and what is missing or too old."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from adabatch import __version__
from adabatch.cli.plain_parser import PlainParser
from adabatch.integrations.versions import release_numbers
from adabatch.runtime.launch.world import World

DESCRIPTION = """\
Print what is installed, which launcher, backend and device this process has, and what is missing or too old. Paste it
into a bug report. Status 1 if something that adabatch needs is too old."""

OPTIONAL = (
    ("scikit-learn", "the digits of the quickstart"),
    ("mlflow", "trackers"),
    ("trackio", "trackers"),
)
"""Packages that no extra requires, or that users look for by name."""

SKIPPED_EXTRAS = ("dev", "docs", "test", "all")  # for work on adabatch itself; and "all", which repeats the others

Version = Callable[[str], str | None]


class Package(NamedTuple):
    """A package that adabatch can use.

    Args:
        name: of its distribution.
        version: the installed version; None if it is not installed.
        least: the oldest supported version; "" for any.
        needed_for: "adabatch" itself, or the extra or use that needs it.
    """

    name: str
    version: str | None
    least: str
    needed_for: str

    @property
    def too_old(self) -> bool:
        """Whether it is installed, and older than supported."""
        return self.version is not None and release_numbers(self.version) < release_numbers(self.least)


def run_doctor(arguments: Sequence[str]) -> int:
    """Runs the command with the arguments after its name; its exit status.

    Raises:
        SystemExit: with status 2, if there is a mistake on the command line.
    """
    parser = PlainParser(prog="adabatch doctor", description=DESCRIPTION)
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    asked = parser.parse_args(arguments)
    found, place = packages(), surroundings()
    said = advice(found, place)
    broken = any(package.too_old and package.needed_for == "adabatch" for package in found)
    if asked.json:
        rows = [{**package._asdict(), "too_old": package.too_old} for package in found]
        print(json.dumps({**place, "packages": rows, "advice": said}, indent=2))
    else:
        print("\n".join(_lines(found, place, said)))
    # what is missing is no failure: most people need few of the extras
    return 1 if broken else 0


def packages(requirements: Sequence[str] | None = None, version: Version | None = None) -> list[Package]:
    """The packages in adabatch's own metadata, and others that it can use.

    Args:
        requirements: as in a distribution's metadata; by default those of the installed adabatch.
        version: of a distribution by its name; None if it is not installed.
    """
    version = version or installed
    if requirements is None:
        try:
            requirements = importlib.metadata.requires("adabatch") or []
        except importlib.metadata.PackageNotFoundError:  # run from its source
            requirements = ["torch", "numpy"]
    found: dict[str, Package] = {}
    for text in requirements:
        # As importlib.metadata gives them: NAME[EXTRAS]>=VERSION; extra == "NAME". The other parts are of no interest
        # here.
        parsed = re.match(r"\s*([\w.-]+)\s*(?:\[[^\]]*\])?\s*(?:>=\s*([\w.]+))?", text)
        extra = re.search(r"""extra\s*==\s*['"]([\w-]+)['"]""", text)
        if parsed is None or (extra is not None and extra[1] in SKIPPED_EXTRAS) or parsed[1] == "adabatch":
            continue
        name, use = parsed[1], "adabatch" if extra is None else f"adabatch[{extra[1]}]"
        # The first mention counts: what adabatch itself needs stands before the extras.
        found.setdefault(name, Package(name, version(name), parsed[2] or "", use))
    for name, use in OPTIONAL:
        found.setdefault(name, Package(name, version(name), "", use))
    return list(found.values())


def installed(name: str) -> str | None:
    """The version of a distribution; None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def surroundings() -> dict[str, Any]:
    """Versions, launcher, backends and devices of this process; nothing that identifies the machine or its user."""
    try:
        world = World.from_environment()
        launched: dict[str, Any] = {
            "launcher": world.launcher,
            "rank": world.rank,
            "size": world.size,
            "device": str(world.device),
            "backend": world.backend,
        }
    except (ValueError, RuntimeError, OSError) as error:
        # said rather than raised: whoever asks for advice has something that does not work
        launched = {"error": " ".join(str(error).split())}
    # what torch was built with; whether a network works can only be seen from a run
    backends = [name for name in ("nccl", "gloo", "mpi") if dist.is_available() and dist.is_backend_available(name)]
    accelerators = [
        {
            "name": torch.cuda.get_device_name(index),
            "memory_gib": round(torch.cuda.get_device_properties(index).total_memory / 2**30, 1),
            "capability": ".".join(map(str, torch.cuda.get_device_capability(index))),
        }
        for index in range(torch.cuda.device_count())
    ]
    return {
        "adabatch": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "launched": launched,
        "backends": backends,
        "accelerators": accelerators,
        "threads": torch.get_num_threads(),
    }


def advice(found: Sequence[Package], place: dict[str, Any]) -> list[str]:
    """What to do, in sentences; empty if all is well."""
    said = [
        f"{package.name} {package.version} is older than {package.least}, which {package.needed_for} needs: "
        f"pip install '{package.name}>={package.least}'"
        for package in found
        if package.too_old
    ]
    extras: dict[str, list[str]] = {}
    for package in found:
        if package.version is None and package.needed_for.startswith("adabatch["):
            extras.setdefault(package.needed_for, []).append(package.name)
    said += [
        f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} not installed: pip install '{extra}', if you need it"
        for extra, names in extras.items()
    ]
    if "error" in place["launched"]:
        said.append(f"the launcher's variables do not fit together: {place['launched']['error']}")
    if not place["backends"]:
        said.append("this torch has no backend for several processes: one process only")
    if place["cuda"] and not place["accelerators"]:
        said.append("this torch was built for CUDA, and sees no device: check the driver and CUDA_VISIBLE_DEVICES")
    return said


def _lines(found: Sequence[Package], place: dict[str, Any], said: Sequence[str]) -> list[str]:
    launched = place["launched"]
    where = launched.get("error") or (
        f"rank {launched['rank']} of {launched['size']}, on {launched['device']}, launched by {launched['launcher']}"
    )
    devices = [f"{each['name']}, {each['memory_gib']} GiB, {each['capability']}" for each in place["accelerators"]]
    facts = {
        "adabatch": place["adabatch"],
        "python": f"{place['python']} ({sys.implementation.name})",
        "system": place["system"],
        "torch": f"{place['torch']}, CUDA {place['cuda'] or 'none'}, {place['threads']} threads",
        "process": where,
        "backends": ", ".join(place["backends"]) or "none",
        "devices": "; ".join(devices) or "CPU only",
    }
    lines = [f"{name:<10} {value}" for name, value in facts.items()]
    lines += ["", f"{'package':<18} {'installed':<14} {'needs':<8} for"]
    for package in found:
        mark = "   <- too old" if package.too_old else ""
        row = f"{package.name:<18} {package.version or '-':<14} {package.least or 'any':<8} {package.needed_for}{mark}"
        lines.append(row)
    return [*lines, "", *([f"- {sentence}" for sentence in said] or ["All is well."])]
