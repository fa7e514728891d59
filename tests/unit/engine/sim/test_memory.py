import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitserve.engine.sim.memory import TOKEN_BYTES, BlockPool, ChainedKv, digest_bytes

LAYERS, BLOCKS, BLOCK = 3, 8, 4
BLOCK_BYTES = digest_bytes(BLOCK)
TABLE = [5, 2, 7, 0]
TOKENS = [11, 12, 13, 14, 15, 16, 17, 18, 19, 20]


class Memory:
    """Blocks of bytes in this process."""

    def __init__(self) -> None:
        self._bytes = memoryview(bytearray(LAYERS * BLOCKS * BLOCK_BYTES))

    def block(self, layer: int, block: int) -> memoryview:
        begin = (layer * BLOCKS + block) * BLOCK_BYTES
        return self._bytes[begin : begin + BLOCK_BYTES]


def computed(tokens: list[int], cuts: list[int], table: list[int] = TABLE, memory: Memory | None = None) -> bytes:
    """What a context reads that was computed in chunks ending at `cuts`."""
    kv = ChainedKv((memory or Memory()).block, LAYERS, BLOCK, "secret")
    for begin, end in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
        for layer in range(LAYERS):
            kv.write(layer, table, kv.segments(tokens, begin, end))
    return kv.read(table, len(tokens))


@settings(deadline=None)
@given(cuts=st.sets(st.integers(1, 9)).map(sorted))
def test_chunks_make_no_difference(cuts: list[int]) -> None:
    assert computed(TOKENS, cuts) == computed(TOKENS, [])


def test_the_blocks_used_make_no_difference() -> None:
    assert computed(TOKENS, [], table=[1, 3, 4, 6]) == computed(TOKENS, [])


@pytest.mark.parametrize("at", range(len(TOKENS)))
def test_any_other_token_is_seen_in_every_layer(at: int) -> None:
    other = [*TOKENS[:at], 99, *TOKENS[at + 1 :]]
    mine, theirs = computed(TOKENS, []), computed(other, [])
    layer_bytes = len(mine) // LAYERS
    for begin in range(0, len(mine), layer_bytes):
        assert mine[begin : begin + layer_bytes] != theirs[begin : begin + layer_bytes]


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("block", TABLE[:2])
def test_damage_in_any_block_changes_what_is_read_and_what_follows(layer: int, block: int) -> None:
    memory = Memory()
    whole = computed(TOKENS[:8], [], memory=memory)
    kv = ChainedKv(memory.block, LAYERS, BLOCK, "secret")
    memory.block(layer, block)[0] ^= 1
    assert kv.read(TABLE, 8) != whole
    for every in range(LAYERS):
        kv.write(every, TABLE, kv.segments(TOKENS, 8, 10))
    assert kv.read(TABLE, 10) != computed(TOKENS, [])


def test_what_was_computed_on_damaged_kv_stays_wrong_though_the_damage_is_mended() -> None:
    memory = Memory()
    computed(TOKENS[:8], [], memory=memory)
    kv = ChainedKv(memory.block, LAYERS, BLOCK, "secret")
    memory.block(0, TABLE[1])[-1] ^= 1
    for layer in range(LAYERS):
        kv.write(layer, TABLE, kv.segments(TOKENS, 8, 10))
    memory.block(0, TABLE[1])[-1] ^= 1
    assert kv.read(TABLE, 8) == computed(TOKENS[:8], [])
    assert kv.read(TABLE, 10) != computed(TOKENS, [])


@pytest.mark.parametrize("used", range(1, len(TOKENS) + 1))
def test_the_first_tokens_of_a_block_read_the_same_whatever_lies_behind_them(used: int) -> None:
    memory, table = Memory(), [1, 3, 4, 6]
    computed(TOKENS, [], memory=memory)
    for layer in range(LAYERS):
        for source, destination in zip(TABLE, table, strict=True):
            memory.block(layer, destination)[:] = memory.block(layer, source)
    kv = ChainedKv(memory.block, LAYERS, BLOCK, "secret")
    assert kv.read(table, used) == computed(TOKENS[:used], [])
    other = [*TOKENS[:used], 99, 98]
    for layer in range(LAYERS):
        kv.write(layer, table, kv.segments(other, used, len(other)))
    assert kv.read(table, len(other)) == computed(other, [])


def test_memory_never_written_holds_no_token() -> None:
    kv = ChainedKv(Memory().block, LAYERS, BLOCK, "secret")
    assert kv.read(TABLE, 1)[-TOKEN_BYTES:] != computed([0], [])[-TOKEN_BYTES:]


def test_the_order_of_blocks_matters() -> None:
    memory = Memory()
    kv = ChainedKv(memory.block, LAYERS, BLOCK, "secret")
    straight = computed(TOKENS[:8], [], memory=memory)
    assert kv.read([2, 5], 8) != straight


def test_blocks_are_taken_all_or_none_and_come_back() -> None:
    pool = BlockPool(4)
    taken = pool.take(3)
    assert taken is not None
    assert pool.take(2) is None
    assert pool.free == 1
    pool.give_back(taken)
    assert pool.free == 4


def test_giving_a_block_back_twice_is_our_mistake() -> None:
    pool = BlockPool(2)
    with pytest.raises(AssertionError, match="twice"):
        pool.give_back([1])
