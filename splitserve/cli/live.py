"""What commands share that show a router's state again and again: on a terminal that redraws, or as JSON."""

from collections.abc import Iterable
from math import isfinite
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType


def plain(value: object) -> object:
    """JSON has no infinity: null, where there is none of something."""
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def show_live(views: "Iterable[RenderableType]", screen: bool = False) -> None:
    """Each in the place of the one before; `screen`: on a screen of its own, as long as it lasts."""
    from rich.live import Live

    with Live(auto_refresh=False, screen=screen, vertical_overflow="crop") as live:
        for view in views:
            live.update(view, refresh=True)
