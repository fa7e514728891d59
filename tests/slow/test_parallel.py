"""Sources and destinations of unequal tensor parallelism: real vLLM, AsyncLLM with two ranks, the stock pull mode."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

import pytest

from benchmarks.remote_engine import RemoteEngine
from splitserve.core.config import KvTransferSettings, VllmSettings
from splitserve.core.worker import KvMode
from tests.contract.engines import Listener, Run, a_decode, a_prefill, a_prompt, a_ticket, greedy, started
from tests.vllm.conftest import VOCAB_SIZE
from tests.vllm.oracle import Oracle

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(900)]

Prompt = tuple[int, ...]

MAX_MODEL_LEN = 2048
OUTPUT_TOKENS = 24
LENGTHS = (1, 15, 128, 129, 600, 1000)  # around a block of 128 tokens, and several chunks of 256
ONE_RANK = VllmSettings(dtype="float32", max_model_len=MAX_MODEL_LEN, max_num_batched_tokens=256, kv_cache_gib=0.125)
TWO_RANKS = ONE_RANK.model_copy(update={"tensor_parallel_size": 2, "extra": {"distributed_executor_backend": "mp"}})


@dataclass(frozen=True, slots=True)
class Engines:
    two_ranks: Listener
    one_rank: Listener
    oracle: Oracle

    def pair(self, source_ranks: int) -> tuple[Listener, Listener]:
        """Source and destination."""
        return (self.two_ranks, self.one_rank) if source_ranks == 2 else (self.one_rank, self.two_ranks)

    def expected(self, prompt: Prompt) -> Prompt:
        return tuple(self.oracle.continue_each([prompt], OUTPUT_TOKENS)[0])


@pytest.fixture(scope="module")
def started_engines(sensitive_model: Path, cores: tuple[int, int]) -> Iterator[Engines]:
    kv = KvTransferSettings(mode=KvMode.PULL, lease_s=10.0)
    two_ranks = RemoteEngine(sensitive_model, TWO_RANKS, kv, uuid4().hex, cores[0])
    one_rank = RemoteEngine(sensitive_model, ONE_RANK, kv, uuid4().hex, cores[1])
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[1]}")  # "auto" wants a NUMA node each
            two_ranks.spawn()
        one_rank.spawn()
        oracle = Oracle(sensitive_model, MAX_MODEL_LEN, cores[1])
        stack.callback(oracle.close)
        yield Engines(stack.enter_context(started(two_ranks)), stack.enter_context(started(one_rank)), oracle)


@pytest.fixture
def engines(started_engines: Engines) -> Iterator[Engines]:
    """After each test all blocks are free on both."""
    yield started_engines
    started_engines.two_ranks.wait_at_rest()
    started_engines.one_rank.wait_at_rest()


def drawn(tokens: int, seed: int = 0) -> Prompt:
    return a_prompt(range(300, VOCAB_SIZE), tokens, seed)


def hand_over(pair: tuple[Listener, Listener], read: Prompt, asked: Prompt | None = None) -> Run:
    """Read by the source, continued by the destination, which may have been asked to continue another prompt."""
    source, destination = pair
    ticket = a_ticket(source, destination)
    outcome = source.submit(a_prefill(read, ticket)).outcome
    assert outcome.failure is None, outcome
    ticket = replace(ticket, handover=outcome.handover)
    return destination.submit(a_decode(asked or read, greedy(OUTPUT_TOKENS), ticket))


def test_two_ranks_write_what_one_does(engines: Engines) -> None:
    for length in LENGTHS:
        alone = engines.two_ranks.submit(a_decode(drawn(length), greedy(OUTPUT_TOKENS))).wait()
        assert alone.tokens == engines.expected(drawn(length)), f"{length} prompt tokens"


@pytest.mark.parametrize("source_ranks", [2, 1])
@pytest.mark.parametrize("length", LENGTHS)
def test_kv_of_a_source_serves_a_destination_with_another_number_of_ranks(
    engines: Engines, source_ranks: int, length: int
) -> None:
    prompt = drawn(length, seed=source_ranks)
    decode = hand_over(engines.pair(source_ranks), prompt).wait()
    assert decode.outcome.failure is None, decode.outcome
    assert decode.tokens == engines.expected(prompt)


@pytest.mark.parametrize("source_ranks", [2, 1])
def test_eight_at_once_are_each_exact(engines: Engines, source_ranks: int) -> None:
    prompts = [drawn(40 + 90 * number, seed=10 * source_ranks + number) for number in range(8)]
    decodes = [hand_over(engines.pair(source_ranks), prompt) for prompt in prompts]
    assert [decode.wait().tokens for decode in decodes] == [engines.expected(prompt) for prompt in prompts]


@pytest.mark.parametrize("source_ranks", [2, 1])
def test_the_kv_of_another_prompt_is_seen_in_the_tokens(engines: Engines, source_ranks: int) -> None:
    """So the tests above would notice ranks whose heads were swapped or left out."""
    asked = drawn(600, seed=50)
    decode = hand_over(engines.pair(source_ranks), drawn(600, seed=51), asked).wait()
    assert decode.tokens != engines.expected(asked)
