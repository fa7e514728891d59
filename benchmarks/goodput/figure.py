"""The ratios of all shapes as one picture: a square per SLO, green where separated serving wins, brown where not."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.goodput.cases import ITL_CELLS, ITL_TIMES, TPOT_CELLS, TPOT_TIMES, TTFT_TIMES, Cell
from benchmarks.goodput.grid import Answer
from splitserve.bench.goodput import Ratio

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST = 2.0  # of the colours; beyond it they get no stronger
ROWS = (("TPOT", TPOT_TIMES, TPOT_CELLS), ("P99 ITL", ITL_TIMES, ITL_CELLS))


def draw(found: Mapping[str, Sequence[Answer]], kind: str, out: Path) -> None:
    """Goodput of `kind` over the best colocated system's; a column per shape. SVG, the same for the same points."""
    drawn = Figure(figsize=(max(3.3 * len(found), 5.2), 6.2), layout="constrained")
    drawn.suptitle(f"goodput of {kind} over colocated with its best chunk")
    axes = drawn.subplots(len(ROWS), len(found), squeeze=False)
    for column, (shape, answers) in enumerate(found.items()):
        ratios = {answer.cell: answer.over_colocated.get(kind) for answer in answers}
        for row, (name, times, cells) in enumerate(ROWS):
            _squares(axes[row][column], name, times, cells, ratios)
        axes[0][column].set_title(shape)
    with mpl.rc_context({"svg.hashsalt": "splitserve", "svg.fonttype": "none"}):
        drawn.savefig(out, metadata={"Date": None})


def _squares(
    axes: "Axes", name: str, times: Sequence[int], cells: Sequence[Cell], ratios: Mapping[Cell, Ratio | None]
) -> None:
    width = len(TTFT_TIMES)
    colours = mpl.colormaps["BrBG"]
    for number, cell in enumerate(cells):
        row, column = divmod(number, width)
        ratio = ratios.get(cell)
        shade = colours(0.5 + 0.5 * max(-1.0, min(1.0, math.log(ratio.value, MOST)))) if _decided(ratio) else "white"
        axes.fill_between((column, column + 1), row, row + 1, color=shade)
        axes.text(column + 0.5, row + 0.5, _label(ratio), ha="center", va="center", fontsize=9, linespacing=1.4)
    axes.set(xlim=(0, width), ylim=(len(times), 0), xlabel="TTFT, times unloaded", ylabel=f"{name}, times unloaded")
    axes.set_xticks([at + 0.5 for at in range(width)], [f"{times}x" for times in TTFT_TIMES])
    axes.set_yticks([at + 0.5 for at in range(len(times))], [f"{each}x" for each in times])
    axes.tick_params(length=0)


def _decided(ratio: Ratio | None) -> TypeGuard[Ratio]:
    return ratio is not None and not ratio.unknown and not ratio.leaves_open


def _label(ratio: Ratio | None) -> str:
    if ratio is None or ratio.unknown:
        return "?"
    bound = "<" if ratio.at_most else ">" if ratio.at_least else ""
    return f"{bound}{ratio.value:.2f}\n{ratio.low:.2f}-{ratio.high:.2f}"
