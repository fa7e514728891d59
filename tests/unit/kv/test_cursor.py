"""What is computed, what is written, what is due."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from splitserve.core.worker import KvFormat, KvMode, KvPart
from splitserve.kv.cursor import Cursor, PrefillProgress
from splitserve.kv.layout import Shard, Slice, slice_between
from splitserve.kv.ticket import Table

SIZE = 4  # tokens in a block


def cut_of(layers: int, groups: Sequence[int] | None = None, sizes: tuple[int, int] = (SIZE, SIZE)) -> Slice:
    """Between two ranks that each hold everything, in blocks of these sizes."""
    kv = KvFormat("m", "float32", sizes[0], layers, 1, 8, 8 * sizes[0], KvMode.PUSH, "model")
    tables = (0,) * layers if groups is None else tuple(groups)
    source, destination = (Shard(KvPart(0, layers, 0, 1), size, tables) for size in sizes)
    made = slice_between(source, destination, kv)
    assert made is not None
    return made


def cursor_of(progress: PrefillProgress, blocks: Sequence[int], first: int = 0, layers: int = 1) -> Cursor:
    tokens = (first + len(blocks)) * SIZE
    return Cursor(progress, cut_of(layers), tokens, [Table(first, tuple(blocks))])


def test_nothing_is_due_before_it_is_computed() -> None:
    progress = PrefillProgress(0, 1)
    cursor = cursor_of(progress, [20, 21])
    assert len(cursor.take(0, 99)) == 0
    progress.computing([[10, 11]])
    assert not cursor.due(0)
    assert len(cursor.take(0, 99)) == 0


def test_a_late_claim_is_caught_up_with_one_copy_list() -> None:
    progress = PrefillProgress(0, 1)
    progress.computing([[10, 11, 12]])
    progress.computed(0, 1 * SIZE)
    progress.computed(0, 3 * SIZE)
    cursor = cursor_of(progress, [20, 21, 22])
    due = cursor.take(0, 99)
    assert (due.source, due.destination) == ((10, 11, 12), (20, 21, 22))
    assert cursor.complete


def test_no_more_is_taken_at_once_than_was_asked_for_and_the_rest_stays_due() -> None:
    progress = PrefillProgress(0, 1)
    progress.computing([[10, 11, 12]])
    progress.computed(None, 3 * SIZE)
    cursor = cursor_of(progress, [20, 21, 22])
    assert cursor.take(0, 2).source == (10, 11)
    assert cursor.due(0)
    assert not cursor.complete
    assert cursor.take(0, 2).source == (12,)
    assert not cursor.due(0)
    assert cursor.complete


def test_blocks_that_were_cached_are_due_in_every_layer_at_once() -> None:
    progress = PrefillProgress(0, 2)
    cursor = cursor_of(progress, [21, 22], first=1, layers=2)
    progress.computing([[10, 11, 12]])
    progress.computed(None, 2 * SIZE)
    assert [cursor.take(layer, 99).destination for layer in cursor.layers] == [(21,), (21,)]


def test_blocks_that_the_destination_has_are_not_written() -> None:
    progress = PrefillProgress(0, 1)
    cursor = cursor_of(progress, [22], first=2)
    progress.computing([[10, 11, 12]])
    progress.computed(None, 3 * SIZE)
    assert cursor.take(0, 99).source == (12,)


def test_a_partly_filled_block_is_due_only_when_it_is_the_last_and_all_its_tokens_are_there() -> None:
    progress = PrefillProgress(0, 1)
    progress.computing([[10, 11]])
    cursor = Cursor(progress, cut_of(1), 2 * SIZE - 1, [Table(0, (20, 21))])
    progress.computed(0, SIZE - 1)
    assert not cursor.due(0)
    progress.computed(0, 2 * SIZE - 2)
    assert cursor.take(0, 99).source == (10,)
    progress.computed(0, 2 * SIZE - 1)
    assert cursor.take(0, 99).source == (11,)
    assert cursor.complete


def test_a_claim_on_the_beginning_of_a_prompt_takes_no_block_beyond_it() -> None:
    progress = PrefillProgress(0, 1)
    cursor = cursor_of(progress, [20])
    progress.computing([[10, 11, 12]])
    progress.computed(None, 3 * SIZE)
    assert cursor.take(0, 99).source == (10,)
    assert cursor.complete


def test_a_claim_that_lacks_nothing_is_complete_before_anything_is_computed() -> None:
    assert Cursor(PrefillProgress(0, 1), cut_of(1), 0, [Table(0, ())]).complete
    assert Cursor(PrefillProgress(0, 1), cut_of(1), 2 * SIZE, [Table(2, ())]).complete
    assert not Cursor(PrefillProgress(0, 1), cut_of(1), 2 * SIZE, [Table(1, (20,))]).complete


def test_each_layer_is_read_from_and_written_to_the_blocks_of_its_own_group() -> None:
    progress = PrefillProgress(0, 2)
    progress.computing([[10, 11], [50, 51]])
    progress.computed(None, 2 * SIZE)
    claimed = [Table(0, (20, 21)), Table(1, (71,))]
    cursor = Cursor(progress, cut_of(2, groups=(0, 1)), 2 * SIZE, claimed)
    full, window = cursor.take(0, 99), cursor.take(1, 99)
    assert (full.source, full.destination) == ((10, 11), (20, 21))
    assert (window.source, window.destination) == ((51,), (71,))
    assert cursor.complete
    assert cursor.written == 3


def test_blocks_of_different_sizes_are_written_in_cells_of_both() -> None:
    progress = PrefillProgress(0, 1)
    progress.computing([[10, 11]])
    progress.computed(None, 12)
    cursor = Cursor(progress, cut_of(1, sizes=(6, 4)), 12, [Table(1, (21, 22))])
    due = cursor.take(0, 99)
    # Cells of two tokens: three in a source block, two in a destination block, of which the first is there already.
    assert due.source == (10 * 3 + 2, 11 * 3, 11 * 3 + 1, 11 * 3 + 2)
    assert due.destination == (21 * 2, 21 * 2 + 1, 22 * 2, 22 * 2 + 1)


def test_a_preempted_prefill_is_written_on_from_where_it_was_with_its_new_blocks() -> None:
    progress = PrefillProgress(0, 1)
    cursor = cursor_of(progress, [20, 21])
    progress.computing([[10, 11]])
    progress.computed(None, SIZE)
    assert cursor.take(0, 99).source == (10,)
    progress.preempted()
    assert len(cursor.take(0, 99)) == 0
    progress.computing([[30, 31]])
    progress.computed(0, 2 * SIZE)
    assert cursor.take(0, 99).source == (31,)
    assert cursor.complete


def test_more_blocks_than_the_table_has_are_never_taken_for_computed() -> None:
    progress = PrefillProgress(0, 1)
    cursor = cursor_of(progress, [20, 21])
    progress.computing([[10]])
    progress.computed(None, 5 * SIZE)
    progress.computed(0, 5 * SIZE)
    assert cursor.take(0, 99).source == (10,)
    assert not cursor.complete


def test_layers_of_other_ranks_change_nothing_here() -> None:
    progress = PrefillProgress(2, 2)
    progress.computing([[10]])
    for elsewhere in (0, 1, 4, 5):
        progress.computed(elsewhere, SIZE)
    assert [progress.ready(layer) for layer in (2, 3)] == [0, 0]
    progress.computed(3, SIZE)
    assert [progress.ready(layer) for layer in (2, 3)] == [0, SIZE]


@given(st.data(), st.integers(1, 3), st.integers(0, 4), st.integers(0, 6))
def test_every_claimed_block_of_every_layer_is_taken_exactly_once(
    data: st.DataObject, layers: int, first: int, count: int
) -> None:
    """Whatever the order in which chunks, layers and the claim come, and however little is taken at a time."""
    progress, total = PrefillProgress(0, layers), first + count
    table, taken = list(range(100, 100 + total)), []
    steps = 2 * layers * (total + 1)
    claim_after = data.draw(st.integers(0, steps))
    cursor: Cursor | None = None
    for step in range(steps + 1):
        if step == claim_after:
            cursor = cursor_of(progress, range(500 + first, 500 + total), first, layers)
        layer = data.draw(st.integers(0, layers - 1))
        progress.computing([table])
        progress.computed(None, data.draw(st.integers(0, total * SIZE)))
        progress.computed(layer, data.draw(st.integers(0, total * SIZE)))
        if cursor is not None:
            due = cursor.take(layer, data.draw(st.integers(1, 4)))
            taken += [(layer, *pair) for pair in zip(due.source, due.destination, strict=True)]
    assert cursor is not None
    progress.computing([table])
    progress.computed(None, total * SIZE)
    for layer in cursor.layers:
        due = cursor.take(layer, 99)
        taken += [(layer, *pair) for pair in zip(due.source, due.destination, strict=True)]
    assert sorted(taken) == [
        (layer, 100 + block, 500 + block) for layer in range(layers) for block in range(first, total)
    ]
    assert cursor.complete
    assert cursor.written == layers * count
