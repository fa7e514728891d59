"""Tables and lists: no frame, no cell cut, heads broken at their spaces so that eighty columns are enough."""

from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text


def table(
    words: Sequence[str], figures: Sequence[str], rows: Iterable[Sequence[str]] = (), folds: Sequence[str] = ()
) -> Table:
    """`words` head columns aligned left and come first, `figures` head columns aligned right; nothing is cut, and only
    cells below `folds` may take several lines."""
    made = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for head in (*words, *figures):
        made.add_column(
            head.replace(" ", "\n"), no_wrap=head not in folds, justify="left" if head in words else "right"
        )
    for row in rows:
        made.add_row(*row)
    return made


def bullet(line: str, style: str = "") -> Text:
    return Text(f"• {line}", style=style)
