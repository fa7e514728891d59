"""The console in a browser: live figures, a prompt and its timeline, a worker's death, keys, and what it says when
there is nothing to show."""

import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from splitserve.client import Client
from splitserve.core.deadline import Deadline
from splitserve.core.request import SamplingParams
from splitserve.core.worker import Pool
from splitserve.gateway.config import GatewayConfig
from tests.cluster.processes import Cluster, Process
from tests.cluster.test_security import key_of, write_keys
from tests.console.conftest import Open
from tests.console.serving import WITHIN_S, busy

Another = Callable[..., Any]
POLL_MS = 50
READING = Path(__file__).with_name("reading.js").read_text()
BARS = ["queue", "prefill", "early", "late", "first", "decode"]


def wait(page: Any, condition: str, argument: Any = None) -> None:
    """Until a JavaScript function returns true. Asked from outside: the page's policy forbids to evaluate within."""
    deadline = Deadline.after(WITHIN_S)
    while not page.evaluate(condition, argument):
        assert deadline.remaining_s > 0, f"not within {WITHIN_S:g} s: {condition} {argument or ''}"
        page.wait_for_timeout(POLL_MS)


def wait_text(page: Any, selector: str, text: str) -> None:
    wait(page, "([at, text]) => document.querySelector(at)?.textContent.includes(text)", [selector, text])


def tile(page: Any, name: str) -> str:
    return str(page.locator(".tile", has=page.get_by_text(name, exact=True)).locator("b").text_content())


def rows(page: Any, pool: str) -> list[str]:
    return [str(each) for each in page.locator(f'tbody[data-pool="{pool}"] th').all_text_contents()]


def live(page: Any) -> Any:
    wait_text(page, "#link", "live")
    return page


# Live figures --------------------------------------------------------------------------------------------------------
def test_it_shows_workers_requests_and_transfers_live(opened: Open, cluster: Cluster, http: str) -> None:
    page = live(opened(http))
    assert tile(page, "workers ready") == "2 / 2"
    assert (rows(page, "prefill"), rows(page, "decode")) == (["prefill-0"], ["decode-0"])
    wait_text(page, "#requests", "Nothing waits or runs in this router.")
    with busy(cluster.address, 3):
        wait(page, "() => document.querySelectorAll('#requests .phase[data-phase=decode]').length === 3")
        assert tile(page, "requests running") == "3"
        assert sorted(page.locator("#requests tbody th").all_text_contents()) == ["r0", "r1", "r2"]
        routes = page.locator("#requests tbody tr td:last-child").all_text_contents()
        assert routes == ["prefill-0 → decode-0"] * 3
        before = int(page.locator("#requests tbody tr").first.locator("td").nth(3).text_content().replace(",", ""))
        wait(
            page,
            """(before) => [...document.querySelectorAll("#requests tbody tr")].some(
                 (row) => Number(row.children[4].textContent.replace(",", "")) > before)""",
            before,
        )
        wait(
            page,
            """() => [...document.querySelectorAll(".tile")].some((tile) => tile.textContent.includes("tokens/s")
                 && Number(tile.querySelector("b").textContent.replace(",", "")) > 0)""",
        )
        wait(page, "() => [...document.querySelectorAll('#workers meter')].some((meter) => meter.value > 0)")
    wait_text(page, "#requests", "Nothing waits or runs in this router.")
    wait_text(page, "#links", "prefill-0 → decode-0")


def test_the_charts_have_the_last_minutes_percentiles_beside_the_objectives(
    opened: Open, cluster: Cluster, http: str
) -> None:
    page = live(opened(http))
    with Client(cluster.address) as client:
        for _ in range(3):
            asked = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
            list(client.generate(tuple(range(300, 360)), asked, slo_class="interactive"))
    page.select_option("#class", "interactive")
    wait(page, "() => /M.*L/.test(document.querySelector('.line.three')?.getAttribute('d') ?? '')")
    labels = [str(each.get_attribute("aria-label")) for each in page.locator("svg.chart").all()]
    assert [label.split(",")[0] for label in labels] == ["TTFT", "TPOT", "Attainment", "Load"]
    assert re.fullmatch(r"TTFT, now: p50 \d+ ms, p90 \d+ ms, p99 \d+ ms, objective 2\.00 s", labels[0])
    assert re.search(r"objective 500 ms", labels[1])
    assert labels[2] == "Attainment, now: met every objective 100%"
    page.select_option("#class", "batch")
    wait(page, "() => document.querySelector('svg.chart').getAttribute('aria-label').includes('p50 none')")


def test_a_charts_past_is_read_with_the_arrow_keys(opened: Open, http: str) -> None:
    page = live(opened(http))
    chart = page.locator("svg.chart").last
    chart.focus()
    chart.press("ArrowLeft")
    assert "Load, 5 seconds ago" in chart.get_attribute("aria-label")
    chart.press("ArrowLeft")
    assert "10 seconds ago" in chart.get_attribute("aria-label")
    chart.press("Escape")
    assert "Load, now" in chart.get_attribute("aria-label")


def test_what_a_client_calls_its_request_is_text(opened: Open, cluster: Cluster, http: str) -> None:
    page = live(opened(http))
    name = "<img src=x onerror=alert(1)><b>"
    with busy(cluster.address, 1, name):
        wait(
            page,
            "(name) => [...document.querySelectorAll('#requests th')].some((cell) => cell.title === name)",
            f"{name}0",
        )
        assert page.locator("#requests img, #requests b").count() == 0


# A prompt ------------------------------------------------------------------------------------------------------------
def test_a_prompt_streams_and_its_timeline_is_drawn(opened: Open, http: str) -> None:
    page = live(opened(http))
    page.fill("#prompt", "It is a truth universally acknowledged, that " * 12)
    page.fill("#max-tokens", "150")
    page.click("#send")
    wait(page, "() => document.getElementById('answer').textContent.length > 0")
    begun = len(page.text_content("#answer"))
    assert page.locator("#timeline figure").count() == 0, "it is drawn at the end"
    assert page.locator("#send").is_disabled()
    page.wait_for_selector("#timeline figure")
    assert len(page.text_content("#answer")) > begun, "the answer came in one piece"
    kinds = [str(each.get_attribute("class")).removeprefix("bar ") for each in page.locator("#timeline .bar").all()]
    assert kinds == BARS
    edges = [(float(bar.get_attribute("x")), float(bar.get_attribute("width"))) for bar in page.locator(".bar").all()]
    starts = [x for x, _ in edges]
    assert starts[0] <= starts[1] == starts[2] <= starts[3] <= starts[4] <= starts[5]
    ticks = [float(tick.get_attribute("x1")) for tick in page.locator("#timeline .token").all()]
    assert ticks == sorted(ticks)
    assert ticks[0] == pytest.approx(starts[5], abs=0.01), "the first token is where the tokens' bar begins"
    said = dict(zip(page.locator("dt").all_text_contents(), page.locator("dd").all_text_contents(), strict=True))
    assert said["route"] == "prefill-0 → decode-0"
    tokens = int(said["tokens"].split()[2])
    assert 1 < len(ticks) <= tokens <= 150
    assert f"{tokens} tokens in" in page.text_content("#prompt-note")
    assert "before prefill ended" in said["KV moved"]
    assert page.locator("#send").is_enabled()


def test_a_chat_is_sent_with_ctrl_enter(opened: Open, http: str) -> None:
    page = live(opened(http))
    page.select_option("#mode", "chat")
    page.fill("#prompt", "Who is Emma?")
    page.fill("#max-tokens", "8")
    page.press("#prompt", "Control+Enter")
    page.wait_for_selector("#timeline figure")


def test_a_prompt_that_is_stopped_is_cancelled(opened: Open, cluster: Cluster, http: str) -> None:
    page = live(opened(http))
    page.fill("#max-tokens", "100000")
    page.fill("#max-tokens", "3000")
    page.click("#send")
    wait(page, "() => document.getElementById('answer').textContent.length > 0")
    page.click("#stop")
    wait_text(page, "#prompt-note", "Stopped")
    wait_text(page, "#requests", "Nothing waits or runs in this router.")


def test_a_prompt_that_is_refused_says_why(opened: Open, http: str) -> None:
    page = live(opened(http))
    page.fill("#temperature", "2")
    page.evaluate("document.getElementById('temperature').max = 9")
    page.fill("#temperature", "9")
    page.click("#send")
    wait_text(page, "#prompt-note", "Not served: temperature")


# Trouble -------------------------------------------------------------------------------------------------------------
def test_a_workers_death_is_shown(opened: Open, another: Another) -> None:
    with another(decode=2) as mine:
        page = live(opened(str(mine.router.ready()["http"])))
        assert rows(page, "decode") == ["decode-0", "decode-1"]
        mine.workers["decode-1"].signal(signal.SIGKILL)
        wait_text(page, "tbody[data-pool=decode] tr.gone", "decode-1")
        assert "gone" in page.text_content("tbody[data-pool=decode] tr.gone")
        wait_text(page, "#events", "decode-1 is gone")
        wait(page, "() => document.querySelector('.tile b').textContent === '2 / 2'")
        wait_text(page, "#workers", "decode pool · 1 of 1 ready")
        mine.restart("decode-1").ready()
        wait_text(page, "#events", "decode-1 joined the decode pool")
        assert rows(page, "decode") == ["decode-0", "decode-1", "decode-1"], "the dead one and the new one"


def test_a_router_that_goes_and_comes_back_is_told_of(opened: Open, another: Another, tmp_path: Path) -> None:
    with another() as mine:
        config = GatewayConfig(router=mine.address, listen="127.0.0.1:0")
        gateway = Process("gateway", config, tmp_path, "gateway")
        try:
            page = live(opened(str(gateway.ready()["address"])))
            mine.router.signal(signal.SIGKILL)
            wait_text(page, "#link", "unreachable")
            assert "The router can't be asked" in page.text_content("#notice")
            assert "old" in page.text_content("#notice")
            assert rows(page, "decode") == ["decode-0"], "the last that was known stays"
            gateway.signal(signal.SIGKILL)
            wait_text(page, "#notice", "The gateway does not answer")
        finally:
            gateway.close()


def test_a_fleet_without_workers_says_how_to_start_one(opened: Open, another: Another) -> None:
    with another(prefill=0, decode=0) as mine:
        page = opened(str(mine.router.ready()["http"]))
        wait_text(page, "#notice", "No worker has joined this router")
        assert page.text_content("#link") == "impaired"
        mine.add("decode-0", Pool.DECODE).ready()
        live(page)
        assert page.locator("#notice").is_hidden()
        wait_text(page, "#events", "decode-0 joined the decode pool")


# Keys ----------------------------------------------------------------------------------------------------------------
def test_it_asks_for_a_key_and_keeps_it_in_the_tab_alone(opened: Open, another: Another, tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    write_keys(keys, "acme", "ops", "fleet")
    (tmp_path / "worker.key").write_text(key_of("fleet") + "\n")
    with another(prefill=0, decode=0, api_keys=str(keys)) as mine:
        mine.add("decode-0", Pool.DECODE, api_key_file=str(tmp_path / "worker.key")).ready()
        page = opened(str(mine.router.ready()["http"]))
        wait_text(page, "#notice", "This cluster asks for an API key")
        assert page.locator("#board").is_hidden()
        assert page.evaluate("document.activeElement.id") == "key"
        for key, sentence in (("no-such-key-0123456789", "not known here"), (key_of("acme"), "no scope admin")):
            page.fill("#key", key)
            page.press("#key", "Enter")
            wait_text(page, "#notice", sentence)
            assert page.locator("#key-form").is_visible()
        page.fill("#key", key_of("ops"))
        page.click("#key-form button")
        live(page)
        assert page.locator("#key-form").is_hidden()
        assert rows(page, "decode") == ["decode-0"]
        assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
        assert page.evaluate("Object.values(sessionStorage)") == [key_of("ops")]
        page.click("#send")
        wait_text(page, "#prompt-note", "Not served")  # the key has no scope inference
        page.reload()
        live(page)
        page.click("#forget")
        wait_text(page, "#notice", "This cluster asks for an API key")
        assert page.evaluate("sessionStorage.length") == 0


# For everybody -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_has_a_name_an_order_and_enough_contrast(
    opened: Open, cluster: Cluster, http: str, scheme: str
) -> None:
    page = live(opened(http, color_scheme=scheme))
    page.fill("#max-tokens", "8")
    page.click("#send")
    page.wait_for_selector("#timeline figure")
    with busy(cluster.address, 2, f"{scheme}-"):
        wait(page, "() => document.querySelectorAll('#requests .phase').length === 2")
        assert page.evaluate(READING) == []


def test_the_check_of_names_and_contrast_sees_what_is_wrong(opened: Open, http: str) -> None:
    page = live(opened(http))
    page.evaluate("""() => {
        const button = document.querySelector("main").appendChild(document.createElement("button"));
        button.id = "send";
        button.tabIndex = 3;
        document.querySelector("h2").style.color = "rgb(200, 200, 200)";
        document.querySelector("label[for=prompt]").remove();
    }""")
    found = " ".join(page.evaluate(READING))
    for complaint in (
        "no name: <button",
        "no name: <textarea",
        "an id comes twice",
        "focus out of order",
        "contrast 1.",
    ):
        assert complaint in found


def test_light_and_dark_follow_the_system(opened: Open, http: str) -> None:
    page = opened(http, color_scheme="light")
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.emulate_media(color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light


def test_whoever_wants_less_motion_gets_none(opened: Open, http: str) -> None:
    page = live(opened(http, reduced_motion="reduce"))
    moving = (
        "[...document.querySelectorAll('*')].filter((each) => parseFloat(getComputedStyle(each).transitionDuration)"
    )
    assert page.evaluate(f"{moving} > 0 || getComputedStyle(each).animationName !== 'none').length") == 0


def test_at_400_pixels_nothing_sticks_out(opened: Open, http: str) -> None:
    page = live(opened(http, viewport={"width": 400, "height": 800}))
    page.fill("#max-tokens", "8")
    page.click("#send")
    page.wait_for_selector("#timeline figure")
    assert page.evaluate("document.documentElement.scrollWidth") == 400


def test_the_keyboard_reaches_everything_in_the_order_of_the_page(opened: Open, http: str) -> None:
    page = live(opened(http))
    seen: list[str] = []
    for _ in range(40):
        page.keyboard.press("Tab")
        at = page.evaluate("document.activeElement.id || document.activeElement.getAttribute('aria-label') || ''")
        if at and at in seen:
            break
        seen.append(str(at))
    assert seen[0] == "" or seen[0].startswith("Skip"), "first a way past the head"
    order = ["class", "Table of workers", "Table of requests in flight", "Table of KV transfers", "prompt", "mode"]
    order += ["max-tokens", "temperature", "prompt-class", "send"]
    assert [each for each in seen if each in order] == order
    assert sum(each.startswith(("TTFT", "TPOT", "Attainment", "Load")) for each in seen) == 4
