"""One transfer between two small workers, for tests that deliver each letter and end each WRITE themselves."""

from splitserve.kv.messages import Codec, Message, Register
from splitserve.kv.ticket import TransferKey
from tests.unit.kv.blocks import SLOT, Prompt
from tests.unit.kv.numbered import Shape
from tests.unit.kv.rank import Rank, peers
from tests.unit.kv.world import World

KEY = TransferKey("one", 1)
LAYERS, SIZE, PROMPT_BLOCKS = 2, 4, 4
TOKENS = PROMPT_BLOCKS * SIZE
BLOCK_BYTES = SIZE * SLOT
PREFILLER, DECODER = "a/0", "b/0"


class Bench(World):
    """One transfer from worker "a" to worker "b", over the ranks that the test says."""

    def __init__(self, one: Shape | None = None, other: Shape | None = None, heads: int = 1) -> None:
        super().__init__(one or Shape(), other or Shape(), LAYERS, heads)
        self.prompt = Prompt.of(1, TOKENS, LAYERS, heads)
        self.prefiller, self.decoder = self.a[0], self.b[0]

    def offer(self) -> None:
        for rank in self.a:
            rank.offer(KEY, self.prompt, peers(self.b))

    def claim(self, limit_s: float = 60.0) -> None:
        for rank in self.b:
            rank.claim(KEY, self.prompt, peers(self.a), limit_s=limit_s)

    def chunk(self, blocks: int) -> None:
        """A forward, up to this block."""
        for rank in self.a:
            rank.chunk(KEY, blocks * SIZE)

    def end_prefill(self) -> None:
        for rank in self.a:
            rank.end_prefill(KEY)

    def abandon(self) -> None:
        for rank in self.b:
            rank.abandon(KEY)

    def registration(self, rank: Rank | None = None, peer: str = PREFILLER) -> Register:
        """The Register that this rank's claim sends."""
        ticket = (rank or self.decoder).destination._ledger.get(KEY.leg(peer))
        assert ticket is not None
        assert ticket.register is not None
        return ticket.register

    def waiting(self, recipient: str) -> list[Message]:
        """Letters to this rank that are not delivered, in order."""
        letters = (*self.returned, *self.letters)
        return [Codec("test").decode(frame)[2] for _, to, frame in letters if to == recipient]

    def dropped(self) -> dict[str, int]:
        counts = [rank.outlet.counters.dropped for rank in self.ranks.values()]
        return dict(sum(counts[1:], counts[0]))

    def failures(self, rank: Rank) -> dict[str, int]:
        return dict(rank.outlet.counters.failures)


def connected(one: Shape | None = None, other: Shape | None = None, heads: int = 1) -> Bench:
    bench = Bench(one, other, heads)
    bench.meet()
    return bench


def pushing(one: Shape | None = None, other: Shape | None = None, heads: int = 1) -> Bench:
    """A claim with one block of each layer in flight."""
    bench = connected(one, other, heads)
    bench.offer()
    bench.claim()
    bench.exchange()
    bench.chunk(1)
    return bench
