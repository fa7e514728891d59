import asyncio
from collections.abc import AsyncGenerator, Sequence

import numpy as np
import pytest

from splitserve.bench.open_loop import run
from splitserve.bench.run import Ending
from splitserve.bench.targets import ask_router, prompt_ids, router
from splitserve.core.request import Chunk, FinishReason, SamplingParams
from splitserve.workload.prefixes import offsets_of
from splitserve.workload.requests import Prefixes, Requests
from tests.unit.bench.virtual import run_virtually

REQUESTS = Requests(
    arrival_s=np.array([0.0, 1.0, 2.0]),
    prompt_tokens=np.array([70, 50, 40]),
    output_tokens=np.array([4, 5, 6]),
    prefixes=Prefixes(np.array([7, 8, 9, 7, 8, 5]), offsets_of(np.array([3, 2, 1])), 16),
)


class FakeClient:
    """Answers two tokens a second."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], SamplingParams]] = []
        self.closed = 0

    async def generate(
        self, prompt: Sequence[int], sampling: SamplingParams | None = None
    ) -> AsyncGenerator[Chunk, None]:
        assert sampling is not None
        assert sampling.max_tokens is not None
        self.asked.append((list(prompt), sampling))
        try:
            for index in range(0, sampling.max_tokens, 2):
                await asyncio.sleep(1.0)
                yield Chunk("r", index, tuple(range(min(2, sampling.max_tokens - index))), "")
            yield Chunk("r", sampling.max_tokens, (), "", finish_reason=FinishReason.LENGTH)
        finally:
            self.closed += 1


def test_the_router_is_asked_for_exactly_the_output_wanted() -> None:
    client = FakeClient()
    found = run_virtually(run(REQUESTS, router(client, REQUESTS, vocabulary=100)))
    assert [sampling.max_tokens for _, sampling in client.asked] == [4, 5, 6]
    assert all(sampling.min_tokens == sampling.max_tokens and sampling.ignore_eos for _, sampling in client.asked)
    assert [len(prompt) for prompt, _ in client.asked] == [70, 50, 40]
    assert found.tokens.tolist() == [4, 5, 6]
    assert (found.count(Ending.DONE), found.short) == (3, 0)
    assert found.timelines.ttft_s == pytest.approx([1.0, 1.0, 1.0])


def test_a_stream_left_early_closes_the_clients() -> None:
    client = FakeClient()

    async def leave() -> None:
        tokens = ask_router(client, [1, 2], 10)
        assert await anext(tokens) == 2
        await tokens.aclose()

    run_virtually(leave())
    assert client.closed == 1


def test_prompts_share_the_blocks_that_the_workload_says_and_no_more() -> None:
    first, second, third = (prompt_ids(REQUESTS, index, vocabulary=50_000) for index in range(3))
    assert np.array_equal(first[:32], second[:32])
    assert (first[32:48] != second[32:48]).any()
    assert (first[:16] != third[:16]).any()
    assert (first[48:64] != first[:16]).any()


def test_the_same_seed_makes_the_same_prompts_and_another_does_not() -> None:
    assert np.array_equal(prompt_ids(REQUESTS, 0, 50_000, seed=1), prompt_ids(REQUESTS, 0, 50_000, seed=1))
    assert not np.array_equal(prompt_ids(REQUESTS, 0, 50_000, seed=1), prompt_ids(REQUESTS, 0, 50_000, seed=2))


def test_ids_are_of_the_vocabulary() -> None:
    ids = np.concatenate([prompt_ids(REQUESTS, index, vocabulary=5) for index in range(3)])
    assert set(ids.tolist()) == {0, 1, 2, 3, 4}


def test_without_prefixes_prompts_differ_from_their_first_block_on() -> None:
    plain = Requests(REQUESTS.arrival_s, REQUESTS.prompt_tokens, REQUESTS.output_tokens)
    assert (prompt_ids(plain, 0, 50_000)[:16] != prompt_ids(plain, 1, 50_000)[:16]).any()
