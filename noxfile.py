"""The tests of the hosts against the oldest and the newest release of each that is supported.

    pip install nox
    nox                       # every session
    nox -s "hosts(host='lightning', release='oldest')"

CI runs the newest releases (constraints.txt). What was run of this matrix stands in the pages of the hosts.
"""

from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"

RELEASES = {
    "accelerate": {"oldest": ["accelerate==1.10.0"], "newest": ["accelerate"]},
    "lightning": {
        "oldest": ["lightning==2.4.0", "pytorch-lightning==2.4.0", "rich<14"],
        "newest": ["lightning", "pytorch-lightning"],
    },
    "transformers": {
        "oldest": ["transformers==5.23.0", "accelerate", "trl==1.16.0", "datasets", "peft"],
        "newest": ["transformers", "accelerate", "trl", "datasets", "peft"],
    },
}
"""Hosts and what pip installs of them."""

TESTS = {
    "accelerate": ["tests/integrations/test_accelerate.py"],
    "lightning": [
        "tests/integrations/test_lightning.py",
        "tests/integrations/test_lightning_ranks.py",
        "tests/integrations/test_fabric.py",
    ],
    "transformers": [
        "tests/integrations/test_transformers.py",
        "tests/integrations/test_transformers_habits.py",
        "tests/integrations/test_transformers_refusals.py",
        "tests/integrations/test_transformers_ranks.py",
        "tests/integrations/test_trl.py",
    ],
}
"""Hosts and the tests that run on them."""

BESIDE = {"accelerate": ["deepspeed", "transformers"], "transformers": ["deepspeed"]}
"""What the tests of a host need beside it. Accelerate's plugin for DeepSpeed asks for the version of Transformers."""


@nox.session
@nox.parametrize("release", ["oldest", "newest"])
@nox.parametrize("host", list(RELEASES))
def hosts(session: nox.Session, host: str, release: str) -> None:
    """One host, in one release."""
    pinned = [line for line in Path("constraints.txt").read_text().splitlines() if line.startswith("torch==")]
    session.install(".[cli]", "hypothesis", "pytest>=8", "pytest-timeout", *pinned, *BESIDE.get(host, []))
    session.install(*RELEASES[host][release], *pinned)
    session.run("pytest", "-q", *TESTS[host], *session.posargs)
