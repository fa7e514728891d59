"""What every `Engine` must do with what a request may ask for beyond plain sampling; part of the engine contract.

Benches have an adapter called ADAPTER, and a parser of tool calls.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from splitserve.core.request import FinishReason, SamplingParams, StructuredOutput, Tool, ToolCall, ToolChoice, ToolMode
from splitserve.core.worker import DecodeJob, Failure, KvMode, Parse
from tests.contract.engines import Bench, Listener, Run, a_decode, a_prefill, a_prompt, a_ticket, greedy, served_alone

ADAPTER = "adapter"
OUTPUT = 12
EOS = 1
MOST = 120  # tokens that a short JSON text takes at most
CHOICES = ("the first of them", "another one")
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "celsius": {"type": "boolean"}},
    "required": ["city", "celsius"],
    "additionalProperties": False,
}
WEATHER = Tool("weather", "Tells it.", json.dumps(SCHEMA))
CLOCK = Tool("clock", "Tells the time.")
STRUCTURED = {
    "choice": StructuredOutput(choice=CHOICES),
    "schema": StructuredOutput(json_schema=json.dumps(SCHEMA)),
}
BAD = {
    "a schema that is no JSON": StructuredOutput(json_schema="{"),
    "a schema of no known type": StructuredOutput(json_schema='{"type": "no such type"}'),
}


def keeping_to(structured: StructuredOutput, **others: object) -> SamplingParams:
    return greedy(MOST, structured_output=structured, ignore_eos=False, **others)


def a_chat(
    prompt: Sequence[int], choice: ToolChoice, output: Sequence[int] = (), tools: Sequence[Tool] = (WEATHER,)
) -> DecodeJob:
    job = a_decode(prompt, greedy(MOST, ignore_eos=False), output=output)
    return replace(job, parse=Parse(tuple(tools), choice))


def a_call(prompt: Sequence[int], choice: ToolChoice, tools: Sequence[Tool] = (WEATHER,)) -> DecodeJob:
    """Ends as soon as it may: a model without sense would call again and again."""
    job = a_chat(prompt, choice, tools=tools)
    return replace(job, sampling=replace(job.sampling, logit_bias={EOS: 100.0}))


def resumed_at(engine: Listener, whole: Run, sent: int) -> Run:
    assert isinstance(whole.job, DecodeJob)
    again = a_decode(whole.job.prompt, whole.job.sampling, output=whole.tokens[:sent])
    return engine.submit(replace(whole.job, job_id=again.job_id, output=again.output)).wait()


def calls_of(*runs: Run) -> list[tuple[str, str]]:
    """Names and arguments, put together from all pieces."""
    pieces: list[ToolCall] = [call for run in runs for delta in run.deltas for call in delta.tool_calls]
    count = 1 + max((piece.index for piece in pieces), default=-1)
    return [
        ("".join(p.name for p in pieces if p.index == at), "".join(p.arguments for p in pieces if p.index == at))
        for at in range(count)
    ]


def before(run: Run, sent: int) -> Run:
    """What a client has of it that was sent so many tokens."""
    had = [delta for delta in run.deltas if delta.index + len(delta.token_ids) <= sent]
    return replace(run, deltas=had)


class RequestContract:
    # Logits ----------------------------------------------------------------------------------------------------------
    def test_a_bias_bans_a_token_or_makes_it_likelier_than_all_others(self, bench: Bench) -> None:
        prompt = a_prompt(bench.vocabulary, 9, 401)
        plain = served_alone(bench, prompt, greedy(OUTPUT)).tokens
        banned = served_alone(bench, prompt, greedy(OUTPUT, logit_bias={plain[0]: -100.0})).tokens
        assert plain[0] not in banned
        wanted = next(token for token in bench.vocabulary if token not in plain)
        assert set(served_alone(bench, prompt, greedy(OUTPUT, logit_bias={wanted: 100.0})).tokens) == {wanted}

    def test_a_bias_on_a_token_that_is_not_there_is_refused_by_name(self, bench: Bench) -> None:
        outcome = served_alone(
            bench, a_prompt(bench.vocabulary, 9, 402), greedy(2, logit_bias={2**31 - 1: 1.0})
        ).outcome
        assert (outcome.failure, outcome.field) == (Failure.INVALID, "sampling.logit_bias")

    # Structured output -----------------------------------------------------------------------------------------------
    def test_a_choice_is_kept_to_and_ends_the_output(self, bench: Bench) -> None:
        for seed in range(3):
            prompt = a_prompt(bench.vocabulary, 20, 410 + seed)
            run = served_alone(bench, prompt, keeping_to(STRUCTURED["choice"]))
            assert run.text in CHOICES
            assert run.outcome.finish_reason is FinishReason.STOP

    def test_a_schema_is_kept_to(self, bench: Bench) -> None:
        run = served_alone(bench, a_prompt(bench.vocabulary, 20, 420), keeping_to(STRUCTURED["schema"]))
        said = json.loads(run.text)
        assert said["city"] in ("Paris", "Rome")
        assert set(said) == {"city", "celsius"}

    @pytest.mark.parametrize("structured", STRUCTURED.values(), ids=STRUCTURED)
    def test_a_resumed_structured_output_goes_on_as_if_uninterrupted(
        self, bench: Bench, structured: StructuredOutput
    ) -> None:
        whole = served_alone(bench, a_prompt(bench.vocabulary, 20, 430), keeping_to(structured))
        for sent in range(1, len(whole.tokens)):
            rest = resumed_at(bench.destination, whole, sent)
            assert whole.tokens[:sent] + rest.tokens == whole.tokens, f"resumed after {sent}"
            assert whole.text_before(sent) + rest.text == whole.text
            assert rest.outcome.finish_reason is FinishReason.STOP

    def test_a_structured_output_may_have_its_context_computed_elsewhere(self, bench: Bench) -> None:
        prompt = a_prompt(bench.vocabulary, 20, 431)
        whole = served_alone(bench, prompt, keeping_to(STRUCTURED["schema"]))
        for sent in (0, 4):
            ticket = a_ticket(bench.source, bench.destination)
            prefill = bench.source.submit(a_prefill(prompt + whole.tokens[:sent], ticket)).wait_news()
            if bench.source.info.kv.mode is KvMode.PULL:
                ticket = replace(ticket, handover=prefill.outcome.handover)
            job = a_decode(prompt, whole.job.sampling, ticket, whole.tokens[:sent])  # type: ignore[union-attr]
            assert whole.tokens[:sent] + bench.destination.submit(job).wait().tokens == whole.tokens

    def test_a_choice_that_begins_anew_would_go_on_otherwise(self, bench: Bench) -> None:
        """The negative twin: a grammar that does not know of the output so far."""
        whole = served_alone(bench, a_prompt(bench.vocabulary, 20, 432), keeping_to(STRUCTURED["choice"]))
        anew = served_alone(bench, whole.job.prompt + whole.tokens[:2], keeping_to(STRUCTURED["choice"]))
        assert anew.tokens != whole.tokens[2:]

    @pytest.mark.parametrize("structured", BAD.values(), ids=BAD)
    def test_what_no_grammar_can_be_made_of_is_refused_by_name(
        self, bench: Bench, structured: StructuredOutput
    ) -> None:
        outcome = served_alone(bench, a_prompt(bench.vocabulary, 9, 433), keeping_to(structured)).outcome
        assert (outcome.failure, outcome.field) == (Failure.INVALID, "sampling.structured_output")
        assert outcome.message

    def test_output_that_does_not_keep_to_the_choice_is_refused_by_name(self, bench: Bench) -> None:
        job = a_decode(a_prompt(bench.vocabulary, 9, 434), keeping_to(STRUCTURED["choice"]), output=(300, 301))
        outcome = bench.alone.submit(job).outcome
        assert (outcome.failure, outcome.field) == (Failure.INVALID, "sampling.structured_output")

    # Logprobs of the prompt ------------------------------------------------------------------------------------------
    def test_the_prompts_logprobs_come_with_the_first_token_one_tuple_a_prompt_token(self, bench: Bench) -> None:
        for tokens in (5, bench.alone.info.max_batched_tokens + 5):
            prompt = a_prompt(bench.vocabulary, tokens, 440)
            run = served_alone(bench, prompt, greedy(4, prompt_logprobs=2))
            (shown,) = [delta.prompt_logprobs for delta in run.deltas if delta.prompt_logprobs]
            assert run.deltas[0].prompt_logprobs == shown
            assert shown[0] == ()
            assert [tops[0].token_id for tops in shown[1:]] == list(prompt[1:])
            assert all(2 <= len(tops) <= 3 and any(top.rank == 1 for top in tops) for tops in shown[1:])
            assert run.tokens == served_alone(bench, prompt, greedy(4)).tokens

    def test_a_resumed_request_does_not_tell_the_prompts_logprobs_again(self, bench: Bench) -> None:
        whole = served_alone(bench, a_prompt(bench.vocabulary, 20, 441), greedy(OUTPUT, prompt_logprobs=1))
        rest = resumed_at(bench.destination, whole, 3)
        assert whole.tokens[:3] + rest.tokens == whole.tokens
        assert not any(delta.prompt_logprobs for delta in rest.deltas)

    def test_a_ticket_and_the_prompts_logprobs_do_not_go_together(self, bench: Bench) -> None:
        ticket = a_ticket(bench.source, bench.destination)
        job = a_decode(a_prompt(bench.vocabulary, 20, 442), greedy(2, prompt_logprobs=1), ticket)
        outcome = bench.destination.submit(job).outcome
        assert (outcome.failure, outcome.field) == (Failure.INVALID, "sampling.prompt_logprobs")

    # Text ------------------------------------------------------------------------------------------------------------
    def test_a_stop_string_is_part_of_the_text_if_asked_for_also_where_it_straddles_a_break(self, bench: Bench) -> None:
        prompt = a_prompt(bench.vocabulary, 9, 450)
        whole = served_alone(bench, prompt, greedy(2 * OUTPUT))
        stop = whole.text[len(whole.text) // 2 :][:5]
        with_it = whole.text[: whole.text.index(stop) + len(stop)]
        stopped = served_alone(bench, prompt, greedy(2 * OUTPUT, stop=(stop,), include_stop=True))
        assert (stopped.text, stopped.outcome.finish_reason) == (with_it, FinishReason.STOP)
        for sent in range(1, len(stopped.tokens)):
            rest = resumed_at(bench.destination, stopped, sent)
            assert stopped.text_before(sent) + rest.text == with_it
            assert rest.outcome.finish_reason is FinishReason.STOP

    def test_a_stop_string_below_min_tokens_does_not_stop(self, bench: Bench) -> None:
        prompt = a_prompt(bench.vocabulary, 9, 451)
        whole = served_alone(bench, prompt, greedy(OUTPUT))
        stop = whole.deltas[1].text or whole.text[:1]
        held_off = served_alone(bench, prompt, greedy(OUTPUT, stop=(stop,), include_stop=True, min_tokens=OUTPUT))
        assert len(held_off.tokens) == OUTPUT
        rest = resumed_at(bench.destination, held_off, 4)
        assert held_off.tokens[:4] + rest.tokens == held_off.tokens

    def test_special_tokens_are_left_out_of_the_text_unless_asked_for(self, bench: Bench) -> None:
        prompt = a_prompt(bench.vocabulary, 9, 452)
        forced = greedy(3, logit_bias={EOS: 100.0})
        assert served_alone(bench, prompt, forced).text == ""
        shown = served_alone(bench, prompt, replace(forced, skip_special_tokens=False))
        assert shown.text == 3 * "<|eos|>"

    # Adapters and salts ----------------------------------------------------------------------------------------------
    def test_an_adapter_makes_other_tokens_the_same_ones_wherever_its_kv_was_computed(self, bench: Bench) -> None:
        assert bench.alone.info.loras == (ADAPTER,)
        for tokens in (5, 3 * bench.alone.info.kv.block_size + 3):
            prompt = a_prompt(bench.vocabulary, tokens, 460)
            plain = served_alone(bench, prompt, greedy(OUTPUT))
            adapted = bench.alone.submit(replace(a_decode(prompt, greedy(OUTPUT)), lora=ADAPTER)).wait()
            assert adapted.tokens != plain.tokens
            assert _apart(bench, prompt, lora=ADAPTER).tokens == adapted.tokens
            assert adapted.tokens[:5] + resumed_at(bench.destination, adapted, 5).tokens == adapted.tokens
            assert served_alone(bench, prompt, greedy(OUTPUT)).tokens == plain.tokens

    def test_kv_of_another_adapter_would_give_other_tokens(self, bench: Bench) -> None:
        """The negative twin: the prompt was read without it."""
        prompt = a_prompt(bench.vocabulary, 3 * bench.alone.info.kv.block_size + 3, 461)
        adapted = bench.alone.submit(replace(a_decode(prompt, greedy(OUTPUT)), lora=ADAPTER)).wait()
        assert _apart(bench, prompt, lora=ADAPTER, prefilled_by="").tokens != adapted.tokens

    def test_an_unknown_adapter_is_refused_by_name(self, bench: Bench) -> None:
        prompt, ticket = a_prompt(bench.vocabulary, 9, 462), a_ticket(bench.source, bench.destination)
        for engine, job in ((bench.alone, a_decode(prompt, greedy(2))), (bench.source, a_prefill(prompt, ticket))):
            outcome = engine.submit(replace(job, lora="nobody")).outcome
            assert (outcome.failure, outcome.field) == (Failure.INVALID, "lora")
            assert "nobody" in outcome.message

    def test_a_salt_changes_no_token(self, bench: Bench) -> None:
        prompt = a_prompt(bench.vocabulary, 3 * bench.alone.info.kv.block_size + 3, 463)
        plain = served_alone(bench, prompt, greedy(OUTPUT))
        assert _apart(bench, prompt, cache_salt="a tenant").tokens == plain.tokens

    # Tool calls ------------------------------------------------------------------------------------------------------
    @pytest.mark.parametrize(
        ("choice", "finish"),
        [
            (ToolChoice(function="weather"), FinishReason.STOP),
            (ToolChoice(ToolMode.REQUIRED), FinishReason.TOOL_CALLS),
        ],
        ids=["by name", "required"],
    )
    def test_a_call_comes_in_pieces_that_make_a_name_and_its_arguments(
        self, bench: Bench, choice: ToolChoice, finish: FinishReason
    ) -> None:
        run = bench.alone.submit(a_call(a_prompt(bench.vocabulary, 20, 470), choice)).wait()
        assert run.outcome.finish_reason is finish, run.outcome
        calls = calls_of(run)
        assert {name for name, _ in calls} == {"weather"}
        assert all(json.loads(arguments)["city"] in ("Paris", "Rome") for _, arguments in calls)
        assert run.text.strip() == ""
        first = [call for delta in run.deltas for call in delta.tool_calls if call.index == 0]
        assert [bool(call.id) for call in first] == [True] + [False] * (len(first) - 1)

    @pytest.mark.parametrize("choice", [ToolChoice(function="weather"), ToolChoice(ToolMode.REQUIRED)], ids=str)
    def test_a_resumed_call_goes_on_as_if_uninterrupted(self, bench: Bench, choice: ToolChoice) -> None:
        whole = bench.alone.submit(a_call(a_prompt(bench.vocabulary, 20, 471), choice, (CLOCK, WEATHER))).wait()
        assert whole.outcome.failure is None, whole.outcome
        for sent in range(1, len(whole.tokens), 3):
            rest = resumed_at(bench.destination, whole, sent)
            assert whole.tokens[:sent] + rest.tokens == whole.tokens, f"resumed after {sent}"
            assert calls_of(before(whole, sent), rest) == calls_of(whole)
            assert rest.outcome.finish_reason is whole.outcome.finish_reason

    def test_a_chat_that_calls_nothing_is_text(self, bench: Bench) -> None:
        prompt = a_prompt(bench.vocabulary, 20, 472)
        plain = served_alone(bench, prompt, greedy(MOST, ignore_eos=False))
        for choice in (ToolChoice(), ToolChoice(ToolMode.NONE)):
            run = bench.alone.submit(a_chat(prompt, choice)).wait()
            assert (run.tokens, run.text, calls_of(run)) == (plain.tokens, plain.text, [])
            assert run.outcome.finish_reason is plain.outcome.finish_reason

    def test_a_function_that_is_none_of_the_tools_is_refused_by_name(self, bench: Bench) -> None:
        outcome = bench.alone.submit(a_chat((300, 301), ToolChoice(function="nobody"))).outcome
        assert (outcome.failure, outcome.field) == (Failure.INVALID, "messages.tool_choice.function")

    def test_a_call_without_tools_is_refused_by_name(self, bench: Bench) -> None:
        for choice in (ToolChoice(ToolMode.REQUIRED), ToolChoice(function="weather")):
            outcome = bench.alone.submit(a_chat((300, 301), choice, tools=())).outcome
            assert (outcome.failure, outcome.field) == (Failure.INVALID, "messages.tool_choice")

    def test_a_tools_schema_that_is_no_json_is_refused_by_name(self, bench: Bench) -> None:
        job = a_chat((300, 301), ToolChoice(ToolMode.REQUIRED), tools=(CLOCK, Tool("bad", parameters="{")))
        outcome = bench.alone.submit(job).outcome
        assert (outcome.failure, outcome.field) == (Failure.INVALID, "messages.tools[1].parameters")


def _apart(bench: Bench, prompt: tuple[int, ...], prefilled_by: str | None = None, **asked: Any) -> Run:
    """Prefilled by one worker and decoded by another; `prefilled_by`: with another adapter."""
    ticket = a_ticket(bench.source, bench.destination)
    prefill_job = replace(a_prefill(prompt, ticket), **asked)
    if prefilled_by is not None:
        prefill_job = replace(prefill_job, lora=prefilled_by)
    prefill = bench.source.submit(prefill_job).wait_news()
    if bench.source.info.kv.mode is KvMode.PULL:
        ticket = replace(ticket, handover=prefill.outcome.handover)
    return bench.destination.submit(replace(a_decode(prompt, greedy(OUTPUT), ticket), **asked)).wait()
