"""What a benchmark says on stderr while it runs, and when it gives up. Told by `open_loop`; never waits."""

import shutil
import sys
from typing import TextIO

from splitserve.bench.facts import milliseconds
from splitserve.bench.open_loop import Progress
from splitserve.core.errors import Unavailable

QUIET_S = 2.0  # what takes no longer needs no progress
LINE_EVERY_S = 10.0  # where it can't be written over
SILENT_S, SILENT_FAILURES = 10.0, 10


class Voice:
    """One line that changes on a terminal; elsewhere a line every ten seconds."""

    def __init__(self, to: TextIO | None = None) -> None:
        self._to = to or sys.stderr
        self._terminal = self._to.isatty()
        self._doing, self._said_s, self._open = "", 0.0, False

    def begin(self, doing: str) -> None:
        """What the next run is, before its figures."""
        self._doing, self._said_s = doing, 0.0

    def tell(self, progress: Progress) -> None:
        due = QUIET_S if self._terminal else self._said_s + LINE_EVERY_S
        if progress.at_s < due:
            return
        self._said_s = progress.at_s
        line = f"{self._doing}: {said(progress)}"
        self._to.write(f"\r{line[: _columns()]}\x1b[K" if self._terminal else f"{line}\n")
        self._to.flush()
        self._open = self._terminal

    def say(self, sentence: str) -> None:
        """A line that stays."""
        self.end()
        self._to.write(f"{sentence}\n")
        self._to.flush()

    def end(self) -> None:
        """Takes the changing line away."""
        if self._open:
            self._to.write("\r\x1b[K")
            self._to.flush()
            self._open = False


def _columns() -> int:
    """One fewer than there are: a line that fills the last one can't be written over."""
    return shutil.get_terminal_size().columns - 1


def said(progress: Progress) -> str:
    rate = progress.tokens / progress.at_s if progress.at_s else 0.0
    failed = f", {progress.failed} failed" if progress.failed else ""
    return (
        f"{progress.at_s:.0f} s, {progress.sent}/{progress.requests} sent, {progress.in_flight} in flight, "
        f"{progress.done} done{failed}, {rate:,.0f} tokens/s, p99 {milliseconds(progress.late_p99_s)} late"
    )


class Patience:
    """Ends a run whose target is gone: no token came for ten seconds, in which ten requests failed. A target that is
    only too slow still answers some."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._since: Progress | None = None

    def judge(self, progress: Progress) -> None:
        """Raises Unavailable."""
        if self._since is None or progress.tokens > self._since.tokens:
            self._since = progress
            return
        failures = progress.failed - self._since.failed
        if progress.at_s - self._since.at_s >= SILENT_S and failures >= SILENT_FAILURES:
            raise Unavailable(
                f"{self._name} has stopped answering: no token came for {progress.at_s - self._since.at_s:.0f} s, in "
                f"which {failures} requests failed ({progress.error}); the run was given up and nothing of it is kept"
            )
