"""The goodput benchmark's own decisions: which rates it measures, what it keeps, what it makes of it."""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import numpy as np
import pytest

from benchmarks.goodput.alone import SPEEDS, Alone, _line, as_if, factor_of
from benchmarks.goodput.campaign import Campaign, Limits, in_turn
from benchmarks.goodput.cases import CELLS, SHAPES, TPOT_CELLS, WARM_UP_REQUESTS, Cell, rate_rps, step_of
from benchmarks.goodput.grid import answers
from benchmarks.goodput.points import Measured, Points
from benchmarks.goodput.rates import Bounds, bracket, wanted
from benchmarks.goodput.served import Served
from benchmarks.goodput.systems import SYSTEMS, System, cluster, unit_of
from splitserve.bench.goodput import Judged
from splitserve.core.config import ClusterConfig
from splitserve.core.slo import Slo, Timelines

UNIT = Alone(0.02, 0.0002, 0.006)
BOUNDS = Bounds(-10, 20)


def judged(step: int, goodput_step: int) -> Judged:
    """Ten requests, of which nine meet the objectives up to that step and none beyond."""
    return Judged(rate_rps(step), 0, np.arange(10) < (9 if step <= goodput_step else 0))


def measured(system: str, step: int, ttft_s: float, tpot_s: float = 0.01, seed: int = 0) -> Measured:
    count = 20
    arrival = np.arange(count) / rate_rps(step)
    lines = Timelines(
        arrival,
        arrival + ttft_s,
        arrival + ttft_s + 9 * tpot_s,
        np.full(count, 10),
        np.full(count, 100),
        np.full(count, 2 * tpot_s),
    )
    return Measured(system, step, seed, lines, 1.0, 1.0, 30.0, {"router": 1.0, "generator": 0.5}, 0.001, 0, "now")


@pytest.mark.parametrize("goodput_step", [-11, -10, -7, 0, 3, 9, 19, 20])
def test_the_search_ends_at_the_two_steps_around_goodput_within_a_few_points(goodput_step: int) -> None:
    points: list[Judged] = []
    cell = CELLS[0]
    while steps := wanted({cell: bracket(points)}, {}, BOUNDS, start=3):
        assert len(steps) == 1
        points.append(judged(steps[0], goodput_step))
        assert len(points) < 12
    found = bracket(points)
    assert found.met == (goodput_step if goodput_step >= BOUNDS.lowest else None)
    assert found.missed == (goodput_step + 1 if goodput_step < BOUNDS.highest else None)


class _WouldMeasure(Exception):
    pass


def _serve_nothing(system: System, classes: Mapping[str, Slo]) -> AbstractAsyncContextManager[Served]:
    raise _WouldMeasure


@pytest.mark.parametrize(("cell", "is_known"), [(Cell(5, tpot_times=3), True), (Cell(2, tpot_times=3), False)])
async def test_only_the_cells_asked_for_are_measured(cell: Cell, is_known: bool, tmp_path: Path) -> None:
    points = Points(tmp_path / "points.jsonl")
    for name in ("push", "colocated-1024"):
        points.add_alone(name, UNIT)
    points.add(measured("push", 3, ttft_s=0.08))  # within TTFT 5x of 100 tokens, not within 2x
    points.add(measured("push", 4, ttft_s=9.0))
    limits = Limits(requests=20, until=math.inf, seeds=1, cells=[cell])
    campaign = Campaign(SHAPES["balanced"], (SYSTEMS["push"],), points, _serve_nothing, limits, lambda text: None)
    if is_known:
        assert await campaign.run()
    else:
        with pytest.raises(_WouldMeasure):
            await campaign.run()


def test_a_point_that_one_cell_asks_for_is_judged_for_all() -> None:
    tight, loose = bracket([judged(3, 0)]), bracket([judged(3, 8)])
    assert wanted({CELLS[0]: tight, CELLS[1]: loose, CELLS[2]: loose}, {}, BOUNDS, start=3) == [7, -1]


def test_a_system_whose_rival_does_better_is_asked_for_the_next_step_and_then_no_more() -> None:
    cell = CELLS[0]
    assert wanted({cell: bracket([])}, {cell: 5}, BOUNDS, start=3) == [6]
    assert wanted({cell: bracket([judged(6, 4)])}, {cell: 5}, BOUNDS, start=3) == []
    assert wanted({cell: bracket([judged(6, 9)])}, {cell: 5}, BOUNDS, start=3) == [10]


def test_luck_at_a_higher_rate_does_not_hide_a_miss_below_it() -> None:
    lucky = [judged(0, 0), judged(1, 0), Judged(rate_rps(2), 0, np.arange(10) < 9)]
    assert bracket(lucky).met == 0


def test_points_are_read_back_as_they_were_and_a_line_cut_off_is_not_one(tmp_path: Path) -> None:
    file = tmp_path / "points.jsonl"
    kept = measured("push", 3, 0.25)
    kept.timelines.last_token[4] = math.inf
    Points(file).add_alone("push", UNIT)
    Points(file).add(kept)
    file.write_bytes(file.read_bytes() + b'{"system": "push", "step')
    alone, points = Points(file).read()
    assert alone == {"push": UNIT}
    assert [point.step for point in points] == [3]
    for name in Timelines.__slots__:
        assert getattr(points[0].timelines, name) == pytest.approx(getattr(kept.timelines, name), abs=1e-4)
    Points(file).add(measured("push", 4, 0.25))
    assert [point.step for point in Points(file).read()[1]] == [3, 4]


def test_the_best_chunk_of_each_cell_stands_for_colocated() -> None:
    tight, loose = Cell(2, tpot_times=2), Cell(2, tpot_times=5)
    points = [
        *(measured("colocated-128", step, 0.05, tpot_s=0.011) for step in (0, 1, 2)),
        measured("colocated-128", 3, 1.0),
        *(measured("colocated-1024", step, 0.05, tpot_s=0.025) for step in (0, 1, 2, 3, 4, 5)),
        measured("colocated-1024", 6, 1.0),
        *(measured("push", step, 0.05) for step in (2, 3, 4)),
        measured("push", 5, 1.0),
    ]
    one, other = answers(points, UNIT, (tight, loose))
    assert (one.best["colocated"].chunk, other.best["colocated"].chunk) == (128, 1024)
    assert one.over_colocated["push"].value == pytest.approx(1.1**2, rel=0.01)
    assert other.over_colocated["push"].value == pytest.approx(1.1**-1, rel=0.01)


def test_every_seed_sends_the_same_requests_at_every_rate_and_exactly_at_that_rate() -> None:
    for shape in SHAPES.values():
        slow, fast = (shape.requests(rate, 100, seed=1) for rate in (1.0, 2.0))
        assert slow.prompt_tokens.tolist() == fast.prompt_tokens.tolist()
        assert slow.arrival_s == pytest.approx(2.0 * fast.arrival_s)
        assert len(slow) == 100 + WARM_UP_REQUESTS
        assert (len(slow) - 1) / (slow.arrival_s[-1] - slow.arrival_s[0]) == pytest.approx(1.0)


def test_an_slo_is_a_multiple_of_what_a_request_alone_gets() -> None:
    slo = Cell(5, tpot_times=2).slo(UNIT)
    assert (slo.ttft_s, slo.ttft_per_token_s, slo.tpot_s) == pytest.approx((0.1, 0.001, 0.012))
    assert len(CELLS) == 18
    assert len(TPOT_CELLS) == 9


def test_kinds_take_turns() -> None:
    chunks = [f"colocated-{chunk}" for chunk in (128, 512, 32)]
    names = [system.name for system in in_turn([SYSTEMS[name] for name in ("push", "pull", *chunks)])]
    assert names == ["push", "pull", *chunks[:2], "push", "pull", chunks[2]]
    assert in_turn([SYSTEMS["push"]]) == [SYSTEMS["push"]]


def test_what_a_request_alone_got_is_compared_at_one_machine_speed() -> None:
    slow = Alone(0.03, 0.0003, 0.009)
    then = slow.at_speed_of(UNIT)
    assert (then.ttft_s, then.ttft_per_token_s, then.tpot_s) == pytest.approx((0.02, 0.0002, UNIT.tpot_s))
    assert slow.slower_than(UNIT, 700) == pytest.approx(1.5)
    assert slow.at_speed_of(UNIT).slower_than(UNIT, 700) == pytest.approx(1.0)


def test_a_run_on_a_slower_machine_is_judged_as_if_its_clock_went_slower() -> None:
    assert factor_of(1.02) == factor_of(0.98) == 1.0
    assert factor_of(100.0) == max(SPEEDS)
    assert all(factor_of(slower) == pytest.approx(slower, rel=0.026) for slower in np.linspace(0.51, 3.9, 50))
    factor = factor_of(1.25)
    seen = Timelines(
        arrival=np.array([10.0]),
        first_token=np.array([10.5]),
        last_token=np.array([12.5]),
        output_tokens=np.array([5]),
        itl_p99_s=np.array([1.0]),
    )
    told = as_if(seen, factor)
    assert told.ttft_s[0] == pytest.approx(0.5 / factor)
    assert told.tpot_s[0] == pytest.approx(0.5 / factor)
    assert told.itl_p99_s is not None
    assert told.itl_p99_s[0] == pytest.approx(1.0 / factor)


def test_objectives_are_multiples_of_the_ttft_of_whole_prompts_and_of_the_median_step_on_idle_cores() -> None:
    whole = Alone(0.02, 0.0002, 0.008)
    alone = {"push": Alone(0.1, 0.1, 0.007), "colocated-1024": whole, "colocated-32": Alone(0.2, 0.1, 0.009)}
    assert unit_of(alone) == whole
    assert unit_of({**alone, "pull": Alone(0.5, 0.1, 0.02)}) == whole
    assert unit_of({**alone, "colocated-64": Alone(0.2, 0.1, 0.006)}).tpot_s == pytest.approx(0.0075)


@pytest.mark.parametrize(
    ("lengths", "ttft_s", "line"),
    [((100, 200, 400), (0.05, 0.07, 0.11), (0.0002, 0.03)), ((100, 200, 400), (0.01, 0.03, 0.11), (0.00025, 0.0))],
)
def test_a_prompts_base_is_never_below_nothing(
    lengths: Sequence[int], ttft_s: Sequence[float], line: tuple[float, float]
) -> None:
    assert _line(lengths, ttft_s) == pytest.approx(line, rel=0.1)


@pytest.mark.parametrize("system", SYSTEMS.values(), ids=lambda system: system.name)
@pytest.mark.parametrize("kind", ["vllm", "sim"])
def test_every_system_is_a_cluster_that_up_can_start(system, kind: str) -> None:  # type: ignore[no-untyped-def]
    assert ClusterConfig.model_validate(cluster(system, kind, None)).engine.kind == kind


def test_a_machine_file_says_where_and_the_system_says_what(tmp_path: Path) -> None:
    machine = tmp_path / "machine.yaml"
    machine.write_text(
        "engine: {kind: vllm, gpu_memory_utilization: 0.4}\npools: {prefill: {cpu_cores: [0]}, decode: {}}"
    )
    said = ClusterConfig.model_validate(cluster(SYSTEMS["colocated-64"], "vllm", machine))
    assert said.engine.kind == "vllm"
    assert (said.engine.gpu_memory_utilization, said.engine.max_num_batched_tokens) == (0.4, 64)
    assert {str(pool): settings.workers for pool, settings in said.pools.items()} == {"decode": 2}


def test_what_a_gpu_needs_is_not_overruled_by_what_a_core_does() -> None:
    said = cluster(SYSTEMS["push"], "vllm", Path(__file__).parents[3] / "benchmarks" / "gpu" / "one_gpu.yaml")
    assert ClusterConfig.model_validate(said).engine.model_dump()["dtype"] == "bfloat16"


def test_steps_and_rates_are_each_others_inverse() -> None:
    assert [step_of(rate_rps(step)) for step in range(-20, 30)] == list(range(-20, 30))
