"""The tables of one shape, as text, and what they rest on."""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.goodput.alone import Alone
from benchmarks.goodput.cases import ATTAINMENT, CELLS, ITL_CELLS, TPOT_CELLS, TTFT_TIMES, Cell, Shape, rate_rps, rows
from benchmarks.goodput.figure import draw
from benchmarks.goodput.grid import Answer, Best, answers
from benchmarks.goodput.points import Measured, Points
from benchmarks.goodput.systems import KINDS, UNIT, unit_of
from splitserve.bench.goodput import Goodput, Ratio

WIDTH = 24


def written(shapes: Sequence[Shape], out: Path) -> str:
    """Also kept beside the points: a text for each shape, and a figure for each kind over colocated."""
    texts, found = [], {}
    for shape in shapes:
        alone, points = points_of(out, shape).read()
        if UNIT not in alone or not points:
            texts.append(f"{shape.name}: nothing is measured yet")
            continue
        unit = unit_of(alone)
        found[shape.name] = answers(points, unit, CELLS)
        texts.append(_report(shape, unit, points, found[shape.name]))
        (out / f"{shape.name}.txt").write_text(texts[-1] + "\n")
    for kind in sorted({kind for one in found.values() for answer in one for kind in answer.over_colocated}):
        draw(found, kind, out / f"{kind}.svg")
    return "\n\n".join(texts)


def points_of(out: Path, shape: Shape) -> Points:
    return Points(out / f"{shape.name}.jsonl")


def _report(shape: Shape, unit: Alone, points: Sequence[Measured], found: Sequence[Answer]) -> str:
    parts = [
        *_heading(shape, unit, points),
        *_goodputs(found, TPOT_CELLS, "TPOT"),
        *_goodputs(found, ITL_CELLS, "P99 ITL"),
        *_costs(points),
        *_all_points(points, unit),
    ]
    return "\n".join(parts)


def _heading(shape: Shape, unit: Alone, points: Sequence[Measured]) -> Iterable[str]:
    dates = sorted(point.taken for point in points)
    requests = sorted({len(point.timelines) for point in points})
    yield f"{shape.name}: {shape.workload}"
    yield (
        f"{len(points)} points of {' or '.join(map(str, requests))} requests, {dates[0][:16]} to {dates[-1][:16]} UTC; "
        f"attainment {ATTAINMENT:.0%}; rates in steps of 10%; 95% intervals by bootstrap over requests"
    )
    yield (
        f"a request alone: TTFT {unit.ttft_s * 1000:.0f} ms + {unit.ttft_per_token_s * 1e6:.0f} us a prompt "
        f"token ({UNIT}), TPOT {unit.tpot_s * 1000:.1f} ms (median system)"
    )
    yield from (f"  {text}" for text in KINDS.values())


def _goodputs(found: Sequence[Answer], cells: tuple[Cell, ...], name: str) -> Iterable[str]:
    by_cell = {answer.cell: answer for answer in found}
    for row in rows(cells):
        times = row[0].tpot_times if name == "TPOT" else row[0].itl_times
        yield ""
        yield f"{name} {times:g}x".ljust(18) + "".join(f"TTFT {ttft}x".ljust(WIDTH) for ttft in TTFT_TIMES)
        answered = [by_cell[cell] for cell in row]
        for kind in KINDS:
            if any(kind in answer.best for answer in answered):
                shown = [_rate(answer.best.get(kind)) for answer in answered]
                yield f"  {kind}, req/s".ljust(18) + "".join(text.ljust(WIDTH) for text in shown)
        for kind in (kind for kind in KINDS if any(kind in answer.over_colocated for answer in answered)):
            shown = [_ratio(answer.over_colocated.get(kind)) for answer in answered]
            yield f"  {kind} / coloc.".ljust(18) + "".join(text.ljust(WIDTH) for text in shown)
        if any(answer.over_static for answer in answered):
            shown = [_ratio(answer.over_static) for answer in answered]
            yield "  adaptive / best".ljust(18) + "".join(text.ljust(WIDTH) for text in shown)


def _rate(best: Best | None) -> str:
    if best is None:
        return "-"
    chunk = f" c{best.chunk}" if best.chunk else ""
    return f"{_bound(best.goodput)}{best.goodput.rps:.2f} ({best.goodput.low:.2f}-{best.goodput.high:.2f}){chunk}"


def _ratio(ratio: Ratio | None) -> str:
    if ratio is None:
        return "-"
    return "?" if ratio.unknown else f"{_bound(ratio)}{ratio.value:.2f} ({ratio.low:.2f}-{ratio.high:.2f})"


def _bound(figure: Goodput | Ratio) -> str:
    return "<" if figure.at_most else ">" if figure.at_least else ""


def _costs(points: Sequence[Measured]) -> Iterable[str]:
    """What shares the engines' cores with them."""
    yield ""
    yield "CPU, cores used: median over points"
    for kind in KINDS:
        mine = [point for point in points if point.system.split("-")[0] == kind]
        if mine:
            names: dict[str, tuple[str, ...]] = {"router": ("router",), "generator": ("generator",)}
            names["workers"] = tuple(name for name in mine[0].cpu_s if name not in ("router", "generator"))
            used = {
                label: statistics.median(
                    sum(point.cpu_s[name] for name in held if name in point.cpu_s) / point.wall_s for point in mine
                )
                for label, held in names.items()
            }
            yield f"  {kind}".ljust(18) + ", ".join(f"{label} {cores:.2f}" for label, cores in used.items())
    late = [point.late_p99_s * 1000 for point in points]
    yield f"generator: late at P99 by {statistics.median(late):.1f} ms in the median point, {max(late):.1f} at worst"
    slower = [point.slower for point in points]
    yield (
        f"machine: {sum(factor != 1.0 for factor in slower)} of {len(points)} points normalised "
        f"({min(slower):.2f} to {max(slower):.2f} times as slow)"
    )
    yield f"{sum(bool(point.doubt) for point in points)} points stayed in doubt when taken once more"


def _all_points(points: Sequence[Measured], unit: Alone) -> Iterable[str]:
    """Attainment of each point in each cell."""
    yield ""
    yield "attainment, %, of each point; columns: TPOT then P99 ITL, TTFT 2x, 5x, 10x within each"
    yield "system            req/s seed  " + "".join(f"{_short(cell):>7}" for cell in CELLS) + "  failed"
    for point in sorted(points, key=lambda point: (point.system, point.step, point.seed)):
        shares = (100 * float(point.timelines.met(cell.slo(unit)).mean()) for cell in CELLS)
        yield (
            f"{point.system:16} {rate_rps(point.step):6.2f} {point.seed:4}  "
            + "".join(f"{share:7.1f}" for share in shares)
            + f"  {point.failed:6}"
        )


def _short(cell: Cell) -> str:
    second = f"T{cell.tpot_times:g}" if cell in TPOT_CELLS else f"I{cell.itl_times:g}"
    return f"{second}/{cell.ttft_times}"
