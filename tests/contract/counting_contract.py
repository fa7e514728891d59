"""What every `Engine` must tell of its transfers to whoever counts them; part of the engine contract."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from splitserve.core.worker import Failure, KvMode, TransferEnd
from tests.contract.engines import Bench, a_decode, a_prefill, a_prompt, a_ticket, eventually, greedy


class CountingContract:
    @pytest.fixture
    def counting(self, bench: Bench) -> Bench:
        if bench.source.info.kv.mode is KvMode.PULL:
            pytest.skip("the stock connector tells nothing of its transfers")
        bench.source.wait_at_rest()
        bench.destination.wait_at_rest()
        return bench

    def test_a_transfer_ends_once_on_each_side_and_its_bytes_are_counted(self, counting: Bench) -> None:
        written = counting.source.engine.load().counts.written_bytes
        with new_ends(counting) as ends:
            ticket = a_ticket(counting.source, counting.destination)
            prompt = a_prompt(counting.vocabulary, 2 * counting.source.info.kv.block_size + 1, 31)
            decode = counting.destination.submit(a_decode(prompt, greedy(2), ticket))
            prefill = counting.source.submit(a_prefill(prompt, ticket))
            decode.wait()
            sent = prefill.outcome.transfer
        assert sent is not None
        assert sent.writes > 0
        assert ends[0] == TransferEnd(True, sent)
        assert [(end.source_side, end.stats.bytes, end.reason) for end in ends[1:]] == [(False, sent.bytes, "")]

        def counted() -> int:
            return counting.source.engine.load().counts.written_bytes - written

        eventually(lambda: counted() == sent.bytes, counted)

    def test_a_transfer_that_fails_has_the_same_reason_on_both_sides(self, counting: Bench) -> None:
        with new_ends(counting) as ends:
            ticket = a_ticket(counting.source, counting.destination)
            prompt = a_prompt(counting.vocabulary, counting.source.info.kv.block_size + 1, 32)
            counting.source.submit(a_prefill(prompt, ticket))
            decode = counting.destination.submit(a_decode(prompt[::-1], greedy(2), ticket))
            assert decode.wait().outcome.failure is Failure.TRANSFER
        assert [(end.source_side, end.reason) for end in ends] == [(True, "prompt hash"), (False, "prompt hash")]


@contextmanager
def new_ends(bench: Bench) -> Iterator[list[TransferEnd]]:
    """The ends of one transfer that takes place meanwhile: the source's, then the destination's."""
    sides = (bench.source.transfers, bench.destination.transfers)
    before = [len(side) for side in sides]
    ends: list[TransferEnd] = []
    yield ends
    eventually(lambda: all(len(side) > count for side, count in zip(sides, before, strict=True)), lambda: sides)
    bench.source.wait_at_rest()
    bench.destination.wait_at_rest()
    ends.extend(end for side, count in zip(sides, before, strict=True) for end in side[count:])
