"""A caller's trace context goes from HTTP's headers to every generation of the request."""

import aiohttp
import pytest

from tests.unit.gateway.serving import Told, gateway, says, url
from tests.unit.recorder import CALLER


@pytest.mark.parametrize(
    ("path", "body", "generations"),
    [
        ("/v1/completions", {"prompt": ["p", "q"]}, 2),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}, 1),
    ],
)
async def test_the_headers_trace_context_is_every_generations(
    path: str, body: dict[str, object], generations: int
) -> None:
    backend = Told(says("A"))
    headers = {"TraceParent": CALLER, "TraceState": "a=1,b=2"}
    async with gateway(backend) as server, aiohttp.ClientSession() as session:
        async with session.post(url(server, path), json=body, headers=headers) as answer:
            assert answer.status == 200
        async with session.post(url(server, path), json=body) as answer:
            assert answer.status == 200
    told = [(request.traceparent, request.tracestate) for request in backend.requests]
    assert told == [(CALLER, "a=1,b=2")] * generations + [("", "")] * generations
