"""Each token once and in order."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitserve.core.errors import EngineError
from splitserve.core.request import Logprob
from splitserve.core.worker import Delta
from splitserve.router.output import Output


def delta(index: int, *token_ids: int, text: str = "") -> Delta:
    return Delta("j", index, token_ids, text or "".join(f"<{token}>" for token in token_ids))


def test_what_came_twice_counts_once() -> None:
    output = Output()
    assert [output.accept(d) for d in (delta(0, 5, 6), delta(0, 5, 6), delta(2, 7))] == [2, 0, 1]
    chunk = output.take_chunk("r")
    assert (chunk.index, chunk.token_ids, chunk.text) == (0, (5, 6, 7), "<5><6><7>")


def test_a_chunk_begins_where_the_last_one_ended() -> None:
    output = Output()
    output.accept(delta(0, 5))
    output.take_chunk("r")
    output.accept(delta(1, 6))
    output.accept(delta(2, 7))
    assert (output.take_chunk("r").index, output.has_unsent) == (1, False)


def test_text_held_back_until_the_end_is_sent() -> None:
    output = Output()
    output.accept(delta(0, 5))
    output.take_chunk("r")
    output.accept(delta(1, text="tail"))
    chunk = output.take_chunk("r")
    assert (chunk.index, chunk.token_ids, chunk.text) == (1, (), "tail")


def test_logprobs_stay_with_their_tokens() -> None:
    output = Output()
    for place in (0, 1):
        output.accept(Delta("j", place, (5 + place,), "x", ((Logprob(5 + place, -0.5, 1),),)))
    assert [top[0].token_id for top in output.take_chunk("r").logprobs] == [5, 6]


@pytest.mark.parametrize("bad", [delta(3, 9), delta(1, 6, 7), delta(3)])
def test_a_gap_or_a_half_repeated_delta_is_an_error_and_changes_nothing(bad: Delta) -> None:
    output = Output()
    output.accept(delta(0, 5, 6))
    with pytest.raises(EngineError):
        output.accept(bad)
    assert output.token_ids == [5, 6]


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=3), max_size=8), st.data())
def test_however_deltas_are_repeated_and_taken_the_client_sees_the_output(
    parts: list[list[int]], data: st.DataObject
) -> None:
    output, seen, deltas, index = Output(), list[int](), list[Delta](), 0
    for part in parts:
        deltas.append(delta(index, *part))
        index += len(part)
    for current, fresh in enumerate(deltas):
        output.accept(fresh)
        output.accept(data.draw(st.sampled_from(deltas[: current + 1])))
        if data.draw(st.booleans()):
            seen.extend(output.take_chunk("r").token_ids)
    seen.extend(output.take_chunk("r").token_ids)
    assert seen == [token for part in parts for token in part]
