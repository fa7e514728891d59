import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from splitserve.bench import plots
from splitserve.bench.findings import Findings, judged
from splitserve.core.errors import ConfigError
from splitserve.core.slo import Slo
from tests.unit.bench.saved_runs import SLO, saved, swept

_GAPS = "Gaps between tokens over time"
FULL = Slo(0.2, 0.05, ttft_per_token_s=0.001, itl_p99_s=0.03)


@pytest.fixture(scope="module")
def comparison() -> Findings:
    return judged([*swept("pd"), *swept("colocated", slots=3)], SLO)


def drawn(draw: plots.Draw) -> Axes:
    axes = Figure().subplots()
    draw(axes)
    return axes


def labels(draw: plots.Draw) -> list[str]:
    legend = drawn(draw).get_legend()
    assert legend is not None
    return [text.get_text() for text in legend.get_texts()]


def test_one_run_has_distributions_and_times_but_no_rates() -> None:
    titles = list(plots.charts(judged([saved(2.0)], FULL)))
    assert titles == ["TTFT", "TPOT", "Gaps between tokens over time", "Requests over time"]


def test_a_comparison_has_a_curve_for_each_system_and_the_target(comparison: Findings) -> None:
    shown = labels(plots.charts(comparison)["Attainment against rate"])
    assert shown[0] == "target 90%"
    assert [label.split(",")[0] for label in shown[1:]] == ["pd", "colocated"]
    assert all("goodput" in label for label in shown[1:])


def test_the_curve_goes_through_what_was_measured(comparison: Findings) -> None:
    axes = drawn(plots.charts(comparison)["Attainment against rate"])
    (curve,) = [line for line in axes.get_lines() if str(line.get_label()).startswith("pd")]
    assert np.asarray(curve.get_xdata()).tolist() == [1.0, 2.0, 3.0, 4.0]
    shares = [figures.attainment.value for figures in comparison.systems[0].figures]
    assert np.asarray(curve.get_ydata()).tolist() == pytest.approx(shares)


def test_systems_are_shown_at_the_same_rate(comparison: Findings) -> None:
    pd, colocated = plots.typical(comparison.systems)
    assert pd.facts.rate_rps == colocated.facts.rate_rps
    assert (pd.facts.name, colocated.facts.name) == ("pd", "colocated")


def test_what_failed_keeps_a_distribution_below_one() -> None:
    findings = judged([saved(6.0, patience_s=1.0)], SLO)
    figures = findings.systems[0].figures[0]
    assert figures.failed > 0
    axes = drawn(plots.charts(findings)["TTFT"])
    most = max(np.asarray(axes.get_lines()[0].get_ydata()))
    assert most == pytest.approx(1 - figures.failed / figures.requests, abs=1 / 400)


def test_objectives_are_marked() -> None:
    charts = plots.charts(judged([saved(2.0)], FULL))
    assert any("by prompt" in label for label in labels(charts["TTFT"]))
    assert "objective TPOT 50 ms" in labels(charts["TPOT"])
    assert "objective" in labels(charts["Gaps between tokens over time"])


def test_outputs_of_one_token_have_no_gaps_and_say_so() -> None:
    one = saved(2.0)
    empty = one.run.chunks.only(np.array([], dtype=np.int64))
    axes = drawn(plots.charts(judged([replace(one, run=replace(one.run, chunks=empty))], SLO))[_GAPS])
    assert "no gaps" in axes.texts[0].get_text()


def test_requests_over_time_count_all_of_them() -> None:
    findings = judged([saved(6.0, patience_s=1.0)], SLO)
    lines = {str(line.get_label()): line for line in drawn(plots.charts(findings)["Requests over time"]).get_lines()}
    last = {name: np.asarray(line.get_ydata())[-1] for name, line in lines.items()}
    assert last["due"] == last["sent"] == 120
    assert last["done"] + last["failed"] == 120


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_the_same_runs_give_the_same_bytes(tmp_path: Path, comparison: Findings, ending: str) -> None:
    for name in ("one", "two"):
        plots.save(comparison, tmp_path / f"{name}.{ending}")
    one, two = ((tmp_path / f"{name}.{ending}").read_bytes() for name in ("one", "two"))
    assert one == two
    assert len(one) > 10_000


def test_within_a_page_the_page_chooses_the_colours(comparison: Findings) -> None:
    text = plots.svg(plots.charts(comparison)["Attainment against rate"])
    root = ElementTree.fromstring(text)
    assert root.tag.endswith("svg")
    assert "var(--series0)" in text
    assert "var(--objective)" in text
    assert not set(re.findall(r"#[0-9a-f]{6}\b", text)) & set(plots.COLOURS.values())


def test_another_ending_is_refused(tmp_path: Path, comparison: Findings) -> None:
    with pytest.raises(ConfigError, match=r"\.svg or \.png"):
        plots.save(comparison, tmp_path / "figure.gif")


def test_a_place_that_can_not_be_written_is_named(tmp_path: Path, comparison: Findings) -> None:
    with pytest.raises(ConfigError, match="can't be written"):
        plots.save(comparison, tmp_path / "nowhere" / "figure.svg")
