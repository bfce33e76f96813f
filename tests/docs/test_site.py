"""The site: every page is in its navigation, and links move with the pages. `make site` checks the rest."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

yaml = pytest.importorskip("yaml", reason="mkdocs.yml needs pyyaml (extra cli)")
pytest.importorskip("latex2mathml", reason="the site needs the extra docs")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gather_site", ROOT / "docs" / "gather_site.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pages_in(part: Any) -> list[str]:
    if isinstance(part, str):
        return [part]
    return [page for each in (part.values() if isinstance(part, dict) else part) for page in pages_in(each)]


def test_every_page_is_in_the_navigation_once(site: ModuleType) -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    pages = pages_in(settings["nav"])
    there = {place.as_posix() for place in site.places().values() if place.suffix == ".md"}
    assert len(pages) == len(set(pages))
    assert there == set(pages), "mkdocs.yml lists each page of docs/ and benchmarks/results/ under nav"
    assert [next(iter(each)) if isinstance(each, dict) else each for each in settings["plugins"]] == [
        "search",
        "mkdocstrings",
    ]


def test_links_move_with_the_pages(site: ModuleType, tmp_path: Path) -> None:
    site.gather(tmp_path)
    for page in tmp_path.rglob("*.md"):
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\((?!https?:|#)([^)\s#]+)", text):
            assert (page.parent / target).exists(), f"{page.relative_to(tmp_path)}: {target}"
    assert "(criteria.md)" in (tmp_path / "index.md").read_text(encoding="utf-8")
    assert "(index.md)" in (tmp_path / "criteria.md").read_text(encoding="utf-8")
    assert "<math" in (tmp_path / "how_it_works.md").read_text(encoding="utf-8")


def test_a_link_that_leads_out_of_the_site_is_an_error(site: ModuleType, tmp_path: Path) -> None:
    page = ROOT / "docs" / "limits.md"
    with pytest.raises(ValueError, match=r"docs/limits\.md links to \S+, which is not a page of the site"):
        site.gathered(page, {page: Path("limits.md")})
