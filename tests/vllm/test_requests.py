"""What requests ask for, where it takes a worker of its own: cached prefixes, a reasoning parser, drafts."""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest

from benchmarks.remote_engine import RemoteEngine
from splitserve.core.config import KvTransferSettings, VllmSettings
from splitserve.core.request import FinishReason, StructuredOutput, ToolChoice, ToolMode
from splitserve.core.worker import DecodeJob, Failure, Parse
from tests.contract.engines import Listener, Run, a_decode, a_prefill, a_prompt, a_ticket, greedy, started
from tests.contract.request_contract import ADAPTER, CHOICES, WEATHER, calls_of, keeping_to, resumed_at
from tests.vllm.adapters import make_adapter
from tests.vllm.conftest import VOCAB_SIZE

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

THINK, THOUGHT = 3, 4  # these special tokens of the demo's tokenizer are called so here
WORDS = range(300, VOCAB_SIZE)
OUTPUT = 12
ONE_OF = StructuredOutput(choice=CHOICES)
SETTINGS = VllmSettings(dtype="float32", max_model_len=1024, max_num_batched_tokens=256, kv_cache_gib=0.125)
NO_WHITESPACE = {"structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True}}
TRACED = f"00-{'a' * 32}-{'b' * 16}-01"
DRAFTS = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}}


@pytest.fixture(scope="module")
def thinking_model(sensitive_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("thinking") / "model"
    shutil.copytree(sensitive_model, out)
    for file in (out / "tokenizer.json", out / "tokenizer_config.json"):
        file.write_text(file.read_text().replace("<|system|>", "<think>").replace("<|user|>", "</think>"))
    return out


@pytest.fixture(scope="module")
def pair(
    thinking_model: Path, cores: tuple[int, int], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Listener, Listener]]:
    adapter = make_adapter(tmp_path_factory.mktemp("adapters") / ADAPTER)
    update = {"loras": {ADAPTER: str(adapter)}, "reasoning_parser": "deepseek_r1", "extra": NO_WHITESPACE}
    settings = SETTINGS.model_copy(update=update)
    engines = [RemoteEngine(thinking_model, settings, KvTransferSettings(), uuid4().hex, core) for core in cores]
    for engine in engines:
        engine.spawn()
    with ExitStack() as stack:
        yield tuple(stack.enter_context(started(engine)) for engine in engines)  # type: ignore[misc]


def moved(pair: tuple[Listener, Listener], prompt: tuple[int, ...], lora: str = "", salt: str = "") -> tuple[Run, int]:
    """A prompt handed over, and the bytes that were not in the destination's prefix cache."""
    source, destination = pair
    ticket, asked = a_ticket(source, destination), {"lora": lora, "cache_salt": salt, "traceparent": TRACED}
    decode = destination.submit(replace(a_decode(prompt, greedy(OUTPUT), ticket), **asked))  # type: ignore[arg-type]
    prefill = source.submit(replace(a_prefill(prompt, ticket), **asked))  # type: ignore[arg-type]
    assert decode.wait().outcome.failure is None, decode.outcome
    assert prefill.outcome.transfer is not None
    return decode, prefill.outcome.transfer.bytes


# Cached prefixes ----------------------------------------------------------------------------------------------------
def test_prefixes_are_shared_under_one_salt_and_never_between_two(pair: tuple[Listener, Listener]) -> None:
    prompt = a_prompt(WORDS, 5 * pair[0].info.kv.block_size + 3, 1)
    first, whole = moved(pair, prompt, salt="one")
    again, rest = moved(pair, prompt, salt="one")
    assert rest < whole
    for salt in ("two", ""):
        other, cold = moved(pair, prompt, salt=salt)
        assert cold == whole
        assert other.tokens == first.tokens == again.tokens


def test_prefixes_are_never_shared_between_adapters(pair: tuple[Listener, Listener]) -> None:
    prompt = a_prompt(WORDS, 5 * pair[0].info.kv.block_size + 3, 2)
    plain, whole = moved(pair, prompt)
    adapted, cold = moved(pair, prompt, lora=ADAPTER)
    again, rest = moved(pair, prompt, lora=ADAPTER)
    assert (cold, rest < whole) == (whole, True)
    assert adapted.tokens == again.tokens != plain.tokens


# Reasoning ----------------------------------------------------------------------------------------------------------
def a_chat(prompt: tuple[int, ...], output: tuple[int, ...] = (), **sampling: object) -> DecodeJob:
    return replace(a_decode(prompt, greedy(40, ignore_eos=False, **sampling), output=output), parse=Parse())


def test_what_comes_before_the_end_of_thinking_is_reasoning_and_the_rest_text(pair: tuple[Listener, Listener]) -> None:
    prompt = a_prompt(WORDS, 20, 3)
    plain = pair[0].submit(a_decode(prompt, greedy(40, ignore_eos=False))).wait()
    thinking = pair[0].submit(a_chat(prompt)).wait()
    assert (thinking.tokens, reasoning(thinking), thinking.text) == (plain.tokens, plain.text, "")
    spoken = pair[0].submit(a_chat(prompt, (*plain.tokens[:3], THOUGHT))).wait()
    assert reasoning(spoken) == ""
    assert spoken.text != ""


def test_a_grammar_waits_for_the_reasoning_to_end_also_after_a_break(pair: tuple[Listener, Listener]) -> None:
    """The bias ends the reasoning at once, and after it the grammar lets nothing pass that the bias wants."""
    job = a_chat(a_prompt(WORDS, 20, 4), structured_output=ONE_OF, logit_bias={THOUGHT: 100.0})
    whole = pair[0].submit(job).wait()
    assert whole.tokens[0] == THOUGHT
    assert whole.text in CHOICES
    assert whole.outcome.finish_reason is FinishReason.STOP
    for sent in range(1, len(whole.tokens)):
        rest = resumed_at(pair[1], whole, sent)
        assert whole.tokens[:sent] + rest.tokens == whole.tokens, f"resumed after {sent}"
        assert whole.text_before(sent) + rest.text == whole.text
    begun = (300, 301, 302)
    thinking = pair[1].submit(replace(job, job_id="begun elsewhere", output=begun)).wait()
    assert thinking.tokens[0] == THOUGHT
    assert thinking.text in CHOICES


def test_a_grammar_without_a_chat_waits_for_nothing(pair: tuple[Listener, Listener]) -> None:
    run = pair[0].submit(a_decode(a_prompt(WORDS, 20, 5), keeping_to(ONE_OF))).wait()
    assert run.text in CHOICES


# Without a tool parser ----------------------------------------------------------------------------------------------
def test_without_a_tool_parser_only_forced_calls_are_served(pair: tuple[Listener, Listener]) -> None:
    job = replace(a_decode(a_prompt(WORDS, 20, 6), greedy(60, ignore_eos=False)), parse=Parse((WEATHER,)))
    outcome = pair[0].submit(job).outcome
    assert (outcome.failure, outcome.field) == (Failure.INVALID, "messages.tools")
    assert "tool_parser" in outcome.message
    sampling = replace(job.sampling, logit_bias={THOUGHT: 100.0})  # the reasoning ends at once
    for number, choice in enumerate((ToolChoice(function="weather"), ToolChoice(ToolMode.REQUIRED))):
        forced = replace(job, job_id=f"forced-{number}", parse=Parse((WEATHER,), choice), sampling=sampling)
        run = pair[0].submit(forced).wait()
        assert calls_of(run)[0][0] == "weather"
        assert json.loads(calls_of(run)[0][1])["city"] in ("Paris", "Rome")


# Starting -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("update", "words"),
    [
        ({"tool_parser": "hermit"}, r"engine\.tool_parser: vLLM has no 'hermit'; it has .*hermes"),
        ({"reasoning_parser": "deepseek_r1"}, r"engine\.reasoning_parser: .*deepseek_r1"),
        ({"extra": {"speculative_config": {"method": "eagle"}}}, r"engine\.extra\.speculative_config: push"),
        ({"loras": {"gone": "nowhere"}}, r"engine\.loras\.gone: nowhere has no adapter_config\.json"),
    ],
    ids=["a tool parser's name", "a tokenizer that can't think", "a drafter with KV", "an adapter's directory"],
)
def test_what_can_not_be_served_ends_the_start_by_name(
    sensitive_model: Path, cores: tuple[int, int], update: dict[str, object], words: str
) -> None:
    engine = RemoteEngine(sensitive_model, SETTINGS.model_copy(update=update), KvTransferSettings(), "uuid", cores[0])
    engine.spawn()
    with pytest.raises(RuntimeError, match=words):
        engine.start(lambda deltas: None)


def test_a_drafter_without_kv_of_its_own_drafts_what_the_model_would_have_said(
    sensitive_model: Path, cores: tuple[int, int]
) -> None:
    """Prompts that repeat themselves, so that drafts are accepted; resumed, and kept to a grammar."""
    settings = [SETTINGS, SETTINGS.model_copy(update={"extra": DRAFTS})]
    kv = KvTransferSettings()
    engines = [
        RemoteEngine(sensitive_model, each, kv, uuid4().hex, core) for each, core in zip(settings, cores, strict=True)
    ]
    for engine in engines:
        engine.spawn()
    with ExitStack() as stack:
        plain, drafting = [stack.enter_context(started(engine)) for engine in engines]
        assert drafting.info.restores == ("structured_output",)
        prompt = a_prompt(WORDS, 40, 7) * 5
        whole = plain.submit(a_decode(prompt, greedy(24))).wait()
        ticket = a_ticket(plain, drafting)
        decode = drafting.submit(a_decode(prompt, greedy(24), ticket))
        plain.submit(a_prefill(prompt, ticket))
        assert decode.wait().tokens == whole.tokens
        assert (
            whole.tokens[:5] + drafting.submit(a_decode(prompt, greedy(24), output=whole.tokens[:5])).wait().tokens
            == whole.tokens
        )
        chosen = plain.submit(a_decode(prompt, keeping_to(ONE_OF))).wait()
        assert chosen.tokens[:3] + resumed_at(drafting, chosen, 3).tokens == chosen.tokens


def reasoning(run: Run) -> str:
    return "".join(delta.reasoning for delta in run.deltas)
