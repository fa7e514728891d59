"""What the transfer service counts for whoever exports it, and under which reasons transfers fail."""

from collections.abc import Iterator

import pytest

from splitserve.core.config import KvTransferSettings
from tests.unit.kv.rig import BLOCK_BYTES, LAYERS, Pair, running_pair, wait_until


@pytest.fixture
def pair() -> Iterator[Pair]:
    with running_pair() as pair:
        yield pair


def test_a_lease_that_ran_out_is_counted_and_is_the_reason() -> None:
    with running_pair(KvTransferSettings(lease_s=0.1, peer_silent_s=1.0)) as pair:
        pair.offer()
        pair.prefill()
        pair.prefiller.wait_for("sent", pair.key)
        counts = pair.prefiller.service.counters.counts()
        assert (counts.leases, counts.expired_leases) == (1, 1)
        assert pair.prefiller.event(pair.key, True).reason == "lease"


def test_a_lease_that_was_claimed_in_time_has_not_expired(pair: Pair) -> None:
    pair.offer()
    pair.prefill()
    wait_until(lambda: pair.prefiller.service.counters.leases == 1, "the prefill has ended unclaimed")
    pair.claim()
    pair.prefiller.wait_for("sent", pair.key)
    assert pair.prefiller.service.counters.counts().expired_leases == 0
    assert pair.prefiller.event(pair.key, True).reason == ""


def test_both_sides_count_a_failure_under_the_same_reason(pair: Pair) -> None:
    pair.offer()
    pair.claim(prompt=pair.prompt[::-1])
    pair.prefill()
    pair.decoder.wait_for("failed", pair.key)
    assert pair.decoder.event(pair.key, False).reason == "prompt hash"
    assert pair.prefiller.event(pair.key, True).reason == "prompt hash"


def test_bytes_are_in_flight_until_their_write_has_ended(pair: Pair) -> None:
    pair.prefiller.transport.holds = True
    pair.offer()
    pair.claim()
    pair.prefill()
    pair.wait_for_blocks(LAYERS * len(pair.source_blocks))
    whole = LAYERS * len(pair.source_blocks) * BLOCK_BYTES
    wait_until(lambda: pair.prefiller.service.in_flight_bytes == whole, "all of it is in flight")
    assert pair.prefiller.service.counters.counts().written_bytes == 0
    pair.prefiller.transport.let_go()
    pair.decoder.wait_for("received", pair.key)
    pair.prefiller.wait_for("sent", pair.key)
    assert pair.prefiller.service.in_flight_bytes == 0
    assert pair.prefiller.service.counters.counts().written_bytes == whole
    assert pair.decoder.service.counters.counts().written_bytes == 0


def test_how_long_before_the_end_of_its_prefill_a_transfer_was_done_is_known_at_the_source(pair: Pair) -> None:
    pair.offer()
    pair.claim()
    pair.forward(0, len(pair.source_blocks))
    pair.decoder.wait_for("received", pair.key)
    pair.prefiller.service.prefill_ended(pair.key)
    pair.prefiller.wait_for("sent", pair.key)
    sent, received = pair.prefiller.event(pair.key, True).stats, pair.decoder.event(pair.key, False).stats
    assert sent.uncovered_s < 0
    assert received.bytes_before_prefill_ended == received.bytes == sent.bytes
