"""A router as a target: through a client that does as told, and a real one with workers on the wire."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

import numpy as np
import pytest

from splitserve.bench.open_loop import run
from splitserve.bench.run import Ending
from splitserve.bench.targets.address import Options, opened, parse
from splitserve.bench.targets.router import asking, to_router
from splitserve.core.errors import ConfigError, Unavailable
from splitserve.core.request import Chunk, FinishReason, SamplingParams
from splitserve.workload.requests import Requests
from tests.certificates import Authority
from tests.unit.bench.targets.answering import answering
from tests.unit.bench.virtual import run_virtually
from tests.unit.router.wired import router

REQUESTS = Requests(
    arrival_s=np.array([0.0, 1.0, 2.0]), prompt_tokens=np.array([70, 50, 40]), output_tokens=np.array([4, 5, 6])
)


class FakeClient:
    """Answers two tokens a second."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], SamplingParams]] = []
        self.classes: set[str] = set()
        self.closed = 0

    async def generate(
        self, prompt: Sequence[int], sampling: SamplingParams | None = None, *, slo_class: str = ""
    ) -> AsyncGenerator[Chunk, None]:
        self.classes.add(slo_class)
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
    found = run_virtually(run(REQUESTS, to_router(client, REQUESTS, vocabulary=100)))
    assert [sampling.max_tokens for _, sampling in client.asked] == [4, 5, 6]
    assert all(sampling.min_tokens == sampling.max_tokens and sampling.ignore_eos for _, sampling in client.asked)
    assert [len(prompt) for prompt, _ in client.asked] == [70, 50, 40]
    assert found.tokens.tolist() == [4, 5, 6]
    assert (found.count(Ending.DONE), found.short) == (3, 0)
    assert found.timelines.ttft_s == pytest.approx([1.0, 1.0, 1.0])


@pytest.mark.parametrize("slo_class", ["", "batch"])
def test_requests_are_of_the_class_that_is_named(slo_class: str) -> None:
    client = FakeClient()
    run_virtually(run(REQUESTS, to_router(client, REQUESTS, vocabulary=100, slo_class=slo_class)))
    assert client.classes == {slo_class}


def test_a_stream_left_early_closes_the_clients() -> None:
    client = FakeClient()

    async def leave() -> None:
        tokens = asking(client)([1, 2], 10)
        assert await anext(tokens) == 2
        await tokens.aclose()

    run_virtually(leave())
    assert client.closed == 1


async def test_a_routers_requests_are_counted_token_by_token() -> None:
    async with (
        router() as serving,
        answering(serving.address) as worker,
        opened(parse(serving.address), Options(vocabulary=100)) as target,
    ):
        found = await run(REQUESTS_AT_ONCE, target.send(REQUESTS_AT_ONCE, seed=3))
    assert target.name == f"grpc://{serving.address}"
    assert target.facts == {"kind": "router", "server": serving.address, "model": "model"}
    assert found.count(Ending.DONE) == 3, found.errors
    assert found.tokens.tolist() == [4, 5, 6]
    asked = worker.jobs[1:]  # after the one that finds out whether all is well
    assert sorted(len(job.prompt) for job in asked) == [40, 50, 70]
    assert all(token < 100 for job in asked for token in job.prompt)


async def test_several_routers_share_the_requests() -> None:
    async with router() as one, router() as other, answering(one.address) as first, answering(other.address) as second:
        name = f"grpc://{one.address},{other.address}"
        async with opened(parse(name), Options(vocabulary=100)) as target:
            found = await run(REQUESTS_AT_ONCE, target.send(REQUESTS_AT_ONCE))
    assert (target.name, found.count(Ending.DONE)) == (name, 3)
    assert first.jobs
    assert second.jobs


async def test_a_router_that_is_not_there_is_told_before_the_run() -> None:
    with pytest.raises(Unavailable, match=r"^grpc://127.0.0.1:1: no router answers there; .*refused"):
        async with opened(parse("127.0.0.1:1"), Options(vocabulary=100)):
            pass


async def test_a_router_without_a_worker_is_told_before_the_run() -> None:
    async with router() as serving:
        with pytest.raises(Unavailable, match="none of its workers takes requests"):
            async with opened(parse(serving.address), Options(vocabulary=100, answer_within_s=0.3)):
                pass


async def test_a_vocabulary_that_the_model_has_not_is_told_before_the_run() -> None:
    async with router() as serving, answering(serving.address):
        with pytest.raises(ConfigError, match="99999 at position 0 is outside the vocabulary of"):
            async with opened(parse(serving.address), Options(vocabulary=100_000)):
                pass


async def test_keys_and_certificates_are_shown(tmp_path: Path) -> None:
    authority, keys = Authority(tmp_path), tmp_path / "keys.yaml"
    keys.write_text("keys: [{name: bench, key: key-of-bench-0123456789, scopes: [inference]}]")
    keys.chmod(0o600)
    async with router(tls=authority.server().model_dump(), api_keys=str(keys)) as serving:
        for options, reason in (
            (Options(vocabulary=100, answer_within_s=2.0), "no router answers"),
            (Options(vocabulary=100, tls=authority.client()), "key"),
        ):
            with pytest.raises((ConfigError, Unavailable), match=reason):
                async with opened(parse(serving.address), options):
                    pass
        known = Options(vocabulary=100, tls=authority.client(), api_key="key-of-bench-0123456789", answer_within_s=0.5)
        with pytest.raises(Unavailable, match="none of its workers"):  # so it was let in
            async with opened(parse(serving.address), known):
                pass


REQUESTS_AT_ONCE = Requests(np.zeros(3), REQUESTS.prompt_tokens, REQUESTS.output_tokens)
