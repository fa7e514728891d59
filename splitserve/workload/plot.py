"""One figure of a workload: how long prompts and outputs are, when requests arrive, and how long sessions are."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from splitserve.core.errors import ConfigError
from splitserve.workload.requests import Requests
from splitserve.workload.statistics import turns_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ENDINGS = (".svg", ".png")

_PROMPT, _OUTPUT = "#1f6fb2", "#c8541b"  # told apart without colour vision too: the output's line is dashed
_POINTS, _BINS = 512, 80


def save(requests: Requests, title: str, path: Path) -> None:
    """Writes SVG or PNG, by the path's ending; the same bytes for the same requests. Raises ConfigError for another
    ending, without matplotlib, or if the path can't be written."""
    if path.suffix.lower() not in ENDINGS:
        raise ConfigError(str(path), f"figures are written as {' or '.join(ENDINGS)}")
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise ConfigError(str(path), "figures need matplotlib: pip install matplotlib") from error
    kind = path.suffix.lower()[1:]
    with mpl.rc_context({"svg.hashsalt": "splitserve", "svg.fonttype": "none"}):
        try:
            figure(requests, title).savefig(path, metadata={"Date": None} if kind == "svg" else {"Software": None})
        except OSError as error:
            raise ConfigError(str(path), f"can't be written: {error.strerror or error}") from error


def figure(requests: Requests, title: str) -> "Figure":
    """Of at least one request; a third plot where it has sessions. Uses no display and none of pyplot's state."""
    assert len(requests)
    from matplotlib.figure import Figure

    plots = [_lengths, _arrivals] if requests.follows is None else [_lengths, _arrivals, _sessions]
    drawn = Figure(figsize=(5.0 * len(plots), 3.6), layout="constrained")
    drawn.suptitle(title)
    for plot, axes in zip(plots, drawn.subplots(1, len(plots)), strict=True):
        plot(axes, requests)
    return drawn


def _lengths(axes: "Axes", requests: Requests) -> None:
    shares = np.linspace(0.0, 1.0, _POINTS)
    for name, tokens, colour, style in (
        ("prompt", requests.prompt_tokens, _PROMPT, "-"),
        ("output", requests.output_tokens, _OUTPUT, "--"),
    ):
        at = np.quantile(tokens, shares, method="inverted_cdf")
        label = f"{name}: mean {tokens.mean():.4g}, p90 {np.quantile(tokens, 0.9, method='inverted_cdf'):.4g}"
        axes.step(at, shares, where="post", color=colour, linestyle=style, label=label)
    axes.set_xscale("log")
    axes.set_xlabel("tokens")
    axes.set_ylabel("share of requests at most as long")
    axes.set_ylim(0.0, 1.0)
    axes.grid(alpha=0.3)
    _legend(axes)


def _arrivals(axes: "Axes", requests: Requests) -> None:
    span_s = max(float(requests.arrival_s[-1] - requests.arrival_s[0]), 1e-9)
    bins = max(1, min(_BINS, len(requests) // 4))
    counts, edges = np.histogram(requests.arrival_s, bins=bins, range=(0.0, float(requests.arrival_s[-1]) or 1.0))
    rate_rps = (len(requests) - 1) / span_s if len(requests) > 1 else 0.0
    axes.stairs(counts / np.diff(edges), edges, fill=True, color=_PROMPT, alpha=0.6)
    axes.axhline(rate_rps, color="black", linewidth=1.0, label=f"mean {rate_rps:.3g} requests/s")
    axes.set_xlabel("seconds")
    axes.set_ylabel("requests/s")
    axes.set_ylim(bottom=0.0)
    axes.grid(alpha=0.3)
    _legend(axes)


def _sessions(axes: "Axes", requests: Requests) -> None:
    turns = turns_of(requests)
    share = 100.0 * requests.history_tokens.sum() / requests.prompt_tokens.sum()
    label = f"mean {turns.mean():.3g} turns; {share:.0f}% of prompt tokens are history"
    reached = (turns[:, None] >= np.arange(1, turns.max() + 1)).mean(axis=0)
    axes.stairs(reached, np.arange(0.5, len(reached) + 1.0), fill=True, color=_PROMPT, alpha=0.6, label=label)
    axes.set_xlabel("turns")
    axes.set_ylabel("share of sessions with at least as many")
    axes.set_ylim(0.0, 1.0)
    axes.grid(alpha=0.3)
    _legend(axes)


def _legend(axes: "Axes") -> None:
    """Above the axes: within, it would hide one of the lines."""
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2, fontsize="small", frameon=False)
