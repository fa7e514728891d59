"""Garbage is looked for rarely while a run goes on: a search through all that is loaded stalls the event loop for tens
of milliseconds, and what tokens make has no cycles. The process's settings are as before afterwards.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_RARELY = (50_000, 20, 10)


@contextmanager
def rarely_collecting() -> Iterator[None]:
    """What is there already is not searched at all meanwhile."""
    usual, frozen = gc.get_threshold(), gc.get_freeze_count()
    gc.freeze()
    gc.set_threshold(*_RARELY)
    try:
        yield
    finally:
        gc.set_threshold(*usual)
        if not frozen:
            gc.unfreeze()
