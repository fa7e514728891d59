"""Two simulated clusters in turns, and what is said of them."""

from dataclasses import replace

import numpy as np
import pytest

from splitserve.bench.compare import compare, compared
from splitserve.bench.goodput import ratio
from splitserve.bench.search import Options
from splitserve.bench.sweep import Measured, sweep
from splitserve.core.errors import ConfigError
from splitserve.core.slo import Slo
from splitserve.planner.deployment import Deployment
from tests.unit.bench import simulated
from tests.unit.bench.simulated import PAIR, SINGLE, SLO, Cluster, named, timelines

TIGHT = replace(SLO, tpot_s=0.015)


def runs(served: Deployment, *keys: tuple[float, int]) -> list[Measured]:
    return [Measured(rate, seed, simulated.run_of(timelines(served, rate, seed))) for rate, seed in keys]


async def test_the_systems_take_turns_and_who_begins_changes() -> None:
    log: list[str] = []
    systems = {name: named(served, name, log) for name, served in (("a", PAIR), ("b", SINGLE))}
    await compare(systems, [SLO], Options(rates_rps=(1.0, 2.0, 4.0), seeds=(0,)))
    assert "".join(log) == "abbaab"
    log.clear()
    systems["c"] = named(PAIR, "c", log)
    await compare(systems, [SLO], Options(rates_rps=(1.0, 2.0), seeds=(0,)))
    assert "".join(log) == "abccba"


async def test_each_system_finds_its_own_goodput_as_if_alone() -> None:
    log: list[str] = []
    options = Options(step=0.2)
    found = await compare({"pd": named(PAIR, "p", log), "one": named(SINGLE, "o", log)}, [SLO], options)
    alone = [await sweep(Cluster(served).measure, SLO, options) for served in (PAIR, SINGLE)]
    assert [found.sweeps[name][0].goodput for name in ("pd", "one")] == [one.goodput for one in alone]
    points = [[one.point for one in each.measured] for each in alone]
    (pair,) = found.pairs
    assert (pair.a, pair.b) == ("pd", "one")
    assert pair.ratios == (ratio(points[0], points[1], SLO),)
    rounds = ["".join(log[at : at + 2]) for at in range(0, min(log.count("p"), log.count("o")) * 2, 2)]
    assert all(said == ("po" if number % 2 == 0 else "op") for number, said in enumerate(rounds))


async def test_every_slo_is_searched_for_with_the_same_runs() -> None:
    clusters = Cluster(PAIR), Cluster(SINGLE)
    systems = {"pd": clusters[0].measure, "one": clusters[1].measure}
    found = await compare(systems, [SLO, TIGHT], Options(step=0.2))
    for name, cluster in zip(systems, clusters, strict=True):
        assert len(cluster.asked) == len(set(cluster.asked))
        assert [one.slo for one in found.sweeps[name]] == [SLO, TIGHT]
        assert all(one.why == "" for one in found.sweeps[name])
    assert len(found.pairs[0].ratios) == 2
    assert all(len(at.differences) == 2 for at in found.pairs[0].rates)


async def test_progress_names_the_system_and_goes_to_one() -> None:
    told: list[tuple[str, float]] = []
    systems = {"pd": Cluster(PAIR).measure, "one": Cluster(SINGLE).measure}
    await compare(systems, [SLO], Options(step=0.3), lambda text, share: told.append((text, share)))
    assert told[0][0].startswith("pd: 1 requests/s")
    assert told[1][0].startswith("one: 1 requests/s")
    assert told[-1][1] == 1.0


async def test_known_runs_of_each_system_are_not_made_again() -> None:
    options = Options(rates_rps=(1.0, 2.0), seeds=(0,))
    known = {"pd": runs(PAIR, (1.0, 0), (2.0, 0)), "one": runs(SINGLE, (1.0, 0))}
    clusters = Cluster(PAIR), Cluster(SINGLE)
    found = await compare({"pd": clusters[0].measure, "one": clusters[1].measure}, [SLO], options, known=known)
    assert (clusters[0].asked, clusters[1].asked) == ([], [(2.0, 0)])
    assert [at.rate_rps for at in found.pairs[0].rates] == [1.0, 2.0]


async def test_an_overloaded_generator_ends_that_systems_search_alone() -> None:
    slow, fine = Cluster(PAIR, generator_rps=1.5), Cluster(SINGLE)
    found = await compare({"a": slow.measure, "b": fine.measure}, [SLO], Options(rates_rps=(1.0, 2.0, 3.0), seeds=(0,)))
    assert (len(slow.asked), len(fine.asked)) == (2, 3)
    assert "overloaded at 2 requests/s" in found.sweeps["a"][0].why
    assert found.sweeps["b"][0].why == ""
    assert [at.rate_rps for at in found.pairs[0].rates] == [1.0]


def test_rates_are_compared_by_the_seeds_that_both_have() -> None:
    a = runs(PAIR, (1.0, 0), (1.0, 1), (3.0, 0), (5.0, 0))
    b = runs(SINGLE, (1.0, 0), (3.0, 0), (3.0, 1), (4.0, 0))
    (pair,) = compared({"a": a, "b": b}, [SLO])
    assert [(at.rate_rps, at.seeds) for at in pair.rates] == [(1.0, (0,)), (3.0, (0,))]
    lines = [timelines(served, 3.0, 0) for served in (PAIR, SINGLE)]
    shares = [float(each.met(SLO).mean()) for each in lines]
    assert pair.rates[1].differences[0].value == pytest.approx(shares[0] - shares[1])
    ttft_s = [float(np.quantile(each.ttft_s, 0.5, method="inverted_cdf")) for each in lines]
    assert (pair.rates[1].quotients[0].a_s, pair.rates[1].quotients[0].b_s) == pytest.approx(tuple(ttft_s))


def test_a_system_beside_itself_differs_in_nothing() -> None:
    both = runs(PAIR, (5.0, 0), (9.0, 0), (20.0, 0))
    (pair,) = compared({"a": both, "b": both}, [SLO])
    assert pair.ratios[0] is not None
    assert (pair.ratios[0].value, pair.ratios[0].low, pair.ratios[0].high) == (1.0, 1.0, 1.0)
    for at in pair.rates:
        assert [(one.value, one.low, one.high) for one in at.differences] == [(0.0, 0.0, 0.0)]
        assert {(one.value, one.low, one.high) for one in at.quotients} == {(1.0, 1.0, 1.0)}


def test_the_figures_of_a_rate_are_those_of_its_requests() -> None:
    a, b = runs(PAIR, (6.0, 0)), runs(SINGLE, (6.0, 0))
    (pair,) = compared({"a": a, "b": b}, [SLO])
    found = {(one.what, one.quantile): one for one in pair.rates[0].quotients}
    assert list(found) == [(what, quantile) for what in ("TTFT", "TPOT", "ITL") for quantile in (0.5, 0.99)]
    ttft = found["TTFT", 0.99]
    one, other = (np.quantile(each[0].run.timelines.ttft_s, 0.99, method="inverted_cdf") for each in (a, b))
    assert (ttft.a_s, ttft.b_s, ttft.value) == pytest.approx((one, other, one / other))
    assert ttft.low <= ttft.value <= ttft.high
    itl = found["ITL", 0.5]
    assert itl.a_s == pytest.approx(np.quantile(a[0].run.chunks.gaps_s(), 0.5, method="inverted_cdf"))


def test_a_system_without_a_valid_run_has_no_ratio() -> None:
    late = [Measured(1.0, 0, simulated.run_of(timelines(PAIR, 1.0, 0), late_s=0.1))]
    (pair,) = compared({"a": late, "b": runs(SINGLE, (1.0, 0))}, [SLO])
    assert (pair.ratios, pair.rates) == ((None,), ())


@pytest.mark.parametrize(
    ("names", "slos", "sentence"), [("a", [SLO], "needs two, and got 1"), ("ab", [], "at least one")]
)
async def test_a_comparison_of_nothing_is_refused(names: str, slos: list[Slo], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        await compare({name: Cluster(PAIR).measure for name in names}, slos)
