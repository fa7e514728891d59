"""What every `Engine` must do, whatever computes in it. Subclasses give a `bench` fixture with their engines."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from splitserve.core.request import FinishReason, SamplingParams
from splitserve.core.worker import Failure, KvMode
from splitserve.kv.layout import prompt_kv_bytes, tokens_to_move
from tests.contract.counting_contract import CountingContract
from tests.contract.engines import Bench, Run, a_decode, a_prefill, a_prompt, a_ticket, greedy, served_alone
from tests.contract.hand_over_contract import HandOverContract
from tests.contract.request_contract import RequestContract

OUTPUT = 12

# Samplers with a state. Penalties below 0 reward what was said before, so that it counts in a large vocabulary too.
SEEDED = SamplingParams(max_tokens=40, temperature=0.8, top_p=0.95, top_k=40, seed=7, ignore_eos=True)
REWARDED = greedy(40, presence_penalty=-1.5, frequency_penalty=-2.0)
STATEFUL = {
    "seeded": SEEDED,
    "seeded, of all tokens": replace(SEEDED, top_p=1.0, top_k=0, seed=-3),
    "penalties": REWARDED,
    "penalties and repetition": replace(REWARDED, repetition_penalty=1.1),
    "penalties and a seed": replace(SEEDED, presence_penalty=-1.5, frequency_penalty=-2.0, repetition_penalty=1.1),
}
SENT = (1, 4, 5, 6, 24)  # of a prompt 5 tokens short of a block: before, at and after its end


def lengths(block: int, chunk: int) -> list[int]:
    """Around the edges of a block and of a prefill chunk."""
    return [1, block - 1, block, block + 1, 2 * block, 5 * block + 3, chunk + 1, 2 * chunk + block + 1]


def prompt_lengths(bench: Bench) -> list[int]:
    info = bench.alone.info
    return lengths(info.kv.block_size, info.max_batched_tokens)


def served_apart(
    bench: Bench, prompt: tuple[int, ...], sampling: SamplingParams, decode_first: bool = True
) -> tuple[Run, Run]:
    """The decode's run and the prefill's. In pull mode the decode always comes second, with the handover."""
    ticket = a_ticket(bench.source, bench.destination)
    if bench.source.info.kv.mode is KvMode.PULL:
        prefill = bench.source.submit(a_prefill(prompt, ticket)).wait()
        ticket = replace(ticket, handover=prefill.outcome.handover)
        return bench.destination.submit(a_decode(prompt, sampling, ticket)), prefill
    if decode_first:
        decode = bench.destination.submit(a_decode(prompt, sampling, ticket))
        return decode, bench.source.submit(a_prefill(prompt, ticket))
    prefill = bench.source.submit(a_prefill(prompt, ticket)).wait_news()
    return bench.destination.submit(a_decode(prompt, sampling, ticket)), prefill


class EngineContract(HandOverContract, CountingContract, RequestContract):
    @pytest.fixture(autouse=True)
    def _all_blocks_come_back(self, bench: Bench) -> Iterator[None]:
        yield
        for engine in (bench.source, bench.destination, bench.alone):
            engine.wait_at_rest()

    # Exactness -------------------------------------------------------------------------------------------------------
    @pytest.mark.parametrize("decode_first", [True, False], ids=["decode first", "prefill first"])
    def test_kv_from_another_worker_gives_the_tokens_of_one_engine(self, bench: Bench, decode_first: bool) -> None:
        for seed, tokens in enumerate(prompt_lengths(bench)):
            prompt = a_prompt(bench.vocabulary, tokens, seed)
            decode, prefill = served_apart(bench, prompt, greedy(OUTPUT), decode_first)
            assert prefill.wait().outcome.failure is None
            expected = served_alone(bench, prompt, greedy(OUTPUT))
            assert (decode.wait().tokens, decode.text) == (expected.tokens, expected.text), f"{tokens} prompt tokens"
            assert decode.outcome.finish_reason is FinishReason.LENGTH

    def test_damaged_kv_gives_other_tokens(self, bench: Bench) -> None:
        prompt = a_prompt(bench.vocabulary, 3 * bench.alone.info.kv.block_size, 77)
        expected = served_alone(bench, prompt, greedy(OUTPUT))
        with bench.corrupting():
            decode, prefill = served_apart(bench, prompt, greedy(OUTPUT))
            assert prefill.wait().outcome.failure is None
            assert decode.wait().outcome.failure is None
        assert decode.tokens != expected.tokens

    def test_prompts_that_share_a_prefix_do_not_disturb_each_other(self, bench: Bench) -> None:
        block = bench.alone.info.kv.block_size
        prefix = a_prompt(bench.vocabulary, 2 * block, 5)
        prompts = [prefix + a_prompt(bench.vocabulary, rest, rest) for rest in (1, block, block + 1, 1)]
        for prompt in prompts:
            decode, _ = served_apart(bench, prompt, greedy(OUTPUT))
            assert decode.wait().tokens == served_alone(bench, prompt, greedy(OUTPUT)).tokens

    def test_sixteen_at_once_are_each_what_they_are_alone(self, bench: Bench) -> None:
        block = bench.alone.info.kv.block_size
        prompts = [a_prompt(bench.vocabulary, 3 + 11 * n % (3 * block), 100 + n) for n in range(16)]
        runs = [served_apart(bench, prompt, greedy(OUTPUT), n % 2 == 0)[0] for n, prompt in enumerate(prompts)]
        outputs = [run.wait().tokens for run in runs]
        assert outputs == [served_alone(bench, prompt, greedy(OUTPUT)).tokens for prompt in prompts]

    # What a job's deltas say -----------------------------------------------------------------------------------------
    def test_deltas_carry_each_output_position_once_and_in_order(self, bench: Bench) -> None:
        run = served_alone(bench, a_prompt(bench.vocabulary, 9, 1), greedy(OUTPUT))
        positions = [delta.index + at for delta in run.deltas for at in range(len(delta.token_ids))]
        assert positions == list(range(OUTPUT))

    def test_a_prefill_tells_of_no_tokens_and_what_it_sent(self, bench: Bench) -> None:
        prompt = a_prompt(bench.vocabulary, 2 * bench.source.info.kv.block_size + 1, 2)
        decode, prefill = served_apart(bench, prompt, greedy(1))
        decode.wait()
        assert prefill.wait().tokens == ()
        assert prefill.outcome.finish_reason is FinishReason.LENGTH
        if bench.source.info.kv.mode is KvMode.PUSH:
            assert prefill.outcome.transfer is not None
            assert prefill.outcome.transfer.bytes == prompt_kv_bytes(tokens_to_move(len(prompt)), bench.source.info.kv)

    def test_logprobs_come_one_tuple_a_token_with_the_sampled_one_first(self, bench: Bench) -> None:
        run = served_alone(bench, a_prompt(bench.vocabulary, 9, 3), greedy(4, logprobs=3))
        shown = [tops for delta in run.deltas for tops in delta.logprobs]
        assert [tops[0].token_id for tops in shown] == list(run.tokens)
        assert all(len(tops) == 3 and tops[0].rank == 1 for tops in shown)
        assert all(tops[0].logprob >= tops[1].logprob >= tops[2].logprob for tops in shown)

    def test_a_seed_makes_a_draw_repeatable(self, bench: Bench) -> None:
        prompt = a_prompt(bench.vocabulary, 9, 4)
        drawn = [
            served_alone(bench, prompt, SamplingParams(OUTPUT, temperature=1.5, seed=seed, ignore_eos=True)).tokens
            for seed in (7, 7, 8)
        ]
        assert drawn[0] == drawn[1] != drawn[2]

    # Stopping --------------------------------------------------------------------------------------------------------
    def test_a_stop_token_ends_the_output_and_min_tokens_holds_it_off(self, bench: Bench) -> None:
        prompt = a_prompt(bench.vocabulary, 9, 6)
        stop = served_alone(bench, prompt, greedy(OUTPUT)).tokens[3]
        stopped = served_alone(bench, prompt, greedy(OUTPUT, stop_token_ids=(stop,)))
        assert stopped.outcome.finish_reason is FinishReason.STOP
        assert stopped.tokens[-1] == stop
        for tokens in (OUTPUT, 4 * OUTPUT):
            held_off = served_alone(bench, prompt, greedy(tokens, stop_token_ids=(stop,), min_tokens=tokens))
            assert len(held_off.tokens) == tokens

    def test_a_stop_string_and_what_follows_are_not_part_of_the_text(self, bench: Bench) -> None:
        prompt = a_prompt(bench.vocabulary, 9, 8)
        whole = served_alone(bench, prompt, greedy(2 * OUTPUT))
        stop = whole.text[len(whole.text) // 2 :][:5]
        stopped = served_alone(bench, prompt, greedy(2 * OUTPUT, stop=(stop,)))
        assert stopped.outcome.finish_reason is FinishReason.STOP
        assert stopped.text == whole.text[: whole.text.index(stop)]

    def test_a_job_without_max_tokens_ends_at_the_models_length(self, bench: Bench) -> None:
        limit = bench.alone.info.max_model_len
        run = served_alone(bench, a_prompt(bench.vocabulary, limit - 5, 9), greedy(0, max_tokens=None))
        assert (len(run.tokens), run.outcome.finish_reason) == (5, FinishReason.LENGTH)

    # Resuming --------------------------------------------------------------------------------------------------------
    @pytest.mark.parametrize("sent", [1, 5, OUTPUT - 1])
    def test_a_resumed_request_goes_on_as_if_uninterrupted(self, bench: Bench, sent: int) -> None:
        prompt = a_prompt(bench.vocabulary, 20, 10)
        whole = served_alone(bench, prompt, greedy(OUTPUT))
        resumed = bench.destination.submit(a_decode(prompt, greedy(OUTPUT), output=whole.tokens[:sent])).wait()
        assert resumed.deltas[0].index == sent
        assert whole.tokens[:sent] + resumed.tokens == whole.tokens
        assert whole.text_before(sent) + resumed.text == whole.text

    @pytest.mark.parametrize("sampling", STATEFUL.values(), ids=STATEFUL)
    def test_a_resumed_sampler_goes_on_as_if_uninterrupted(self, bench: Bench, sampling: SamplingParams) -> None:
        prompt = a_prompt(bench.vocabulary, bench.alone.info.kv.block_size - 5, 48)
        whole = served_alone(bench, prompt, sampling)
        for sent in SENT:
            resumed = bench.destination.submit(a_decode(prompt, sampling, output=whole.tokens[:sent])).wait()
            assert whole.tokens[:sent] + resumed.tokens == whole.tokens, f"resumed after {sent}"

    @pytest.mark.parametrize("sampling", STATEFUL.values(), ids=STATEFUL)
    def test_output_that_counts_as_prompt_would_go_on_otherwise(self, bench: Bench, sampling: SamplingParams) -> None:
        """The negative twin: draws made and tokens counted make a difference."""
        prompt = a_prompt(bench.vocabulary, bench.alone.info.kv.block_size - 5, 48)
        whole = served_alone(bench, prompt, sampling)
        left = {sent: replace(sampling, max_tokens=len(whole.tokens) - sent) for sent in SENT}
        anew = [served_alone(bench, prompt + whole.tokens[:sent], left[sent]).tokens for sent in SENT]
        assert any(tokens != whole.tokens[sent:] for sent, tokens in zip(SENT, anew, strict=True))

    def test_resumed_samplers_do_not_disturb_each_other(self, bench: Bench) -> None:
        prompts = [a_prompt(bench.vocabulary, 20 + number, 50 + number) for number in range(len(STATEFUL))]
        jobs = list(zip(prompts, STATEFUL.values(), strict=True))
        wholes = [served_alone(bench, prompt, sampling) for prompt, sampling in jobs]
        resumed = [
            bench.destination.submit(a_decode(prompt, sampling, output=whole.tokens[:sent]))
            for sent, ((prompt, sampling), whole) in enumerate(zip(jobs, wholes, strict=True))
        ]
        for sent, (whole, run) in enumerate(zip(wholes, resumed, strict=True)):
            assert whole.tokens[:sent] + run.wait().tokens == whole.tokens

    def test_a_resumed_sampler_gives_the_logprobs_it_would_have_given(self, bench: Bench) -> None:
        sampling = replace(STATEFUL["penalties and a seed"], logprobs=2)
        prompt = a_prompt(bench.vocabulary, 20, 60)
        whole = served_alone(bench, prompt, sampling)
        resumed = bench.destination.submit(a_decode(prompt, sampling, output=whole.tokens[:4])).wait()
        expected = [one for delta in whole.deltas for one in delta.logprobs][4:]
        got = [one for delta in resumed.deltas for one in delta.logprobs]
        assert [[each.token_id for each in one] for one in got] == [[each.token_id for each in one] for one in expected]
        for one, other in zip(got, expected, strict=True):
            assert [each.logprob for each in one] == pytest.approx([each.logprob for each in other], abs=1e-4)

    def test_min_tokens_counts_what_was_sent(self, bench: Bench) -> None:
        prompt = a_prompt(bench.vocabulary, 20, 61)
        plain = served_alone(bench, prompt, greedy(OUTPUT)).tokens
        sampling = greedy(OUTPUT, stop_token_ids=plain, min_tokens=6)
        whole = served_alone(bench, prompt, sampling)
        for sent in (1, 5):
            resumed = bench.destination.submit(a_decode(prompt, sampling, output=whole.tokens[:sent])).wait()
            assert whole.tokens[:sent] + resumed.tokens == whole.tokens
            assert resumed.outcome.finish_reason is whole.outcome.finish_reason

    def test_a_prompt_read_in_several_steps_draws_nothing_for_the_first_ones(self, bench: Bench) -> None:
        chunk = bench.alone.info.max_batched_tokens
        prompt = a_prompt(bench.vocabulary, 2 * chunk + 3, 62)
        whole = served_alone(bench, prompt, SEEDED)
        at_once, _ = served_apart(bench, prompt, SEEDED)
        assert at_once.wait().tokens == whole.tokens
        resumed = bench.destination.submit(a_decode(prompt, SEEDED, output=whole.tokens[:5])).wait()
        assert whole.tokens[:5] + resumed.tokens == whole.tokens

    def test_a_resumed_request_may_have_its_context_computed_elsewhere(self, bench: Bench) -> None:
        prompt = a_prompt(bench.vocabulary, 20, 11)
        whole = served_alone(bench, prompt, greedy(OUTPUT))
        context, ticket = prompt + whole.tokens[:5], a_ticket(bench.source, bench.destination)
        prefill = bench.source.submit(a_prefill(context, ticket)).wait_news()
        if bench.source.info.kv.mode is KvMode.PULL:
            ticket = replace(ticket, handover=prefill.outcome.handover)
        job = a_decode(prompt, greedy(OUTPUT), ticket, whole.tokens[:5])
        assert whole.tokens[:5] + bench.destination.submit(job).wait().tokens == whole.tokens

    def test_a_stop_string_that_straddles_the_break_still_stops(self, bench: Bench) -> None:
        prompt = a_prompt(bench.vocabulary, 20, 12)
        whole = served_alone(bench, prompt, greedy(OUTPUT))
        for sent in range(3, OUTPUT - 2):
            at = len(whole.text_before(sent))
            stop = whole.text[at - 2 : at + 2]
            stopped = served_alone(bench, prompt, greedy(OUTPUT, stop=(stop,)))
            if len(stopped.tokens) <= sent:
                continue  # it occurs earlier too
            job = a_decode(prompt, greedy(OUTPUT, stop=(stop,)), output=stopped.tokens[:sent])
            resumed = bench.destination.submit(job).wait()
            assert resumed.outcome.finish_reason is FinishReason.STOP
            assert stopped.text_before(sent) + resumed.text == stopped.text

    # Ending early ----------------------------------------------------------------------------------------------------
    def test_cancelling_a_decode_that_waits_for_kv_gives_its_blocks_back(self, bench: Bench) -> None:
        if bench.source.info.kv.mode is KvMode.PULL:
            pytest.skip("in pull mode a decode comes when its KV is there")
        ticket = a_ticket(bench.source, bench.destination)
        parked = bench.destination.submit(a_decode(a_prompt(bench.vocabulary, 40, 13), greedy(OUTPUT), ticket))
        bench.destination.engine.cancel(parked.job.job_id)
        assert parked.outcome.failure is Failure.CANCELLED

    def test_cancelling_a_running_decode_gives_its_blocks_back(self, bench: Bench) -> None:
        prompt = a_prompt(bench.vocabulary, 40, 14)
        running = bench.alone.submit(a_decode(prompt, greedy(0, max_tokens=None))).wait_tokens(2)
        bench.alone.engine.cancel(running.job.job_id)
        assert running.outcome.failure is Failure.CANCELLED

    def test_cancelling_the_prefill_fails_the_decode_that_waits_for_it(self, bench: Bench) -> None:
        if bench.source.info.kv.mode is KvMode.PULL:
            pytest.skip("in pull mode a decode comes when its KV is there")
        tokens = 4 * bench.source.info.max_batched_tokens
        prompt = a_prompt(bench.vocabulary, min(tokens, bench.source.info.max_model_len - 20), 15)
        decode, prefill = served_apart(bench, prompt, greedy(OUTPUT))
        bench.source.engine.cancel(prefill.job.job_id)
        if prefill.outcome.failure is Failure.CANCELLED:  # it may have been done
            assert decode.outcome.failure is Failure.TRANSFER
            assert decode.outcome.message
        else:
            assert decode.outcome.failure is None

    def test_kv_of_another_prompt_is_refused(self, bench: Bench) -> None:
        if bench.source.info.kv.mode is KvMode.PULL:
            pytest.skip("the stock connector checks no prompt")
        ticket = a_ticket(bench.source, bench.destination)
        prefill = bench.source.submit(a_prefill(a_prompt(bench.vocabulary, 40, 16), ticket))
        decode = bench.destination.submit(a_decode(a_prompt(bench.vocabulary, 40, 17), greedy(OUTPUT), ticket))
        assert decode.outcome.failure is Failure.TRANSFER
        assert decode.tokens == ()
        assert prefill.outcome.failure is Failure.TRANSFER

    def test_a_job_that_is_unknown_can_be_cancelled_in_vain(self, bench: Bench) -> None:
        bench.alone.engine.cancel("no such job")
        assert len(served_alone(bench, a_prompt(bench.vocabulary, 5, 18), greedy(2)).tokens) == 2

    # Bad requests ----------------------------------------------------------------------------------------------------
    def test_what_only_the_engine_knows_to_be_wrong_is_refused_by_field(self, bench: Bench) -> None:
        limit = bench.alone.info.max_model_len
        for prompt in ((), (2**31 - 1,), a_prompt(bench.vocabulary, limit + 1, 19)):
            outcome = served_alone(bench, prompt, greedy(2)).outcome
            assert (outcome.failure, outcome.field) == (Failure.INVALID, "prompt")
            assert outcome.message
