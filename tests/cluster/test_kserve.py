"""Triton's own client against a real router with simulated workers: every call that the protocol has for it."""

import asyncio
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from splitserve import __version__
from splitserve.client import AsyncClient
from splitserve.core.config import SimSettings
from splitserve.core.request import SamplingParams
from tests.cluster.asking import Answer, ask, eventually, prompt_of, settled
from tests.cluster.processes import FAST, Cluster, cluster_of

WITHIN_S = 120
SERVICE = "inference.GRPCInferenceService"
TEXT = "It is a truth universally acknowledged,"
INVALID, NOT_FOUND = "StatusCode.INVALID_ARGUMENT", "StatusCode.NOT_FOUND"
ENGINE = SimSettings.model_validate({**FAST.model_dump(), "loras": ["polite"]})
BOUND = {"temperature": 0.0, "ignore_eos": True}

Triton = Callable[..., Awaitable[Any]]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster_of(tmp_path_factory.mktemp("kserve"), prefill=1, decode=1, engine=ENGINE) as started:
        yield started


@pytest.fixture
async def client(cluster: Cluster) -> AsyncIterator[AsyncClient]:
    """After each test all memory is free again on both workers."""
    async with AsyncClient(cluster.address) as connected:
        yield connected
        await settled(connected, 2)


@pytest.fixture
def triton(cluster: Cluster, client: AsyncClient) -> Triton:
    async def call(name: str, **arguments: Any) -> Any:
        return await asyncio.to_thread(_in_another_process, cluster.address, name, arguments)

    return call


def _in_another_process(address: str, call: str, arguments: dict[str, Any]) -> Any:
    script = Path(__file__).with_name("triton.py")
    ran = subprocess.run(
        [sys.executable, str(script), address, call],
        input=json.dumps(arguments),
        capture_output=True,
        text=True,
        timeout=WITHIN_S,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def text(said: str = TEXT) -> list[Any]:
    return ["text_input", "BYTES", [1], [said]]


def flag(name: str, said: bool = True) -> list[Any]:
    return [name, "BOOL", [1], [said]]


def ids(prompt: tuple[int, ...]) -> list[Any]:
    return ["input_ids", "INT64", [len(prompt)], list(prompt)]


def sampling(**said: Any) -> list[Any]:
    return ["sampling_parameters", "BYTES", [1], [json.dumps(said)]]


def request(*inputs: list[Any], parameters: dict[str, Any] | None = None, **arguments: Any) -> dict[str, Any]:
    return {"inputs": inputs, "parameters": {"max_tokens": 24, **BOUND, **(parameters or {})}, **arguments}


async def test_health_and_reflection_know_the_service(cluster: Cluster, client: AsyncClient) -> None:
    async with grpc.aio.insecure_channel(cluster.address) as channel:
        health, asks = health_pb2_grpc.HealthStub(channel), health_pb2.HealthCheckRequest(service=SERVICE)

        async def serves() -> bool:
            return bool((await health.Check(asks)).status == health_pb2.HealthCheckResponse.SERVING)

        await eventually(serves, "health of the service")  # the router looks at its workers now and then
        asked = reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE)
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        answers = [answer async for answer in reflection.ServerReflectionInfo(iter([asked]))]
    assert answers[0].HasField("file_descriptor_response")


# What there is ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("call", ["status", "aio_status"])
async def test_the_server_and_its_model_are_live_ready_and_described(triton: Triton, call: str) -> None:
    said = await triton(call, model="demo")
    assert said["live"]
    assert said["ready"]
    assert said["model_ready"]
    assert said["server"]["name"] == "splitserve"
    assert said["server"]["version"] == __version__
    assert said["model"]["versions"] == ["1"]
    tensors = {tensor["name"]: tensor for kind in ("inputs", "outputs") for tensor in said["model"][kind]}
    assert tensors["text_input"] == {"name": "text_input", "datatype": "BYTES", "shape": ["1"]}
    assert tensors["text_output"] == {"name": "text_output", "datatype": "BYTES", "shape": ["-1"]}


async def test_a_model_or_version_that_is_not_served_is_not_found(triton: Triton) -> None:
    said = await triton("status", model="demo")
    assert said["version_1_ready"]
    assert [one["status"] for one in said["unknown"]] == [NOT_FOUND] * 3
    (refused,) = await triton("infer", requests=[request(text(), model_name="gpt-9")])
    assert refused["status"] == NOT_FOUND
    assert "'gpt-9' is not served here; there are: 'demo', 'polite'" in refused["message"]


async def test_a_lora_adapter_is_a_model_too(triton: Triton, client: AsyncClient) -> None:
    assert (await triton("status", model="polite"))["model_ready"]
    prompt = prompt_of(60)
    base, adapted = await triton("infer", requests=[request(ids(prompt)), request(ids(prompt), model_name="polite")])
    native = await ask(client, prompt, greedy(24), lora="polite")
    assert adapted["outputs"]["text_output"] == [native.text]
    assert adapted["outputs"] != base["outputs"]


# Whole answers ------------------------------------------------------------------------------------------------------
def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)


@pytest.mark.parametrize("call", ["infer", "async_infer", "aio_infer"])
async def test_a_whole_answer_is_that_of_our_own_client(triton: Triton, client: AsyncClient, call: str) -> None:
    prompts = [prompt_of(1 + 150 * number) for number in range(4)]
    asked = [
        request(ids(prompt), outputs=["text_output", "token_ids", "finish_reason"], request_id=f"r{at}")
        for at, prompt in enumerate(prompts)
    ]
    answers = await triton(call, requests=asked)
    for at, (answer, prompt) in enumerate(zip(answers, prompts, strict=True)):
        native = await ask(client, prompt, greedy(24))
        assert answer["id"] == f"r{at}"
        assert answer["model"] == ["demo", "1"]
        assert answer["outputs"] == {
            "text_output": [native.text],
            "token_ids": list(native.token_ids),
            "finish_reason": ["length"],
        }


async def test_the_answer_begins_with_the_prompt_unless_that_is_excluded(triton: Triton) -> None:
    asked = [request(text()), request(text(), flag("exclude_input_in_output"))]
    whole, excluded = [one["outputs"]["text_output"][0] for one in await triton("infer", requests=asked)]
    assert whole == TEXT + excluded
    assert excluded


async def test_max_tokens_min_tokens_and_ignore_eos_are_honoured(triton: Triton, client: AsyncClient) -> None:
    """A prompt is looked for whose answer ends by itself, so that the two latter make a difference."""
    count = flag("return_num_output_tokens")
    prompt, ends_at = await _an_answer_that_ends(client)
    bounds: list[dict[str, Any]] = [
        {"max_tokens": 5, "ignore_eos": True},
        {"max_tokens": 200},
        {"max_tokens": 200, "min_tokens": ends_at + 10},
        {"max_tokens": 200, "ignore_eos": True},
    ]
    greedily: dict[str, Any] = {"temperature": 0}
    in_parameters: list[Any] = [{"inputs": [ids(prompt), count], "parameters": {**greedily, **one}} for one in bounds]
    in_json: list[Any] = [{"inputs": [ids(prompt), count, sampling(temperature="0", **one)]} for one in bounds]
    counts = [one["outputs"]["num_output_tokens"][0] for one in await triton("infer", requests=in_parameters + in_json)]
    assert counts[:4] == counts[4:]
    assert counts[0] == 5
    assert counts[1] == ends_at
    assert counts[2] >= ends_at + 10
    assert counts[3] == 200


async def _an_answer_that_ends(client: AsyncClient) -> tuple[tuple[int, ...], int]:
    for seed in range(200):
        prompt = prompt_of(40, seed=seed)
        answer: Answer = await ask(client, prompt, SamplingParams(max_tokens=180, temperature=0.0))
        if answer.last.finish_reason == "stop" and len(answer.token_ids) > 1:
            return prompt, len(answer.token_ids)
    raise AssertionError("no answer of the simulated engine ends by itself")


async def test_sampling_parameters_mean_what_they_do_to_our_own_client(triton: Triton, client: AsyncClient) -> None:
    prompt = prompt_of(120)
    said = {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "seed": 7, "repetition_penalty": 1.2}
    (answer,) = await triton("infer", requests=[request(ids(prompt), parameters=said)])
    native = await ask(client, prompt, SamplingParams(max_tokens=24, ignore_eos=True, **said))  # type: ignore[arg-type]
    assert answer["outputs"]["text_output"] == [native.text]


async def test_several_outputs_usage_and_timings_come_with_the_answer(triton: Triton) -> None:
    returns = [
        flag(f"return_{name}") for name in ("num_input_tokens", "num_output_tokens", "logprobs", "cumulative_logprob")
    ]
    (answer,) = await triton(
        "infer", requests=[request(ids(prompt_of(50)), *returns, parameters={"n": 3, "logprobs": 2})]
    )
    outputs = answer["outputs"]
    assert len(outputs["text_output"]) == 3
    assert outputs["num_output_tokens"] == [24, 24, 24]
    assert outputs["num_input_tokens"] == [50]
    assert [len(json.loads(one)) for one in outputs["logprobs"]] == [24, 24, 24]
    assert len(outputs["cumulative_logprob"]) == 3
    assert answer["shapes"]["num_output_tokens"] == ["UINT32", 3]
    assert answer["parameters"]["prompt_tokens"] == 50
    assert answer["parameters"]["output_tokens"] == 72
    assert answer["parameters"]["decode_worker"] == "decode-0"
    assert answer["parameters"]["ttft_s"] > 0


BAD: list[tuple[dict[str, Any], str]] = [
    (request(["prompt", "BYTES", [1], ["x"]]), "inputs[0].name"),
    (request(["text_input", "INT32", [1], [5]]), "text_input"),
    (request(["text_input", "BYTES", [2], ["x", "y"]]), "text_input"),
    (request(["text_input", "BYTES", [1, 1], ["x"]]), "text_input"),
    (request(text("")), "text_input"),
    (request(), "text_input"),
    (request(text(), ids((300,))), "text_input"),
    (request(ids((2048,))), "input_ids"),
    (request(text(), flag("stream")), "stream"),
    (request(text(), outputs=["logits"]), "outputs[0].name"),
    (request(text(), parameters={"max_tokens": "many"}), "parameters.max_tokens"),
    (request(text(), parameters={"max_tokens": 0}), "parameters.max_tokens"),
    (request(text(), parameters={"max_new_tokens": 5}), "parameters.max_new_tokens"),
    (request(text(), sampling(temperature=3)), "sampling_parameters.temperature"),
    (request(text(), sampling(top_p=0)), "sampling_parameters.top_p"),
    (request(text(), sampling(best_of=3)), "sampling_parameters.best_of"),
    (request(text(), sequence_id=7), "parameters.sequence_end"),
    (request(text(), timeout=-5), "parameters.timeout"),
]
for bad, field in BAD:
    if field == "sampling_parameters.temperature":
        del bad["parameters"]["temperature"]


async def test_bad_input_is_refused_by_the_name_that_the_client_gave_it(triton: Triton) -> None:
    answers = await triton("infer", requests=[bad for bad, _ in BAD])
    assert [answer.get("status") for answer in answers] == [INVALID] * len(BAD)
    said = [answer["message"].partition(": ")[0] for answer in answers]
    assert said == [field for _, field in BAD]


async def test_a_clients_timeout_ends_the_request(triton: Triton) -> None:
    (late,) = await triton("infer", requests=[request(ids(prompt_of(60)), timeout=1, parameters={"max_tokens": 4000})])
    assert late["status"] == "StatusCode.DEADLINE_EXCEEDED"


async def test_ids_may_be_the_same_at_the_same_time(triton: Triton) -> None:
    """Clients count from 1, each of them."""
    asked = [request(ids(prompt_of(40, seed=number)), request_id="1") for number in range(8)]
    assert [answer["id"] for answer in await triton("async_infer", requests=asked)] == ["1"] * 8


# Streams ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("call", ["stream", "aio_stream"])
async def test_requests_of_one_stream_are_answered_token_by_token_and_told_apart(
    triton: Triton, client: AsyncClient, call: str
) -> None:
    prompts = [prompt_of(100 + 40 * number, seed=number) for number in range(6)]
    returns = ["text_output", "token_ids", "finish_reason"]
    asked = [
        request(ids(prompt), outputs=returns, request_id=f"r{at}", parameters={"max_tokens": 80})
        for at, prompt in enumerate(prompts)
    ]
    came: dict[str, list[Any]] = defaultdict(list)
    order = await triton(call, requests=asked)
    for response in order:
        came[response["id"]].append(response)
    for at, prompt in enumerate(prompts):
        native = await ask(client, prompt, greedy(80))
        responses = came[f"r{at}"]
        assert "".join(one["outputs"]["text_output"][0] for one in responses) == native.text
        assert tuple(token for one in responses for token in one["outputs"]["token_ids"]) == native.token_ids
        assert [one["parameters"]["triton_final_response"] for one in responses] == [False] * (len(responses) - 1) + [
            True
        ]
        assert {one["outputs"]["finish_reason"][0] for one in responses[:-1]} == {"None"}
        assert responses[-1]["outputs"]["finish_reason"] == ["length"]
        assert responses[-1]["parameters"]["output_tokens"] == 80
        assert len(responses) > 3  # as tokens come, not whole
    ids_in_order = [response["id"] for response in order]
    assert ids_in_order != sorted(ids_in_order)  # none waits for another to end


async def test_a_stream_may_ask_for_whole_answers_and_for_a_mark_on_the_last_one(triton: Triton) -> None:
    asked = request(text(), flag("stream", False), enable_empty_final_response=True)
    (whole,) = await triton("stream", requests=[asked])
    assert whole["outputs"]["text_output"][0].startswith(TEXT)
    assert whole["parameters"]["triton_final_response"] is True


async def test_one_requests_error_leaves_the_streams_other_requests_alone(triton: Triton) -> None:
    good = [request(text(), request_id=f"good-{at}") for at in range(3)]
    bad = request(text(), request_id="bad", parameters={"top_p": 7.0})
    came = await triton("stream", requests=[good[0], bad, *good[1:]])
    (error,) = [one for one in came if "message" in one]
    assert error["message"].startswith("[request id: bad] INVALID_ARGUMENT: parameters.top_p: 7.0 must be")
    ended = [one["id"] for one in came if one.get("parameters", {}).get("triton_final_response")]
    assert sorted(ended) == ["good-0", "good-1", "good-2"]


async def test_a_client_that_wants_a_status_for_an_error_gets_one(triton: Triton) -> None:
    asked = [request(text(), model_name="gpt-9")]
    (refused,) = await triton("stream", requests=asked, headers={"triton_grpc_error": "true"})
    assert refused["status"] == NOT_FOUND
    assert refused["message"].startswith("model: 'gpt-9' is not served here")


async def test_a_stream_that_is_cancelled_frees_its_blocks_on_both_sides(triton: Triton, client: AsyncClient) -> None:
    """The fixture counts the blocks."""
    asked = request(ids(prompt_of(2000)), parameters={"max_tokens": 4000})
    seen = await triton("cancelled_stream", request=asked, responses=3)
    assert [one["parameters"]["triton_final_response"] for one in seen[:3]] == [False] * 3
    assert seen[-1]["status"] == "StatusCode.CANCELLED"
    await eventually(lambda: _nothing_runs(client), "an end of what was cancelled")


async def _nothing_runs(client: AsyncClient) -> bool:
    return (await client.fleet()).running_requests == 0


async def test_an_answer_that_nobody_waits_for_any_more_frees_its_blocks(triton: Triton) -> None:
    asked = request(ids(prompt_of(2000)), parameters={"max_tokens": 6000})
    given_up = await triton("cancelled_infer", request=asked)
    assert given_up["status"] == "StatusCode.DEADLINE_EXCEEDED"


async def test_sixty_four_requests_on_one_stream_are_each_exact(triton: Triton, client: AsyncClient) -> None:
    prompts = [prompt_of(1 + 37 * number % 900, seed=number) for number in range(64)]
    asked = [request(ids(prompt), request_id=str(at)) for at, prompt in enumerate(prompts)]
    texts = [""] * len(prompts)
    for response in await triton("stream", requests=asked):
        texts[int(response["id"])] += response["outputs"]["text_output"][0]
    native = await asyncio.gather(*(ask(client, prompt, greedy(24)) for prompt in prompts))
    assert texts == [answer.text for answer in native]


# Beside our own client ----------------------------------------------------------------------------------------------
def test_our_client_and_tritons_live_in_one_process() -> None:
    """Only a router has messages of the same names."""
    code = "import splitserve.client, tritonclient.grpc, splitserve.cli.main"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=WITHIN_S, check=False)
    assert ran.returncode == 0, ran.stderr
