"""The planner's simulator as the cluster that is measured: runs of known latencies, at once."""

import numpy as np

from splitserve.bench.run import Chunks, Ending, Run
from splitserve.bench.sweep import Measure
from splitserve.core.slo import Slo, Timelines
from splitserve.planner.deployment import Deployment
from splitserve.planner.simulator.simulate import simulate
from splitserve.workload.named import workload
from tests.unit.planner.simulator.worlds import COLOCATED, DECODE, PREFILL, deployment

SLO = Slo(ttft_s=0.5, tpot_s=0.03)
PAIR, SINGLE = deployment(PREFILL, DECODE), deployment(COLOCATED)
WORKLOAD = workload("lognormal:prompt=300,output=40,sigma=0.6")


def timelines(served: Deployment, rate_rps: float, seed: int, count: int = 120) -> Timelines:
    return simulate(served, WORKLOAD.draw(count, rate_rps, seed)).timelines


def run_of(lines: Timelines, late_s: float = 0.0) -> Run:
    """As the load generator would have written it down, each token a chunk and evenly spaced."""
    assert lines.prompt_tokens is not None
    assert np.isfinite(lines.last_token).all()
    times = [np.linspace(*ends) for ends in zip(lines.first_token, lines.last_token, lines.output_tokens, strict=True)]
    owners = np.repeat(np.arange(len(lines)), lines.output_tokens)
    joined = np.concatenate(times)
    order = np.argsort(joined, kind="stable")
    return Run(
        scheduled_s=lines.arrival,
        sent_s=lines.arrival + late_s,
        first_token_s=lines.first_token,
        last_token_s=lines.last_token,
        ended_s=lines.last_token,
        prompt_tokens=lines.prompt_tokens,
        tokens=lines.output_tokens,
        asked_tokens=lines.output_tokens,
        ending=np.full(len(lines), Ending.DONE, dtype=np.int8),
        error=np.full(len(lines), -1, dtype=np.int32),
        errors=(),
        chunks=Chunks(joined[order], owners[order], np.ones(len(joined), dtype=np.int64)),
    )


class Cluster:
    """`asked` is what it was asked to serve, in order. Above `generator_rps` the sender is late."""

    def __init__(self, served: Deployment, generator_rps: float = np.inf, log: list[str] | None = None) -> None:
        self.served, self._generator_rps = served, generator_rps
        self.asked: list[tuple[float, int]] = []
        self._log, self.name = log, ""

    async def measure(self, rate_rps: float, seed: int) -> Run:
        self.asked.append((rate_rps, seed))
        if self._log is not None:
            self._log.append(self.name)
        return run_of(timelines(self.served, rate_rps, seed), 0.1 if rate_rps > self._generator_rps else 0.0)


def named(served: Deployment, name: str, log: list[str]) -> Measure:
    """One of several, which write down whose turn it was."""
    cluster = Cluster(served, log=log)
    cluster.name = name
    return cluster.measure
