"""Multi-turn sessions through real processes: a server gets its own words back, and in time."""

from collections.abc import Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

import numpy as np
import pytest

from splitserve.bench.open_loop import Answer, run
from splitserve.bench.run import Ending
from splitserve.bench.targets.address import Opened, Options, opened, parse
from splitserve.bench.targets.opened import Ask, Heard
from splitserve.client import AsyncClient
from splitserve.workload.named import workload
from tests.cluster.asking import settled
from tests.cluster.processes import ROUTER, Cluster, cluster_of

VOCABULARY = 1000


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    router = ROUTER.model_copy(update={"http": "127.0.0.1:0"})
    with cluster_of(tmp_path_factory.mktemp("sessions"), router=router) as started:
        yield started


@dataclass
class Recorder:
    """What was asked and answered, as pairs of prompt and output."""

    ask: Ask
    said: list[tuple[list[int], list[int]]] = field(default_factory=list)

    async def __call__(self, prompt_ids: Sequence[int], output_tokens: int, heard: Heard | None = None) -> Answer:
        output: list[int] = []
        assert heard is not None

        def both(token_ids: Sequence[int]) -> None:
            output.extend(token_ids)
            heard(token_ids)

        async with aclosing(self.ask(prompt_ids, output_tokens, both)) as chunks:
            async for tokens in chunks:
                yield tokens
        self.said.append((list(prompt_ids), output))


@pytest.mark.parametrize("kind", ["router", "openai"])
async def test_each_turn_reads_what_the_server_wrote(kind: str, cluster: Cluster) -> None:
    drawn = workload("prompt=30,output=6,sessions=3,pause=0.02").draw(24, 20.0, 0)
    address = cluster.address if kind == "router" else f"http://{cluster.router.facts['http']}"
    async with opened(parse(address), Options(vocabulary=VOCABULARY)) as target:
        recorder = Recorder(target.ask)
        found = await run(drawn, Opened(target.name, VOCABULARY, recorder).send(drawn))
    assert drawn.follows is not None
    assert drawn.pause_s is not None
    assert (found.count(Ending.DONE), found.short) == (24, 0)
    later = np.flatnonzero(drawn.follows >= 0)
    assert found.scheduled_s[later] == pytest.approx(found.ended_s[drawn.follows[later]] + drawn.pause_s[later])
    histories = {tuple(prompt + output) for prompt, output in recorder.said}
    assert all(len(output) == 6 for _, output in recorder.said)
    continued = [prompt for prompt, _ in recorder.said if tuple(prompt[:-30]) in histories]
    assert len(continued) == len(later) > 8
    async with AsyncClient(cluster.address) as client:
        await settled(client, 2)
