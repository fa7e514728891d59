"""KV from all ranks of one worker to all ranks of another, each in its own process, over every transport: exact for
every pair of parallelisms, where heads are replicated, and between block sizes.
"""

from collections.abc import Iterator

import pytest

from splitserve.kv.transfer import TransferKey
from splitserve.kv.transport import TransportError
from tests.contract.kv_endpoints import KINDS, skip_without
from tests.contract.kv_ranks import Child, Transfer, Workers, children
from tests.contract.rank_server import SETTINGS, SLOT, Read
from tests.unit.kv.numbered import Shape, format_of

TOKENS = 29  # ends within a block of every size used here


@pytest.fixture(scope="module")
def made() -> Iterator[list[Child]]:
    with children(4) as started:
        yield started


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    skip_without(request.param)
    return str(request.param)


def transfer(workers: Workers, tokens: int = TOKENS, **rest: int | tuple[int, ...]) -> Transfer:
    read = Read(7, tokens, workers.layers, workers.heads)
    return Transfer(workers, TransferKey("transfer", 1), read, **rest)  # type: ignore[arg-type]


def push(moved: Transfer) -> None:
    """In two chunks, with the claim there before the first."""
    moved.claim()
    moved.offer()
    moved.chunk(0, 13)
    moved.chunk(13, moved.read.tokens)
    moved.end_prefill()
    moved.wait_for(moved.workers.destination, "received")
    moved.wait_for(moved.workers.source, "sent")


@pytest.mark.parametrize(
    ("source", "destination", "heads"),
    [
        pytest.param(Shape(2), Shape(1), 2, id="tp 2 to 1"),
        pytest.param(Shape(1), Shape(2), 2, id="tp 1 to 2"),
        pytest.param(Shape(2), Shape(2), 4, id="tp 2 to 2"),
        pytest.param(Shape(1, 2), Shape(1), 2, id="pp 2 to 1"),
        pytest.param(Shape(1), Shape(1, 2), 2, id="pp 1 to 2"),
        pytest.param(Shape(2), Shape(1, 2), 2, id="tp 2 to pp 2"),
        pytest.param(Shape(2), Shape(1), 1, id="a head on two ranks to one"),
        pytest.param(Shape(2), Shape(2), 1, id="a head on two ranks to two"),
        pytest.param(Shape(1, 2, windowed=True), Shape(2, 1, windowed=True), 2, id="two groups, pp 2 to tp 2"),
    ],
)
def test_kv_arrives_exactly_whatever_the_parallelism(
    made: list[Child], kind: str, source: Shape, destination: Shape, heads: int
) -> None:
    with Workers.begun(made, kind, source, destination, heads=heads) as workers:
        moved = transfer(workers, first=(1, 2), tokens=TOKENS)
        push(moved)
        assert moved.arrived()
        workers.assert_at_rest()


@pytest.mark.nixl
@pytest.mark.parametrize(
    ("source", "destination"),
    [
        pytest.param(Shape(1, block_size=4), Shape(1, block_size=8), id="4 to 8"),
        pytest.param(Shape(2, block_size=6), Shape(1, block_size=4), id="6 to 4, tp 2 to 1"),
        pytest.param(Shape(1, block_size=8), Shape(2, block_size=4), id="8 to 4, tp 1 to 2"),
    ],
)
def test_kv_arrives_exactly_between_block_sizes(made: list[Child], source: Shape, destination: Shape) -> None:
    skip_without("nixl")
    with Workers.begun(made, "nixl", source, destination) as workers:
        moved = transfer(workers, first=(0, 1))
        push(moved)
        assert moved.arrived()
        workers.assert_at_rest()


def test_over_shared_memory_another_block_size_is_refused_with_the_field_named(made: list[Child]) -> None:
    with Workers.begun(made, "shm", Shape(block_size=4), Shape(block_size=8)) as workers:
        moved = transfer(workers)
        workers.source.each("connect", workers.destination.peers)
        moved.claim()
        moved.wait_for(workers.destination, "failed")
        (errors,) = workers.destination.each("errors", moved.key, False)
        assert errors[0].startswith("kv.block_size is '8' here and '4' there")


def test_one_wrong_block_of_one_rank_is_seen(made: list[Child], kind: str) -> None:
    """The negative twin: the comparison can fail."""
    with Workers.begun(made, kind, Shape(2), Shape(1)) as workers:
        moved = transfer(workers)
        moved.claim()
        moved.offer()
        wrong = moved.source_place(0, TOKENS).tables
        wrong = (wrong[0][1::-1] + wrong[0][2:], *wrong[1:])
        for rank, tables in zip(workers.source.ranks, (moved.source_place(0, TOKENS).tables, wrong), strict=True):
            rank.call("place", moved.read, moved.source_place(0, TOKENS))
            rank.call("computing", moved.key, tables, TOKENS)
        moved.end_prefill()
        moved.wait_for(workers.destination, "received")
        assert not moved.arrived()


def test_a_claim_is_received_when_the_last_rank_has_written_and_not_before(made: list[Child], kind: str) -> None:
    with Workers.begun(made, kind, Shape(2), Shape(1)) as workers:
        moved = transfer(workers)
        moved.claim()
        moved.offer()
        first, second = workers.source.ranks
        for rank in (first, second):
            rank.call("place", moved.read, moved.source_place(0, TOKENS))
        first.call("computing", moved.key, moved.source_place(0, TOKENS).tables, TOKENS)
        first.call("prefill_ended", moved.key)
        assert first.call("wait_for", "sent", moved.key) == ""
        assert not workers.destination.ranks[0].call("collect")
        second.call("computing", moved.key, moved.source_place(0, TOKENS).tables, TOKENS)
        second.call("prefill_ended", moved.key)
        moved.wait_for(workers.destination, "received")
        assert moved.arrived()
        workers.assert_at_rest()


def test_a_rank_that_aborts_fails_the_claim_and_the_other_is_stopped(made: list[Child], kind: str) -> None:
    with Workers.begun(made, kind, Shape(2), Shape(1)) as workers:
        moved = transfer(workers)
        moved.claim()
        moved.offer()
        moved.chunk(0, 13)
        first, second = workers.source.ranks
        assert not second.call("wait_for_writes")  # one that never hears of the claim keeps its KV until the lease ends
        first.call("prefill_aborted", moved.key)
        moved.wait_for(workers.destination, "failed")
        (errors,) = workers.destination.each("errors", moved.key, False)
        assert errors == ["the prefill was aborted"]
        second.call("prefill_ended", moved.key)
        moved.wait_for(workers.source, "sent")
        workers.assert_at_rest()


@pytest.mark.nixl
@pytest.mark.parametrize(("source", "destination"), [(Shape(1), Shape(1)), (Shape(2, block_size=6), Shape(1))])
def test_kv_arrives_exactly_where_processes_may_not_read_each_others_memory(
    monkeypatch: pytest.MonkeyPatch, source: Shape, destination: Shape
) -> None:
    """As in a container without the right to; UCX then has TCP alone, and the receiver's help is needed."""
    skip_without("nixl")
    monkeypatch.setenv("UCX_TLS", "tcp,self")
    with children(3) as apart, Workers.begun(apart, "nixl", source, destination) as workers:
        moved = transfer(workers)
        push(moved)
        assert moved.arrived()
        workers.assert_at_rest()


@pytest.mark.nixl
def test_children_heed_what_ucx_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative twin: with no way to another process there is no transport at all."""
    skip_without("nixl")
    monkeypatch.setenv("UCX_TLS", "self")
    with children(1) as apart, pytest.raises(TransportError, match="can't register"):
        apart[0].call("begin", "nixl", "rank", format_of(Shape(), 2, 2, SLOT), Shape().shards(2, 2)[0], SETTINGS)
