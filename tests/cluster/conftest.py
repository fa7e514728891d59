"""The oracle: one colocated worker with a router of its own, for the whole run."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest

from splitserve.client import AsyncClient
from splitserve.core.request import SamplingParams
from tests.cluster.asking import GREEDY_32, Answer, ask
from tests.cluster.processes import Cluster, cluster_of

Expected = Callable[..., Awaitable[Answer]]


@pytest.fixture(scope="session")
def colocated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster_of(tmp_path_factory.mktemp("colocated"), prefill=0, decode=1) as cluster:
        yield cluster


@pytest.fixture
async def expected(colocated: Cluster) -> AsyncIterator[Expected]:
    """What one colocated worker answers."""
    async with AsyncClient(colocated.address) as client:

        async def answer(prompt: tuple[int, ...], sampling: SamplingParams = GREEDY_32) -> Answer:
            answered = await ask(client, prompt, sampling)
            assert answered.timings.prefill_worker == ""
            return answered

        yield answer
