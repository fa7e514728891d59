"""Runs to look at: real ones of the load generator, in virtual time, against a server of known capacity."""

import asyncio
from collections.abc import AsyncGenerator

from splitserve.bench.facts import Facts, Machine
from splitserve.bench.findings import Saved
from splitserve.bench.open_loop import run
from splitserve.core.errors import Overloaded
from splitserve.core.slo import Slo
from splitserve.workload.named import workload
from tests.unit.bench.virtual import run_virtually

SLO = Slo(0.4, 0.05)
WORKLOAD = "lognormal:prompt=200,output=40,sigma=0.4"


class Slots:
    """Serves so many requests at once, the others wait; after `patience_s` it refuses them. A first token takes 1 ms
    for each token of the prompt."""

    def __init__(self, prompts: list[int], outputs: list[int], slots: int, gap_s: float, patience_s: float) -> None:
        self._prompts, self._outputs, self._gap_s, self._patience_s = prompts, outputs, gap_s, patience_s
        self._free = asyncio.Semaphore(slots)

    async def send(self, index: int) -> AsyncGenerator[int, None]:
        try:
            async with asyncio.timeout(self._patience_s):
                await self._free.acquire()
        except TimeoutError:
            raise Overloaded("the queue is full", 1.0) from None
        try:
            await asyncio.sleep(self._prompts[index] * 0.001)
            yield 1
            for _ in range(self._outputs[index] - 1):
                await asyncio.sleep(self._gap_s)
                yield 1
        finally:
            self._free.release()


def saved(
    rate_rps: float,
    name: str = "pd",
    count: int = 120,
    seed: int = 0,
    slots: int = 4,
    gap_s: float = 0.02,
    patience_s: float = 5.0,
    warm_up_s: float = 0.0,
) -> Saved:
    requests = workload(WORKLOAD).draw(count, rate_rps, seed)
    server = Slots(requests.prompt_tokens.tolist(), requests.output_tokens.tolist(), slots, gap_s, patience_s)
    return Saved(facts(rate_rps, name, seed, warm_up_s), run_virtually(run(requests, server.send)))


def facts(rate_rps: float, name: str, seed: int = 0, warm_up_s: float = 0.0) -> Facts:
    return Facts(
        name=name,
        target=f"grpc://{name}:50051",
        about={"model": "demo"},
        workload=WORKLOAD,
        workload_notes=("lengths are made up",),
        rate_rps=rate_rps,
        seed=seed,
        warm_up_s=warm_up_s,
        slo=SLO,
        command="splitserve bench sweep --ttft 400ms",
        started="2026-01-31T12:00:00+00:00",
        splitserve="0.1.0",
        python="3.11.2",
        machine=Machine(2, "A <fast> CPU"),
    )


def swept(name: str = "pd", slots: int = 4, gap_s: float = 0.02) -> list[Saved]:
    return [saved(rate, name, slots=slots, gap_s=gap_s) for rate in (1.0, 2.0, 3.0, 4.0)]
