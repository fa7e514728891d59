"""What is computed, what is written, what is due."""

from hypothesis import given
from hypothesis import strategies as st

from splitserve.kv.cursor import Cursor


def test_nothing_is_due_before_a_claim() -> None:
    cursor = Cursor(1)
    cursor.computing([10, 11], 2)
    assert len(cursor.take(0)) == 0


def test_a_late_claim_is_caught_up_with_one_copy_list() -> None:
    cursor = Cursor(1)
    cursor.computing([10, 11, 12], 0)
    cursor.computed(0, 1)
    cursor.computed(0, 3)
    cursor.claim(0, [20, 21, 22])
    due = cursor.take(0)
    assert (due.source, due.destination) == ((10, 11, 12), (20, 21, 22))
    assert cursor.complete


def test_blocks_that_were_cached_are_due_in_every_layer_at_once() -> None:
    cursor = Cursor(2)
    cursor.claim(1, [21, 22])
    cursor.computing([10, 11, 12], 2)
    assert [cursor.take(layer).destination for layer in cursor.layers] == [(21,), (21,)]


def test_blocks_that_the_destination_has_are_not_written() -> None:
    cursor = Cursor(1)
    cursor.claim(2, [22])
    cursor.computing([10, 11, 12], 3)
    assert cursor.take(0).source == (12,)


def test_a_preempted_prefill_is_written_on_from_where_it_was_with_its_new_blocks() -> None:
    cursor = Cursor(1)
    cursor.claim(0, [20, 21])
    cursor.computing([10, 11], 1)
    assert cursor.take(0).source == (10,)
    cursor.preempted()
    assert len(cursor.take(0)) == 0
    cursor.computing([30, 31], 0)
    cursor.computed(0, 2)
    assert cursor.take(0).source == (31,)
    assert cursor.complete


def test_more_blocks_than_the_table_has_are_never_taken_for_computed() -> None:
    cursor = Cursor(1)
    cursor.claim(0, [20, 21])
    cursor.computing([10], 5)
    cursor.computed(0, 5)
    assert cursor.take(0).source == (10,)
    assert not cursor.complete


@given(st.data(), st.integers(1, 3), st.integers(0, 4), st.integers(0, 6))
def test_every_claimed_block_of_every_layer_is_taken_exactly_once(
    data: st.DataObject, layers: int, first: int, count: int
) -> None:
    """Whatever the order in which chunks, layers and the claim come."""
    cursor = Cursor(layers)
    total = first + count
    table, taken = list(range(100, 100 + total)), []
    claim_after = data.draw(st.integers(0, 2 * layers * (total + 1)))
    for step in range(2 * layers * (total + 1)):
        if step == claim_after:
            cursor.claim(first, range(500 + first, 500 + total))
        layer = data.draw(st.integers(0, layers - 1))
        cursor.computing(table, data.draw(st.integers(0, total)))
        cursor.computed(layer, data.draw(st.integers(0, total)))
        if step >= claim_after:
            due = cursor.take(layer)
            taken += [(layer, *pair) for pair in zip(due.source, due.destination, strict=True)]
    if claim_after == 2 * layers * (total + 1):
        cursor.claim(first, range(500 + first, 500 + total))
    cursor.computing(table, total)
    for layer in cursor.layers:
        due = cursor.take(layer)
        taken += [(layer, *pair) for pair in zip(due.source, due.destination, strict=True)]
    assert sorted(taken) == [
        (layer, 100 + block, 500 + block) for layer in range(layers) for block in range(first, total)
    ]
    assert cursor.complete
    assert cursor.written == layers * count
