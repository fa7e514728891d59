"""How far live traffic is from what was planned."""

from math import isnan

import numpy as np

from splitserve.core.request import Usage
from splitserve.router.traffic import LiveTraffic, Planned
from splitserve.router.window import WINDOW_S
from splitserve.workload.workload import Quantiles, Summary

PROMPTS = Quantiles(mean=505, p10=100, p25=250, p50=500, p75=750, p90=900, p99=990, longest=1000)
OUTPUTS = Quantiles(mean=101, p10=20, p25=50, p50=100, p75=150, p90=180, p99=198, longest=200)


class World:
    def __init__(self) -> None:
        self.now = 0.0
        self.traffic = LiveTraffic(Planned(Summary(1000, PROMPTS, OUTPUTS), rate_rps=4.0), lambda: self.now)

    def serve(self, seconds: float, rate_rps: float, longer: float = 1.0) -> None:
        """Uniform lengths up to 1,000 and 200 tokens, which is what is planned, or longer ones."""
        random = np.random.default_rng(1)
        for _ in range(int(seconds * rate_rps)):
            self.now += 1 / rate_rps
            self.traffic.add(Usage(int(longer * random.integers(1, 1001)), int(random.integers(1, 201))))


def test_traffic_as_planned_has_not_drifted() -> None:
    world = World()
    world.serve(200, rate_rps=4.0)
    found = world.traffic.drift()
    assert abs(found["rate"] - 1.0) < 0.05
    assert max(found["prompt"], found["output"]) < 0.08


def test_longer_prompts_at_a_higher_rate_are_seen_for_what_they_are() -> None:
    world = World()
    world.serve(200, rate_rps=8.0, longer=2.0)
    found = world.traffic.drift()
    assert abs(found["rate"] - 2.0) < 0.1
    assert found["prompt"] > 0.3
    assert found["output"] < 0.08


def test_only_the_last_minutes_count() -> None:
    world = World()
    world.serve(WINDOW_S, rate_rps=4.0, longer=2.0)
    world.serve(WINDOW_S + 20, rate_rps=4.0)
    assert world.traffic.drift()["prompt"] < 0.08
    world.now += 2 * WINDOW_S
    assert world.traffic.drift()["rate"] == 0.0


def test_of_few_requests_nothing_is_said_of_lengths() -> None:
    world = World()
    world.serve(5, rate_rps=4.0)
    found = world.traffic.drift()
    assert isnan(found["prompt"])
    assert isnan(found["output"])
