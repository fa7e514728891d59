import re
from html.parser import HTMLParser

import pytest

from splitserve.bench.findings import Findings, judged
from splitserve.bench.report import report
from tests.unit.bench.saved_runs import SLO, saved, swept

_VOID = {"meta", "link", "br", "hr", "img", "input", "path", "use", "rect"}


class Page(HTMLParser):
    """Checks that what is opened is closed, and keeps ids, tags and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.addresses: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in _VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def comparison() -> Findings:
    return judged([*swept("pd"), *swept("colocated", slots=3)], SLO)


@pytest.fixture(scope="module")
def text(comparison: Findings) -> str:
    return report(comparison)


def test_it_is_whole_and_loads_nothing(text: str) -> None:
    page = Page(text)
    assert "script" not in page.tags
    assert all(address.startswith("#") for address in page.addresses)
    assert not re.search(r"url\((?!#)", text)
    assert "@import" not in text


def test_it_is_for_light_and_dark(text: str) -> None:
    assert "prefers-color-scheme: dark" in text
    used = set(re.findall(r"var\((--\w+)\)", text))
    roots = re.findall(r":root \{(.*?)\}", text, re.DOTALL)  # the page's, then the report's own
    light, dark = "".join(roots[0::2]), "".join(roots[1::2])
    assert all(f"{name}:" in light and f"{name}:" in dark for name in used)


def test_it_says_what_was_run_and_on_what(text: str) -> None:
    for said in (
        "splitserve bench sweep --ttft 400ms",
        "grpc://pd:50051",
        "lognormal:prompt=200,output=40,sigma=0.4",
        "2026-01-31T12:00:00+00:00",
        "A &lt;fast&gt; CPU",
        "splitserve 0.1.0, Python 3.11.2",
        "lengths are made up",
        "TTFT 400 ms and TPOT 50 ms",
    ):
        assert said in text


def test_it_shows_what_the_terminal_shows(comparison: Findings, text: str) -> None:
    page = Page(text)
    for system in comparison.systems:
        assert system.goodput is not None
        assert f"{system.goodput.rps:.3g}" in page.text
        for figures in system.figures:
            assert f"{100 * figures.attainment.value:.1f}%" in page.text
    assert "pd beside colocated" in page.text
    assert page.tags.count("svg") == 7


def test_one_run_shows_its_failures() -> None:
    page, good = (Page(report(judged([saved(rate, patience_s=1.0)], SLO))) for rate in (6.0, 0.5))
    assert "Overloaded: the queue is full" in page.text
    assert "What failed" in page.text
    assert "What failed" not in good.text
    assert page.tags.count("svg") == 4


def test_the_same_findings_give_the_same_bytes(comparison: Findings, text: str) -> None:
    assert report(comparison) == text
