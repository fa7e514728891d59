"""Draws charts as SVG text: scales, axes, marks. Colours are the template's CSS classes, for light and dark."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Scale:
    """From values (`low` to `high`) to pixels (`start` to `end`)."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """Values beyond the ends are drawn at the ends."""
        share = (min(max(value, self.low), self.high) - self.low) / ((self.high - self.low) or 1.0)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self, most: int = 6) -> list[float]:
        """Round values, at most so many, within the scale."""
        step = _round_step((self.high - self.low) / most)
        first = math.ceil(self.low / step - 1e-9)
        return [n * step for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _round_step(least: float) -> float:
    """The least of 1, 2, 5 times a power of ten that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least)) if least > 0 else 1.0
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


@dataclass(frozen=True, slots=True)
class Frame:
    """A chart's two scales and its size in pixels."""

    x: Scale
    y: Scale
    width: int
    height: int

    @classmethod
    def of(cls, x: Point, y: Point, width: int = 560, height: int = 300, left: int = 52, right: int = 14) -> "Frame":
        """`x` and `y` are the ranges of values."""
        return cls(Scale(*x, left, width - right), Scale(*y, height - 44, 14), width, height)

    def point(self, value: Point) -> Point:
        return self.x.at(value[0]), self.y.at(value[1])


Label = Callable[[float], str]


def plain(value: float) -> str:
    return f"{value:g}" if abs(value) < 1e-9 or abs(value) >= 1e-3 else f"{value:.1e}"


def percent(value: float) -> str:
    return f"{value * 100:.4g}%"


def axes(frame: Frame, x_title: str, y_title: str, x_label: Label = plain, y_label: Label = plain) -> Iterable[str]:
    """Horizontal grid lines only: values are read off against them."""
    for tick in frame.y.ticks(5):
        y = frame.y.at(tick)
        yield line((frame.x.start, y), (frame.x.end, y), "grid")
        yield text((frame.x.start - 6, y + 4), y_label(_clean(tick)), "tick end")
    base = frame.y.start
    yield line((frame.x.start, base), (frame.x.end, base), "axis")
    for tick in frame.x.ticks():
        x = frame.x.at(tick)
        yield line((x, base), (x, base + 4), "axis")
        yield text((x, base + 17), x_label(_clean(tick)), "tick middle")
    yield text(((frame.x.start + frame.x.end) / 2, frame.height - 6), x_title, "title middle")
    middle = (frame.y.start + frame.y.end) / 2
    yield f'<text class="title middle" transform="translate(12 {middle:.1f}) rotate(-90)">{escape(y_title)}</text>'


def _clean(tick: float) -> float:
    return float(f"{tick:.6g}")


def drawing(width: int, height: int, marks: Iterable[str], about: str) -> str:
    """`about` is read out where nothing is seen."""
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(about, quote=True)}">{"".join(marks)}</svg>'
    )


def line(one: Point, other: Point, style: str, tip: str = "") -> str:
    ends = f'x1="{one[0]:g}" y1="{one[1]:g}" x2="{other[0]:g}" y2="{other[1]:g}"'
    return f'<line class="{style}" {ends}>{_tip(tip)}</line>'


def path(points: Sequence[Point], style: str) -> str:
    return f'<polyline class="{style}" points="{_pairs(points)}"/>'


def area(points: Sequence[Point], style: str) -> str:
    return f'<polygon class="{style}" points="{_pairs(points)}"/>'


def dot(at: Point, style: str, tip: str = "", radius: float = 4.5) -> str:
    return f'<circle class="{style}" cx="{at[0]:g}" cy="{at[1]:g}" r="{radius:g}">{_tip(tip)}</circle>'


def box(at: Point, width: float, height: float, style: str, tip: str = "") -> str:
    size = f'width="{max(width, 0):.1f}" height="{height:g}"'
    return f'<rect class="{style}" x="{at[0]:g}" y="{at[1]:g}" {size} rx="2">{_tip(tip)}</rect>'


def text(at: Point, said: str, style: str) -> str:
    return f'<text class="{style}" x="{at[0]:g}" y="{at[1]:g}">{escape(said)}</text>'


def _tip(said: str) -> str:
    return f"<title>{escape(said)}</title>" if said else ""


def _pairs(points: Iterable[Point]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in points)
