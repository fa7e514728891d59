"""What is particular to the simulated engine; what every engine must do is in tests/contract."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from uuid import uuid4

import pytest

from splitserve.cli.build import DEMO_MODEL
from splitserve.core.config import KvTransferSettings, SimSettings
from splitserve.core.errors import ConfigError, EngineError
from splitserve.core.model import ModelInfo
from splitserve.core.worker import Failure, KvMode
from splitserve.engine.sim import SimEngine
from splitserve.engine.sim.shape import kv_format
from splitserve.latency.model import Step
from tests.contract.engines import Listener, a_decode, a_prefill, a_prompt, a_ticket, greedy, started

MODEL = ModelInfo.read(DEMO_MODEL)
WORDS = range(6, MODEL.vocab_size)
QUICK = SimSettings(total_blocks=64, max_model_len=512, max_num_batched_tokens=64, step_s=0, prefill_token_s=0)


def an_engine(settings: SimSettings = QUICK, mode: KvMode = KvMode.PUSH) -> SimEngine:
    return SimEngine(MODEL, settings, KvTransferSettings(mode=mode), uuid4().hex)


@pytest.fixture
def pair() -> Iterator[tuple[Listener, Listener]]:
    with ExitStack() as stack:
        yield tuple(stack.enter_context(started(an_engine())) for _ in range(2))  # type: ignore[misc]


def test_bytes_are_the_real_models_though_only_digests_move() -> None:
    kv = kv_format(MODEL, QUICK, KvMode.PUSH)
    assert kv.block_bytes == 2 * 16 * MODEL.kv_heads * MODEL.head_dim * 2
    assert (kv.dtype, kv.layers, kv.transport) == ("bfloat16", MODEL.layers, "shm")


def test_kv_moves_layer_by_layer_while_the_prompt_is_still_being_read() -> None:
    slow = QUICK.model_copy(update={"step_s": 0.02})
    with started(an_engine(slow)) as source, started(an_engine()) as destination:
        ticket, prompt = a_ticket(source, destination), a_prompt(WORDS, 200, 1)
        decode = destination.submit(a_decode(prompt, greedy(1), ticket))
        stats = source.submit(a_prefill(prompt, ticket)).outcome.transfer
        decode.wait()
    assert stats is not None
    assert 0 < stats.bytes_before_prefill_ended <= stats.bytes


def test_the_time_of_a_step_is_what_the_latency_model_says() -> None:
    asked: list[Step] = []

    class Recording:
        def step_s(self, step: Step) -> float:
            asked.append(step)
            return 0.0

    engine = SimEngine(MODEL, QUICK, KvTransferSettings(), uuid4().hex, Recording())
    with started(engine) as alone:
        alone.submit(a_decode(a_prompt(WORDS, 100, 2), greedy(3))).wait()
    chunks = [(chunk.tokens, chunk.context) for step in asked for chunk in step.prefills]
    assert chunks == [(64, 0), (36, 64)]
    assert [context for step in asked for context in step.decodes] == [101, 102]


def test_preempted_sequences_end_with_the_same_tokens() -> None:
    crowded = QUICK.model_copy(update={"total_blocks": 12, "max_model_len": 160})
    prompts = [a_prompt(WORDS, 40, seed) for seed in range(3)]
    with started(an_engine()) as roomy, started(an_engine(crowded)) as tight:
        expected = [roomy.submit(a_decode(prompt, greedy(50))) for prompt in prompts]
        runs = [tight.submit(a_decode(prompt, greedy(50))) for prompt in prompts]
        assert [run.wait().tokens for run in runs] == [run.wait().tokens for run in expected]
        tight.wait_at_rest()


def test_a_preempted_prefill_still_delivers_all_of_its_kv() -> None:
    crowded = QUICK.model_copy(update={"total_blocks": 12, "max_model_len": 160, "step_s": 0.001})
    prompts = [a_prompt(WORDS, 90 + seed, seed) for seed in range(4)]
    with started(an_engine()) as destination, started(an_engine(crowded)) as source:
        grown = [source.submit(a_decode(a_prompt(WORDS, 10, 50 + n), greedy(60))) for n in range(3)]
        runs = []
        for prompt in prompts:
            ticket = a_ticket(source, destination)
            runs.append(destination.submit(a_decode(prompt, greedy(5), ticket)))
            source.submit(a_prefill(prompt, ticket))
        outputs = [run.wait().tokens for run in runs]
        assert outputs == [destination.submit(a_decode(prompt, greedy(5))).wait().tokens for prompt in prompts]
        assert all(run.wait().outcome.failure is None for run in grown)
        source.wait_at_rest()
        destination.wait_at_rest()


@pytest.mark.parametrize("wrong", ["source", "destination"])
def test_a_ticket_for_another_worker_is_refused_at_once(pair: tuple[Listener, Listener], wrong: str) -> None:
    source, destination = pair
    ticket, prompt = a_ticket(destination, source), a_prompt(WORDS, 20, 3)
    run = (
        source.submit(a_prefill(prompt, ticket))
        if wrong == "source"
        else destination.submit(a_decode(prompt, greedy(2), ticket))
    )
    assert run.outcome.failure is Failure.TRANSFER
    assert "names worker" in run.outcome.message


def test_a_ticket_that_is_in_use_is_refused_and_a_new_epoch_is_not(pair: tuple[Listener, Listener]) -> None:
    source, destination = pair
    ticket, prompt = a_ticket(source, destination), a_prompt(WORDS, 20, 4)
    first = destination.submit(a_decode(prompt, greedy(2), ticket))
    assert destination.submit(a_decode(prompt, greedy(2), ticket)).outcome.failure is Failure.TRANSFER
    again = replace(ticket, epoch=2)
    second = destination.submit(a_decode(prompt, greedy(2), again))
    for each in (ticket, again):
        source.submit(a_prefill(prompt, each))
    assert first.wait().tokens == second.wait().tokens != ()


def test_a_pull_without_its_handover_is_refused() -> None:
    with started(an_engine(mode=KvMode.PULL)) as source, started(an_engine(mode=KvMode.PULL)) as destination:
        ticket, prompt = a_ticket(source, destination), a_prompt(WORDS, 20, 5)
        assert "handover" in destination.submit(a_decode(prompt, greedy(2), ticket)).outcome.message


def test_a_job_resumed_at_its_end_ends_without_another_token(pair: tuple[Listener, Listener]) -> None:
    alone, _ = pair
    prompt = a_prompt(WORDS, 20, 6)
    whole = alone.submit(a_decode(prompt, greedy(4))).wait()
    run = alone.submit(a_decode(prompt, greedy(4), output=whole.tokens)).wait()
    assert (run.tokens, run.text, run.outcome.failure) == ((), "", None)


def test_closing_ends_every_job(pair: tuple[Listener, Listener]) -> None:
    source, destination = pair
    parked = destination.submit(a_decode(a_prompt(WORDS, 20, 7), greedy(2), a_ticket(source, destination)))
    running = destination.submit(a_decode(a_prompt(WORDS, 20, 8), greedy(400))).wait_tokens(1)
    destination.engine.close()
    assert parked.outcome.failure is Failure.CANCELLED
    assert running.outcome.failure in (Failure.CANCELLED, None)


def test_a_broken_engine_fails_its_jobs_instead_of_leaving_them() -> None:
    class Broken:
        def step_s(self, step: Step) -> float:
            raise RuntimeError("no such profile")

    caught = threading.Event()
    previous, threading.excepthook = threading.excepthook, lambda _: caught.set()
    try:
        with started(SimEngine(MODEL, QUICK, KvTransferSettings(), uuid4().hex, Broken())) as alone:
            run = alone.submit(a_decode(a_prompt(WORDS, 20, 9), greedy(2)))
            assert (run.outcome.failure, "no such profile" in run.outcome.message) == (Failure.ENGINE, True)
            assert caught.wait(10)
            late = alone.submit(a_decode(a_prompt(WORDS, 20, 9), greedy(2)))
            assert late.outcome.failure is Failure.ENGINE
            with pytest.raises(EngineError, match="no such profile"):
                alone.engine.load()
    finally:
        threading.excepthook = previous


@pytest.mark.parametrize("length", [MODEL.max_position_embeddings + 1, 64 * 16 + 1])
def test_a_length_that_the_model_or_the_memory_cannot_hold_is_a_configuration_error(length: int) -> None:
    with pytest.raises(ConfigError, match=r"engine\.max_model_len"):
        an_engine(QUICK.model_copy(update={"max_model_len": length}))
