"""Headless Chromium on the console of real processes. Skipped where there is no browser to do it with."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.processes import Cluster, cluster_of
from tests.console.serving import CLASSES, SIM, routing

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
PATIENCE_MS = 30_000
_REFUSED = "Failed to load resource"  # what a browser writes of any answer that is not a success

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Not for a whole session: as long as it runs, its event loop does, and no other test may have one."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: requirements/dev.txt")
    if not CHROMIUM.exists():
        pytest.skip(f"no Chromium at {CHROMIUM}: install Debian's package `chromium`")
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(executable_path=str(CHROMIUM), headless=True, args=list(ARGUMENTS))
        try:
            yield started
        finally:
            started.close()


@pytest.fixture
def opened(browser: Any) -> Iterator[Open]:
    """Opens a console in a browser that knows nothing yet. Whatever the page does, it may break no rule of its policy,
    raise nothing, and ask nobody but its own gateway."""
    complaints: list[str] = []
    contexts: list[Any] = []

    def open_(http: str, **options: Any) -> Any:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        page.on("console", lambda said: _hear(said, complaints))
        page.on("request", lambda asked: _check_here(asked.url, http, complaints))
        page.goto(f"http://{http}/console")
        return page

    yield open_
    for context in contexts:
        context.close()
    assert complaints == []


def _hear(said: Any, complaints: list[str]) -> None:
    if said.type in ("error", "warning") and not said.text.startswith(_REFUSED):
        complaints.append(f"{said.type}: {said.text}")


def _check_here(url: str, http: str, complaints: list[str]) -> None:
    if not url.startswith(f"http://{http}/"):
        complaints.append(f"asked elsewhere: {url}")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """For tests that break nothing: one prefill and one decode worker."""
    with cluster_of(tmp_path_factory.mktemp("console"), engine=SIM, router=routing(CLASSES)) as started:
        yield started


@pytest.fixture(scope="module")
def http(cluster: Cluster) -> str:
    """Where the router's console is."""
    return str(cluster.router.ready()["http"])


@pytest.fixture
def another(tmp_path: Path) -> Callable[..., Any]:
    """A cluster of a test's own, to be broken."""

    @contextmanager
    def started(prefill: int = 1, decode: int = 1, **changes: Any) -> Iterator[Cluster]:
        with cluster_of(tmp_path, prefill, decode, engine=SIM, router=routing(CLASSES, **changes)) as one:
            yield one

    return started
