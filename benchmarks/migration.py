"""Measures what a move costs a running request: how long its stream stands still between two workers, and what a drain
does to all streams of a worker.

    python -m benchmarks.migration [--engine vllm] [--moves 300] [--json]

Starts a router and decode workers, as `splitserve up` does, and keeps so many streams decoding. Then it moves one
running request after another from worker to worker, each with prompt and output of its own, and drains a worker at the
end. Afterwards every request is sent again and left alone: its tokens must be the same, and their pace says what a
decode step takes.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from splitserve.cli.cluster import running
from splitserve.cli.supervisor import Ended, Event, Ready
from splitserve.client import AsyncClient
from splitserve.core.config import ClusterConfig
from splitserve.core.errors import InvalidRequest, SplitserveError, Unavailable
from splitserve.core.request import SamplingParams

VOCABULARY = range(300, 2000)  # ordinary tokens of the demonstration model
LIMIT_S = 1800.0
DRAIN_S = 60.0
STOP_S = 10.0
LEAST_TOKENS_LEFT = 30  # a request that ends on the way does not move
PROGRESS_EVERY = 50  # moves
MOST_REFUSALS = 100  # more than moves


@dataclass(frozen=True)
class Shape:
    """What every request looks like, and how many run at a time."""

    streams: int
    prompt_tokens: int
    output_tokens: int

    @property
    def sampling(self) -> SamplingParams:
        return SamplingParams(max_tokens=self.output_tokens, temperature=0.0, ignore_eos=True)


@dataclass
class Stream:
    """One request and what came of it. `at_s`: when each chunk came."""

    name: str
    prompt: tuple[int, ...]
    tokens: list[int] = field(default_factory=list)
    at_s: list[float] = field(default_factory=list)
    resumed: bool = False

    @property
    def step_s(self) -> float:
        """A decode step, on average: a busy client hears of several steps at once, so single gaps do not say."""
        return (self.at_s[-1] - self.at_s[0]) / (len(self.tokens) - 1)

    def gaps_s(self, since_s: float = 0.0) -> list[float]:
        """Between its chunks, those that ended before then aside."""
        return [later - earlier for earlier, later in pairwise(self.at_s) if later > since_s]


@dataclass(frozen=True)
class Moves:
    """Of a run of moves one after another."""

    stalls_s: list[float]
    refusals: Counter[str]


@dataclass(frozen=True)
class Drain:
    """Of one worker, drained while it decoded. `worst_gap_s`: the longest that any stream stood still from then on."""

    moved: int
    finished: int
    took_s: float
    worst_gap_s: float


class Traffic:
    """Requests under way: `running` by name."""

    def __init__(self, client: AsyncClient, shape: Shape) -> None:
        self._client = client
        self._shape = shape
        self.running: dict[str, Stream] = {}
        self._progress = asyncio.Event()

    async def serve(self, streams: Iterable[Stream]) -> list[Stream]:
        """So many at a time, until there are no more."""
        coming, ended = iter(streams), list[Stream]()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(self._shape.streams):
                tasks.create_task(self._follow_each(coming, ended))
        return ended

    async def all_decode(self, count: int) -> None:
        """Until so many have a few tokens."""
        while sum(len(stream.tokens) > 2 for stream in self.running.values()) < count:
            await self.progress()

    async def progress(self) -> None:
        """Until the next token of any."""
        self._progress.clear()
        await self._progress.wait()

    def movable(self) -> list[Stream]:
        most = self._shape.output_tokens - LEAST_TOKENS_LEFT
        return [stream for stream in self.running.values() if 0 < len(stream.tokens) < most]

    async def _follow_each(self, coming: Iterator[Stream], ended: list[Stream]) -> None:
        for stream in coming:
            self.running[stream.name] = stream
            await self._follow(stream)
            del self.running[stream.name]
            ended.append(stream)

    async def _follow(self, stream: Stream) -> None:
        async for chunk in self._client.generate(stream.prompt, self._shape.sampling, request_id=stream.name):
            stream.tokens.extend(chunk.token_ids)
            if chunk.token_ids:
                stream.at_s.append(time.monotonic())
                self._progress.set()
        assert chunk.timings is not None
        stream.resumed = chunk.timings.attempts > 1


class Fresh:
    """An endless row of requests that nobody has sent before, until it is closed."""

    def __init__(self, shape: Shape, name: str) -> None:
        self._shape = shape
        self._name = name
        self._count = 0
        self._closed = False

    def __iter__(self) -> Iterator[Stream]:
        return self

    def __next__(self) -> Stream:
        if self._closed:
            raise StopIteration
        self._count += 1
        name = f"{self._name}-{self._count}"
        return Stream(name, tuple(random.Random(name).choices(VOCABULARY, k=self._shape.prompt_tokens)))

    @contextmanager
    def while_open(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._closed = True


def main() -> None:
    arguments = _arguments()
    shape = Shape(arguments.streams, arguments.prompt_tokens, arguments.output_tokens)
    with tempfile.TemporaryDirectory(prefix="splitserve-") as directory:
        try:
            result = asyncio.run(_measure(_cluster(arguments), shape, arguments.moves, Path(directory)))
        except SplitserveError as error:
            raise SystemExit(str(error)) from error
    facts = {"engine": arguments.engine, **vars(shape), **result}
    print(json.dumps(facts) if arguments.json else _table(facts))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=["sim", "vllm"], default="sim")
    parser.add_argument("--moves", type=int, default=300)
    parser.add_argument("--streams", type=int, default=8, help="requests at a time")
    parser.add_argument("--prompt-tokens", type=int, default=500)
    parser.add_argument("--output-tokens", type=int, default=400)
    parser.add_argument("--step-ms", type=float, default=20.0, help="sim: what a decode step takes")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return parser.parse_args()


def _cluster(arguments: argparse.Namespace) -> ClusterConfig:
    engine: dict[str, Any] = {"kind": arguments.engine}
    if arguments.engine == "sim":
        engine |= {"step_s": arguments.step_ms / 1000, "decode_token_s": 0.0}
    settings = {
        "engine": engine,
        "router": {"listen": "127.0.0.1:0", "metrics": None},
        "worker_metrics_port": None,
        "pools": {"prefill": {"workers": 0}, "decode": {"workers": 2}},
    }
    return ClusterConfig.model_validate(settings)


async def _measure(cluster: ClusterConfig, shape: Shape, moves: int, directory: Path) -> dict[str, object]:
    async with (
        asyncio.timeout(LIMIT_S),
        running(cluster, "options", directory, _tell, STOP_S) as up,
        AsyncClient(up.address) as client,
    ):
        traffic = Traffic(client, shape)
        moved, streams = await _move(client, traffic, shape, moves)
        _say(f"{len(streams)} requests were moved {moves} times; now they run undisturbed")
        alone = await traffic.serve(Stream(f"{stream.name}-alone", stream.prompt) for stream in streams)
        _say("draining a worker")
        drained, left = await _drain(client, traffic, shape)
        again = await traffic.serve(Stream(f"{stream.name}-alone", stream.prompt) for stream in left)
        return _facts(moved, drained, [*streams, *left], [*alone, *again])


async def _move(client: AsyncClient, traffic: Traffic, shape: Shape, count: int) -> tuple[Moves, list[Stream]]:
    """Moves any of the running requests, one after another."""
    moves, coming = Moves([], Counter()), Fresh(shape, "moved")
    serving = asyncio.create_task(traffic.serve(coming))
    chance = random.Random(0)
    with coming.while_open():
        while len(moves.stalls_s) < count:
            movable = traffic.movable()
            if not movable:
                await traffic.progress()
                continue
            if not await _move_one(client, chance.choice(movable), moves):
                await traffic.progress()
            elif len(moves.stalls_s) % PROGRESS_EVERY == 0:
                _say(f"{len(moves.stalls_s)} of {count} moves")
    return moves, await serving


async def _move_one(client: AsyncClient, stream: Stream, moves: Moves) -> bool:
    """Whether it has moved. Raises Unavailable if hardly anything does."""
    try:
        moved = await client.migrate(stream.name)
    except (Unavailable, InvalidRequest) as refusal:  # the latter: it has just ended
        moves.refusals[str(refusal).replace(stream.name, "it")] += 1
        if moves.refusals.total() > MOST_REFUSALS + len(moves.stalls_s):
            raise Unavailable(f"{len(moves.stalls_s)} moved and {moves.refusals} did not") from refusal
        return False
    moves.stalls_s.append(moved.stall_s)
    return True


async def _drain(client: AsyncClient, traffic: Traffic, shape: Shape) -> tuple[Drain, list[Stream]]:
    """Drains a worker while every stream decodes."""
    coming = Fresh(shape, "drained")
    streams = [next(coming) for _ in range(shape.streams)]
    serving = asyncio.create_task(traffic.serve(streams))
    await traffic.all_decode(len(streams))
    started = time.monotonic()
    drained = await client.drain("decode-0", DRAIN_S)
    took_s = time.monotonic() - started
    served = await serving
    worst_s = max(gap for stream in served for gap in stream.gaps_s(since_s=started))
    return Drain(drained.migrated_requests, drained.finished_requests, took_s, worst_s), served


def _facts(moved: Moves, drained: Drain, streams: Sequence[Stream], alone: Sequence[Stream]) -> dict[str, object]:
    undisturbed = {stream.name: stream.tokens for stream in alone}
    differing = sum(stream.tokens != undisturbed[f"{stream.name}-alone"] for stream in streams)
    step_s = statistics.median(stream.step_s for stream in alone)
    median_s, p99_s = statistics.median(moved.stalls_s), _p99(moved.stalls_s)
    return {
        "moves": len(moved.stalls_s),
        "refused": dict(moved.refusals),
        "step_ms_median": _ms(step_s),
        "undisturbed_gap_ms_p99": _ms(_p99([gap for stream in alone for gap in stream.gaps_s()])),
        "stall_ms_median": _ms(median_s),
        "stall_ms_p99": _ms(p99_s),
        "stall_ms_max": _ms(max(moved.stalls_s)),
        "stall_steps_median": round(median_s / step_s, 1),
        "stall_steps_p99": round(p99_s / step_s, 1),
        "drain_moved": drained.moved,
        "drain_finished": drained.finished,
        "drain_s": round(drained.took_s, 2),
        "drain_worst_gap_ms": _ms(drained.worst_gap_s),
        "drain_worst_gap_steps": round(drained.worst_gap_s / step_s, 1),
        "requests": len(streams),
        "resumed": sum(stream.resumed for stream in streams),
        "differing": differing,
    }


def _p99(values: Sequence[float]) -> float:
    return sorted(values)[int(0.99 * len(values))]


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 1)


def _tell(event: Event) -> None:
    if isinstance(event, Ready):
        _say(f"{event.name} is ready")
    elif isinstance(event, Ended) and event.restart_in_s is not None:
        _say(f"{event.name} died: {event.how}")


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr)


def _table(facts: dict[str, object]) -> str:
    width = max(map(len, facts))
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in facts.items())


if __name__ == "__main__":
    main()
