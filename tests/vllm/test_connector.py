"""The scheduler half of the push connector, without an engine around it."""

from types import SimpleNamespace
from typing import Any

import pytest

from splitserve.core.worker import KvPeer, Ticket

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

TICKET = Ticket("transfer", 1, KvPeer("source", "tcp://127.0.0.1:1"), KvPeer("destination", "tcp://127.0.0.1:2"))


def test_a_claim_that_was_never_made_leaves_nothing_behind() -> None:
    """Its request was cancelled while it waited in vLLM's queue."""
    from vllm.v1.request import RequestStatus

    from splitserve.kv.connector import DESTINATION, SchedulerHalf, ticket_params

    half = SchedulerHalf(block_size=16)
    params = ticket_params(TICKET, DESTINATION, 5.0)
    request: Any = SimpleNamespace(request_id="r", kv_transfer_params=params, status=RequestStatus.FINISHED_ABORTED)
    half.admit(request)
    assert not half.finish(request)
    step = half.step(_nothing_scheduled())
    assert step.empty
    assert step.requests == {}, "the worker half would keep it for an end that never comes"


def _nothing_scheduled() -> Any:
    cached = SimpleNamespace(req_ids=[], num_computed_tokens=[])
    return SimpleNamespace(scheduled_new_reqs=[], scheduled_cached_reqs=cached, num_scheduled_tokens={})
