"""What is particular to the simulated engine; what every engine must do is in tests/contract."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from math import inf, isinf
from uuid import uuid4

import pytest

from splitserve.cli.build import DEMO_MODEL
from splitserve.core.config import KvTransferSettings, SimSettings
from splitserve.core.errors import ConfigError, EngineError
from splitserve.core.model import ModelInfo
from splitserve.core.request import FinishReason, Tool
from splitserve.core.worker import Failure, KvMode, Objectives, Parse, StepCost, Ticket
from splitserve.engine.sim import SimEngine
from splitserve.engine.sim.shape import kv_format
from splitserve.engine.sim.text import load_tokenizer
from splitserve.kv.layout import blocks_for
from splitserve.latency.linear import LinearLatency
from splitserve.latency.model import PrefillChunk, Step
from splitserve.routing.pace import PacedJobs, Pacer
from splitserve.routing.slack import LEAST_CHUNK, STEPS_WITHOUT
from tests.contract.engines import (
    Listener,
    Order,
    Orders,
    Run,
    a_decode,
    a_prefill,
    a_prompt,
    a_ticket,
    eventually,
    greedy,
    started,
)
from tests.contract.request_contract import before, calls_of, resumed_at

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
    kv = kv_format(MODEL, QUICK, KvMode.PUSH, "shm")
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

    class Recording(LinearLatency):
        def step_s(self, step: Step) -> float:
            asked.append(step)
            return 0.0

    engine = SimEngine(MODEL, QUICK, KvTransferSettings(), uuid4().hex, Recording(0.0, 0.0, 0.0))
    with started(engine) as alone:
        asked.clear()
        alone.submit(a_decode(a_prompt(WORDS, 100, 2), greedy(3))).wait()
    steps = list(dict.fromkeys(asked))
    assert steps[:2] == [Step.of([PrefillChunk(64)]), Step.of([PrefillChunk(36, context=64)])]
    assert steps[2:] == [Step.of(decodes=[101]), Step.of(decodes=[102])]


# Steps take 2 ms and 0.5 ms more for each prompt token: decodes that allow 2.4 ms never leave time for `LEAST_CHUNK`.
PACED = QUICK.model_copy(update={"step_s": 0.002, "prefill_token_s": 0.0005, "decode_token_s": 0.0})
TIGHT = Objectives(tpot_s=0.0024)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """All that engines have computed."""
    computed: list[Step] = []
    took = Pacer.took

    def noting(pacer: Pacer, step: Step, seconds: float) -> None:
        computed.append(step)
        took(pacer, step, seconds)

    monkeypatch.setattr(Pacer, "took", noting)
    return computed


def chunks_beside_a_decode(steps: list[Step], objectives: Objectives) -> list[int]:
    """Prompt tokens per step, from the first to the last of a prompt of 160 tokens."""
    with started(an_engine(PACED)) as alone:
        decode = replace(a_decode(a_prompt(WORDS, 10, 1), greedy(400)), objectives=objectives)
        alone.submit(decode).wait_tokens(1)
        before = len(steps)
        alone.submit(a_decode(a_prompt(WORDS, 160, 2), greedy(1))).wait()
        alone.engine.cancel(decode.job_id)
        alone.wait_at_rest()
        beside = [step.prompt_tokens for step in steps[before:] if step.decodes]
    read = [number for number, tokens in enumerate(beside) if tokens]
    return beside[read[0] : read[-1] + 1]


def test_a_prompt_is_read_in_full_steps_beside_a_decode_without_objectives(steps: list[Step]) -> None:
    assert chunks_beside_a_decode(steps, Objectives()) == [63, 63, 34]


def test_a_prompt_is_read_in_small_chunks_beside_a_decode_with_a_tight_objective(steps: list[Step]) -> None:
    each = [LEAST_CHUNK, *([0] * STEPS_WITHOUT)]
    assert chunks_beside_a_decode(steps, TIGHT) == [*(4 * each), LEAST_CHUNK]


def test_an_engine_tells_how_its_decodes_stand() -> None:
    with started(an_engine(PACED)) as alone:
        tight = replace(a_decode(a_prompt(WORDS, 10, 1), greedy(400)), objectives=TIGHT)
        alone.submit(tight).wait_tokens(2)
        alone.submit(a_decode(a_prompt(WORDS, 10, 2), greedy(1))).wait()
        pace = alone.engine.load().pace
        assert (pace.tpot_s, isinf(pace.slack_s)) == (TIGHT.tpot_s, False)
        alone.engine.cancel(tight.job_id)
        alone.wait_at_rest()
        pace = alone.engine.load().pace
        assert (pace.tpot_s, pace.slack_s) == (inf, inf)
        assert pace.slowdown > 1.0, "this engine's own work comes on top"


def test_a_worker_says_what_its_steps_cost() -> None:
    cost = StepCost(0.002, 0.0, 0.0005, inf, 0.0, 0.0, 0.0, 0.0, inf, 0.0, 0.0, stages=1)
    with started(an_engine(PACED)) as alone:
        assert alone.info.step_cost == cost


def test_the_lengths_of_whole_outputs_count_and_no_others(
    pair: tuple[Listener, Listener], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, destination = pair
    lengths: list[int] = []
    end = PacedJobs.end

    def noting(jobs: PacedJobs, job_id: str, output_tokens: int = 0) -> None:
        lengths.append(output_tokens)
        end(jobs, job_id, output_tokens)

    monkeypatch.setattr(PacedJobs, "end", noting)
    ticket, prompt = a_ticket(source, destination), a_prompt(WORDS, 40, 3)
    decode = destination.submit(a_decode(prompt, greedy(5), ticket))
    source.submit(a_prefill(prompt, ticket)).wait()
    whole = decode.wait()
    assert sorted(lengths) == [0, 5]
    destination.submit(a_decode(prompt, greedy(5), output=whole.tokens[:2])).wait()
    assert lengths[2:] == [5], "with those that it came with"
    cancelled = destination.submit(a_decode(prompt, greedy(400))).wait_tokens(1)
    destination.engine.cancel(cancelled.job.job_id)
    assert cancelled.outcome.failure is Failure.CANCELLED
    destination.wait_at_rest()
    assert lengths[3:] == [0]


def test_preempted_sequences_end_with_the_same_tokens() -> None:
    crowded = QUICK.model_copy(update={"total_blocks": 12, "max_model_len": 160})
    prompts = [a_prompt(WORDS, 40, seed) for seed in range(3)]
    with started(an_engine()) as roomy, started(an_engine(crowded)) as tight:
        expected = [roomy.submit(a_decode(prompt, greedy(50))) for prompt in prompts]
        runs = [tight.submit(a_decode(prompt, greedy(50))) for prompt in prompts]
        assert [run.wait().tokens for run in runs] == [run.wait().tokens for run in expected]
        tight.wait_at_rest()
        assert tight.engine.load().preemptions > roomy.engine.load().preemptions == 0


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


def offers(engine: Listener, tickets: dict[int, Ticket], at_end: bool = False) -> Orders:
    """To offer a decode's KV under each ticket once it has made so many tokens."""

    def offer(ticket: Ticket) -> Order:
        return lambda run: engine.engine.hand_over(run.job.job_id, ticket, at_end=at_end)

    return {after: offer(ticket) for after, ticket in tickets.items()}


def test_kv_that_was_handed_over_stays_as_it_is_whatever_else_runs() -> None:
    tight = QUICK.model_copy(update={"total_blocks": 10, "max_model_len": 160})
    with started(an_engine(tight)) as source, started(an_engine()) as destination:
        ticket, prompt = a_ticket(source, destination), a_prompt(WORDS, 60, 20)
        run = source.submit(a_decode(prompt, greedy(40)), offers(source, {2: ticket}, at_end=True)).wait()
        pinned = blocks_for(60 + len(run.tokens) - 1, 16)
        assert (run.outcome.failure, source.engine.load().pinned_blocks) == (Failure.MIGRATED, pinned)
        for seed in range(4):
            filling = source.submit(a_decode(a_prompt(WORDS, 50, 21 + seed), greedy(30))).wait()
            assert filling.outcome.failure is None
        assert source.engine.load().free_blocks == 10 - pinned
        rest = destination.submit(a_decode(prompt, greedy(40), ticket, run.tokens)).wait()
        assert run.tokens + rest.tokens == destination.submit(a_decode(prompt, greedy(40))).wait().tokens
        source.wait_at_rest()


def test_blocks_that_were_offered_twice_are_pinned_once_and_until_both_are_taken(
    pair: tuple[Listener, Listener],
) -> None:
    source, destination = pair
    first, second = a_ticket(source, destination), a_ticket(source, destination)
    prompt = a_prompt(WORDS, 60, 25)
    run = source.submit(a_decode(prompt, greedy(20)), offers(source, {2: first, 3: second})).wait()
    pinned = blocks_for(60 + 20 - 1, 16)
    for ticket in (first, second):
        assert source.engine.load().pinned_blocks == pinned
        taken = destination.submit(a_decode(prompt, greedy(20), ticket, run.tokens[:2])).wait()
        assert run.tokens[:2] + taken.tokens == run.tokens
    source.wait_at_rest()


def test_an_offer_is_of_what_was_computed_when_it_was_made(pair: tuple[Listener, Listener]) -> None:
    source, destination = pair
    ticket, prompt = a_ticket(source, destination), a_prompt(WORDS, 60, 27)
    run = source.submit(a_decode(prompt, greedy(20)), offers(source, {2: ticket})).wait()
    ahead = destination.submit(a_decode(prompt, greedy(20), ticket, run.tokens[:3]))
    assert ahead.outcome.failure is Failure.TRANSFER
    assert "62 tokens" in ahead.outcome.message


def test_a_running_decodes_blocks_are_its_own_though_they_are_offered(pair: tuple[Listener, Listener]) -> None:
    source, destination = pair
    job = a_decode(a_prompt(WORDS, 60, 26), greedy(400))
    source.submit(job, offers(source, {2: a_ticket(source, destination)})).wait_tokens(4)
    assert source.engine.load().pinned_blocks == 0
    source.engine.cancel(job.job_id)
    eventually(lambda: source.engine.load().pinned_blocks > 0, source.engine.load)


def test_an_offer_of_a_decode_that_is_preempted_fails_and_the_decode_does_not() -> None:
    crowded = QUICK.model_copy(update={"total_blocks": 12, "max_model_len": 160})
    prompts = [a_prompt(WORDS, 40, 30 + seed) for seed in range(3)]
    with started(an_engine()) as destination, started(an_engine(crowded)) as source:
        ticket = a_ticket(source, destination)
        runs = [source.submit(a_decode(prompt, greedy(50))) for prompt in prompts[:2]]
        runs.append(source.submit(a_decode(prompts[2], greedy(50)), offers(source, {2: ticket})))
        expected = [destination.submit(a_decode(prompt, greedy(50))) for prompt in prompts]
        assert [run.wait().tokens for run in runs] == [run.wait().tokens for run in expected]
        source.wait_at_rest()
        late = destination.submit(a_decode(prompts[2], greedy(50), ticket, runs[2].tokens[:2]))
        assert late.outcome.failure is Failure.TRANSFER
        assert "aborted" in late.outcome.message


@pytest.mark.parametrize("mode", list(KvMode))
def test_an_order_that_cannot_be_carried_out_leaves_the_decode_as_it_is(mode: KvMode) -> None:
    with started(an_engine(mode=mode)) as source, started(an_engine(mode=mode)) as destination:
        ours, theirs = a_ticket(source, destination), a_ticket(destination, source)
        unusable = {2: ours, 3: theirs} if mode is KvMode.PULL else {3: theirs}
        run = source.submit(a_decode(a_prompt(WORDS, 20, 40), greedy(30)), offers(source, unusable, at_end=True))
        assert (len(run.wait().tokens), run.outcome.failure) == (30, None)
        source.wait_at_rest()


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
    class Broken(LinearLatency):
        def step_s(self, step: Step) -> float:
            if step.prompt_tokens == 20:
                raise RuntimeError("no such profile")
            return 0.0

    caught = threading.Event()
    previous, threading.excepthook = threading.excepthook, lambda _: caught.set()
    try:
        with started(SimEngine(MODEL, QUICK, KvTransferSettings(), uuid4().hex, Broken(0.0, 0.0, 0.0))) as alone:
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


def test_reasoning_and_a_call_go_on_after_a_break() -> None:
    settings = QUICK.model_copy(update={"tool_parser": "sim", "reasoning_parser": "sim"})
    prompt = load_tokenizer(MODEL).encode("Ask weather(", add_special_tokens=False).ids
    job = replace(a_decode(prompt, greedy(200, ignore_eos=False)), parse=Parse((Tool("weather"),)))

    def told(*runs: Run) -> tuple[str, str, list[tuple[str, str]]]:
        reasoning = "".join(delta.reasoning for run in runs for delta in run.deltas)
        return reasoning, "".join(run.text for run in runs), calls_of(*runs)

    with started(an_engine(settings)) as alone:
        whole = alone.submit(job).wait()
        assert told(whole) == ("It has to be said.", "", [("weather", "{}")])
        assert whole.outcome.finish_reason is FinishReason.TOOL_CALLS
        for sent in range(1, len(whole.tokens)):
            rest = resumed_at(alone, whole, sent)
            assert told(before(whole, sent), rest) == told(whole), f"resumed after {sent}"
            assert rest.outcome.finish_reason is FinishReason.TOOL_CALLS


def test_an_engine_that_turns_says_when_it_last_did() -> None:
    engine = an_engine()
    with started(engine) as listener:
        listener.submit(a_decode(a_prompt(WORDS, 20, 1), greedy(4))).wait()
        before = listener.engine.load().turned_at
        assert before is not None
        listener.submit(a_decode(a_prompt(WORDS, 20, 2), greedy(4))).wait()
        after = listener.engine.load().turned_at
        assert after is not None
        assert after > before
