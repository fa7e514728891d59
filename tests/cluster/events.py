"""Event streams of the HTTP endpoint, read line by line from whatever has the lines."""

import json
from collections.abc import AsyncGenerator, AsyncIterable, Mapping, Sequence
from typing import Any

_DATA = b"data: "


class ErrorEvent(Exception):
    """What a stream that has begun says instead of its end."""

    def __init__(self, error: Mapping[str, Any]) -> None:
        super().__init__(error["message"])
        self.code = error["code"]


def completion(prompt: Sequence[int], max_tokens: int, **fields: Any) -> dict[str, Any]:
    """The body of a greedy, streaming completion whose events have token ids."""
    plain = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True}
    return {**plain, "ignore_eos": True, "return_token_ids": True, **fields}


async def events(lines: AsyncIterable[bytes]) -> AsyncGenerator[dict[str, Any], None]:
    """Until the stream says that it is done. Raises ErrorEvent, or ConnectionError if it ends without saying so."""
    async for line in lines:
        if line.strip() == b"data: [DONE]":
            return
        if line.startswith(_DATA) and line.endswith(b"\n"):
            event = json.loads(line[len(_DATA) :])
            if "error" in event:
                raise ErrorEvent(event["error"])
            yield event
    raise ConnectionError("the stream ended before its end was said")


def token_ids_of(event: Mapping[str, Any]) -> list[int]:
    """Of its one choice; none in an event that only has the usage."""
    return [token for choice in event["choices"] for token in choice["token_ids"] or ()]
