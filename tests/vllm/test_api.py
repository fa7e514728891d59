"""What clients ask for, end to end: router, prefill and decode worker as processes with real vLLM, compared with plain
vLLM. Asked over gRPC, HTTP (OpenAI's own package) and KServe (Triton's client)."""

import asyncio
import json
import re
import shutil
import subprocess
import sys
import urllib.request
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Unpack

import openai
import pytest
from openai import AsyncOpenAI
from prometheus_client.parser import text_string_to_metric_families

from splitserve.client import AsyncClient, Options
from splitserve.core.config import KvTransferSettings, RouterConfig, VllmSettings
from splitserve.core.errors import ModelNotFound
from splitserve.core.request import Chunk, FinishReason, Logprob, SamplingParams, StructuredOutput, Timings, Usage
from splitserve.core.worker import Pool
from tests.cluster.asking import ask, greedy, prompt_of, settled, worker_status
from tests.cluster.processes import Cluster, cluster_of
from tests.vllm.adapters import make_adapter
from tests.vllm.oracle import Oracle, Tops

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

MODEL, ADAPTER = "model", "adapter"
EOS, THOUGHT = 1, 4  # the latter ends the reasoning
MAX_MODEL_LEN, BATCHED_TOKENS = 2048, 256
TRITON_WITHIN_S = 120
TRITON = Path(__file__).parents[1] / "cluster" / "triton.py"
NO_WHITESPACE = {"structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True}}
ENGINE = VllmSettings(
    dtype="float32",
    max_model_len=MAX_MODEL_LEN,
    max_num_batched_tokens=BATCHED_TOKENS,
    kv_cache_gib=0.125,
    tool_parser="hermes",
    reasoning_parser="deepseek_r1",
    extra=NO_WHITESPACE,  # a random model would write it for ever
)
ROUTER = RouterConfig(
    listen="127.0.0.1:0",
    http="127.0.0.1:0",
    metrics="127.0.0.1:0",
    heartbeat_interval_s=0.2,
    heartbeat_timeout_s=4.0,
    deadline_s=120.0,
)
KV = KvTransferSettings(peer_silent_s=2.0, lease_s=10.0)


# The cluster, and plain vLLM beside it ------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def thinking_model(sensitive_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("thinking") / MODEL
    shutil.copytree(sensitive_model, out)
    for file in (out / "tokenizer.json", out / "tokenizer_config.json"):
        file.write_text(file.read_text().replace("<|system|>", "<think>").replace("<|user|>", "</think>"))
    return out


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_adapter(tmp_path_factory.mktemp("adapters") / ADAPTER))


@pytest.fixture(scope="module")
def oracle(thinking_model: Path, cores: tuple[int, int]) -> Iterator[Oracle]:
    loras = {"enable_lora": True, "max_loras": 1, "max_lora_rank": 8}
    started = Oracle(thinking_model, MAX_MODEL_LEN, cores[1], {**NO_WHITESPACE, **loras})
    yield started
    started.close()


@pytest.fixture(scope="module")
def cluster(
    tmp_path_factory: pytest.TempPathFactory,
    thinking_model: Path,
    adapter: str,
    cores: tuple[int, int],
    oracle: Oracle,
) -> Iterator[Cluster]:
    engine = ENGINE.model_copy(update={"loras": {ADAPTER: adapter}})
    router = ROUTER.model_copy(update={"model": str(thinking_model)})
    with cluster_of(tmp_path_factory.mktemp("api"), 0, 0, engine, router, KV) as started:
        for pool, core in zip((Pool.PREFILL, Pool.DECODE), cores, strict=True):
            started.add(f"{pool}-0", pool, model=str(thinking_model), cpu_core=core)
        for worker in started.workers.values():
            worker.ready()
        yield started


@pytest.fixture
async def client(cluster: Cluster) -> AsyncIterator[AsyncClient]:
    """Each test begins with both workers, and ends with all their blocks free and nothing pinned."""
    for name, worker in list(cluster.workers.items()):
        if worker.exited:
            cluster.restart(name).ready()
    async with AsyncClient(cluster.address) as connected:
        await settled(connected, 2)
        yield connected
        await settled(connected, sum(not worker.exited for worker in cluster.workers.values()))


@pytest.fixture
async def http(cluster: Cluster, client: AsyncClient) -> AsyncIterator[AsyncOpenAI]:
    url = f"http://{cluster.router.facts['http']}/v1"
    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as asking:
        yield asking


@dataclass
class Told:
    """One output, put together."""

    token_ids: tuple[int, ...] = ()
    text: str = ""
    finish_reason: FinishReason | None = None
    logprobs: tuple[Tops, ...] = ()
    prompt_logprobs: tuple[Tops, ...] = ()


@dataclass
class Answer:
    outputs: dict[int, Told] = field(default_factory=lambda: defaultdict(Told))
    usage: Usage | None = None
    timings: Timings | None = None

    def take(self, chunk: Chunk) -> None:
        told = self.outputs[chunk.choice]
        assert chunk.index == len(told.token_ids), "a token came twice or was left out"
        told.token_ids += chunk.token_ids
        told.text += chunk.text
        told.logprobs += plain(chunk.logprobs)
        told.prompt_logprobs += plain(chunk.prompt_logprobs)
        told.finish_reason = told.finish_reason or chunk.finish_reason
        self.usage, self.timings = chunk.usage, chunk.timings

    @property
    def moved(self) -> tuple[str, int]:
        """Who read the prompt for the decode worker, and what KV came from there."""
        assert self.timings is not None
        return self.timings.prefill_worker, self.timings.kv_bytes


def plain(positions: Sequence[Sequence[Logprob]]) -> tuple[Tops, ...]:
    return tuple(tuple((one.token_id, one.logprob, one.rank) for one in position) for position in positions)


async def asked(
    client: AsyncClient, prompt: tuple[int, ...], sampling: SamplingParams, **options: Unpack[Options]
) -> Answer:
    answer = Answer()
    async for chunk in client.generate(prompt, sampling, **options):
        answer.take(chunk)
    return answer


def in_vllms_names(sampling: Mapping[str, Any]) -> dict[str, Any]:
    renamed = {"include_stop": "include_stop_str_in_output"}
    return {renamed.get(name, name): value for name, value in sampling.items()}


def alike(ours: Sequence[Tops], theirs: Sequence[Tops]) -> bool:
    """Tokens and ranks exactly, log-probabilities within 1e-4."""
    names = [[(token, rank) for token, _, rank in tops] for tops in ours]
    values = [value for tops in ours for _, value, _ in tops]
    assert names == [[(token, rank) for token, _, rank in tops] for tops in theirs]
    return values == pytest.approx([value for tops in theirs for _, value, _ in tops], abs=1e-4, rel=0)


def jobs_and_transfers(cluster: Cluster) -> tuple[int, int]:
    """Of the prefill worker so far: prefill jobs that have ended, well or not, and transfers that have ended well."""
    url = f"http://{cluster.workers['prefill-0'].ready()['metrics']}/metrics"
    with urllib.request.urlopen(url, timeout=10) as page:
        families = list(text_string_to_metric_families(page.read().decode()))
    samples = [sample for family in families for sample in family.samples]
    jobs = [one for one in samples if one.name == "splitserve_worker_jobs_total" and one.labels["kind"] == "prefill"]
    transfers = [one for one in samples if one.name == "splitserve_worker_kv_transfer_bytes_count"]
    return int(sum(one.value for one in jobs)), int(sum(one.value for one in transfers))


async def has_cost(client: AsyncClient, cluster: Cluster, before: tuple[int, int]) -> tuple[int, int]:
    """Prefill jobs and transfers since then, once all is at rest."""
    await settled(client, 2)
    jobs, transfers = jobs_and_transfers(cluster)
    return jobs - before[0], transfers - before[1]


# Several outputs ----------------------------------------------------------------------------------------------------
SAMPLED: Mapping[str, Any] = {"max_tokens": 24, "temperature": 1.0, "seed": 11, "ignore_eos": True}


async def test_n_outputs_are_plain_vllms_for_one_prefill_and_one_transfer(
    client: AsyncClient, oracle: Oracle, cluster: Cluster
) -> None:
    """Also of a prompt whose siblings can't both be computed at once where it is cached: they wait for each other."""
    prompt, before = prompt_of(700, seed=1), jobs_and_transfers(cluster)
    expected = oracle.outputs(prompt, n=3, **SAMPLED)
    answer = await asked(client, prompt, SamplingParams(n=3, **SAMPLED))
    assert [answer.outputs[at].token_ids for at in range(3)] == [one.token_ids for one in expected]
    assert [answer.outputs[at].text for at in range(3)] == [one.text for one in expected]
    assert len({one.token_ids for one in expected}) == 3
    assert answer.usage == Usage(700, 72)
    assert answer.moved[0] == "prefill-0"
    assert await has_cost(client, cluster, before) == (1, 1)


async def test_siblings_find_their_prompt_cached_and_end_with_their_stream(
    client: AsyncClient, cluster: Cluster
) -> None:
    """Both would read it for twelve steps, one after the other, and the first output gets a token in each. What else
    lets it run ahead is the machine's load, so the best of some tries counts. The fixture counts the blocks."""
    prompts = [prompt_of(1285, seed=2 + at) for at in range(5)]
    steps = 2 * -(-1285 // BATCHED_TOKENS)
    before = jobs_and_transfers(cluster)
    leads = [await lead_of_first(client, prompt) for prompt in prompts]
    assert min(leads) < steps, leads
    assert await has_cost(client, cluster, before) == (5, 5)


async def lead_of_first(client: AsyncClient, prompt: tuple[int, ...]) -> int:
    """Tokens of the first output when the third one begins. Then the stream is cancelled."""
    answer = Answer()
    async with aclosing(client.generate(prompt, replace(greedy(600), n=3))) as chunks:
        async for chunk in chunks:
            answer.take(chunk)
            if len(answer.outputs) == 3:
                break
        status = await worker_status(client, "decode-0")
    assert status is not None
    assert status.decodes == 3
    return len(answer.outputs[0].token_ids)


# The prompt's log-probabilities -------------------------------------------------------------------------------------
@pytest.mark.parametrize("n", [1, 2])
async def test_a_prompts_logprobs_are_plain_vllms_and_nothing_is_moved_for_them(
    client: AsyncClient, oracle: Oracle, cluster: Cluster, n: int
) -> None:
    prompt, before = prompt_of(400, seed=10 + n), jobs_and_transfers(cluster)
    said: dict[str, Any] = {"n": n, "prompt_logprobs": 2, **SAMPLED}
    expected = oracle.outputs(prompt, n=n, **SAMPLED)
    (of_prompt,) = oracle.outputs(prompt, prompt_logprobs=2, **SAMPLED)  # vLLM with adapters breaks if n is above 1
    answer = await asked(client, prompt, SamplingParams(**said))
    assert answer.moved == ("", 0)
    assert alike(answer.outputs[0].prompt_logprobs, of_prompt.prompt_logprobs)
    assert len(answer.outputs[0].prompt_logprobs) == len(prompt)
    assert [answer.outputs[at].token_ids for at in range(n)] == [one.token_ids for one in expected]
    assert [answer.outputs[at].prompt_logprobs for at in range(1, n)] == [()] * (n - 1)
    assert await has_cost(client, cluster, before) == (0, 0)


async def test_the_logprobs_of_several_prompts_at_once_are_each_their_own(client: AsyncClient, oracle: Oracle) -> None:
    prompts = [prompt_of(100, seed=15 + at) for at in range(3)]
    said: dict[str, Any] = {"prompt_logprobs": 1, **GREEDY}
    expected = [oracle.outputs(prompt, **said)[0] for prompt in prompts]
    answers = await asyncio.gather(*(asked(client, prompt, SamplingParams(**said)) for prompt in prompts))
    for answer, one in zip(answers, expected, strict=True):
        assert alike(answer.outputs[0].prompt_logprobs, one.prompt_logprobs)
        assert answer.outputs[0].token_ids == one.token_ids


# Sampling -----------------------------------------------------------------------------------------------------------
GREEDY: Mapping[str, Any] = {"max_tokens": 32, "temperature": 0.0, "ignore_eos": True}
ENDS: Mapping[str, Any] = {"max_tokens": 32, "temperature": 0.0, "logit_bias": {EOS: 100.0}}
SAID: Mapping[str, Mapping[str, Any]] = {
    "logprobs": {**GREEDY, "logprobs": 3},
    "logprobs of a draw": {**SAMPLED, "logprobs": 0},
    "a bias that forces": {**GREEDY, "logit_bias": {1500: 100.0}, "logprobs": 1},
    "a seed": SAMPLED,
    "a shaped distribution": {**SAMPLED, "temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.01},
    "penalties": {**GREEDY, "presence_penalty": 1.5, "frequency_penalty": 1.0, "repetition_penalty": 1.3},
    "an end": ENDS,
    "min_tokens": {**ENDS, "min_tokens": 7},
    "stop_token_ids": {**GREEDY, "logit_bias": {1500: 100.0}, "stop_token_ids": [1500], "min_tokens": 3},
    "special tokens in the text": {**ENDS, "min_tokens": 2, "skip_special_tokens": False},
}


@pytest.mark.parametrize("said", SAID.values(), ids=SAID)
async def test_what_sampling_says_means_what_it_means_to_plain_vllm(
    client: AsyncClient, oracle: Oracle, said: Mapping[str, Any]
) -> None:
    prompt = prompt_of(300, seed=20)
    (expected,) = oracle.outputs(prompt, **in_vllms_names(said))
    answer = await asked(client, prompt, SamplingParams(**said))
    told = answer.outputs[0]
    assert (told.token_ids, told.text, told.finish_reason) == (
        expected.token_ids,
        expected.text,
        expected.finish_reason,
    )
    assert alike(told.logprobs, expected.logprobs)
    assert len(told.logprobs) == (len(told.token_ids) if "logprobs" in said else 0)


async def test_what_is_said_makes_a_difference(client: AsyncClient) -> None:
    """The negative twin: of these, none gives the same as another or as none."""
    prompt = prompt_of(300, seed=20)
    names = ("logprobs", "a bias that forces", "a seed", "a shaped distribution", "penalties", "an end", "min_tokens")
    answers = await asyncio.gather(*(asked(client, prompt, SamplingParams(**SAID[name])) for name in names))
    assert len({answer.outputs[0].token_ids for answer in answers}) == len(names)
    forced, ended, held_off = (answers[names.index(name)].outputs[0] for name in ("a bias that forces", *names[-2:]))
    assert set(forced.token_ids) == {1500}
    assert ended.token_ids == (EOS,)
    assert (len(held_off.token_ids), held_off.token_ids.index(EOS)) == (8, 7)


@pytest.mark.parametrize("include_stop", [False, True])
async def test_a_stop_string_ends_the_text_where_plain_vllm_ends_it(
    client: AsyncClient, oracle: Oracle, include_stop: bool
) -> None:
    prompt = prompt_of(300, seed=21)
    whole = (await asked(client, prompt, SamplingParams(**GREEDY))).outputs[0].text
    stop = whole[len(whole) // 2 :][:6]
    said: dict[str, Any] = {**GREEDY, "stop": [stop], "include_stop": include_stop}
    (expected,) = oracle.outputs(prompt, **in_vllms_names(said))
    told = (await asked(client, prompt, SamplingParams(**said))).outputs[0]
    assert (told.token_ids, told.text, told.finish_reason) == (expected.token_ids, expected.text, FinishReason.STOP)
    assert told.text.endswith(stop) is include_stop


# Adapters and salts -------------------------------------------------------------------------------------------------
async def test_an_adapter_is_a_model_by_name(
    client: AsyncClient, http: AsyncOpenAI, oracle: Oracle, adapter: str
) -> None:
    prompt = prompt_of(500, seed=30)
    (adapted,) = oracle.outputs(prompt, lora=adapter, **GREEDY)
    (base,) = oracle.outputs(prompt, **GREEDY)
    assert adapted.token_ids != base.token_ids
    for model, expected in ((ADAPTER, adapted), (MODEL, base), (ADAPTER, adapted)):
        answer = await asked(client, prompt, SamplingParams(**GREEDY), model=model)
        assert answer.outputs[0].token_ids == expected.token_ids
        over_http = await completed(http, prompt, model=model)
        assert (over_http.choices[0].text, over_http.model) == (expected.text, model)
    by_lora = await asked(client, prompt, SamplingParams(**GREEDY), lora=ADAPTER)
    assert by_lora.outputs[0].token_ids == adapted.token_ids
    assert by_lora.moved[0] == "prefill-0"


async def test_models_are_listed_with_what_they_adapt_and_no_others_are_there(
    client: AsyncClient, http: AsyncOpenAI
) -> None:
    assert [(model.name, model.parent) for model in await client.models()] == [(MODEL, ""), (ADAPTER, MODEL)]
    listed = [(model.id, model.parent) async for model in http.models.list()]  # type: ignore[attr-defined]
    assert listed == [(MODEL, None), (ADAPTER, MODEL)]
    with pytest.raises(ModelNotFound, match="'nobody' is not served here; there are: 'model', 'adapter'"):
        await asked(client, prompt_of(5), greedy(2), model="nobody")
    with pytest.raises(ModelNotFound, match="no worker has 'nobody'"):
        await asked(client, prompt_of(5), greedy(2), lora="nobody")
    with pytest.raises(openai.NotFoundError, match="'nobody' is not served here") as refusal:
        await completed(http, prompt_of(5), model="nobody")
    assert refusal.value.code == "model_not_found"


async def completed(http: AsyncOpenAI, prompt: Sequence[int], model: str = MODEL, **more: Any) -> Any:
    extra = {"ignore_eos": True, **more}
    return await http.completions.create(
        model=model, prompt=list(prompt), max_tokens=32, temperature=0, extra_body=extra
    )


async def test_cached_kv_is_found_under_one_salt_and_never_under_another(
    client: AsyncClient, http: AsyncOpenAI
) -> None:
    """What is in the decode worker's prefix cache is not moved to it."""
    prompt, sampling = prompt_of(700, seed=40), SamplingParams(**GREEDY)
    cold = await asked(client, prompt, sampling, cache_salt="one")
    warm = await asked(client, prompt, sampling, cache_salt="one")
    assert warm.moved[1] < cold.moved[1]
    assert (await completed(http, prompt, cache_salt="three")).choices[0].text == cold.outputs[0].text
    for salt, bytes_moved in (("two", cold), ("three", warm), ("", cold)):
        other = await asked(client, prompt, sampling, cache_salt=salt)
        assert other.moved[1] == bytes_moved.moved[1], salt
        assert other.outputs[0].token_ids == cold.outputs[0].token_ids


# Tools and reasoning, by OpenAI's package ---------------------------------------------------------------------------
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "celsius": {"type": "boolean"}},
    "required": ["city", "celsius"],
    "additionalProperties": False,
}
WEATHER: Any = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
CLOCK: Any = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
BY_NAME: Any = {"type": "function", "function": {"name": "weather"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "celsius": true}}\n</tool_call>'
HELLO: Any = [{"role": "user", "content": "What is the weather in Rome?"}]
THOUGHT_OUT: Any = [*HELLO, {"role": "assistant", "content": "Well.</think>"}]
AT_ONCE = {str(THOUGHT): 100, str(EOS): 60}  # the reasoning ends with the first token, all else as soon as it may
ASKED: Any = {"model": MODEL, "messages": HELLO, "temperature": 0, "max_tokens": 120}


@pytest.mark.parametrize("choice", ["required", BY_NAME], ids=["required", "by name"])
async def test_a_forced_call_keeps_to_its_tools_schema(http: AsyncOpenAI, choice: Any) -> None:
    tools = [WEATHER] if choice == "required" else [CLOCK, WEATHER]
    said: Any = {**ASKED, "tools": tools, "tool_choice": choice, "logit_bias": AT_ONCE}
    whole = (await http.chat.completions.create(**said)).choices[0]
    assert whole.finish_reason == ("tool_calls" if choice == "required" else "stop")
    assert whole.message.tool_calls
    assert not (whole.message.content or "").strip()
    for call in whole.message.tool_calls:
        assert (call.function.name, call.id != "") == ("weather", True)
        arguments = json.loads(call.function.arguments)
        assert set(arguments) == {"city", "celsius"}
        assert (arguments["city"] in ("Paris", "Rome"), type(arguments["celsius"])) == (True, bool)
    pieces = [part.choices[0].delta async for part in await http.chat.completions.create(**said, stream=True)]
    streamed = "".join(
        call.function.arguments or "" for piece in pieces for call in piece.tool_calls or () if call.index == 0
    )
    assert streamed == whole.message.tool_calls[0].function.arguments


async def test_a_call_that_the_model_makes_itself_is_told_apart_from_its_text(http: AsyncOpenAI) -> None:
    said = {"structured_outputs": {"choice": [f"Let me look. {CALL}"]}}
    whole = await http.chat.completions.create(
        **ASKED, tools=[WEATHER], tool_choice="auto", logit_bias=AT_ONCE, extra_body=said
    )
    message = whole.choices[0].message
    assert (message.content, whole.choices[0].finish_reason) == ("Let me look. ", "tool_calls")
    (call,) = message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Rome", "celsius": True})


async def test_a_chat_that_calls_nothing_is_text(http: AsyncOpenAI) -> None:
    said: Any = {**ASKED, "messages": THOUGHT_OUT, "max_tokens": 24}
    going_on = {"continue_final_message": True, "add_generation_prompt": False, "ignore_eos": True}
    plain_text = (await http.chat.completions.create(**said, extra_body=going_on)).choices[0]
    auto = (await http.chat.completions.create(**said, tools=[WEATHER], extra_body=going_on)).choices[0]
    assert auto.message.content
    assert auto.message.content == plain_text.message.content
    assert (auto.message.tool_calls, auto.finish_reason) == (None, "length")


async def test_reasoning_is_no_part_of_the_text(http: AsyncOpenAI) -> None:
    thinking = (await http.chat.completions.create(**{**ASKED, "max_tokens": 12})).choices[0].message
    assert thinking.reasoning
    assert not thinking.content
    kept_to = {"structured_outputs": {"choice": ["the first of them", "another one"]}}
    spoken = (await http.chat.completions.create(**ASKED, logit_bias=AT_ONCE, extra_body=kept_to)).choices[0].message
    assert spoken.content in ("the first of them", "another one")
    assert not getattr(spoken, "reasoning", None)


# KServe -------------------------------------------------------------------------------------------------------------
async def test_tritons_client_gets_the_tokens_of_our_own(client: AsyncClient, oracle: Oracle, cluster: Cluster) -> None:
    prompt = prompt_of(350, seed=50)
    request = {
        "model_name": MODEL,
        "inputs": [["input_ids", "INT64", [len(prompt)], list(prompt)]],
        "parameters": dict(SAMPLED),
        "outputs": ["text_output", "token_ids"],
    }
    whole, streamed = await asyncio.gather(
        *(asyncio.to_thread(by_triton, cluster.address, call, request) for call in ("infer", "stream"))
    )
    native = (await asked(client, prompt, SamplingParams(**SAMPLED))).outputs[0]
    assert native.token_ids == oracle.outputs(prompt, **SAMPLED)[0].token_ids
    assert whole[0]["outputs"] == {"text_output": [native.text], "token_ids": list(native.token_ids)}
    assert tuple(token for one in streamed for token in one["outputs"]["token_ids"]) == native.token_ids
    assert len(streamed) > 1


def by_triton(address: str, call: str, request: dict[str, Any]) -> Any:
    ran = subprocess.run(
        [sys.executable, str(TRITON), address, call],
        input=json.dumps({"requests": [request]}),
        capture_output=True,
        text=True,
        timeout=TRITON_WITHIN_S,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


# Structured output; the last of all, since it kills the decode worker -----------------------------------------------
PATTERN = "([a-z]{5} ){30}end"
TEXTS = tuple(" ".join([word] * 12) for word in ("the first of them", "another one", "neither of them"))
NAMES = {
    "type": "object",
    "properties": {"names": {"type": "array", "items": {"enum": ["Emma", "Anne"]}, "minItems": 20, "maxItems": 20}},
    "required": ["names"],
    "additionalProperties": False,
}
KEPT: Mapping[str, tuple[StructuredOutput, Mapping[str, Any], Callable[[str], bool]]] = {
    "regex": (
        StructuredOutput(regex=PATTERN),
        {"regex": PATTERN},
        lambda text: re.fullmatch(PATTERN, text) is not None,
    ),
    "choice": (StructuredOutput(choice=TEXTS), {"choice": list(TEXTS)}, lambda text: text in TEXTS),
    "json_schema": (
        StructuredOutput(json_schema=json.dumps(NAMES)),
        {"json": json.dumps(NAMES)},
        lambda text: len(json.loads(text)["names"]) == 20,
    ),
}
STRUCTURED: Mapping[str, Any] = {"max_tokens": 300, "temperature": 0.8, "seed": 5}


async def test_structured_output_goes_on_exactly_when_its_decode_worker_is_killed(
    client: AsyncClient, oracle: Oracle, cluster: Cluster
) -> None:
    prompts = [prompt_of(200, seed=60 + at) for at in range(len(KEPT))]
    samplings = [SamplingParams(structured_output=structured, **STRUCTURED) for structured, _, _ in KEPT.values()]
    for prompt, sampling, (_, in_vllm, keeps) in zip(prompts, samplings, KEPT.values(), strict=True):
        (expected,) = oracle.outputs(prompt, structured_outputs=dict(in_vllm), **STRUCTURED)
        told = (await asked(client, prompt, sampling)).outputs[0]
        assert keeps(told.text), told.text
        assert (told.token_ids, told.text, told.finish_reason) == (expected.token_ids, expected.text, "stop")
    whole = [await ask(client, prompt, sampling) for prompt, sampling in zip(prompts, samplings, strict=True)]
    begun = [asyncio.Event() for _ in prompts]

    def note(event: asyncio.Event) -> Callable[[int], None]:
        return lambda tokens: event.set() if tokens > 5 else None

    async with asyncio.TaskGroup() as tasks:
        asking = [
            tasks.create_task(ask(client, prompt, sampling, note(event)))
            for prompt, sampling, event in zip(prompts, samplings, begun, strict=True)
        ]
        for event in begun:
            await asyncio.wait_for(event.wait(), 60)
        cluster.kill("decode-0")
    assert [task.result().timings.attempts for task in asking] == [2, 2, 2]
    assert [task.result().timings.decode_worker for task in asking] == ["prefill-0"] * 3
    assert [task.result().same_as(one) for task, one in zip(asking, whole, strict=True)] == [True] * 3
