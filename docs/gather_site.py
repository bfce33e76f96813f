"""Gathers the pages of the site into build/docs, from where `make site` builds it.

    python docs/gather_site.py [FOLDER]

The pages stay where a code host shows them: the README and the changelog at the root, the guides in docs/, the results
of benchmarks beside their scripts. The site has them in one folder. So this script copies them and changes the links
between them to match, and turns each ```math block into MathML, which browsers show without a script from the network.
A link to a file that is not a page of the site is an error.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

from latex2mathml.converter import convert

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "build" / "docs"
RESULTS = ROOT / "benchmarks" / "results"
MATH = re.compile(r"^```math\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
CODE = re.compile(r"^```.*?^```$", flags=re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(\]\()((?!https?:|#)[^)\s#]+)((?:#[\w-]+)?\))")
STYLE = """\
.md-typeset math, math { font-size: 1.15em; }
math[display="block"] { margin: 1em 0; overflow-x: auto; }
.md-typeset table:not([class]) { font-size: .68rem; }
.md-typeset td code { word-break: normal; overflow-wrap: break-word; }
"""


def places() -> dict[Path, Path]:
    """Each source file, and where it stands in the site."""
    found = {
        ROOT / "README.md": Path("index.md"),
        ROOT / "CHANGELOG.md": Path("changelog.md"),
        ROOT / "CONTRIBUTING.md": Path("contributing.md"),
        ROOT / "docs" / "README.md": Path("all_pages.md"),
        ROOT / "benchmarks" / "LOG.md": Path("results/log.md"),
    }
    for path in sorted((ROOT / "docs").rglob("*")):
        if path.suffix in (".md", ".png"):
            found.setdefault(path, path.relative_to(ROOT / "docs"))
    for path in sorted(RESULTS.iterdir()):
        if path.suffix in (".md", ".png"):
            found[path] = Path("results") / path.name
    return found


def gathered(source: Path, where: dict[Path, Path]) -> str:
    """The text of a page as the site has it.

    Raises:
        ValueError: it links to a file that is not in the site.
    """
    here = where[source].parent

    def moved(match: re.Match[str]) -> str:
        target = Path(os.path.normpath(source.parent / match[2]))
        if target not in where:
            raise ValueError(f"{source.relative_to(ROOT)} links to {match[2]}, which is not a page of the site")
        return match[1] + Path(os.path.relpath(where[target], here)).as_posix() + match[3]

    text = MATH.sub(lambda match: convert(match[1].strip(), display="block"), source.read_text(encoding="utf-8"))
    parts, end = [], 0
    for code in CODE.finditer(text):  # what looks like a link in code is none
        parts += [LINK.sub(moved, text[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*parts, LINK.sub(moved, text[end:])])


def gather(out: Path = OUT) -> None:
    """Writes the pages, pictures and the style sheet of the site into a folder, in place of what is there."""
    shutil.rmtree(out, ignore_errors=True)
    where = places()
    for source, place in where.items():
        target = out / place
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".md":
            target.write_text(gathered(source, where), encoding="utf-8")
        else:
            shutil.copyfile(source, target)
    (out / "site.css").write_text(STYLE, encoding="utf-8")


if __name__ == "__main__":
    gather(*map(Path, sys.argv[1:2]))
