"""The page of a report: what it is made of, and what a browser makes of it (headless Chromium, where there is one)."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from support.reports import journal, two_runs

from adabatch.report.page import page, report_on
from adabatch.report.steps import read_steps
from adabatch.report.what_if import Choice, what_if

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Parts(HTMLParser):
    """The elements of a page, and everything that it would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.loads: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.loads += [(tag, value or "") for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing():
    text = page(two_runs())
    parts = Parts()
    parts.feed(text)
    parts.close()
    assert parts.open == []
    assert {"html", "head", "title", "style", "body", "main", "script", "noscript"} <= parts.seen
    assert parts.loads == [("link", "data:,")]
    assert not re.search(r"@import|url\(\s*['\"]?(https?:)?//|\bfetch\(|XMLHttpRequest|\bimport\(", text)
    # One address is left: the name of SVG's namespace, which nothing loads.
    assert set(re.findall(r"https?://[^\"'\s]+", text)) == {"http://www.w3.org/2000/svg"}


@pytest.mark.slow
def test_large_runs_and_many_of_them_stay_small():
    one = [report_on(read_steps(journal(5_000, layers=150), "large"))]
    assert len(page(one).encode()) < 3_000_000
    short = read_steps(journal(1_500, layers=20), "one of many")
    assert len(page([report_on(short)] * 24).encode()) < 3_000_000


@pytest.fixture
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on the path")
    with api.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


class Opened:
    """A page in the browser, with what it complained about and asked for."""

    def __init__(self, browser: Any, path: Path, *, width: int = 1200, scheme: str = "light") -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.tab = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()
        self.tab.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        self.tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.goto(path.as_uri())

    def text(self, selector: str) -> str:
        return str(self.tab.inner_text(selector))

    def count(self, selector: str) -> int:
        return int(self.tab.locator(selector).count())


@pytest.mark.slow
def test_a_browser_draws_it_and_its_switches_work(browser, tmp_path):
    path = tmp_path / "report.html"
    reports = two_runs()
    path.write_text(page(reports), encoding="utf-8")
    opened = Opened(browser, path)
    tab = opened.tab
    charts = {"batch", "loss", "metric0", "noise", "efficiency", "lr", "shape", "factor", "tau", "betas", "freedom"}
    charts.add("layers")
    assert set(tab.eval_on_selector_all("[data-chart]", "all => all.map(each => each.dataset.chart)")) == charts
    assert all(opened.count(f'[data-chart="{chart}"] svg path') for chart in charts - {"layers"})
    assert opened.count('[data-chart="layers"] svg rect') > 100
    assert "first <run>" in opened.text("#totals-narrow")
    assert "1 update was left out" in opened.text('[data-kind="updates_left_out"] >> nth=0')
    assert "best accuracy, evaluated\t" in opened.text("#totals-narrow")
    assert not tab.is_visible("#totals")
    assert "seed" in opened.text("#differences")

    curve = '[data-chart="batch"] svg path >> nth=-1'
    before = tab.get_attribute(curve, "d")
    for name, unit in (("steps", "steps"), ("tokens", "tokens"), ("time", "seconds"), ("examples", "examples")):
        tab.click(f'#axis label:has-text("{name}")')
        assert tab.locator('[data-chart="batch"] svg text').last.text_content() == unit
    tab.click('#axis label:has-text("steps")')
    assert tab.get_attribute(curve, "d") != before

    drawn = opened.count('[data-chart="loss"] svg path')
    tab.uncheck(".runs input >> nth=1")
    assert opened.count('[data-chart="loss"] svg path') == drawn / 2
    tab.check(".runs input >> nth=1")
    assert opened.count('[data-chart="loss"] svg path') == drawn

    for theme in ("light", "dark", None):
        tab.click("#theme")
        assert tab.get_attribute("html", "data-theme") == theme
    tab.hover('[data-chart="batch"] svg', position={"x": 400, "y": 100})
    assert "taken" in opened.text(".tip")

    tab.select_option("#try-kind", "constant")
    tab.fill("#try-value", "100")
    told = what_if(reports[0].run, Choice("constant", 100))
    assert f"takes {round(told.steps):,} steps" in opened.text("#try-answer")
    assert f"{round(told.examples):,} examples" in opened.text("#try-answer")
    tab.select_option("#try-kind", "eta")
    tab.fill("#try-value", "1.5")
    assert "between 0 and 1" in opened.text("#try-answer")

    assert opened.complaints == []
    assert opened.requests == [path.as_uri()]


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 900, 1500])
def test_nothing_leaves_the_window(browser, tmp_path, width):
    path = tmp_path / "report.html"
    path.write_text(page(two_runs()), encoding="utf-8")
    opened = Opened(browser, path, width=width, scheme="dark")
    assert opened.tab.evaluate("document.documentElement.scrollWidth") <= width
    opened.tab.emulate_media(media="print", color_scheme="light")
    assert not opened.tab.is_visible("#axis")
    assert opened.tab.is_visible('[data-chart="batch"] svg')
    opened.tab.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert opened.tab.get_attribute("html", "data-theme") == "light"
    opened.tab.evaluate("dispatchEvent(new Event('afterprint'))")
    assert opened.tab.get_attribute("html", "data-theme") is None
    assert opened.complaints == []


@pytest.mark.slow
def test_a_run_that_measured_nothing_has_a_page(browser, tmp_path):
    silent = {"moments": None, "averages": None, "wanted": None, "low": None, "high": None, "lr": None}
    lines = journal(3, **silent, loss=None, reason="not probed")
    path = tmp_path / "report.html"
    path.write_text(page([report_on(read_steps(lines, "silent"))]), encoding="utf-8")
    opened = Opened(browser, path)
    assert "not measured" in opened.text('[data-chart="noise"]')
    assert opened.complaints == []
