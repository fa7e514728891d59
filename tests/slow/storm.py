"""A storm: random requests while random faults meet the workers, all drawn from one seed.

What happens is drawn in advance (`Storm.drawn`); when it happens is seconds after the round's start, and how far the
requests have come by then is the machine's affair. So a seed names a schedule, not an interleaving, and `check` says
what holds whatever the interleaving was. The pauses here are part of the schedule: nothing is concluded from them.
"""

import asyncio
import random
import signal
from collections.abc import Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from enum import StrEnum

from splitserve.client import AsyncClient
from splitserve.core.errors import DeadlineExceeded, SplitserveError, Unavailable, UnknownWorker
from splitserve.core.request import Chunk, FinishReason, SamplingParams
from splitserve.core.worker import Pool
from splitserve.worker.serve import DRAINED, QUARANTINED
from tests.cluster.asking import prompt_of, settled
from tests.cluster.processes import Cluster, Process

# What a client may be told when workers fail. EngineError is not among them: no engine broke.
ALLOWED = (Unavailable, DeadlineExceeded)
GRACE_S = 15.0  # beyond its deadline, before a request counts as hung; the machine is busy
HANGS_UP = 0.15  # share of requests whose client goes away after some tokens, and as many after some time
IN_A_HURRY = 0.2  # share of requests with a short deadline
SHORT_DEADLINE_S = 2.0
DRAIN_WITHIN_S = 20.0


class Kind(StrEnum):
    KILL = "kill"
    STOP = "stop"  # and go on after a while
    STOP_AND_KILL = "stop and kill"
    MOVE = "move"  # to the other pool
    DRAIN = "drain"


@dataclass(frozen=True, slots=True)
class Fault:
    """`after_s`: since the worker's fault before, or the round's start. `lasts_s`: how long a stopped one stays so."""

    kind: Kind
    worker: str
    after_s: float
    lasts_s: float


@dataclass(frozen=True, slots=True)
class Wish:
    """A request, when it is sent, and when its client hangs up, if it does: after so many tokens or seconds."""

    prompt: tuple[int, ...]
    sampling: SamplingParams
    at_s: float
    deadline_s: float
    patience_s: float
    tokens_enough: int | None
    hang_up_s: float | None

    @property
    def may_hang_up(self) -> bool:
        return self.tokens_enough is not None or self.hang_up_s is not None


@dataclass(frozen=True, slots=True)
class Weather:
    """The ranges that a storm is drawn from. `sampling` is given the number of tokens to make."""

    requests: int
    longest_prompt: int
    longest_output: int
    round_s: float
    stop_s: tuple[float, float]
    faults_per_worker: tuple[int, int]
    deadline_s: float
    patience_s: tuple[float, float]
    sampling: Callable[[random.Random, int], SamplingParams]


@dataclass(frozen=True, slots=True)
class Storm:
    seed: int
    wishes: tuple[Wish, ...]
    faults: tuple[Fault, ...]

    @classmethod
    def drawn(cls, seed: int, weather: Weather, workers: Sequence[str]) -> "Storm":
        rng = random.Random(seed)
        wishes = tuple(_wish(rng, weather) for _ in range(weather.requests))
        struck = [name for name in workers for _ in range(rng.randint(*weather.faults_per_worker))]
        return cls(seed, wishes, tuple(_fault(rng, weather, name) for name in struck))

    def __str__(self) -> str:
        return f"storm {self.seed}: " + "; ".join(
            f"{fault.kind} {fault.worker} after {fault.after_s:.2f} s for {fault.lasts_s:.2f} s"
            for fault in self.faults
        )


def _wish(rng: random.Random, weather: Weather) -> Wish:
    output = rng.randint(1, weather.longest_output)
    return Wish(
        prompt=prompt_of(round(weather.longest_prompt ** rng.random()), seed=rng.randrange(2**32)),
        sampling=weather.sampling(rng, output),
        at_s=rng.uniform(0, weather.round_s),
        deadline_s=SHORT_DEADLINE_S if rng.random() < IN_A_HURRY else weather.deadline_s,
        patience_s=rng.uniform(*weather.patience_s),
        tokens_enough=rng.randint(1, output) if rng.random() < HANGS_UP else None,
        hang_up_s=rng.uniform(0, weather.round_s) if rng.random() < HANGS_UP else None,
    )


def _fault(rng: random.Random, weather: Weather, worker: str) -> Fault:
    return Fault(rng.choice(list(Kind)), worker, rng.uniform(0, weather.round_s), rng.uniform(*weather.stop_s))


# What came of a request ----------------------------------------------------------------------------------------------
@dataclass(slots=True)
class Ending:
    """What the client had when its request ended. With neither `last`, the last chunk of a complete answer, nor `error`
    it has hung up."""

    wish: Wish
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    last: Chunk | None = None
    error: SplitserveError | None = None

    @property
    def complete(self) -> bool:
        return self.last is not None

    @property
    def retried(self) -> bool:
        return self.last is not None and self.last.timings is not None and self.last.timings.attempts > 1

    def take(self, chunk: Chunk) -> None:
        assert not self.complete, "a chunk after the last"
        assert chunk.index == len(self.token_ids), "a token came twice or was left out"
        self.token_ids += chunk.token_ids
        self.text += chunk.text
        if chunk.finish_reason is not None:
            self.last = chunk


@dataclass(frozen=True, slots=True)
class Truth:
    """The whole answer of one colocated engine; `text` is None where the oracle writes none."""

    token_ids: tuple[int, ...]
    text: str | None
    finish_reason: FinishReason


def check(ending: Ending, truth: Truth) -> None:
    """Complete and exact, or a piece of the truth and a named reason why it is no more."""
    assert tuple(ending.token_ids) == truth.token_ids[: len(ending.token_ids)]
    assert truth.text is None or truth.text.startswith(ending.text)
    if ending.last is not None:
        assert len(ending.token_ids) == len(truth.token_ids)
        assert truth.text in (None, ending.text)
        assert ending.last.finish_reason is truth.finish_reason
        assert ending.last.usage is not None
        assert ending.last.usage.output_tokens == len(ending.token_ids)
    elif ending.error is not None:
        assert isinstance(ending.error, ALLOWED), repr(ending.error)
        assert str(ending.error), "an error without a sentence"
    else:
        assert ending.wish.may_hang_up, "a stream that ended without its last chunk"


# A round -------------------------------------------------------------------------------------------------------------
async def ride_out(storm: Storm, client: AsyncClient, cluster: Cluster) -> list[Ending]:
    """Sends all requests while all faults happen, puts the workers right, and waits until nothing is left of it all."""
    async with asyncio.TaskGroup() as tasks:
        endings = [tasks.create_task(_ask(client, wish)) for wish in storm.wishes]
        for name in dict.fromkeys(fault.worker for fault in storm.faults):
            tasks.create_task(_trouble(client, cluster, [fault for fault in storm.faults if fault.worker == name]))
    await _put_right(client, cluster)
    return [ending.result() for ending in endings]


async def _ask(client: AsyncClient, wish: Wish) -> Ending:
    ending = Ending(wish)
    await asyncio.sleep(wish.at_s)
    try:
        async with asyncio.timeout(wish.deadline_s + GRACE_S):
            with suppress(TimeoutError):
                async with asyncio.timeout(wish.hang_up_s):
                    await _hear(client, ending)
    except SplitserveError as error:
        ending.error = error
    except TimeoutError:
        raise AssertionError(f"hung past its deadline of {wish.deadline_s:g} s: {ending}") from None
    return ending


async def _hear(client: AsyncClient, ending: Ending) -> None:
    wish = ending.wish
    deadlines = {"deadline_s": wish.deadline_s, "inter_token_deadline_s": wish.patience_s}
    async with aclosing(client.generate(wish.prompt, wish.sampling, **deadlines)) as chunks:  # type: ignore[arg-type]
        async for chunk in chunks:
            ending.take(chunk)
            if wish.tokens_enough is not None and len(ending.token_ids) >= wish.tokens_enough:
                return


async def _trouble(client: AsyncClient, cluster: Cluster, faults: Sequence[Fault]) -> None:
    """One worker's faults, one after the other."""
    for fault in faults:
        await asyncio.sleep(fault.after_s)
        await _strike(client, cluster, fault)


async def _strike(client: AsyncClient, cluster: Cluster, fault: Fault) -> None:
    process = cluster.workers[fault.worker]
    match fault.kind:
        case Kind.KILL:
            await _replace(cluster, fault.worker)
        case Kind.STOP:
            await _stop(process, fault.lasts_s)
            process.signal(signal.SIGCONT)
        case Kind.STOP_AND_KILL:
            await _stop(process, fault.lasts_s)
            await _replace(cluster, fault.worker)
        case Kind.MOVE:
            with suppress(UnknownWorker):
                await client.set_pool(fault.worker, Pool.DECODE if home(fault.worker) is Pool.PREFILL else Pool.PREFILL)
        case Kind.DRAIN:
            with suppress(UnknownWorker):
                await client.drain(fault.worker, DRAIN_WITHIN_S)
                await _restart(cluster, fault.worker)


async def _stop(process: Process, lasts_s: float) -> None:
    process.signal(signal.SIGSTOP)
    await asyncio.sleep(lasts_s)


async def _replace(cluster: Cluster, name: str) -> None:
    cluster.kill(name)
    await asyncio.to_thread(cluster.restart(name).ready)


async def _restart(cluster: Cluster, name: str) -> None:
    """A worker that ends by itself: only when it was asked to, or to get rid of a quarantine."""
    process = cluster.workers[name]
    code = await asyncio.to_thread(process.ended)
    assert code in (DRAINED, QUARANTINED), f"{name} ended with {code}:\n{process.log.read_text()}"
    await asyncio.to_thread(cluster.restart(name).ready)


async def _put_right(client: AsyncClient, cluster: Cluster) -> None:
    for name, process in list(cluster.workers.items()):
        if process.exited:
            await _restart(cluster, name)
    await settled(client, len(cluster.workers))
    for name in cluster.workers:
        await client.set_pool(name, home(name))


def home(worker: str) -> Pool:
    return Pool(worker.rpartition("-")[0])
