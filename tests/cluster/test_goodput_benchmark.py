"""The goodput benchmark on real clusters with simulated engines, from the first request alone to the tables."""

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.goodput.alone import SPEEDS
from benchmarks.goodput.campaign import Campaign, Limits
from benchmarks.goodput.cases import SHAPES
from benchmarks.goodput.points import Points
from benchmarks.goodput.report import written
from benchmarks.goodput.served import Served, serving
from benchmarks.goodput.systems import SYSTEMS, UNIT, System, cluster
from splitserve.cli.build import DEMO_MODEL
from splitserve.core.slo import Slo

SHAPE = replace(SHAPES["balanced"], workload="prompt=200,output=20", start_rps=1.0)
FAST = {"step_s": 0.002, "prefill_token_s": 0.00002, "decode_token_s": 0.0}


class Bench:
    """Runs the campaign, and counts how often each system was started."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.started = directory, []  # type: Path, list[str]

    def campaign(
        self, until: float = float("inf"), steps: Sequence[int] = (20, 24), seeds: int = 1, told: str = ""
    ) -> Campaign:
        systems = [SYSTEMS[name] for name in (told, "push", UNIT) if name]
        limits = Limits(requests=12, until=until, steps=steps, seeds=seeds)
        points = Points(self.directory / f"{SHAPE.name}.jsonl")
        return Campaign(SHAPE, systems, points, self._serve, limits, lambda _: None)

    def _serve(self, system: System, classes: Mapping[str, Slo]) -> AbstractAsyncContextManager[Served]:
        self.started.append(system.name)
        scratch = self.directory / f"run-{len(self.started)}"
        scratch.mkdir()
        settings = cluster(system, "sim", None, classes)
        return serving(DEMO_MODEL, {**settings, "engine": {**settings["engine"], **FAST}}, scratch)


@pytest.mark.timeout(180)
async def test_points_are_measured_in_turns_kept_and_never_measured_again(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    assert await bench.campaign().run()
    assert bench.started == ["push", UNIT, "push", UNIT]  # alone first, then its points
    alone, points = Points(tmp_path / "balanced.jsonl").read()
    assert set(alone) == {"push", UNIT}
    assert [(point.system, point.step) for point in points] == [("push", 20), ("push", 24), (UNIT, 20), (UNIT, 24)]
    for point in points:
        assert point.failed == 0
        assert len(point.timelines) == 12
        assert point.timelines.output_tokens.tolist() == [20] * 12
        assert np.isfinite(point.timelines.last_token).all()
        assert (point.timelines.tpot_s > 0).all()
        assert set(point.cpu_s) == {"generator", "router", *(name for name in point.cpu_s if "-" in name)}
        assert len(point.cpu_s) == 4
    assert await bench.campaign().run()
    assert len(bench.started) == 4
    assert await bench.campaign(steps=[24], seeds=2).run()
    assert len(bench.started) == 6
    _, points = Points(tmp_path / "balanced.jsonl").read()
    assert [(point.system, point.step, point.seed) for point in points[4:]] == [("push", 24, 1), (UNIT, 24, 1)]
    text = written([SHAPE], tmp_path)
    assert "push / coloc." in text
    assert (tmp_path / "balanced.txt").read_text() == text + "\n"
    assert (tmp_path / "push.svg").read_text().startswith("<?xml")


async def test_a_system_that_is_told_objectives_has_a_class_for_the_speed_that_the_machine_has(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    assert await bench.campaign(steps=[20], told="adaptive-5-3").run()
    _, points = Points(tmp_path / "balanced.jsonl").read()
    (point,) = (point for point in points if point.system == "adaptive-5-3")
    assert point.failed == 0  # a class that the router does not know would be refused
    assert point.slower in SPEEDS


async def test_no_point_is_begun_when_time_is_up(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    assert not await bench.campaign(until=time.monotonic() - 1.0).run()
    assert bench.started == []
