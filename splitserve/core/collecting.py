"""Garbage is looked for rarely: a search through all that is loaded stalls a process for tens of milliseconds, and what
tokens make has no cycles.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_RARELY = (50_000, 20, 10)


def collect_rarely() -> None:
    """From now on; what is there already is never searched again. Looking as often as usual costs a router 8% of its
    CPU."""
    gc.freeze()
    gc.set_threshold(*_RARELY)


@contextmanager
def rarely_collecting() -> Iterator[None]:
    """Within it only: the process's settings are as before afterwards."""
    usual, frozen = gc.get_threshold(), gc.get_freeze_count()
    collect_rarely()
    try:
        yield
    finally:
        gc.set_threshold(*usual)
        if not frozen:
            gc.unfreeze()
