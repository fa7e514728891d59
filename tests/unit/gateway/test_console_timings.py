"""`stream_options.include_timings`: what the console draws a request's timeline from."""

import json
from dataclasses import asdict, replace
from typing import Any

import aiohttp
import pytest

from splitserve.core.request import Chunk, FinishReason, Timings, Usage
from tests.unit.gateway.serving import Told, events_of, gateway, sends, url

TIMINGS = Timings(0.01, 0.2, 0.005, 0.25, 0.02, "p0", "d0", 4096, 3072, 1)
LAST = Chunk("", 1, (66,), "B", finish_reason=FinishReason.LENGTH, usage=Usage(3, 2), timings=TIMINGS)
WHOLE = sends(Chunk("", 0, (65,), "A"), LAST)
ALONE = sends(replace(LAST, index=0))
COMPLETION = ("/v1/completions", {"prompt": "x"})
CHAT = ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]})


async def streamed(told: Told, path: str, body: dict[str, Any], **options: bool) -> list[Any]:
    asked = {"model": "demo", **body, "stream": True, "stream_options": options}
    async with (
        gateway(told) as server,
        aiohttp.ClientSession() as client,
        client.post(url(server, path), json=asked) as answer,
    ):
        assert answer.status == 200
        return [json.loads(event) for event in events_of(await answer.read())[:-1]]


@pytest.mark.parametrize(("path", "body"), [COMPLETION, CHAT])
@pytest.mark.parametrize("script", [WHOLE, ALONE])
async def test_the_event_with_the_end_has_them(path: str, body: dict[str, Any], script: Any) -> None:
    events = await streamed(Told(script), path, body, include_timings=True)
    told = [event["timings"] for event in events if "timings" in event]
    assert told == [asdict(TIMINGS)]
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    assert "timings" in events[-1]


@pytest.mark.parametrize(("path", "body"), [COMPLETION, CHAT])
@pytest.mark.parametrize("options", [{}, {"include_timings": False}, {"include_usage": True}])
async def test_nobody_else_gets_them(path: str, body: dict[str, Any], options: dict[str, bool]) -> None:
    events = await streamed(Told(WHOLE), path, body, **options)
    assert not any("timings" in event for event in events)
