"""What the browser tests look at: a simulated engine slow enough to be watched, and requests that keep it busy."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any

from splitserve.client import Client
from splitserve.core.config import RouterConfig, SimSettings, SloClass
from splitserve.core.request import SamplingParams
from tests.cluster.processes import ROUTER

SIM = SimSettings(step_s=0.01, prefill_token_s=0.0005, decode_token_s=0.0005)
CLASSES: Mapping[str, SloClass] = {"interactive": SloClass(ttft_s=2.0, tpot_s=0.5)}
WITHIN_S = 30.0


def routing(classes: Mapping[str, SloClass], **changes: Any) -> RouterConfig:
    return ROUTER.model_copy(
        update={"http": "127.0.0.1:0", "slo_classes": {**ROUTER.slo_classes, **classes}, **changes}
    )


@contextmanager
def busy(address: str, requests: int = 3, name: str = "r", max_tokens: int = 3000) -> Iterator[None]:
    """So many requests decode; they are cancelled when the block is left. They have no objectives, so they go by both
    pools."""
    stop, begun = threading.Event(), threading.Semaphore(0)

    def one(number: int) -> None:
        asked = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        prompt = tuple(range(300, 400))
        with Client(address) as client:
            stream = client.generate(prompt, asked, request_id=f"{name}{number}")
            with closing(stream) as chunks:
                for _ in chunks:
                    begun.release()
                    if stop.is_set():
                        return

    threads = [threading.Thread(target=one, args=(number,)) for number in range(requests)]
    for thread in threads:
        thread.start()
    try:
        for _ in threads:
            assert begun.acquire(timeout=WITHIN_S), "the requests do not decode"
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(WITHIN_S)
