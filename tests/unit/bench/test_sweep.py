"""A sweep of the simulated cluster, held against a fine grid of the same."""

from dataclasses import replace

import numpy as np
import pytest

from splitserve.bench.goodput import Judged, goodput_of
from splitserve.bench.run import Chunks, Run
from splitserve.bench.search import Options
from splitserve.bench.sweep import Measured, Sweep, sweep
from splitserve.core.errors import ConfigError, Unavailable
from splitserve.core.slo import Slo, attainment
from splitserve.planner.deployment import Deployment
from tests.unit.bench import simulated
from tests.unit.bench.simulated import PAIR, SINGLE, SLO, Cluster, timelines


def pairs(found: Sweep) -> list[tuple[float, int]]:
    return [(one.rate_rps, one.seed) for one in found.measured]


@pytest.mark.parametrize("served", [PAIR, SINGLE])
@pytest.mark.parametrize("start_rps", [0.3, 20.0, 300.0])
async def test_it_finds_the_goodput_that_a_fine_grid_has(served: Deployment, start_rps: float) -> None:
    found = await sweep(Cluster(served).measure, SLO, Options(start_rps=start_rps, step=0.05))
    assert found.why == ""
    assert found.goodput is not None
    fine = found.goodput.rps * 1.01 ** np.arange(-25, 26)
    grid = [Judged(rate, seed, timelines(served, rate, seed).met(SLO)) for rate in fine for seed in (0, 1)]
    assert found.goodput.rps == pytest.approx(goodput_of(grid, SLO.attainment).rps, rel=0.06)
    assert found.goodput.low <= found.goodput.rps <= found.goodput.high
    assert len(found.measured) <= 18


async def test_what_is_known_is_not_measured_again() -> None:
    options = Options(step=0.2)
    whole = await sweep(Cluster(PAIR).measure, SLO, options)
    half, again = Cluster(PAIR), Cluster(PAIR)
    resumed = await sweep(half.measure, SLO, options, known=whole.measured[:4])
    assert half.asked == pairs(whole)[4:]
    assert pairs(resumed) == pairs(whole)
    assert resumed.goodput == whole.goodput
    assert (await sweep(again.measure, SLO, options, known=whole.measured)).goodput == whole.goodput
    assert again.asked == []


async def test_every_run_is_told_and_the_share_goes_to_one() -> None:
    told: list[tuple[str, float]] = []
    found = await sweep(Cluster(PAIR).measure, SLO, Options(step=0.2), lambda text, share: told.append((text, share)))
    assert len(told) == len(found.measured)
    assert all(0.0 < share <= 1.0 for _, share in told)
    assert told[-1][1] == 1.0
    first, seed = found.measured[0], found.measured[0].seed
    share = attainment(first.run.timelines, SLO)
    assert told[0][0] == f"1 requests/s (seed {seed}): {share:.1%} of 120 requests met the objectives; " + (
        "goodput is at least 1"
    )


async def test_an_overloaded_generator_ends_it_and_its_run_is_not_judged() -> None:
    cluster = Cluster(PAIR, generator_rps=3.0)
    found = await sweep(cluster.measure, SLO, Options())
    assert cluster.asked == [(1.0, 0), (2.0, 0), (4.0, 0)]
    assert found.why.startswith("the load generator was overloaded at 4 requests/s (seed 0): 100.0% of the requests")
    assert found.goodput is not None
    assert (found.goodput.rps, found.goodput.at_least) == (2.0, True)
    assert [one.valid for one in found.measured] == [True, True, False]
    better = Cluster(PAIR)
    await sweep(better.measure, SLO, Options(), known=found.measured)
    assert better.asked[0] == (4.0, 0)


async def test_a_generator_that_was_never_quick_enough_leaves_no_goodput() -> None:
    found = await sweep(Cluster(PAIR, generator_rps=0.1).measure, SLO, Options())
    assert (found.goodput, len(found.measured)) == (None, 1)
    assert "overloaded at 1 requests/s" in found.why


async def test_objectives_that_no_rate_or_every_rate_meets_are_said() -> None:
    never = await sweep(Cluster(PAIR).measure, Slo(1e-6, 1e-6), Options(lowest_rps=0.5))
    always = await sweep(Cluster(PAIR).measure, Slo(1e6, 1e6), Options(highest_rps=2.0))
    assert "even 0.5 requests/s, the lowest rate allowed, missed the objectives" in never.why
    assert "even 2 requests/s, the highest rate allowed, met the objectives" in always.why
    assert never.goodput is not None
    assert always.goodput is not None
    assert (never.goodput.at_most, always.goodput.at_least) == (True, True)


async def test_given_rates_are_measured_and_no_others() -> None:
    cluster = Cluster(PAIR)
    found = await sweep(cluster.measure, SLO, Options(rates_rps=(2.0, 8.0), seeds=(3,)))
    assert cluster.asked == [(2.0, 3), (8.0, 3)]
    assert found.why == ""


async def test_the_warm_up_is_sent_and_not_judged() -> None:
    found = await sweep(Cluster(PAIR).measure, SLO, Options(rates_rps=(2.0,), seeds=(0,), warm_up_s=10.0))
    one = found.measured[0]
    assert len(one.run) == 120
    assert len(one.point.timelines) == 120 - one.point.first < 120
    assert one.point.timelines.arrival[0] == one.run.scheduled_s[one.point.first] >= 10.0


async def test_a_warm_up_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"warm_up_s: no request of the run at 2 requests/s was due after 1000 s"):
        await sweep(Cluster(PAIR).measure, SLO, Options(rates_rps=(2.0,), warm_up_s=1000.0))


async def test_an_objective_that_the_runs_can_not_tell_is_refused() -> None:
    async def without_gaps(rate_rps: float, seed: int) -> Run:
        run = simulated.run_of(timelines(PAIR, rate_rps, seed))
        none = np.zeros(0)
        return replace(run, chunks=Chunks(none, none.astype(int), none.astype(int), dropped=5))

    with pytest.raises(ConfigError, match="slo: itl_p99_s can't be judged"):
        await sweep(without_gaps, replace(SLO, itl_p99_s=0.1), Options())


async def test_a_target_that_fails_altogether_is_the_callers_to_hear_of() -> None:
    async def dead(rate_rps: float, seed: int) -> Run:
        raise Unavailable("no worker is left")

    with pytest.raises(Unavailable, match="no worker is left"):
        await sweep(dead, SLO)


def test_a_measured_run_is_a_point_of_all_its_requests() -> None:
    run = simulated.run_of(timelines(PAIR, 2.0, 0))
    assert Measured(2.0, 0, run).point.first == 0
    assert attainment(Measured(2.0, 0, run).point.timelines, SLO) == attainment(run.timelines, SLO)
