import re
from html.parser import HTMLParser

import pytest

from splitserve.planner.plan import Plan
from splitserve.planner.report import report
from splitserve.planner.result import SearchResult
from tests.unit.planner.fixtures.results import INPUTS, plan, result

_EMPTY = {"meta", "input", "br", "line", "rect", "circle", "polyline", "polygon"}


class _Tags(HTMLParser):
    """Whether every tag is closed, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag not in _EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        if tag not in _EMPTY:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def html() -> str:
    return report(plan())


def test_every_tag_is_closed(html: str) -> None:
    tags = _Tags()
    tags.feed(html)
    assert tags.open == []


def test_the_report_loads_nothing_and_runs_nothing(html: str) -> None:
    tags = _Tags()
    tags.feed(html)
    assert not {name for name, _ in tags.attributes} & {"src", "href", "srcset", "onload", "xlink:href"}
    assert "<script" not in html
    assert "http" not in html
    assert "@import" not in html
    assert "url(" not in html


def test_the_same_plan_gives_the_same_report(html: str) -> None:
    assert report(plan()) == html


def test_it_is_for_light_and_for_dark(html: str) -> None:
    assert "prefers-color-scheme: dark" in html
    roots = re.findall(r":root \{(.*?)\}", html, re.DOTALL)  # the page's, then the report's own
    light, dark = "".join(roots[0::2]), "".join(roots[1::2])
    assert set(re.findall(r"--[a-z0-9]+", light)) == set(re.findall(r"--[a-z0-9]+", dark))


def test_every_colour_that_is_used_is_defined(html: str) -> None:
    assert set(re.findall(r"var\((--[a-z0-9]+)\)", html)) <= set(re.findall(r"(--[a-z0-9]+):", html))


@pytest.mark.parametrize(
    "says",
    [
        "Attainment against rate",
        "Goodput per GPU of every candidate",
        "What more machines buy",
        "Where time goes",
        "worker 0, NVLink",
        "Why the others lost",
        "too close to call",
        "held-out error 3.0%",
        "decode latencies are extrapolated",
        "a100-80g:1x8",
        "48,000 requests",
        "the weights need 2 GPUs",
    ],
)
def test_it_tells_all_that_the_plan_knows(html: str, says: str) -> None:
    assert says in html


def test_names_from_outside_cannot_become_markup() -> None:
    made = plan()
    odd: Plan = made.model_copy(update={"inputs": INPUTS.model_copy(update={"model": "<script>alert(1)</script>"})})
    assert "<script" not in report(odd)


def test_a_plan_with_one_candidate_has_a_report() -> None:
    alone = plan(found=SearchResult(result().judged[:1], (), None, 0, 0.0))
    assert "No placement without separation was found" in report(alone)
