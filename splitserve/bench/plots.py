"""Figures of runs: attainment against rate, how fast requests were, gaps between tokens over time, traffic over time.

Drawn without a display and without pyplot's state. The same runs give the same bytes. Files are for paper, so they are
light; within the report `svg` leaves the colours to the page, which may be dark.
"""

import io
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from splitserve.bench.facts import milliseconds
from splitserve.bench.findings import Findings, Saved, System
from splitserve.bench.goodput import curve
from splitserve.bench.run import Ending, Run
from splitserve.core.errors import ConfigError
from splitserve.core.slo import Slo, Timelines

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ENDINGS = (".svg", ".png")

COLOURS: Mapping[str, str] = {  # by name, as on paper; the report has the same names for both of its grounds
    "ink": "#16161a",
    "soft": "#5d5d66",
    "rule": "#e3e3e0",
    "card": "#ffffff",
    "objective": "#c22f45",
    "series0": "#2a78d6",
    "series1": "#d9591f",
    "series2": "#1b9e6c",
    "series3": "#6a4fc9",
    "series4": "#b98200",
}
_SERIES = [name for name in COLOURS if name.startswith("series")]
_STYLES = ("-", "--", "-.", ":", (0, (5, 1)))  # told apart without colour vision too
_POINTS, _BUCKETS = 400, 120

Floats = npt.NDArray[np.float64]
Draw = Callable[["Axes"], None]


def save(findings: Findings, path: Path) -> None:
    """All figures in one, as SVG or PNG by the path's ending. Raises ConfigError for another ending, or if the path
    can't be written."""
    if path.suffix.lower() not in ENDINGS:
        raise ConfigError(str(path), f"figures are written as {' or '.join(ENDINGS)}")
    kind = path.suffix.lower()[1:]
    with _look():
        try:
            _sheet(list(charts(findings).items())).savefig(path, metadata=_METADATA[kind], format=kind)
        except OSError as error:
            raise ConfigError(str(path), f"can't be written: {error.strerror or error}") from error


def svg(draw: Draw, width: float = 5.6, height: float = 3.2) -> str:
    """One figure as an element of a page that says what the colours are, as `--ink` and so on. Inches of 72 pixels."""
    file = io.StringIO()
    with _look():
        drawn = _figure(width, height)
        draw(drawn.subplots())
        drawn.savefig(file, format="svg", metadata=_METADATA["svg"], transparent=True)
    text = file.getvalue()
    meant = set(re.findall(r"#([^\")]+)", text))
    text = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in meant else "", text[text.index("<svg") :])
    for name, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    return text


def charts(findings: Findings) -> dict[str, Draw]:
    """The figures that these findings have, by title, in the order in which they are shown. Where there are several
    runs, what needs one is of one near the goodput (see `typical`)."""
    chosen = typical(findings.systems)
    made: dict[str, Draw] = {}
    if any(system.goodput for system in findings.systems):
        made["Attainment against rate"] = partial(attainment, findings=findings)
    made["TTFT"] = partial(ttft, runs=chosen, slo=findings.slo)
    made["TPOT"] = partial(tpot, runs=chosen, slo=findings.slo)
    for saved in chosen:
        of = f", {saved.facts.name}" if len(chosen) > 1 else ""
        made[f"Gaps between tokens over time{of}"] = partial(gaps, saved=saved, slo=findings.slo)
        made[f"Requests over time{of}"] = partial(traffic, saved=saved)
    return made


def typical(systems: Sequence[System]) -> list[Saved]:
    """One run of each system, at the rate nearest their goodput that all of them have, or else each has."""
    shared = set.intersection(*({saved.facts.rate_rps for saved in system.saved} for system in systems))
    known = [system.goodput.rps for system in systems if system.goodput]
    return [_nearest(system, shared, known) for system in systems]


def _nearest(system: System, rates: set[float], goodputs: Sequence[float]) -> Saved:
    among = [saved for saved in system.saved if saved.facts.rate_rps in rates] or list(system.saved)
    middle = float(np.mean(np.log(goodputs))) if goodputs else 0.0
    return min(among, key=lambda saved: abs(math.log(saved.facts.rate_rps) - middle) if goodputs else 0.0)


def attainment(axes: "Axes", findings: Findings) -> None:
    """A curve for each system, with the interval of each point; the goodput and its interval on the target's line."""
    target = findings.slo.attainment
    axes.axhline(target, color=COLOURS["objective"], linestyle="--", linewidth=1.2, label=f"target {target:.0%}")
    for system, (colour, style) in zip(findings.systems, _series(), strict=False):
        _attainment(axes, system, findings.slo, colour, style)
    axes.set_xlabel("requests/s")
    axes.set_ylabel("share within the objectives")
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlim(left=0.0)
    _percent(axes)
    _legend(axes)


def _attainment(axes: "Axes", system: System, slo: Slo, colour: str, style: object) -> None:
    fitted = curve(system.points or [saved.measured.point for saved in system.saved], slo)
    rates, shares = fitted.rates_rps, fitted.attainment
    for one in system.figures:
        axes.plot([one.rate_rps] * 2, [one.attainment.low, one.attainment.high], color=colour, alpha=0.35, linewidth=3)
    goodput = f", goodput {_goodput(system)}" if system.goodput else ""
    axes.plot(rates, shares, color=colour, linestyle=style, marker="o", markersize=4, label=f"{system.name}{goodput}")
    if not np.allclose(fitted.fitted, shares):
        axes.plot(rates, fitted.fitted, color=colour, linestyle=":", linewidth=1.0)
    if system.goodput is None or system.goodput.at_most:
        return
    found = system.goodput
    axes.plot([found.low, found.high], [slo.attainment] * 2, color=colour, linewidth=2)
    axes.plot([found.rps], [slo.attainment], color=colour, marker="D", markersize=7, markeredgecolor=COLOURS["card"])


def _goodput(system: System) -> str:
    found = system.goodput
    assert found is not None
    bound = "≥ " if found.at_least else "< " if found.at_most else ""
    return f"{bound}{found.rps:.3g}/s"


def ttft(axes: "Axes", runs: Sequence[Saved], slo: Slo) -> None:
    """Which share of all requests, of those that failed too, had their first token how soon."""

    def objectives_s(timelines: Timelines) -> Floats:
        if timelines.prompt_tokens is None:
            return np.array([slo.ttft_s])
        return np.atleast_1d(timelines.ttft_objective_s(slo))

    _distribution(axes, runs, "TTFT", lambda timelines: timelines.ttft_s, objectives_s)


def tpot(axes: "Axes", runs: Sequence[Saved], slo: Slo) -> None:
    """Like `ttft`."""
    _distribution(axes, runs, "TPOT", lambda timelines: timelines.tpot_s, lambda _: np.array([slo.tpot_s]))


def _distribution(
    axes: "Axes",
    runs: Sequence[Saved],
    name: str,
    of: Callable[[Timelines], Floats],
    objectives_s: Callable[[Timelines], Floats],
) -> None:
    judged = [saved.measured.judged.timelines for saved in runs]
    objectives = np.concatenate([objectives_s(timelines) for timelines in judged])
    low_s, high_s = float(objectives.min()), float(objectives.max())
    shares, slowest_s = np.linspace(0.0, 1.0, _POINTS), 0.0
    for saved, timelines, (colour, style) in zip(runs, judged, _series(), strict=False):
        at_s = np.quantile(of(timelines), shares, method="inverted_cdf")
        came = np.isfinite(at_s)
        label = f"{saved.facts.name} at {saved.facts.rate_rps:.3g}/s"
        axes.step(at_s[came] * 1e3, shares[came], where="post", color=colour, linestyle=style, label=label)
        slowest_s = max(slowest_s, float(at_s[came][-1]) if came.any() else 0.0)
    _objective(axes, name, low_s, high_s)
    axes.set_xlim(0.0, 1e3 * max(1.25 * high_s, min(1.05 * slowest_s, 4.0 * high_s)))
    axes.set_xlabel(f"{name}, ms")
    axes.set_ylabel("share of requests")
    axes.set_ylim(0.0, 1.02)
    _percent(axes)
    _legend(axes)


def _objective(axes: "Axes", name: str, low_s: float, high_s: float) -> None:
    if high_s > low_s:
        label = f"{milliseconds(low_s)} to {milliseconds(high_s)}, by prompt"
        axes.axvspan(low_s * 1e3, high_s * 1e3, color=COLOURS["objective"], alpha=0.15, linewidth=0)
    else:
        label = f"{name} {milliseconds(low_s)}"
    axes.axvline(high_s * 1e3, color=COLOURS["objective"], linestyle="--", linewidth=1.2, label=f"objective {label}")


def gaps(axes: "Axes", saved: Saved, slo: Slo) -> None:
    """Of the gaps that ended in each bucket of time: half, 99%, and all of them are at most so long."""
    ended_s, gaps_s = _gaps(saved.run)
    if not len(gaps_s):
        axes.text(0.5, 0.5, "no gaps: no request had two chunks", ha="center", transform=axes.transAxes)
        return
    edges = np.linspace(0.0, float(ended_s.max()) * (1 + 1e-9), min(_BUCKETS, max(2, len(gaps_s) // 20)) + 1)
    bucket = np.digitize(ended_s, edges) - 1
    middles, levels = (edges[1:] + edges[:-1]) / 2, (("p50", 0.5), ("p99", 0.99), ("longest", 1.0))
    found = np.full((len(levels), len(middles)), np.nan)
    for nth in np.unique(bucket):
        within = gaps_s[bucket == nth] * 1e3
        found[:, nth] = np.quantile(within, [share for _, share in levels], method="inverted_cdf")
    for (name, _), row, (colour, style) in zip(levels, found, _series(), strict=False):
        axes.plot(middles, row, color=colour, linestyle=style, marker=".", markersize=2, label=name)
    if slo.itl_p99_s < math.inf:
        axes.axhline(slo.itl_p99_s * 1e3, color=COLOURS["objective"], linestyle="--", linewidth=1.2, label="objective")
    _logarithmic(axes)
    _seconds(axes, saved)
    axes.set_ylabel("gap between tokens, ms")
    _legend(axes)


def _logarithmic(axes: "Axes") -> None:
    """At least from a third to three times of what is drawn, with ticks that say plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    low, high = axes.dataLim.intervaly
    axes.set_yscale("log")
    axes.set_ylim(low / 3, high * 3)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _gaps(run: Run) -> tuple[Floats, Floats]:
    """When each gap ended, and how long it was, seconds."""
    order = np.argsort(run.chunks.request, kind="stable")
    times_s = run.chunks.time_s[order]
    same = np.diff(run.chunks.request[order]) == 0
    return times_s[1:][same], np.diff(times_s)[same]


def traffic(axes: "Axes", saved: Saved) -> None:
    """How many requests had fallen due, were sent, and had ended. The space between the lines is what waits or runs."""
    run = saved.run
    done = run.ending == Ending.DONE
    lines = [
        ("due", run.scheduled_s),
        ("sent", run.sent_s),
        ("done", run.ended_s[done]),
        ("failed", np.where(np.isnan(run.ended_s), run.scheduled_s, run.ended_s)[~done]),
    ]
    for (name, times_s), (colour, style) in zip(lines, _series(), strict=False):
        at_s = np.sort(times_s[np.isfinite(times_s)])
        if not len(at_s):
            continue
        shown = np.unique(np.linspace(0, len(at_s) - 1, min(_POINTS, len(at_s))).astype(np.int64))
        axes.step(at_s[shown], shown + 1, where="post", color=colour, linestyle=style, label=name)
    _seconds(axes, saved)
    axes.set_ylabel("requests so far")
    axes.set_ylim(bottom=0.0)
    _legend(axes)


def _seconds(axes: "Axes", saved: Saved) -> None:
    if saved.facts.warm_up_s:
        axes.axvspan(0.0, saved.facts.warm_up_s, color=COLOURS["soft"], alpha=0.12, linewidth=0, label="warm-up")
    axes.set_xlabel("seconds")
    axes.set_xlim(left=0.0)


def _series() -> Iterator[tuple[str, object]]:
    return zip([COLOURS[name] for name in _SERIES], _STYLES, strict=True)


def _percent(axes: "Axes") -> None:
    from matplotlib.ticker import PercentFormatter

    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _legend(axes: "Axes") -> None:
    """Above the axes: within, it would hide one of the lines."""
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2, fontsize="small", frameon=False)


def _sheet(drawn: Sequence[tuple[str, Draw]]) -> "Figure":
    rows = -(-len(drawn) // 2)
    sheet = _figure(11.0, 3.5 * rows)
    places: Iterable[Axes] = np.atleast_1d(sheet.subplots(rows, 2)).ravel()
    for axes in places:
        axes.set_axis_off()
    for axes, (title, draw) in zip(places, drawn, strict=False):
        axes.set_axis_on()
        axes.set_title(title, loc="left", fontsize="medium", pad=30)
        draw(axes)
    return sheet


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


@contextmanager
def _look() -> Iterator[None]:
    """Raises ConfigError without matplotlib."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise ConfigError("matplotlib", "figures need it: pip install matplotlib") from error
    with mpl.rc_context(_RC):
        yield


_METADATA: Mapping[str, dict[str, None]] = {"svg": {"Date": None}, "png": {"Software": None}}
_RC: dict[Any, Any] = {
    "svg.hashsalt": "splitserve",
    "svg.fonttype": "none",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": COLOURS["rule"],
    "axes.edgecolor": COLOURS["soft"],
    "axes.labelcolor": COLOURS["soft"],
    "axes.titlecolor": COLOURS["ink"],
    "text.color": COLOURS["soft"],
    "xtick.color": COLOURS["soft"],
    "ytick.color": COLOURS["soft"],
    "axes.facecolor": COLOURS["card"],
    "figure.facecolor": COLOURS["card"],
    "font.size": 9.0,
    "lines.linewidth": 1.6,
}
