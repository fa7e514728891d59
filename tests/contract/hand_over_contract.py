"""What every `Engine` must do when a running decode is handed over to another; part of the engine contract."""

from dataclasses import replace

import pytest

from splitserve.core.request import FinishReason, SamplingParams, StructuredOutput
from splitserve.core.worker import Failure, KvMode, Ticket
from tests.contract.engines import (
    Bench,
    Listener,
    Orders,
    Run,
    a_decode,
    a_prefill,
    a_prompt,
    a_ticket,
    greedy,
    served_alone,
)

TAIL = 12  # tokens that are made elsewhere
MOST_TRIES = 100
ENDLESS = greedy(0, max_tokens=None)
SEEDED = SamplingParams(temperature=0.8, top_p=0.95, top_k=40, seed=7, presence_penalty=-1.5, ignore_eos=True)


def order(engine: Listener, ticket: Ticket, after: int, at_end: bool = True) -> Orders:
    """To hand a decode over once it has made so many tokens."""
    return {after: lambda run: engine.engine.hand_over(run.job.job_id, ticket, at_end=at_end)}


def left(
    here: Listener, ticket: Ticket, prompt: tuple[int, ...], after: int = 2, sampling: SamplingParams = ENDLESS
) -> Run:
    """A decode that was stopped and handed over under this ticket."""
    run = here.submit(a_decode(prompt, sampling), order(here, ticket, after)).wait()
    assert run.outcome.failure is Failure.MIGRATED
    assert len(run.tokens) >= after
    return run


def goes_on(there: Listener, ticket: Ticket, run: Run, sampling: SamplingParams = ENDLESS) -> Run:
    bounded = replace(sampling, max_tokens=len(run.tokens) + TAIL)
    return there.submit(a_decode(run.job.prompt, bounded, ticket, run.tokens))


def uninterrupted(bench: Bench, run: Run, sampling: SamplingParams = ENDLESS) -> Run:
    return served_alone(bench, run.job.prompt, replace(sampling, max_tokens=len(run.tokens) + TAIL))


class HandOverContract:
    @pytest.fixture
    def pushing(self, bench: Bench) -> Bench:
        if bench.source.info.kv.mode is KvMode.PULL:
            pytest.skip("the stock connector can't hand a running decode over")
        return bench

    # Exactness -------------------------------------------------------------------------------------------------------
    def test_a_decode_goes_on_elsewhere_wherever_in_a_block_it_stopped(self, pushing: Bench) -> None:
        """Which token it stops at is the engine's affair: prompts are varied until all edges of a block were met."""
        block = pushing.source.info.kv.block_size
        wanted, prompt_tokens = {0, 1, block - 1}, 2 * block
        for seed in range(MOST_TRIES):
            ticket = a_ticket(pushing.source, pushing.destination)
            run = left(pushing.source, ticket, a_prompt(pushing.vocabulary, prompt_tokens, 200 + seed))
            assert pushing.source.engine.load().pinned_blocks > 0
            rest, whole = goes_on(pushing.destination, ticket, run).wait(), uninterrupted(pushing, run)
            assert rest.deltas[0].index == len(run.tokens)
            assert (run.tokens + rest.tokens, run.text + rest.text) == (whole.tokens, whole.text)
            moved = prompt_tokens + len(run.tokens) - 1
            wanted.discard(moved % block)
            if not wanted:
                return
            prompt_tokens = 2 * block + (prompt_tokens + min(wanted) - moved) % block
        pytest.fail(f"no decode stopped with {wanted} tokens in its last block")

    def test_damaged_kv_of_a_handed_over_decode_gives_other_tokens(self, pushing: Bench) -> None:
        ticket = a_ticket(pushing.source, pushing.destination)
        prompt = a_prompt(pushing.vocabulary, 3 * pushing.source.info.kv.block_size, 300)
        with pushing.corrupting():
            run = left(pushing.source, ticket, prompt)
            rest = goes_on(pushing.destination, ticket, run).wait()
        assert rest.outcome.failure is None
        assert run.tokens + rest.tokens != uninterrupted(pushing, run).tokens

    def test_a_handed_over_sampler_goes_on_too(self, pushing: Bench) -> None:
        ticket = a_ticket(pushing.source, pushing.destination)
        run = left(pushing.source, ticket, a_prompt(pushing.vocabulary, 30, 301), after=5, sampling=SEEDED)
        rest = goes_on(pushing.destination, ticket, run, SEEDED).wait()
        assert run.tokens + rest.tokens == uninterrupted(pushing, run, SEEDED).tokens

    def test_a_decode_may_go_there_and_back(self, pushing: Bench) -> None:
        here, there = pushing.source, pushing.destination
        prompt, away, back = a_prompt(pushing.vocabulary, 30, 302), a_ticket(here, there), a_ticket(there, here)
        first = left(here, away, prompt).tokens
        second = there.submit(a_decode(prompt, ENDLESS, away, first), order(there, back, 2)).wait().tokens
        tokens = first + second
        third = here.submit(a_decode(prompt, greedy(len(tokens) + TAIL), back, tokens)).wait().tokens
        assert tokens + third == served_alone(pushing, prompt, greedy(len(tokens) + TAIL)).tokens

    def test_what_is_copied_of_a_decode_that_goes_on_is_right_and_so_is_what_goes_on(self, pushing: Bench) -> None:
        """A copy is claimed by a decode of its first tokens; once it is there the rest moves."""
        here, there = pushing.source, pushing.destination
        copy, rest = a_ticket(here, there), a_ticket(here, there)
        prompt = a_prompt(pushing.vocabulary, 2 * here.info.kv.block_size + 3, 303)
        copies: list[Run] = []

        def stop(_: Run) -> None:
            here.engine.hand_over(job.job_id, rest, at_end=True)

        def begin(run: Run) -> None:
            here.engine.hand_over(job.job_id, copy, at_end=False)
            copies.append(there.submit(a_decode(prompt, greedy(4), copy, run.tokens[:3]), {1: stop}))

        job = a_decode(prompt, ENDLESS)
        run = here.submit(job, {3: begin}).wait()
        assert run.outcome.failure is Failure.MIGRATED
        whole = uninterrupted(pushing, run)
        assert run.tokens + goes_on(there, rest, run).wait().tokens == whole.tokens
        assert copies[0].wait().tokens == whole.tokens[3:4]

    def test_copies_outlive_the_decode_that_they_were_made_of(self, pushing: Bench) -> None:
        here, takers = pushing.source, (pushing.destination, pushing.alone)
        tickets = [a_ticket(here, taker) for taker in takers]
        orders = order(here, tickets[0], 3, at_end=False) | order(here, tickets[1], 4, at_end=False)
        prompt = a_prompt(pushing.vocabulary, 2 * here.info.kv.block_size - 2, 304)
        whole = here.submit(a_decode(prompt, greedy(40)), orders).wait()
        assert whole.outcome.finish_reason is FinishReason.LENGTH
        for taker, ticket in zip(takers, tickets, strict=True):
            taken = taker.submit(a_decode(prompt, greedy(40), ticket, whole.tokens[:3])).wait()
            assert whole.tokens[:3] + taken.tokens == whole.tokens

    def test_a_handed_over_structured_output_keeps_to_what_is_left_of_it(self, pushing: Bench) -> None:
        said = StructuredOutput(choice=tuple(f"{word} again" + 20 * " and again" for word in ("Once", "Twice")))
        sampling = greedy(200, structured_output=said, ignore_eos=False)
        ticket, prompt = a_ticket(pushing.source, pushing.destination), a_prompt(pushing.vocabulary, 30, 310)
        run = left(pushing.source, ticket, prompt, sampling=sampling)
        rest = pushing.destination.submit(a_decode(prompt, sampling, ticket, run.tokens)).wait()
        whole = served_alone(pushing, prompt, sampling)
        assert run.tokens + rest.tokens == whole.tokens
        assert run.text + rest.text == whole.text
        assert whole.text in said.choice
        assert rest.outcome.finish_reason is FinishReason.STOP

    # Other endings ---------------------------------------------------------------------------------------------------
    def test_kv_that_nobody_takes_over_is_given_up_when_its_lease_ends(self, pushing: Bench) -> None:
        ticket = a_ticket(pushing.alone, pushing.destination)
        run = left(pushing.alone, ticket, a_prompt(pushing.vocabulary, 40, 305))
        pushing.alone.wait_at_rest()
        assert goes_on(pushing.destination, ticket, run).outcome.failure is Failure.TRANSFER

    def test_cancelling_the_decode_that_takes_over_gives_both_sides_their_blocks_back(self, pushing: Bench) -> None:
        ticket = a_ticket(pushing.alone, pushing.destination)
        run = left(pushing.alone, ticket, a_prompt(pushing.vocabulary, 40, 306))
        taking = goes_on(pushing.destination, ticket, run)
        pushing.destination.engine.cancel(taking.job.job_id)
        assert taking.outcome.failure in (Failure.CANCELLED, None)

    def test_an_order_at_the_last_moment_loses_no_token(self, pushing: Bench) -> None:
        ticket, prompt = a_ticket(pushing.source, pushing.destination), a_prompt(pushing.vocabulary, 30, 307)
        whole = served_alone(pushing, prompt, greedy(TAIL))
        job, last = a_decode(prompt, greedy(TAIL)), order(pushing.source, ticket, TAIL - 1)
        run = pushing.source.submit(job, last).wait()
        made = run.tokens
        if run.outcome.failure is Failure.MIGRATED:
            made += pushing.destination.submit(a_decode(prompt, greedy(TAIL), ticket, made)).wait().tokens
        assert made == whole.tokens

    def test_an_order_for_a_job_that_is_over_is_ignored(self, pushing: Bench) -> None:
        here, ticket = pushing.source, a_ticket(pushing.source, pushing.destination)
        prompt = a_prompt(pushing.vocabulary, 30, 308)
        run = here.submit(a_decode(prompt, greedy(TAIL)), order(here, ticket, TAIL)).wait()
        assert (len(run.tokens), run.outcome.finish_reason) == (TAIL, FinishReason.LENGTH)
        assert len(here.submit(a_decode(prompt, greedy(2))).wait().tokens) == 2

    def test_only_a_decode_that_has_made_a_token_is_handed_over(self, pushing: Bench) -> None:
        here, there = pushing.source, pushing.destination
        prompt, ticket = a_prompt(pushing.vocabulary, 3 * here.info.kv.block_size, 309), a_ticket(here, there)
        decode = there.submit(a_decode(prompt, greedy(TAIL), ticket))
        for at_end in (False, True):
            there.engine.hand_over(decode.job.job_id, a_ticket(there, here), at_end=at_end)
        prefill = here.submit(a_prefill(prompt, ticket))
        here.engine.hand_over(prefill.job.job_id, a_ticket(here, there), at_end=True)
        assert prefill.outcome.failure is None
        assert decode.outcome.finish_reason is FinishReason.LENGTH
        assert decode.tokens == served_alone(pushing, prompt, greedy(TAIL)).tokens
