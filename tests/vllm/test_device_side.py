"""The connector's side of a device's memory, as far as goes without one: events before WRITEs, graphs, staging."""

import multiprocessing
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from benchmarks.remote_engine import RemoteEngine
from splitserve.core.config import KvBuffer, KvTransferSettings, VllmSettings
from splitserve.kv.ticket import TransferKey
from tests.contract.engines import a_decode, a_prefill, a_prompt, a_ticket, greedy, started
from tests.vllm.conftest import VOCAB_SIZE
from tests.vllm.device_side import answer

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

ANSWER_TIMEOUT_S = 240
KEY = TransferKey("one", 1)


@pytest.fixture(scope="module")
def answers() -> dict[str, Any]:
    """One child answers all, for importing vLLM is what takes the time."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=answer, args=(theirs,), daemon=True)
    child.start()
    theirs.close()
    try:
        assert ours.poll(ANSWER_TIMEOUT_S), "the child does not answer"
        found: dict[str, Any] = ours.recv()
    finally:
        child.kill()
        child.join()
        ours.close()
    return found


def test_each_layer_is_written_after_an_event_that_was_recorded_behind_it(answers: dict[str, Any]) -> None:
    """And what vLLM calls computed before the step after one that was recorded before it."""
    assert answers["every hook"] == [
        ("computing", KEY, [[4, 5]], 16, 0),
        ("computed", 0, [(KEY, 32)], 1),
        ("computed", 1, [(KEY, 32)], 2),
        ("prefill_ended", KEY),
    ]


def test_a_layer_whose_hook_a_graph_has_swallowed_is_written_after_the_forward(answers: dict[str, Any]) -> None:
    assert answers["one hook"] == answers["every hook"]


def test_only_the_piecewise_setting_requires_piecewise_graphs(answers: dict[str, Any]) -> None:
    assert answers["piecewise"] == {"not said": False, "full_decode": False, "piecewise": True}


def test_the_mirror_copies_the_named_blocks_both_ways_and_no_other(answers: dict[str, Any]) -> None:
    for mirrored in answers["mirrored"]:
        assert mirrored["fences"]
        assert mirrored["exact"]
        assert not mirrored["other layer"]
        assert mirrored["region"] == (96, 96, 8)
        assert mirrored["none"] == []


def test_neighbouring_blocks_are_copied_at_once_where_they_lie_together(answers: dict[str, Any]) -> None:
    together, apart = (mirrored["runs"] for mirrored in answers["mirrored"])
    assert together == [(0, 1), (3, 5), (6, 7)]
    assert apart == [(0, 1), (3, 4), (4, 5), (6, 7)]


def test_a_cpus_memory_is_registered_itself_unless_host_buffers_are_asked_for(answers: dict[str, Any]) -> None:
    assert answers["buffers"] == {"auto": "NixlTransport", "device": "NixlTransport", "host": "StagedTransport"}


def test_tokens_are_the_same_when_kv_goes_through_host_buffers(sensitive_model: Path, cores: tuple[int, int]) -> None:
    """Of both engines; then the source misreads its copies, and they must differ."""
    settings = VllmSettings(
        dtype="float32", max_model_len=2048, max_num_batched_tokens=256, kv_cache_gib=0.125, enable_prefix_caching=False
    )
    kv = KvTransferSettings(buffer=KvBuffer.HOST)
    engines = [RemoteEngine(sensitive_model, settings, kv, uuid4().hex, core) for core in cores]
    for engine in engines:
        engine.spawn()
    with started(engines[0]) as source, started(engines[1]) as destination:
        for tokens, misread in ((15, False), (700, False), (1000, False), (700, True)):
            prompt = a_prompt(range(300, VOCAB_SIZE), tokens, tokens)
            ticket = a_ticket(source, destination)
            with engines[0].misreading() if misread else nullcontext():
                decode = destination.submit(a_decode(prompt, greedy(12), ticket))
                prefill = source.submit(a_prefill(prompt, ticket))
                alone = source.submit(a_decode(prompt, greedy(12)))
                assert prefill.outcome.failure is None
                assert (decode.wait().tokens == alone.wait().tokens) is not misread
