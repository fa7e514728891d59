"""What is said of a change of load, on hand-made outcomes and a small simulation."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.goodput.cases import SHAPES
from benchmarks.load_change import CELL, CHANGE_AT_S, END_S, WINDOW_S, _row, _settled_s, changes, decoding
from benchmarks.scheduling import adaptive_system, unit_of
from splitserve.latency.linear import LinearLatency
from splitserve.planner.simulator.outcome import Outcome
from splitserve.planner.simulator.simulate import simulate

LATENCY = LinearLatency(fixed_s=0.006, prefill_token_s=0.00025, decode_token_s=0.0008)
SLO = CELL.slo(unit_of(LATENCY, SHAPES["balanced"]))


@pytest.fixture(scope="module")
def outcome() -> Outcome:
    return simulate(adaptive_system(8, LATENCY).deployment, changes(seed=0)["burst"], slo=SLO)


def test_it_has_settled_after_the_last_window_that_missed() -> None:
    arrival = np.arange(0.0, END_S, 0.5, dtype=np.float64)
    met = np.ones(len(arrival), dtype=bool)
    assert _settled_s(met, arrival) == 0.0
    met[(arrival >= CHANGE_AT_S + WINDOW_S) & (arrival < CHANGE_AT_S + WINDOW_S + 1.0)] = False
    assert _settled_s(met, arrival) == 2 * WINDOW_S


def test_a_missed_request_in_ten_is_no_miss_of_a_window() -> None:
    arrival = np.arange(0.0, END_S, 0.5, dtype=np.float64)
    met = np.ones(len(arrival), dtype=bool)
    met[arrival == CHANGE_AT_S + 1.0] = False
    assert _settled_s(met, arrival) == 0.0


def test_who_decodes_is_told_by_the_second(outcome: Outcome) -> None:
    lines = replace(
        outcome.timelines,
        first_token=np.array([3.4, 7.0]),
        last_token=np.array([5.2, 7.5]),
        arrival=np.array([0.0, 0.0]),
    )
    held = decoding(replace(outcome, timelines=lines, decode_worker=np.array([1, 3], dtype=np.int32)))
    assert np.flatnonzero(held[:, 1]).tolist() == [4, 5]
    assert np.flatnonzero(held[:, 3]).tolist() == [7]
    assert held.sum() == 3


def test_the_burst_is_a_burst(outcome: Outcome) -> None:
    arrival = outcome.timelines.arrival
    rates = [
        ((arrival >= at) & (arrival < at + 5.0)).sum() / 5.0 for at in (CHANGE_AT_S - 5, CHANGE_AT_S, CHANGE_AT_S + 5)
    ]
    assert rates[1] > 1.8 * max(rates[0], rates[2])


def test_a_row_counts_what_was_missed_before_it_settled(outcome: Outcome) -> None:
    found = _row("burst", adaptive_system(8, LATENCY), outcome, SLO)
    late = ~outcome.timelines.met(SLO)
    assert found.before == 1.0 - late[outcome.timelines.arrival < CHANGE_AT_S].mean()
    assert found.lost <= late.sum()
    assert 0.0 < found.decoding_before < 8.0
