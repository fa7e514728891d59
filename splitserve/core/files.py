"""Files that change while a process runs: certificates and keys, as Kubernetes mounts and renews them."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

ValueT = TypeVar("ValueT")


class Watched(Generic[ValueT]):
    """What files say, read anew when one of them has changed. May be asked on any thread.

    `read` raises what it will, from the constructor and from `look`; a later `look` tries again only once the files
    have changed once more.
    """

    def __init__(self, files: Sequence[str], read: Callable[[], ValueT]) -> None:
        self.files = tuple(files)
        self._read = read
        self._lock = threading.Lock()
        self._seen = _stamp(self.files)
        self.first = read()

    def look(self) -> ValueT | None:
        """What they say now; None if nothing has changed since the last look."""
        with self._lock:
            now = _stamp(self.files)  # before reading: what changes in between is seen the next time
            if now == self._seen:
                return None
            self._seen = now
            return self._read()


def _stamp(files: Sequence[str]) -> tuple[tuple[int, int, int], ...]:
    """Changes with the content: Kubernetes swaps a symlink, so that the inode is another one."""
    return tuple(_stamp_of(Path(file)) for file in files)


def _stamp_of(file: Path) -> tuple[int, int, int]:
    try:
        found = file.stat()
    except OSError:
        return (0, 0, 0)
    return (found.st_ino, found.st_mtime_ns, found.st_size)
