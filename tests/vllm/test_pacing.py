"""Our scheduler inside real vLLM: prompts are read in what decodes' objectives leave, and nothing else changes."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from math import inf, isinf
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from benchmarks.remote_engine import Build, RemoteEngine
from splitserve.core.config import KvTransferSettings, VllmSettings
from splitserve.core.worker import Objectives
from splitserve.latency.cost import cost_of
from splitserve.routing.slack import LEAST_CHUNK, STEPS_WITHOUT
from tests.contract.engines import Listener, Run, a_decode, a_prefill, a_prompt, a_ticket, eventually, greedy, started
from tests.vllm.conftest import VOCAB_SIZE
from tests.vllm.watched import LATENCY, paced, paced_async, paced_in_processes, plain

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

CHUNK = 256
SETTINGS = VllmSettings(
    dtype="float32", max_model_len=2048, max_num_batched_tokens=CHUNK, kv_cache_gib=0.125, enable_prefix_caching=False
)
NEVER_IN_TIME = Objectives(tpot_s=1.2e-4)  # a step could keep it by what is known of steps, and none does
IN_NO_HURRY = Objectives(tpot_s=30.0)
WORDS = range(300, VOCAB_SIZE)
OURS, OUR_ASYNCHRONOUS, VLLMS = "PacedScheduler", "PacedAsyncScheduler", "Scheduler"
SCHEDULER = "vllm.v1.core.sched.scheduler.Scheduler"


@pytest.fixture(scope="module")
def pair(sensitive_model: Path, cores: tuple[int, int]) -> Iterator[tuple[Listener, Listener]]:
    """A source and a destination, both paced."""
    engines = [an_engine(sensitive_model, core, paced) for core in cores]
    with ExitStack() as stack:
        source, destination = [stack.enter_context(started(engine)) for engine in engines]
        source.engine.connect(destination.info.kv_peers)
        destination.engine.connect(source.info.kv_peers)
        yield source, destination


@pytest.fixture(scope="module")
def worker(pair: tuple[Listener, Listener]) -> Listener:
    return pair[1]


def an_engine(model: Path, core: int, build: Build, ranks: int = 1, **extra: Any) -> RemoteEngine:
    settings = SETTINGS.model_copy(update={"extra": extra, "tensor_parallel_size": ranks})
    engine = RemoteEngine(model, settings, KvTransferSettings(), uuid4().hex, core, build)
    engine.spawn()
    return engine


def a_long_decode(objectives: Objectives, seed: int = 1) -> Any:
    return replace(a_decode(a_prompt(WORDS, 20, seed), greedy(600)), objectives=objectives)


def a_read(tokens: int, priority: int) -> Any:
    return replace(a_decode(a_prompt(WORDS, tokens, priority), greedy(2)), priority=priority)


def read_beside(worker: Listener, objectives: Objectives, tokens: int) -> tuple[list[int], Run]:
    """The chunks in which a prompt is read beside a decode that has these objectives."""
    decode = worker.submit(a_long_decode(objectives)).wait_tokens(2)
    prompt = worker.submit(a_decode(a_prompt(WORDS, tokens, tokens), greedy(4))).wait()
    assert not decode.ended
    worker.engine.cancel(decode.job.job_id)
    decode.wait()
    return chunks(worker, prompt), prompt


def chunks(worker: Listener, run: Run) -> list[int]:
    """Of its prompt."""
    assert isinstance(worker.engine, RemoteEngine)
    counts = [count for step in worker.engine.ask("steps") for name, count in step.items() if named(run, name)]
    found: list[int] = []
    left = len(run.job.prompt)
    while left > 0:
        found.append(counts[len(found)])
        left -= found[-1]
    assert left == 0
    return found


def named(run: Run, name: str) -> bool:
    """vLLM adds to a request's name."""
    return name == run.job.job_id or name.startswith(f"{run.job.job_id}-")


# Chunks -------------------------------------------------------------------------------------------------------------
def test_a_prompt_is_read_in_small_chunks_beside_a_decode_that_is_late_and_ends_all_the_same(worker: Listener) -> None:
    found, prompt = read_beside(worker, NEVER_IN_TIME, 300)
    assert max(found) <= LEAST_CHUNK
    assert len(prompt.tokens) == 4


def test_a_prompt_gets_its_least_in_every_few_steps(worker: Listener) -> None:
    assert isinstance(worker.engine, RemoteEngine)
    _, prompt = read_beside(worker, NEVER_IN_TIME, 200)
    steps = worker.engine.ask("steps")
    first, *_, last = [at for at, step in enumerate(steps) if any(named(prompt, name) for name in step)]
    without = [at for at in range(first, last) if not any(named(prompt, name) for name in steps[at])]
    assert len(without) >= STEPS_WITHOUT * (200 // LEAST_CHUNK)
    assert last - first <= (STEPS_WITHOUT + 1) * (200 // LEAST_CHUNK + 1) + len(prompt.tokens)


@pytest.mark.parametrize("objectives", [Objectives(), Objectives(first_token_s=0.001), IN_NO_HURRY])
def test_a_prompt_is_read_in_whole_chunks_beside_a_decode_that_can_wait(
    worker: Listener, objectives: Objectives
) -> None:
    found, _ = read_beside(worker, objectives, 900)
    assert found[0] >= CHUNK - 1
    assert len(found) == 4


def test_a_prompt_is_read_in_whole_chunks_once_the_decode_is_over(worker: Listener) -> None:
    decode = worker.submit(a_long_decode(NEVER_IN_TIME)).wait_tokens(2)
    prompt = worker.submit(a_decode(a_prompt(WORDS, 900, 9), greedy(4)))
    worker.engine.cancel(decode.job.job_id)
    found = chunks(worker, prompt.wait())
    assert found[-2] == CHUNK


def test_a_gap_objective_bounds_every_chunk_of_a_decode_that_is_far_ahead(worker: Listener) -> None:
    found, _ = read_beside(worker, Objectives(tpot_s=30.0, itl_s=1.2e-4), 200)
    assert max(found) <= LEAST_CHUNK


# Tokens -------------------------------------------------------------------------------------------------------------
def test_tokens_are_what_they_are_without_objectives(worker: Listener) -> None:
    prompts = [a_prompt(WORDS, tokens, 40 + tokens) for tokens in (30, 200, 333, 500)]
    alone = [worker.submit(a_decode(prompt, greedy(24))).wait().tokens for prompt in prompts]
    decode = worker.submit(a_long_decode(NEVER_IN_TIME)).wait_tokens(2)
    runs = [
        worker.submit(replace(a_decode(prompt, greedy(24)), objectives=objectives))
        for prompt, objectives in zip(prompts, (NEVER_IN_TIME, IN_NO_HURRY, Objectives(), NEVER_IN_TIME), strict=True)
    ]
    assert [run.wait().tokens for run in runs] == alone
    worker.engine.cancel(decode.job.job_id)
    decode.wait()


# KV from elsewhere --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("prompts", [1, 3])
def test_pushed_kv_is_taken_up_while_prompts_are_read_slowly(pair: tuple[Listener, Listener], prompts: int) -> None:
    """On both sides a decode is late, and on one prompts came before: they are read one after the other."""
    source, destination = pair
    pushed = a_prompt(WORDS, 150, 7)
    expected = source.submit(a_decode(pushed, greedy(8))).wait().tokens
    late = [worker.submit(a_long_decode(NEVER_IN_TIME, seed)).wait_tokens(2) for seed, worker in enumerate(pair)]
    reading = [destination.submit(a_decode(a_prompt(WORDS, 500, seed), greedy(4))) for seed in range(prompts)]
    ticket, objectives = a_ticket(source, destination), Objectives(first_token_s=5.0, tpot_s=1.2e-4)
    decode = destination.submit(replace(a_decode(pushed, greedy(8), ticket), objectives=objectives))
    prefill = source.submit(replace(a_prefill(pushed, ticket), objectives=objectives))
    assert decode.wait().tokens == expected
    assert prefill.outcome.failure is None
    assert begun(destination, reading, until=decode) == reading[:1]
    assert not any(run.tokens for run in reading)
    for run, worker in zip(late, (source, destination), strict=True):
        worker.engine.cancel(run.job.job_id)
        run.wait()
    assert [len(run.wait().tokens) for run in reading] == [4] * prompts
    for worker in pair:
        eventually(lambda w=worker: at_rest(w), lambda w=worker: w.engine.load())  # type: ignore[misc]


def begun(worker: Listener, runs: Sequence[Run], until: Run) -> list[Run]:
    """Those that had a turn when this one had its first."""
    assert isinstance(worker.engine, RemoteEngine)
    steps = worker.engine.ask("steps")
    turn = next(at for at, step in enumerate(steps) if any(named(until, name) for name in step))
    return [run for run in runs if any(named(run, name) for step in steps[: turn + 1] for name in step)]


def at_rest(worker: Listener) -> bool:
    load = worker.engine.load()
    return (load.free_blocks, load.pinned_blocks) == (worker.at_rest.free_blocks, 0)


# What is told -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ends", ["by itself", "cancelled"])
def test_routers_hear_how_decodes_stand_and_that_they_are_over(worker: Listener, ends: str) -> None:
    def pace() -> Any:
        return worker.engine.load().pace

    eventually(lambda: isinf(pace().tpot_s), pace)
    loose = worker.submit(replace(a_decode(a_prompt(WORDS, 20, 3), greedy(400)), objectives=IN_NO_HURRY))
    eventually(lambda: pace().tpot_s == IN_NO_HURRY.tpot_s and 0.0 < pace().slack_s < inf, pace)
    tight = worker.submit(a_long_decode(NEVER_IN_TIME)).wait_tokens(2)
    eventually(lambda: pace().tpot_s == NEVER_IN_TIME.tpot_s and pace().slack_s < 0.0, pace)
    worker.engine.cancel(tight.job.job_id)
    if ends == "cancelled":
        worker.engine.cancel(loose.job.job_id)
    loose.wait()
    eventually(lambda: (pace().tpot_s, pace().slack_s) == (inf, inf), pace)
    assert pace().slowdown > 0.0


# Which scheduler ----------------------------------------------------------------------------------------------------
def test_an_engine_whose_steps_are_known_says_so_and_has_our_scheduler(worker: Listener) -> None:
    assert isinstance(worker.engine, RemoteEngine)
    assert worker.info.step_cost == cost_of(LATENCY)
    assert worker.engine.ask("scheduler") == OURS


def test_without_a_profile_or_with_a_users_own_scheduler_it_is_vllms(
    sensitive_model: Path, cores: tuple[int, int]
) -> None:
    engines = [
        an_engine(sensitive_model, cores[0], plain),
        an_engine(sensitive_model, cores[1], paced, scheduler_cls=SCHEDULER),
    ]
    with ExitStack() as stack:
        for engine in engines:
            worker = stack.enter_context(started(engine))
            assert worker.info.step_cost is None
            assert engine.ask("scheduler") == VLLMS
            found, _ = read_beside(worker, NEVER_IN_TIME, 600)
            assert found[0] >= CHUNK - 1
            assert isinf(worker.engine.load().pace.tpot_s)


def test_asynchronous_scheduling_and_a_queue_by_priority_are_paced_too(
    sensitive_model: Path, cores: tuple[int, int], worker: Listener
) -> None:
    engine = an_engine(sensitive_model, cores[0], paced_async, scheduling_policy="priority")
    with started(engine) as asynchronous:
        assert engine.ask("scheduler") == OUR_ASYNCHRONOUS
        found, prompt = read_beside(asynchronous, NEVER_IN_TIME, 300)
        assert max(found) <= LEAST_CHUNK
        late = asynchronous.submit(a_long_decode(NEVER_IN_TIME)).wait_tokens(2)
        reading = [asynchronous.submit(a_read(100, priority)) for priority in (0, 2, 1)]
        for run in (*reading, late):
            run.wait()
        assert begun(asynchronous, reading, until=reading[2]) == [reading[0], reading[2]]
        assert worker.submit(replace(prompt.job, job_id="the same elsewhere")).wait().tokens == prompt.tokens
        eventually(lambda: isinf(engine.load().pace.tpot_s), engine.load)


def test_where_vllm_runs_in_processes_of_its_own_our_scheduler_is_there(
    sensitive_model: Path, cores: tuple[int, int]
) -> None:
    engine = an_engine(sensitive_model, cores[0], paced_in_processes, ranks=2)
    with started(engine) as worker:
        decode = worker.submit(a_long_decode(NEVER_IN_TIME)).wait_tokens(2)
        eventually(lambda: engine.load().pace.tpot_s == NEVER_IN_TIME.tpot_s, engine.load)
        before = len(decode.tokens)
        worker.submit(a_decode(a_prompt(WORDS, 300, 5), greedy(4))).wait()
        assert len(decode.tokens) - before >= STEPS_WITHOUT * (300 // LEAST_CHUNK - 1)
        engine.cancel(decode.job.job_id)
        eventually(lambda: isinf(engine.load().pace.tpot_s), engine.load)
