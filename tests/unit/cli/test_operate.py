"""`splitserve status` against a router that listens, with a worker whose step cost has no break: an infinity."""

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from splitserve.client import AsyncClient
from splitserve.core.request import SamplingParams
from splitserve.core.worker import Pool
from tests.unit.cli.console import Run
from tests.unit.router.scripted import WITHIN_S
from tests.unit.router.test_late import COST
from tests.unit.router.wired import WiredWorker, router


class Site:
    """A router with worker d0, where request "r" of class interactive has its first token; in a thread of its own."""

    def __init__(self) -> None:
        self.address = ""
        self._is_up = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ends = asyncio.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    def __enter__(self) -> "Site":
        self._thread.start()
        assert self._is_up.wait(WITHIN_S)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._ends.set)
        self._thread.join(WITHIN_S)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        async with (
            router() as serving,
            AsyncClient(serving.address) as client,
            WiredWorker(serving.address, "d0", Pool.DECODE, step_cost=COST) as worker,
        ):
            stream = client.generate((5, 6, 7), SamplingParams(max_tokens=2), request_id="r", slo_class="interactive")
            first = asyncio.create_task(anext(stream))
            worker.say(await worker.job(), 10)
            await first
            self.address = serving.address
            self._is_up.set()
            await self._ends.wait()
            await stream.aclose()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with Site() as site:
        yield site.address


def told(text: str) -> Any:
    """Strictly JSON: Python's reader would take Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_the_fleets_status_is_json_and_what_there_is_none_of_is_null(splitserve: Run, address: str) -> None:
    fleet = told(splitserve("status", "--router", address, "--json").out)
    interactive, standard, batch = fleet["classes"]
    assert (interactive["ttft_s"], interactive["tpot_s"], interactive["itl_p99_s"]) == (1.0, 0.05, None)
    assert (standard["ttft_s"], batch["tpot_s"]) == (None, None)
    (worker,) = fleet["workers"]
    assert (worker["worker"]["step_cost"]["token_break"], worker["load"]["tpot_s"]) == (None, None)


def test_a_request_is_explained_in_words_and_as_json(splitserve: Run, address: str) -> None:
    explanation = told(splitserve("status", "--router", address, "--explain", "r", "--json").out)
    assert (explanation["slo_class"], explanation["ttft_s"], explanation["itl_p99_s"]) == ("interactive", 1.0015, None)
    (decision,) = explanation["decisions"]
    assert (decision["decode_worker"], decision["predicted"]) == ("d0", True)
    assert "r: 3 prompt and 1 output tokens" in splitserve("status", "--router", address, "--explain", "r").out


def test_a_request_that_does_not_run_is_named(splitserve: Run, address: str) -> None:
    done = splitserve("status", "--router", address, "--explain", "gone")
    assert done.code != 0
    assert "no request 'gone' runs" in done.err
