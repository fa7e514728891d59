"""Servers for whoever calls them."""

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack

import pytest

from splitserve.core.config import TlsSettings
from splitserve.rpc.server import Server
from tests.unit.rpc.counting import Counting, Started


@pytest.fixture
async def started() -> AsyncIterator[Started]:
    async with AsyncExitStack() as stack:

        async def start(
            listen: str = "127.0.0.1:0",
            tls: TlsSettings | None = None,
            check: Callable[[str, str | None], None] | None = None,
        ) -> Counting:
            counting = Counting(Server(listen, 1, [], tls, check))
            await counting.server.start()
            stack.push_async_callback(counting.server.stop, 0)
            return counting

        yield start
