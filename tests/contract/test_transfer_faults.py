"""Transfers between two processes of which one is stopped or killed, over every transport."""

import signal
from collections.abc import Callable

import pytest

from splitserve.core.worker import KvPeer
from splitserve.kv.layout import prompt_hash
from splitserve.kv.transfer import Claim, Offer, Results, Table, TransferKey
from tests.contract.kv_endpoints import BLOCK_BYTES, BLOCK_SIZE, KINDS, LAYERS, skip_without
from tests.contract.kv_worker import LocalWorker, RemoteWorker, local_worker, remote_worker
from tests.unit.kv.rig import wait_until

KEY = TransferKey("transfer", 1)
SOURCE_BLOCKS, CLAIMED = (1, 2, 3, 4), (9, 7, 11, 5)
PROMPT = tuple(range(len(CLAIMED) * BLOCK_SIZE))


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    skip_without(request.param)
    return str(request.param)


def claim_on(source: KvPeer) -> Claim:
    return Claim(KEY, (source,), prompt_hash(PROMPT), len(PROMPT), (Table(0, CLAIMED),), 600.0)


def offer_to(destination: KvPeer) -> Offer:
    return Offer(KEY, (destination,), PROMPT, len(SOURCE_BLOCKS))


def push_half(source: RemoteWorker, decoder: LocalWorker) -> None:
    """A claim of ours, of which the other process has written two blocks of four."""
    decoder.service.claim(claim_on(source.peer))
    source.call("offer", offer_to(decoder.service.peer))
    source.forward(KEY, SOURCE_BLOCKS, 0, 2)
    last = LAYERS - 1
    wait_until(lambda: decoder.memory[last, CLAIMED[1], -1] == SOURCE_BLOCKS[1] + 1, "two blocks have come")


def named(worker: LocalWorker, names: Callable[[Results], list[TransferKey]]) -> None:
    wait_until(lambda: KEY in names(worker.service.take_results()), "the transfer's end")
    wait_until(lambda: not worker.service.busy, "rest")
    assert (worker.service.quarantined_blocks, worker.service.pinned_blocks) == (0, 0)


def test_a_claim_on_a_killed_source_fails_once_its_end_is_proven(kind: str) -> None:
    with local_worker(kind, "decoder") as decoder, remote_worker(kind, "prefiller") as source:
        push_half(source, decoder)
        source.kill()
        named(decoder, lambda results: results.failed)


def test_blocks_abandoned_to_a_killed_source_are_released_once_its_end_is_proven(kind: str) -> None:
    with local_worker(kind, "decoder") as decoder, remote_worker(kind, "prefiller") as source:
        push_half(source, decoder)
        source.signal(signal.SIGSTOP)
        decoder.service.abandon(KEY)
        wait_until(lambda: decoder.service.quarantined_blocks == len(CLAIMED), "quarantine")
        source.kill()
        named(decoder, lambda results: results.released)


def test_blocks_abandoned_to_a_stopped_source_stay_in_quarantine_until_it_wakes(kind: str) -> None:
    with local_worker(kind, "decoder") as decoder, remote_worker(kind, "prefiller") as source:
        push_half(source, decoder)
        source.signal(signal.SIGSTOP)
        decoder.service.abandon(KEY)
        wait_until(lambda: not decoder.service.connected, "the source is called silent")
        assert decoder.service.quarantined_blocks == len(CLAIMED)
        assert not decoder.service.take_results()
        source.signal(signal.SIGCONT)
        named(decoder, lambda results: results.released)
        source.forward(KEY, SOURCE_BLOCKS, 2, 4)
        source.call("prefill_ended", KEY)
        wait_until(lambda: KEY in source.call("take_results").sent, "the source's blocks are given back")
        assert not decoder.memory[:, CLAIMED[2:]].any(), "a cancelled claim was written on"


def test_a_transfer_goes_on_when_a_stopped_source_wakes(kind: str) -> None:
    with local_worker(kind, "decoder") as decoder, remote_worker(kind, "prefiller") as source:
        push_half(source, decoder)
        source.signal(signal.SIGSTOP)
        wait_until(lambda: not decoder.service.connected, "the source is called silent")
        source.signal(signal.SIGCONT)
        source.forward(KEY, SOURCE_BLOCKS, 2, 4)
        named(decoder, lambda results: results.received)
        assert decoder.memory[:, CLAIMED, 0].tolist() == [[block + 1 for block in SOURCE_BLOCKS]] * LAYERS


@pytest.mark.parametrize("stop_first", [False, True])
def test_a_killed_destination_gives_the_source_its_blocks_back(kind: str, stop_first: bool) -> None:
    with local_worker(kind, "prefiller") as prefiller, remote_worker(kind, "decoder") as decoder:
        decoder.call("claim", claim_on(prefiller.service.peer))
        prefiller.service.offer(offer_to(decoder.peer))
        prefiller.service.computing(KEY, [SOURCE_BLOCKS], 2 * BLOCK_SIZE)
        written = 2 * LAYERS * BLOCK_BYTES
        wait_until(lambda: prefiller.service.counters.bytes_written == written, "two blocks are written")
        if stop_first:
            decoder.signal(signal.SIGSTOP)
        decoder.kill()
        wait_until(lambda: not prefiller.service.connected, "its end is known")
        prefiller.service.prefill_ended(KEY)
        named(prefiller, lambda results: results.sent)
        assert prefiller.service.counters.failures.total() == 1


def test_an_unclaimed_prefill_for_a_killed_destination_does_not_wait_for_its_lease(kind: str) -> None:
    with local_worker(kind, "prefiller") as prefiller, remote_worker(kind, "decoder") as decoder:
        decoder.call("connect", [prefiller.service.peer])
        prefiller.service.connect([decoder.peer])
        wait_until(lambda: bool(prefiller.service.connected), "they are connected")
        prefiller.service.offer(offer_to(decoder.peer))
        prefiller.service.computing(KEY, [SOURCE_BLOCKS], 4 * BLOCK_SIZE)
        prefiller.service.prefill_ended(KEY)
        wait_until(lambda: prefiller.service.pinned_blocks == len(SOURCE_BLOCKS), "the blocks are pinned")
        decoder.kill()
        named(prefiller, lambda results: results.sent)
