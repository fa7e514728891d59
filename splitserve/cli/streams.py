"""Several streams of text on one terminal, live: a row each where the terminal can redraw, else lines with the name."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

_LINE = 100  # characters gathered before a line is printed
_NAME = 14


class Streams:
    """Takes text by stream name. Use within `shown`."""

    def __init__(self, console: Console, names: Sequence[str]) -> None:
        self._console = console
        self._texts = dict.fromkeys(names, "")
        self._printed = dict.fromkeys(names, 0)
        self._live = Live(console=console, refresh_per_second=10) if console.is_terminal else None

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Until the streams have ended; what is left of each is printed then."""
        if self._live is None:
            yield
        else:
            with self._live:
                yield
                self._live.update(self._table(), refresh=True)

    def add(self, name: str, text: str, ended: bool) -> None:
        self._texts[name] += text
        if self._live is not None:
            self._live.update(self._table())
            return
        while ended or len(self._texts[name]) - self._printed[name] >= _LINE:
            if not self._print_line(name):
                return

    def _print_line(self, name: str) -> bool:
        """Prints the next line's worth, cut at a space; False if nothing was left."""
        rest = self._texts[name][self._printed[name] :]
        line = rest if len(rest) <= _LINE else rest[: rest.rfind(" ", 0, _LINE) + 1] or rest[:_LINE]
        self._printed[name] += len(line)
        if line.strip():
            self._console.print(Text(f"{name:>{_NAME}} │ {' '.join(line.split())}"), soft_wrap=True)
        return bool(line)

    def _table(self) -> Table:
        """The end of each text, as much as fits two lines."""
        table = Table.grid(padding=(0, 1))
        table.add_column(justify="right", style="bold")
        table.add_column()
        room = 2 * max(20, self._console.width - _NAME - 4)
        for name, text in self._texts.items():
            table.add_row(name, Text(" ".join(text.split())[-room:]))
        return table
