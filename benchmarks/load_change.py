"""How the adaptive policy takes a change of load, simulated: roles over time, and the attainment it costs.

    python -m benchmarks.load_change                      # 8 workers, three changes: a minute or two
    python -m benchmarks.load_change --json

Three changes, each half-way: the rate doubles and stays (step), it is 2.5 times as high for five seconds (burst), or
prompts become short and outputs long (shape). The same requests go to the adaptive policy and to the pools and chunk
that are best for the balanced shape at the doubled rate. A worker's role at a moment: it holds decodes, or not.
"""

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from benchmarks.goodput.cases import SHAPES, Cell
from benchmarks.scheduling import PROFILE, System, adaptive_system, static_systems, unit_of
from splitserve.core.slo import Slo, Timelines
from splitserve.latency.profile import read
from splitserve.planner.simulator.outcome import Outcome
from splitserve.planner.simulator.simulate import simulate
from splitserve.workload.named import workload
from splitserve.workload.requests import Requests

FIGURE = Path(__file__).parent / "results" / "load_change.svg"
WORKERS = 8
CELL = Cell(5, tpot_times=3)
CHANGE_AT_S, END_S = 60.0, 120.0
BURST_S, BURST_TIMES = 5.0, 2.5
WINDOW_S = 5.0
BASE_RPS = 10.0  # of the balanced shape; about half of what 8 workers serve
ATTAINMENT = 0.9


@dataclass(frozen=True, slots=True)
class Row:
    """`before`, `after`: attainment until the change and from `settled_s` after it on; `lost`: requests that missed
    their objectives in between. `settled_s`: from the change until windows of five seconds met 90% again, for good.
    `decoding_before`, `decoding_after`: workers that hold decodes, in the mean; `flips`: how often a worker begins or
    ceases to, per minute, from ten seconds after the change on."""

    change: str
    system: str
    before: float
    after: float
    settled_s: float
    lost: int
    decoding_before: float
    decoding_after: float
    flips: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", type=Path, default=PROFILE, help="default: %(default)s")
    parser.add_argument("--figure", type=Path, default=FIGURE, help="roles over time; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    args = parser.parse_args()
    latency = read(args.profile).latency()
    slo = CELL.slo(unit_of(latency, SHAPES["balanced"]))
    static, adaptive = static_systems(WORKERS, latency), adaptive_system(WORKERS, latency)
    chosen = [_best(kind, static, slo, args.seed) for kind in ("colocated", "pools")]
    rows, roles = [], {}
    for name, requests in changes(args.seed).items():
        for system in (*chosen, adaptive):
            outcome = simulate(system.deployment, requests, slo=slo if system is adaptive else None)
            rows.append(_row(name, system, outcome, slo))
            roles[name] = decoding(outcome)  # the last is the adaptive one's
    draw(roles, args.figure)
    print(json.dumps([asdict(row) for row in rows]) if args.json else "\n".join(table(rows)))


def changes(seed: int) -> dict[str, Requests]:
    half = CHANGE_AT_S
    calm = _drawn("balanced", BASE_RPS, half, seed)
    return {
        "step": _then(calm, _drawn("balanced", 2 * BASE_RPS, half, seed + 1)),
        "burst": _then(
            calm,
            _drawn("balanced", BURST_TIMES * BASE_RPS, BURST_S, seed + 1),
            _drawn("balanced", BASE_RPS, half - BURST_S, seed + 2),
        ),
        "shape": _then(calm, _drawn("decode-heavy", 2 * BASE_RPS, half, seed + 1)),
    }


def _drawn(shape: str, rate_rps: float, seconds: float, seed: int) -> Requests:
    drawn = workload(SHAPES[shape].workload).draw(int(2 * rate_rps * seconds) + 50, rate_rps, seed)
    return _rows(drawn, drawn.arrival_s < seconds)


def _rows(requests: Requests, which: npt.NDArray[np.bool_]) -> Requests:
    return Requests(requests.arrival_s[which], requests.prompt_tokens[which], requests.output_tokens[which])


def _then(*parts: Requests) -> Requests:
    """One after the other; the first lasts until the change."""
    starts = (0.0, CHANGE_AT_S, CHANGE_AT_S + BURST_S)
    return Requests(
        np.concatenate([part.arrival_s + start for part, start in zip(parts, starts, strict=False)]),
        np.concatenate([part.prompt_tokens for part in parts]),
        np.concatenate([part.output_tokens for part in parts]),
    )


def _best(kind: str, static: Sequence[System], slo: Slo, seed: int) -> System:
    requests = _drawn("balanced", 2 * BASE_RPS, CHANGE_AT_S, seed + 3)

    def attainment(system: System) -> float:
        return float(simulate(system.deployment, requests).timelines.met(slo).mean())

    return max((system for system in static if system.kind == kind), key=attainment)


def _row(change: str, system: System, outcome: Outcome, slo: Slo) -> Row:
    lines = outcome.timelines
    met, arrival = lines.met(slo), lines.arrival
    settled_s = _settled_s(met, arrival)
    between = (arrival >= CHANGE_AT_S) & (arrival < CHANGE_AT_S + settled_s)
    held = decoding(outcome)
    later = held[int(CHANGE_AT_S) + 10 : int(END_S)]
    return Row(
        change,
        f"{system.kind}, {system.name}" if system.name != system.kind else system.kind,
        float(met[arrival < CHANGE_AT_S].mean()),
        _share(met[arrival >= CHANGE_AT_S + settled_s]),
        settled_s,
        int((~met[between]).sum()),
        float(held[10 : int(CHANGE_AT_S)].sum(axis=1).mean()),
        float(later.sum(axis=1).mean()),
        float(np.abs(np.diff(later.astype(int), axis=0)).sum() / len(later) * 60.0 / held.shape[1]),
    )


def _share(met: npt.NDArray[np.bool_]) -> float:
    return float(met.mean()) if len(met) else 0.0


def _settled_s(met: npt.NDArray[np.bool_], arrival: npt.NDArray[np.float64]) -> float:
    """The end of the last window that missed the target."""
    settled_s = 0.0
    for start in np.arange(CHANGE_AT_S, END_S, WINDOW_S):
        window = (arrival >= start) & (arrival < start + WINDOW_S)
        if window.any() and met[window].mean() < ATTAINMENT:
            settled_s = float(start + WINDOW_S - CHANGE_AT_S)
    return settled_s


def decoding(outcome: Outcome) -> npt.NDArray[np.bool_]:
    """Of each second and worker, whether it held a decode then."""
    lines: Timelines = outcome.timelines
    held = np.zeros((int(END_S), len(outcome.workers)), dtype=bool)
    for first, last, worker in zip(lines.first_token, lines.last_token, outcome.decode_worker, strict=True):
        if worker >= 0 and np.isfinite(last):
            held[int(np.ceil(first)) : int(last) + 1, worker] = True
    return held


def table(rows: Iterable[Row]) -> Iterator[str]:
    cell = f"{CELL}"
    yield f"{WORKERS} workers, objectives {cell}; the change comes after {CHANGE_AT_S:g} s of {END_S:g}"
    yield "change  system                 met before  settled after  missed till then  met after  decoding  flips/min"
    for row in rows:
        yield (
            f"{row.change:7} {row.system:22} {row.before:9.1%}  {row.settled_s:10.0f} s {row.lost:15}  "
            f"{row.after:11.1%}  {row.decoding_before:.1f} -> {row.decoding_after:.1f}  {row.flips:6.1f}"
        )


def draw(roles: dict[str, npt.NDArray[np.bool_]], file: Path) -> None:
    """Workers that hold decodes, over time, under the adaptive policy."""
    figure = Figure(figsize=(8, 2.2 * len(roles)), layout="constrained")
    axes_of = figure.subplots(len(roles), 1, squeeze=False)[:, 0]
    for axes, (name, held) in zip(axes_of, roles.items(), strict=True):
        axes.imshow(held.T, aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        axes.axvline(CHANGE_AT_S, color="black", linewidth=1)
        axes.set_title(f"{name}: workers that hold decodes (dark)", fontsize=9)
        axes.set_ylabel("worker")
    axes_of[-1].set_xlabel("seconds")
    with mpl.rc_context({"svg.hashsalt": "splitserve", "svg.fonttype": "none"}):
        figure.savefig(file, metadata={"Date": None})


if __name__ == "__main__":
    main()
