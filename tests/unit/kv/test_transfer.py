"""Two transfer services with real threads, sockets and shared memory."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from splitserve.core.config import KvTransferSettings
from splitserve.core.errors import ConfigError
from splitserve.core.worker import KvPeer
from splitserve.kv.curve import made_keys
from splitserve.kv.transfer import TransferKey, TransferService
from splitserve.kv.transport import TransportError
from tests.unit.kv.rig import (
    BLOCK_BYTES,
    BLOCK_SIZE,
    KV,
    LAYERS,
    PART,
    SETTINGS,
    SHARD,
    HeldTransport,
    Pair,
    Worker,
    a_claim,
    running,
    running_pair,
    wait_until,
)


@pytest.fixture
def pair() -> Iterator[Pair]:
    with running_pair() as made:
        yield made


# Bytes ---------------------------------------------------------------------------------------------------------------
def test_decode_first_every_block_arrives_exactly(pair: Pair) -> None:
    pair.claim()
    pair.offer()
    pair.prefill()
    pair.decoder.wait_for("received", pair.key)
    assert pair.arrived()
    pair.prefiller.wait_for("sent", pair.key)
    pair.assert_at_rest()


def test_prefill_first_the_claim_is_caught_up_with_one_write_a_layer(pair: Pair) -> None:
    pair.offer()
    pair.forward(0, 2)
    pair.forward(2, 4)
    pair.prefiller.service.prefill_ended(pair.key)
    wait_until(lambda: pair.prefiller.service.pinned_blocks == 4, "the prefill's blocks are pinned")
    pair.claim()
    pair.decoder.wait_for("received", pair.key)
    assert pair.arrived()
    assert sorted(pair.prefiller.transport.posted) == [(layer, 4) for layer in range(LAYERS)]
    pair.prefiller.wait_for("sent", pair.key)
    pair.assert_at_rest()


def test_in_a_race_every_block_arrives_exactly(pair: Pair) -> None:
    for number in range(30):
        pair.key = TransferKey("race", number)
        for step in (pair.claim, pair.offer)[:: 1 if number % 2 else -1]:
            step()
        pair.prefill()
        pair.decoder.wait_for("received", pair.key)
        pair.prefiller.wait_for("sent", pair.key)
        assert pair.arrived()
    pair.assert_at_rest()


def test_each_chunk_is_written_before_the_next_is_computed(pair: Pair) -> None:
    pair.decoder.service.connect([pair.prefiller.peer])
    pair.claim()
    pair.offer()
    for end in (1, 2, 4):
        pair.forward(max(0, end - 1), end)
        pair.wait_for_blocks(LAYERS * end)
    pair.decoder.wait_for("received", pair.key)
    assert pair.arrived()
    assert not pair.prefiller.collect().sent, "the prefill has not ended"
    pair.prefiller.service.prefill_ended(pair.key)
    stats = pair.prefiller.event(pair.key, source_side=True).stats
    assert stats.bytes == stats.bytes_before_prefill_ended == 4 * LAYERS * BLOCK_BYTES
    assert stats.uncovered_s < 0


def test_blocks_cached_at_the_source_go_out_at_registration(pair: Pair) -> None:
    pair.claim()
    pair.offer()
    pair.prefiller.service.computing(pair.key, [pair.source_blocks], 3 * BLOCK_SIZE)
    wait_until(lambda: len(pair.prefiller.transport.posted) == LAYERS, "the cached blocks are written")
    assert pair.prefiller.transport.posted == [(layer, 3) for layer in range(LAYERS)]


def test_blocks_cached_at_the_destination_are_not_written(pair: Pair) -> None:
    pair.claim(first=2)
    pair.offer()
    pair.prefill()
    pair.decoder.wait_for("received", pair.key)
    assert pair.arrived(first=2)
    assert not any(pair.decoder.transport.block(0, block)[0] for block in pair.claimed[:2])


def test_a_wrong_block_table_is_seen_to_differ(pair: Pair) -> None:
    """The negative twin of the tests above: their check can fail."""
    pair.claim()
    pair.offer()
    pair.prefiller.service.computing(pair.key, [(1, 3, 2, 4)], 4 * BLOCK_SIZE)
    pair.decoder.wait_for("received", pair.key)
    assert not pair.arrived()


def test_what_was_moved_before_and_after_the_end_of_the_prefill_is_told_on_both_sides(pair: Pair) -> None:
    pair.offer()
    pair.claim()
    pair.forward(0, 1)
    wait_until(lambda: pair.prefiller.service.counters.bytes_written == LAYERS * BLOCK_BYTES, "the first chunk is out")
    pair.prefiller.transport.holds = True
    pair.forward(1, 4)
    pair.prefiller.service.prefill_ended(pair.key)
    wait_until(lambda: pair.prefiller.service.pinned_blocks == 4, "the prefill's end is known")
    pair.prefiller.transport.let_go()
    source, destination = pair.prefiller.event(pair.key, True), pair.decoder.event(pair.key, False)
    assert source.stats == destination.stats
    assert (source.stats.bytes, source.stats.bytes_before_prefill_ended) == (
        4 * LAYERS * BLOCK_BYTES,
        LAYERS * BLOCK_BYTES,
    )
    assert source.stats.uncovered_s > 0
    assert source.error == destination.error == ""


def test_roles_are_soft_both_workers_write_to_each_other(pair: Pair) -> None:
    back = Pair(pair.decoder, pair.prefiller, TransferKey("back", 1), (1, 2), (14, 15))
    for way in (pair, back):
        way.claim()
    for way in (pair, back):
        way.offer()
        way.prefill()
    for way in (pair, back):
        way.decoder.wait_for("received", way.key)
        way.prefiller.wait_for("sent", way.key)
        assert way.arrived()


def test_sixteen_transfers_at_once_each_get_their_own_blocks(pair: Pair) -> None:
    ways = [
        Pair(pair.prefiller, pair.decoder, TransferKey(f"t{number}", 1), (number,), (15 - number,))
        for number in range(16)
    ]
    for way in ways:
        way.claim()
        way.offer()
        way.prefill()
    for way in ways:
        way.decoder.wait_for("received", way.key)
        way.prefiller.wait_for("sent", way.key)
    assert all(way.arrived() for way in ways)
    pair.assert_at_rest()


def test_a_preempted_prefill_waits_for_its_writes_and_is_written_from_its_new_blocks(pair: Pair) -> None:
    pair.claim()
    pair.offer()
    pair.prefiller.transport.holds = True
    pair.forward(0, 2)
    wait_until(lambda: len(pair.prefiller.transport.posted) == LAYERS, "WRITEs are in flight")
    with pytest.raises(TransportError, match="preempted prefills did not end"):
        pair.prefiller.service.drain([pair.key], timeout_s=0.05)
    pair.prefiller.transport.let_go()
    pair.prefiller.service.drain([pair.key])
    pair.prefiller.fill((12, 13))
    pair.prefiller.service.computing(pair.key, [(10, 11, 12, 13)], 0)
    for layer in range(LAYERS):
        pair.prefiller.service.computed(layer, [(pair.key, 4 * BLOCK_SIZE)])
    pair.decoder.wait_for("received", pair.key)
    assert pair.decoder.holds(pair.prefiller, (1, 2, 12, 13), pair.claimed)


def test_a_drain_of_prefills_without_writes_returns_at_once(pair: Pair) -> None:
    pair.prefiller.service.drain([TransferKey("unknown", 1)])


# Refusals ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("claim_first", [True, False])
def test_kv_of_another_prompt_is_refused_with_the_field_named(pair: Pair, claim_first: bool) -> None:
    steps = [lambda: pair.claim(prompt=pair.prompt[::-1]), pair.offer]
    for step in steps if claim_first else reversed(steps):
        step()
    pair.prefill()
    pair.decoder.wait_for("failed", pair.key)
    assert pair.decoder.event(pair.key, False).error.startswith("prompt_hash of the claim is not the prefill's")
    pair.prefiller.wait_for("sent", pair.key)
    assert not pair.prefiller.transport.posted
    assert pair.prefiller.service.counters.failures == {"prompt hash": 1}
    pair.assert_at_rest()


def test_a_worker_of_another_format_is_refused_on_both_sides_with_the_field_named() -> None:
    pair = Pair(Worker("prefiller"), Worker("decoder", kv=replace(KV, dtype="bfloat16")))
    back = Pair(pair.decoder, pair.prefiller, TransferKey("back", 1))
    with running(pair.prefiller, pair.decoder):
        for way in (pair, back):
            way.claim()
            way.decoder.wait_for("failed", way.key)
            assert way.decoder.event(way.key, False).error.startswith("kv.dtype is ")
    assert not pair.prefiller.transport.posted


def test_a_worker_whose_memory_has_another_shape_is_refused() -> None:
    pair = Pair(Worker("prefiller"), Worker("decoder"))
    pair.decoder.transport._address = b"nonsense"
    with running(pair.prefiller, pair.decoder):
        pair.offer()
        pair.claim()
        pair.prefill()
        pair.decoder.wait_for("failed", pair.key)
        pair.prefiller.wait_for("sent", pair.key)
        error = "this rank has nothing of what the claim's rank holds, or can't write to it"
        assert pair.decoder.event(pair.key, False).error == error


def test_a_claim_on_another_workers_endpoint_fails_with_proof(pair: Pair) -> None:
    """The uuid is one process start: whoever listens at its endpoint now is somebody else."""
    keys = made_keys()
    assert keys is not None
    gone = KvPeer("gone", pair.prefiller.peer.endpoint, PART, keys.public.decode())
    for _ in range(2):
        pair.key = TransferKey(pair.key.transfer_id, pair.key.epoch + 1)
        pair.decoder.service.claim(a_claim(pair.key, gone))
        pair.prefiller.service.connect([pair.decoder.peer])
        pair.decoder.wait_for("failed", pair.key)
        assert pair.decoder.event(pair.key, False).error == "the source's rank gone has ended"


def test_a_claim_on_an_endpoint_where_nobody_listens_fails_before_its_deadline(pair: Pair) -> None:
    other = Worker("short-lived")
    with running(other):
        endpoint = other.peer
    pair.decoder.service.claim(a_claim(pair.key, endpoint))
    pair.decoder.wait_for("failed", pair.key)
    pair.assert_at_rest()


def test_an_endpoint_that_is_none_is_refused(pair: Pair) -> None:
    pair.decoder.service.claim(a_claim(pair.key, replace(pair.prefiller.peer, uuid="x", endpoint="nonsense")))
    pair.decoder.wait_for("failed", pair.key)
    assert "its endpoint 'nonsense' is not usable" in pair.decoder.event(pair.key, False).error


def test_a_write_that_the_transport_refuses_fails_its_claim(pair: Pair) -> None:
    pair.prefiller.transport.broken = True
    pair.claim()
    pair.offer()
    pair.prefill()
    pair.decoder.wait_for("failed", pair.key)
    assert pair.decoder.event(pair.key, False).error == "the link is broken"
    pair.prefiller.wait_for("sent", pair.key)
    pair.assert_at_rest()


def test_a_transport_that_stumbles_over_one_peer_still_serves_the_others(pair: Pair) -> None:
    pair.decoder.transport.progress_fails = True
    pair.claim()
    wait_until(lambda: bool(pair.decoder.dropped()), "the failure is counted")
    pair.offer()
    pair.prefill()
    pair.decoder.wait_for("received", pair.key)
    assert set(pair.decoder.dropped()) == {"progress refused by the transport"}


# Giving up -----------------------------------------------------------------------------------------------------------
def test_a_claim_abandoned_before_its_source_was_reached_is_released_at_once(pair: Pair) -> None:
    pair.claim()
    pair.decoder.service.abandon(pair.key)
    pair.decoder.wait_for("released", pair.key)
    assert pair.decoder.service.counters.cancels == 0
    pair.assert_at_rest()


def test_a_claim_abandoned_before_its_prefill_came_is_released_and_nothing_is_written(pair: Pair) -> None:
    pair.warm_up()
    pair.claim()
    pair.decoder.service.abandon(pair.key)
    pair.decoder.wait_for("released", pair.key)
    pair.offer()
    pair.prefill()
    pair.prefiller.wait_for("sent", pair.key)
    assert not pair.prefiller.transport.posted
    pair.assert_at_rest()


def test_a_claim_abandoned_during_the_push_keeps_its_blocks_until_the_last_write_ended(pair: Pair) -> None:
    pair.prefiller.transport.holds = True
    pair.claim()
    pair.offer()
    pair.forward(0, 2)
    pair.wait_for_claim()
    pair.decoder.service.abandon(pair.key)
    wait_until(lambda: pair.prefiller.service.counters.cancels > 0, "the Cancel has come")
    assert pair.decoder.service.quarantined_blocks == 4
    assert pair.decoder.service.busy
    assert not pair.decoder.collect().released
    pair.prefiller.transport.let_go()
    pair.decoder.wait_for("released", pair.key)
    pair.prefill()
    pair.prefiller.wait_for("sent", pair.key)
    assert len(pair.prefiller.transport.posted) == LAYERS, "nothing is written once it is cancelled"
    assert pair.decoder.told.received == pair.decoder.told.failed == []
    pair.assert_at_rest()


def test_a_claim_abandoned_after_it_was_received_is_not_named_again(pair: Pair) -> None:
    pair.claim()
    pair.offer()
    pair.prefill()
    pair.decoder.wait_for("received", pair.key)
    pair.decoder.service.abandon(pair.key)
    pair.assert_at_rest()
    assert pair.decoder.collect().released == []


def test_an_aborted_prefill_fails_its_claim_and_gives_its_blocks_back(pair: Pair) -> None:
    pair.prefiller.transport.holds = True
    pair.claim()
    pair.offer()
    pair.forward(0, 2)
    pair.wait_for_claim()
    pair.prefiller.service.prefill_aborted(pair.key)
    wait_until(lambda: pair.prefiller.service.pinned_blocks == 4, "the abort is known")
    assert not pair.prefiller.collect().sent, "a WRITE still reads its blocks"
    pair.prefiller.transport.let_go()
    pair.prefiller.wait_for("sent", pair.key)
    pair.decoder.wait_for("failed", pair.key)
    assert pair.decoder.event(pair.key, False).error == "the prefill was aborted"
    pair.assert_at_rest()


def test_an_unclaimed_prefill_is_given_back_when_its_lease_ends_and_its_blocks_are_never_read() -> None:
    with running_pair(KvTransferSettings(lease_s=0.1, peer_silent_s=1.0)) as pair:
        pair.offer()
        pair.prefill()
        pair.prefiller.wait_for("sent", pair.key)
        assert "nobody claimed" in pair.prefiller.event(pair.key, True).error
        pair.claim()
        pair.decoder.wait_for("failed", pair.key)
        assert not pair.prefiller.transport.posted
        pair.assert_at_rest()


def test_a_claim_past_its_deadline_is_cancelled_and_fails_only_when_fenced(pair: Pair) -> None:
    pair.prefiller.transport.holds = True
    pair.offer()
    pair.claim(deadline_s=0.5)
    pair.forward(0, 2)
    pair.wait_for_claim()
    wait_until(lambda: pair.prefiller.service.counters.cancels > 0, "the Cancel has come")
    assert not pair.decoder.collect().failed
    pair.prefiller.transport.let_go()
    pair.decoder.wait_for("failed", pair.key)
    pair.prefiller.service.prefill_aborted(pair.key)
    pair.prefiller.wait_for("sent", pair.key)
    pair.assert_at_rest()


def test_the_end_of_a_prefill_that_was_never_offered_is_counted_and_owes_nothing(pair: Pair) -> None:
    pair.prefiller.service.prefill_aborted(pair.key)
    pair.prefiller.service.prefill_ended(pair.key)
    wait_until(lambda: pair.prefiller.dropped() == {"own end of no offer": 2}, "both are counted")
    pair.assert_at_rest()
    assert not pair.prefiller.told


# The end -------------------------------------------------------------------------------------------------------------
def test_a_closing_source_fails_its_claims_and_says_goodbye(pair: Pair) -> None:
    pair.claim()
    pair.offer()
    pair.forward(0, 2)
    pair.wait_for_claim()
    pair.prefiller.service.close()
    pair.decoder.wait_for("failed", pair.key)
    later = TransferKey("later", 1)
    pair.decoder.service.claim(a_claim(later, pair.prefiller.peer))
    pair.decoder.wait_for("failed", later)
    assert pair.decoder.event(later, False).error == "the source's rank prefiller has ended"


def test_a_closing_destination_takes_its_claims_back(pair: Pair) -> None:
    pair.claim()
    pair.offer()
    pair.forward(0, 2)
    pair.wait_for_claim()
    pair.decoder.service.close()
    pair.prefiller.service.prefill_ended(pair.key)
    pair.prefiller.wait_for("sent", pair.key)
    assert pair.prefiller.service.pinned_blocks == 0


def test_a_transport_that_cannot_be_made_is_raised_at_the_start() -> None:
    def refuse() -> HeldTransport:
        raise TransportError("no such device")

    service = TransferService("a", refuse, KV, SHARD, SETTINGS, lambda _: None)
    with pytest.raises(TransportError, match="no such device"):
        service.start()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "no.such.host.invalid", "203.0.113.7"])
def test_a_host_that_peers_cannot_reach_is_refused_with_the_setting_named(host: str) -> None:
    service = TransferService("a", HeldTransport, KV, SHARD, KvTransferSettings(host=host), lambda _: None)
    with pytest.raises(ConfigError, match=r"kv_transfer\.host"):
        service.start()


def test_a_broken_transfer_thread_is_told_to_the_engine() -> None:
    def explode(_: object) -> None:
        raise RuntimeError("a defect")

    worker = Worker("prefiller")
    worker.service = TransferService("prefiller", lambda: worker.transport, KV, SHARD, SETTINGS, explode)
    with running(worker):
        worker.service.claim(a_claim(TransferKey("t", 1), KvPeer("x", "nonsense", PART)))
        with pytest.raises(TransportError, match="a defect"):
            wait_until(lambda: bool(worker.service.take_results().failed), "the error")
        running_loop = worker.service._running
        assert running_loop.control._thread.is_alive(), "peers must not take the defect for the end of this process"
        running_loop.control.close()
