"""Metrics and probes over HTTP, as Prometheus and a kubelet ask for them."""

import asyncio
import socket
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter

from splitserve.cli.build import metrics_served
from splitserve.core.config import ClientTls
from splitserve.telemetry.health import Probes, loop_fault
from tests.certificates import Authority

TIMEOUT_S = 20.0


@pytest.fixture
def registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    Counter("splitserve_something", "x", registry=registry).inc()
    return registry


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def context_of(tls: ClientTls, shows: bool = False) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=tls.ca)
    if shows:
        assert tls.certificate is not None
        context.load_cert_chain(tls.certificate, tls.key)
    return context


def asked(address: str, path: str, context: ssl.SSLContext | None = None) -> tuple[int, str]:
    """Status and body."""
    url = f"{'https' if context else 'http'}://{address}{path}"
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), *([urllib.request.HTTPSHandler(context=context)] if context else [])
    )
    try:
        with opener.open(url, timeout=TIMEOUT_S) as page:
            return page.status, page.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_a_process_that_has_just_begun_lives_and_is_not_ready(registry: CollectorRegistry) -> None:
    with metrics_served("127.0.0.1:0", registry) as address:
        assert asked(address, "/livez") == (200, "ok\n")
        assert asked(address, "/readyz") == (503, "it is starting\n")


def test_probes_say_what_the_process_says_when_they_are_asked(registry: CollectorRegistry) -> None:
    probes, said = Probes(), [""]
    with metrics_served("127.0.0.1:0", registry, probes=probes) as address:
        probes.live = probes.ready = lambda: said[0]
        for path in ("/livez", "/readyz"):
            said[0] = ""
            assert asked(address, path) == (200, "ok\n")
            said[0] = "it drains"
            assert asked(address, path) == (503, "it drains\n")


def test_metrics_are_beside_them(registry: CollectorRegistry) -> None:
    with metrics_served("127.0.0.1:0", registry) as address:
        status, page = asked(address, "/metrics")
    assert (status, "splitserve_something_total 1.0" in page) == (200, True)


def test_a_caller_who_says_nothing_keeps_nobody_waiting(registry: CollectorRegistry, authority: Authority) -> None:
    with metrics_served("127.0.0.1:0", registry, authority.server()) as address:
        host, _, port = address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=TIMEOUT_S):
            assert asked(address, "/livez", context_of(authority.client()))[0] == 200


def test_only_metrics_insist_on_a_client_certificate(registry: CollectorRegistry, authority: Authority) -> None:
    tls = authority.client()
    stranger, prometheus = context_of(tls), context_of(tls, shows=True)
    with metrics_served("127.0.0.1:0", registry, authority.server(mutual=True)) as address:
        assert asked(address, "/livez", stranger)[0] == 200
        assert asked(address, "/readyz", stranger)[0] == 503
        status, sentence = asked(address, "/metrics", stranger)
        assert (status, "show a client certificate" in sentence) == (403, True)
        for elsewhere in ("/", "/metrics/", "//metrics", "/livez/../metrics"):
            assert asked(address, elsewhere, stranger)[0] == 403
        assert asked(address, "/metrics", prometheus)[0] == 200


def test_without_a_client_ca_whoever_reaches_it_reads_metrics(
    registry: CollectorRegistry, authority: Authority
) -> None:
    with metrics_served("127.0.0.1:0", registry, authority.server()) as address:
        assert asked(address, "/metrics", context_of(authority.client()))[0] == 200


def test_a_certificate_of_another_ca_is_let_in_nowhere(
    registry: CollectorRegistry, authority: Authority, tmp_path: Path
) -> None:
    forged = Authority(tmp_path / "other", "other").client().model_copy(update={"ca": authority.ca})
    with metrics_served("127.0.0.1:0", registry, authority.server(mutual=True)) as address:
        for path in ("/metrics", "/livez"):
            with pytest.raises(OSError, match=r"SSL|reset|closed|EOF"):
                asked(address, path, context_of(forged, shows=True))


def test_a_renewed_certificate_is_shown_at_the_next_connection(
    registry: CollectorRegistry, authority: Authority
) -> None:
    with metrics_served("127.0.0.1:0", registry, authority.server("it")) as address:
        before = shown_by(address)
        certificate, _ = authority.issue("it")
        renewed = shown_by(address)
        assert renewed != before
        Path(certificate).write_text("nothing")
        assert shown_by(address) == renewed, "the former one stays while the new one is broken"
        assert asked(address, "/livez", context_of(authority.client()))[0] == 200


def shown_by(address: str) -> str:
    host, _, port = address.rpartition(":")
    return ssl.get_server_certificate((host, int(port)), timeout=TIMEOUT_S)


def test_ipv6_works(registry: CollectorRegistry) -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no IPv6")
    with metrics_served("[::1]:0", registry) as address:
        assert asked(address, "/livez")[0] == 200


# Event loops --------------------------------------------------------------------------------------------------------
@contextmanager
def loop_of_another_thread() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(TIMEOUT_S)
        loop.close()


def test_a_loop_that_turns_has_no_fault() -> None:
    with loop_of_another_thread() as loop:
        assert loop_fault(loop) == ""


def test_a_loop_that_something_blocks_is_found() -> None:
    free = threading.Event()
    with loop_of_another_thread() as loop:
        loop.call_soon_threadsafe(free.wait, TIMEOUT_S)
        assert loop_fault(loop, 0.01) == "its event loop has not turned for 0.01 s"
        free.set()
        assert loop_fault(loop) == ""


def test_a_loop_that_is_closed_is_found() -> None:
    with loop_of_another_thread() as loop:
        pass
    assert loop_fault(loop) == "its event loop is closed"
