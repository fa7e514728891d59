"""What decodes will hold at their fullest moment."""

from hypothesis import given
from hypothesis import strategies as st

from splitserve.routing.peak import Expectations, peak_tokens

SEQUENCES = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 30)), max_size=8)


@given(SEQUENCES)
def test_the_peak_is_what_stepping_through_the_future_finds(sequences: list[tuple[int, int]]) -> None:
    moments = range(max((to_come for _, to_come in sequences), default=0) + 1)
    held = [sum(now + at for now, to_come in sequences if to_come >= at) for at in moments]
    assert peak_tokens(sequences) == max(held)


def test_those_that_end_first_make_room_for_those_that_go_on() -> None:
    """Counted at their ends at once they would be 110 + 20."""
    assert peak_tokens([(10, 100), (10, 10)]) == 110


def test_nothing_is_expected_while_too_few_outputs_have_ended() -> None:
    assert Expectations().tokens(0.9, made=5, most=1000) == 5


def test_many_outputs_are_expected_to_be_as_those_of_late_were() -> None:
    expectations = Expectations()
    for number in range(200):
        expectations.lengths.add(100 + number)
    found = [expectations.tokens(expectations.share(), made=0, most=1000) for _ in range(500)]
    assert abs(sum(found) / len(found) - 199.5) < 2
    assert min(found) < 105
    assert max(found) > 294


def test_none_is_expected_beyond_what_it_may_have() -> None:
    expectations = Expectations()
    for _ in range(50):
        expectations.lengths.add(400)
    assert expectations.tokens(0.5, made=10, most=64) == 64
    assert expectations.tokens(0.5, made=500, most=1000) == 500, "longer than any of late"
