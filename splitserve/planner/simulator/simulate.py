"""One simulation: a deployment serves requests; what came of each is the outcome. Deterministic by its seed."""

import numpy as np

from splitserve.core.slo import Slo, Timelines
from splitserve.planner.deployment import Deployment
from splitserve.planner.simulator.clock import Clock
from splitserve.planner.simulator.journal import NEVER, Journal
from splitserve.planner.simulator.links import Links
from splitserve.planner.simulator.outcome import Outcome
from splitserve.planner.simulator.router import Router
from splitserve.planner.simulator.worker import Worker
from splitserve.routing.lengths import OutputLengths
from splitserve.workload.requests import Requests


def simulate(
    deployment: Deployment,
    requests: Requests,
    seed: int = 0,
    horizon_s: float | None = None,
    slo: Slo | None = None,
    prefix_aware: bool = True,
) -> Outcome:
    """Serves them all, or as far as it gets by `horizon_s` seconds. The seed draws what the router samples of a fleet
    too large to be looked at whole; requests bring their own randomness. With `slo` the router schedules by these
    objectives, whatever the workers' roles; without, it keeps to the roles. `prefix_aware`: it is told what each worker
    has cached, and heeds it."""
    clock, journal, links = Clock(), Journal(requests), Links(deployment)
    router = Router(clock, journal, seed, slo)
    lengths = OutputLengths()
    tpot_s = slo.tpot_s if slo is not None else NEVER
    firsts = range(len(requests)) if requests.follows is None else np.flatnonzero(requests.follows < 0).tolist()
    workers = [
        Worker(
            number, spec, clock, journal, links, router, requests.prefixes, deployment.prefill_answers, tpot_s, lengths
        )
        for number, spec in enumerate(deployment.workers)
    ]
    router.start(workers, firsts, requests.prefixes if prefix_aware else None)
    clock.run(NEVER if horizon_s is None else horizon_s)
    return _outcome(clock, journal, links, workers)


def _outcome(clock: Clock, journal: Journal, links: Links, workers: list[Worker]) -> Outcome:
    timelines = Timelines(
        arrival=np.array(journal.arrival),
        first_token=np.array(journal.first_token),
        last_token=np.array(journal.last_token),
        output_tokens=np.array(journal.output, dtype=np.int64),
        prompt_tokens=np.array(journal.prompt, dtype=np.int64),
    )
    return Outcome(
        timelines=timelines,
        bound=np.array(journal.bound),
        prefill_start=np.array(journal.prefill_start),
        prefill_end=np.array(journal.prefill_end),
        kv_ready=np.array(journal.kv_ready),
        cached_tokens=np.array(journal.cached, dtype=np.int64),
        prefill_worker=np.array(journal.prefill_worker, dtype=np.int32),
        decode_worker=np.array(journal.decode_worker, dtype=np.int32),
        workers=tuple(worker.use(clock.now) for worker in workers),
        links=links.use(clock.now),
        simulated_s=clock.now,
        events=clock.events,
    )
