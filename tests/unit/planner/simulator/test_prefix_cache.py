"""What simulated workers have cached, and what the router makes of it."""

from itertools import chain

import numpy as np
import pytest

from splitserve.core.slo import Slo
from splitserve.planner.deployment import Deployment, Role
from splitserve.planner.simulator.prefix_cache import KnownPrefixes, PrefixCache
from splitserve.planner.simulator.simulate import simulate
from splitserve.workload.arrivals import Poisson
from splitserve.workload.lengths import uniform
from splitserve.workload.pairs import Pair
from splitserve.workload.prefixes import Sharing, offsets_of
from splitserve.workload.requests import Prefixes, Requests
from splitserve.workload.sessions import Dialogue, Sessions
from splitserve.workload.synthetic import Synthetic
from tests.unit.planner.simulator.worlds import deployment, requests, worker

BLOCK = 16
CACHING = worker(Role.COLOCATED, kv_blocks=4000, prefix_caching=True)
SLO = Slo(ttft_s=1.0, tpot_s=0.03)


def prefixes(*runs: list[int]) -> Prefixes:
    return Prefixes(np.array([*chain.from_iterable(runs)]), offsets_of(np.array([len(run) for run in runs])), BLOCK)


def ids(*blocks: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array(blocks, dtype=np.int64)


def test_the_end_of_a_prompt_is_evicted_before_its_beginning() -> None:
    cache = PrefixCache(BLOCK)
    assert cache.add(ids(1, 2, 3), 10 * BLOCK).gone == []
    assert cache.add(ids(8, 9), 4 * BLOCK).gone == [3]
    assert cache.hit(ids(1, 2, 3), 100) == 2 * BLOCK
    assert cache.add(ids(8, 9, 10), 4 * BLOCK).gone == [2]


def test_a_router_is_told_what_is_new_and_what_went() -> None:
    known, cache = KnownPrefixes(prefixes([1, 2, 3, 4], [1, 2, 2**40]), ["a", "b"]), PrefixCache(BLOCK)
    known.told("a", cache.add(ids(1, 2), 100 * BLOCK))
    known.told("a", cache.add(ids(1, 2, 3), 100 * BLOCK))
    assert known.cached(0) == {"a": 3 * BLOCK}
    assert known.cached(1) == {"a": 2 * BLOCK}
    known.told("b", PrefixCache(BLOCK).add(ids(1, 2, 2**40), 100 * BLOCK))
    assert known.cached(1) == {"a": 2 * BLOCK, "b": 3 * BLOCK}
    known.told("a", cache.add(ids(7), 2 * BLOCK))
    assert list(known.cached(0).items()) == [("a", BLOCK), ("b", 2 * BLOCK)]


def test_a_prompt_is_read_where_its_beginning_is_cached() -> None:
    """Two beginnings by turns, so that without it each would go to whoever is free first."""
    served = requests(np.arange(8).tolist(), 1000, 2, prefixes(*([[*range(50)], [*range(100, 150)]] * 4)))
    fleet = deployment(CACHING, CACHING, CACHING)
    for slo in (None, SLO):
        outcome = simulate(fleet, served, slo=slo, prefix_aware=True)
        assert (outcome.cached_tokens[2:] == 800).all()
        readers = np.where(outcome.prefill_worker >= 0, outcome.prefill_worker, outcome.decode_worker)
        assert len(set(readers[::2].tolist())) == 1


def test_a_fleet_without_prefix_caching_is_served_the_same() -> None:
    plain = deployment(*[worker(Role.COLOCATED, prefix_caching=False)] * 3)
    served = requests(np.arange(8).tolist(), 1000, 2, prefixes(*[[*range(50)]] * 8))
    one, other = (simulate(plain, served, prefix_aware=aware) for aware in (False, True))
    np.testing.assert_array_equal(one.timelines.last_token, other.timelines.last_token)


@pytest.mark.parametrize("slo", [None, Slo(ttft_s=1.0, tpot_s=0.03)], ids=["static", "adaptive"])
def test_one_beginning_does_not_make_one_worker_read_everything(slo: Slo | None) -> None:
    """Half as many prompts again as one worker could read, all of which begin alike."""
    fleet = deployment(*[CACHING] * 4)
    alike = Synthetic("s", Pair(uniform(1000, 3000), uniform(10, 40)), Poisson(), Sharing(0.8, groups=1))
    served = alike.draw(800, 45.0, 0)
    aware = simulate(fleet, served, slo=slo, prefix_aware=True)
    readers = np.where(aware.prefill_worker >= 0, aware.prefill_worker, aware.decode_worker)
    assert np.bincount(readers, minlength=4).max() < 0.6 * len(served)
    blind = simulate(fleet, served, slo=slo).timelines
    assert np.quantile(aware.timelines.ttft_s, 0.9) <= 1.2 * np.quantile(blind.ttft_s, 0.9)


def found(fleet: Deployment, served: Requests, slo: Slo | None, aware: bool) -> tuple[float, float]:
    """Mean TTFT in seconds, and the share of prompt tokens that were cached; once it has run for a while."""
    outcome, later = simulate(fleet, served, slo=slo, prefix_aware=aware), slice(len(served) // 5, None)
    hits = outcome.cached_tokens[later].sum() / served.prompt_tokens[later].sum()
    return float(outcome.timelines.ttft_s[later].mean()), float(hits)


@pytest.mark.parametrize("slo", [None, SLO], ids=["static", "adaptive"])
@pytest.mark.parametrize("workers", [4, 40])
def test_later_turns_find_their_history(workers: int, slo: Slo | None) -> None:
    """Also in a fleet too large to be looked at whole."""
    fleet = deployment(*[CACHING] * workers)
    lengths = Pair(uniform(200, 800), uniform(20, 100), limit_tokens=8000)
    served = Sessions("s", lengths, Poisson(), Dialogue(6.0, 4.0)).draw(300 * workers // 4, 1.5 * workers, 0)
    (blind_s, blind_hit), (aware_s, aware_hit) = (found(fleet, served, slo, aware) for aware in (False, True))
    assert aware_s < 0.8 * blind_s
    assert aware_hit > max(0.75, blind_hit + 0.05)
