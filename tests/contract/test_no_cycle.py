"""Two workers that both prefill and decode, their memory full, each waiting for the other: nothing stands still.

Real simulated engines and the worker's real admission; the router is the simplest one that could lock them up: it sends
every decode that a worker takes, and only then asks for prefills.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from uuid import uuid4

import pytest

from splitserve.cli.build import DEMO_MODEL
from splitserve.core.config import KvTransferSettings, SimSettings
from splitserve.core.model import ModelInfo
from splitserve.core.worker import DecodeJob, Delta, Failure, Job, Pool, PrefillJob, Ticket
from splitserve.engine.sim import SimEngine
from splitserve.routing.admission import Capacity
from tests.contract.engines import TIMEOUT_S, a_decode, a_prefill, a_prompt, eventually, greedy

SETTINGS = SimSettings(
    total_blocks=24, block_size=16, max_model_len=160, max_num_seqs=8, max_num_batched_tokens=64, step_s=0.0002
)
REQUESTS = 24


class SoftWorker:
    """An engine behind its admission."""

    def __init__(self, model: ModelInfo, news: threading.Condition) -> None:
        self.engine = SimEngine(model, SETTINGS, KvTransferSettings(), uuid4().hex)
        self._news = news
        self.info = self.engine.start(self._hear)
        self.capacity = Capacity(SETTINGS.total_blocks, 16, 8, self.info.max_model_len, 64)
        self.ended: dict[str, Delta] = {}

    def take(self, job: Job) -> bool:
        refusal = self.capacity.admit(job)
        assert refusal is None or refusal.failure is Failure.NOT_NOW, refusal
        if refusal is None:
            self.engine.submit(job)
        return refusal is None

    def _hear(self, deltas: Sequence[Delta]) -> None:
        with self._news:
            for delta in deltas:
                if delta.outcome is None or delta.token_ids:
                    self.capacity.progressed(delta.job_id, len(delta.token_ids))
                if delta.outcome is not None:
                    self.capacity.ended(delta.job_id)
                    self.ended[delta.job_id] = delta
            self._news.notify_all()


@dataclass
class Request:
    decode_worker: SoftWorker
    prefill_worker: SoftWorker
    decode: DecodeJob
    prefill: PrefillJob
    decode_sent: bool = False
    prefill_sent: bool = False

    @property
    def ended(self) -> bool:
        return self.decode.job_id in self.decode_worker.ended

    def dispatch(self) -> None:
        self.decode_sent = self.decode_sent or self.decode_worker.take(self.decode)
        if self.decode_sent:
            self.prefill_sent = self.prefill_sent or self.prefill_worker.take(self.prefill)


@pytest.fixture
def news() -> threading.Condition:
    return threading.Condition()


@pytest.fixture
def workers(news: threading.Condition) -> Iterator[tuple[SoftWorker, SoftWorker]]:
    model = ModelInfo.read(DEMO_MODEL)
    with ExitStack() as stack:
        pair = SoftWorker(model, news), SoftWorker(model, news)
        for worker in pair:
            stack.callback(worker.engine.close)
        yield pair


def requests_both_ways(pair: tuple[SoftWorker, SoftWorker]) -> list[Request]:
    requests = []
    for number in range(REQUESTS):
        here, there = pair if number % 2 else pair[::-1]
        ticket = Ticket(f"t{number}", 1, there.info.kv_peers, here.info.kv_peers)
        prompt = a_prompt(range(6, 2048), 70 + number, number)
        requests.append(Request(here, there, a_decode(prompt, greedy(20), ticket), a_prefill(prompt, ticket)))
    return requests


def test_two_full_workers_that_wait_for_each_others_prefills_finish_everything(
    workers: tuple[SoftWorker, SoftWorker], news: threading.Condition
) -> None:
    requests = requests_both_ways(workers)
    with news:
        for request in requests:
            request.decode_sent = request.decode_worker.take(request.decode)
        assert all(worker.capacity.load(Pool.DECODE).parked_limit_blocks < 6 for worker in workers), "both are full"

        def move() -> bool:
            for request in requests:
                request.dispatch()
            return all(request.ended for request in requests)

        assert news.wait_for(move, TIMEOUT_S), [worker.capacity.load(Pool.DECODE) for worker in workers]
    outcomes = [request.decode_worker.ended[request.decode.job_id].outcome for request in requests]
    assert [outcome.failure for outcome in outcomes if outcome is not None] == [None] * REQUESTS
    for worker in workers:
        eventually(lambda: worker.engine.load().free_blocks == SETTINGS.total_blocks, worker.engine.load)  # noqa: B023
