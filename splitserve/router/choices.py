"""Several outputs of one prompt (`sampling.n`): a journey each, so that each has its own seed, resume and end.

The first goes like any request. The others set out when it has made its first token, to the worker where it decodes:
the prompt's KV is there, so that they find its full blocks in that worker's prefix cache, and nothing is transferred
twice. If that worker can't take one now, or is lost, it is routed like any other request.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace

from splitserve.core.errors import SplitserveError, first_of
from splitserve.core.request import Chunk, FinishReason, GenerateRequest, Timings, Usage
from splitserve.core.sink import Sink
from splitserve.router.journey import Journey, Surroundings, Terms
from splitserve.telemetry import traces

SetsOut = Callable[[int, Journey], None]


async def travel(request: GenerateRequest, sink: Sink, around: Surroundings, terms: Terms, sets_out: SetsOut) -> Chunk:
    """All outputs of the request; `sets_out` is told of each journey. Returns the last chunk, sent like the others.
    Raises a SplitserveError in every other ending, and then no output goes on."""
    if request.sampling.n <= 1:
        journey = Journey(request, sink, around, terms)
        sets_out(0, journey)
        last = await journey.travel()
        _note(terms, {0: last.finish_reason})
        return last
    return await _Choices(request, sink, around, terms, sets_out).travel()


class _Choices:
    """One request's journeys, and the sink of them all: one chunk at a time, usage and timings at the end."""

    def __init__(
        self, request: GenerateRequest, sink: Sink, around: Surroundings, terms: Terms, sets_out: SetsOut
    ) -> None:
        self._count = request.sampling.n
        self._terms = terms
        self._reasons: dict[int, FinishReason | None] = {}
        self._sink = sink
        self._sets_out = sets_out
        self._one_at_a_time = asyncio.Lock()
        self._first = Journey(request, self, around, terms)
        self._has_begun = asyncio.Event()
        self._finished = 0
        self._output_tokens = 0
        self._timings: Timings | None = None
        self._last: Chunk | None = None

    async def travel(self) -> Chunk:
        self._sets_out(0, self._first)
        try:
            async with asyncio.TaskGroup() as tasks:
                siblings = tasks.create_task(self._follow())
                await self._first.travel()
                await siblings
        except* SplitserveError as group:
            raise first_of(group) from group
        assert self._last is not None
        _note(self._terms, self._reasons)
        return self._last

    def put(self, chunk: Chunk) -> bool:
        return not self._one_at_a_time.locked() and self._sink.put(chunk)  # a last chunk is never put

    async def send(self, chunk: Chunk) -> None:
        async with self._one_at_a_time:
            await self._sink.send(self._counted(chunk) if chunk.finish_reason is not None else chunk)
        self._has_begun.set()

    async def _follow(self) -> None:
        await self._has_begun.wait()
        async with asyncio.TaskGroup() as tasks:
            for choice in range(1, self._count):
                journey = self._first.sibling(choice, self)
                self._sets_out(choice, journey)
                tasks.create_task(journey.travel())

    def _counted(self, chunk: Chunk) -> Chunk:
        """The last chunk of an output, which may be the last of all."""
        assert chunk.usage is not None
        self._finished += 1
        self._reasons[chunk.choice] = chunk.finish_reason
        self._output_tokens += chunk.usage.output_tokens
        if chunk.choice == 0:
            self._timings = chunk.timings
        is_last = self._finished == self._count
        usage = Usage(chunk.usage.prompt_tokens, self._output_tokens) if is_last else None
        self._last = replace(chunk, usage=usage, timings=self._timings if is_last else None)
        return self._last


def _note(terms: Terms, reasons: Mapping[int, FinishReason | None]) -> None:
    terms.span.note(traces.finish_reasons, reasons)
