"""Sessions in the simulator: a turn comes when the answer before it has ended, and finds its history cached."""

from collections.abc import AsyncGenerator

import numpy as np
import pytest

from splitserve.bench.open_loop import run
from splitserve.latency.model import PrefillChunk, Step
from splitserve.planner.deployment import Role
from splitserve.planner.simulator.outcome import Outcome
from splitserve.planner.simulator.simulate import simulate
from splitserve.workload.arrivals import Poisson
from splitserve.workload.lengths import uniform
from splitserve.workload.pairs import Pair
from splitserve.workload.prefixes import offsets_of
from splitserve.workload.requests import Prefixes, Requests
from splitserve.workload.sessions import Dialogue, Sessions
from tests.unit.bench.test_open_loop import Server
from tests.unit.bench.virtual import run_virtually
from tests.unit.planner.simulator.worlds import COLOCATED, DECODE, LATENCY, PREFILL, deployment, worker

BLOCK = 16


def two_turns(pause_s: float = 3.0, prompt: int = 200, answer: int = 9, second: int = 300) -> Requests:
    ids = np.arange(second // BLOCK)
    runs = [ids[: prompt // BLOCK], ids]
    return Requests(
        np.array([0.0, pause_s]),
        np.array([prompt, second]),
        np.array([answer, 4]),
        Prefixes(np.concatenate(runs), offsets_of(np.array([len(run) for run in runs])), BLOCK),
        np.array([-1, 0]),
        np.array([0.0, pause_s]),
    )


def drawn(count: int = 300, rate_rps: float = 6.0) -> Requests:
    lengths = Pair(uniform(50, 300), uniform(5, 60))
    return Sessions("s", lengths, Poisson(), Dialogue(4.0, 2.0)).draw(count, rate_rps, 0)


def came_when_due(outcome: Outcome, requests: Requests) -> None:
    assert requests.follows is not None
    assert requests.pause_s is not None
    later = np.flatnonzero(requests.follows >= 0)
    due = outcome.timelines.last_token[requests.follows[later]] + requests.pause_s[later]
    np.testing.assert_allclose(outcome.timelines.arrival[later], due)


def test_a_turn_comes_a_pause_after_the_last_token_before_it() -> None:
    for each in (deployment(COLOCATED), deployment(PREFILL, DECODE)):
        requests = two_turns()
        outcome = simulate(each, requests)
        came_when_due(outcome, requests)
        assert outcome.timelines.arrival[1] > 3.0


def test_every_turn_of_a_drawn_workload_is_served_when_it_is_due() -> None:
    requests = drawn()
    for each in (deployment(COLOCATED, COLOCATED), deployment(PREFILL, DECODE)):
        outcome = simulate(each, requests)
        assert np.isfinite(outcome.timelines.last_token).all()
        came_when_due(outcome, requests)


def test_a_colocated_worker_finds_what_it_read_and_wrote_but_for_the_last_token() -> None:
    caching = deployment(worker(Role.COLOCATED, prefix_caching=True))
    outcome = simulate(caching, two_turns(prompt=200, answer=9))
    assert outcome.cached_tokens.tolist() == [0, 208]  # 13 blocks: of 209 tokens the last has no KV
    computed = LATENCY.step_s(Step.of([PrefillChunk(300 - 208, 208)]))
    assert outcome.timelines.ttft_s[1] == pytest.approx(computed)
    shorter = simulate(caching, two_turns(prompt=200, answer=8))
    assert shorter.cached_tokens.tolist() == [0, 192]


def test_a_prefill_worker_finds_only_what_it_read() -> None:
    apart = deployment(worker(Role.PREFILL, prefix_caching=True), worker(Role.DECODE, prefix_caching=True))
    assert simulate(apart, two_turns(prompt=200, answer=100, second=400)).cached_tokens.tolist() == [0, 192]


def test_a_turn_too_long_for_the_fleet_ends_its_session_and_no_other() -> None:
    requests = two_turns(second=2000)
    alone = deployment(worker(Role.COLOCATED, max_model_len=1000))
    outcome = simulate(alone, requests)
    assert np.isfinite(outcome.timelines.last_token).tolist() == [True, False]
    none = simulate(deployment(worker(Role.COLOCATED, max_model_len=100)), requests)
    assert not np.isfinite(none.timelines.last_token).any()


def test_the_load_generator_sends_turns_when_the_simulator_says_they_come() -> None:
    """Both against servers of the same known times, each on its own virtual clock."""
    requests = drawn(80, rate_rps=0.01)  # so rarely that none waits for another
    outcome = simulate(deployment(PREFILL, DECODE), requests)
    lines = outcome.timelines

    class Simulated(Server):
        async def send(self, index: int) -> AsyncGenerator[int, None]:
            tokens = int(requests.output_tokens[index])
            alike = Server(float(lines.ttft_s[index]), float(lines.tpot_s[index]), tokens)
            async for token in alike.send(index):
                yield token

    found = run_virtually(run(requests, Simulated().send))
    assert found.scheduled_s == pytest.approx(lines.arrival, rel=1e-9)
    assert found.last_token_s == pytest.approx(lines.last_token, rel=1e-9)
