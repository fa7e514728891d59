import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitserve.planner.report.svg import Frame, Scale, box, dot, drawing, text


@given(st.floats(0, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_few_round_and_within_the_scale(low: float, span: float) -> None:
    scale = Scale(low, low + span, 0, 100)
    ticks = scale.ticks(5)
    assert 1 <= len(ticks) <= 6
    assert all(low - span * 1e-6 <= tick <= low + span * (1 + 1e-6) for tick in ticks)


def test_ticks_are_multiples_of_one_two_or_five() -> None:
    assert Scale(0.0, 0.55, 0, 100).ticks(6) == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])


def test_a_value_beyond_the_scale_is_drawn_at_its_end() -> None:
    scale = Scale(0.0, 10.0, 50, 150)
    assert (scale.at(5.0), scale.at(99.0), scale.at(-1.0)) == (100, 150, 50)


def test_more_is_drawn_higher() -> None:
    frame = Frame.of((0.0, 1.0), (0.0, 1.0))
    assert frame.point((0.0, 1.0))[1] < frame.point((0.0, 0.0))[1]


def test_text_from_outside_cannot_become_markup() -> None:
    assert "<b>" not in text((0, 0), "<b>", "name") + dot((0, 0), "x", "<b>") + drawing(1, 1, [], '"><b>')


def test_nothing_is_no_negative_width() -> None:
    assert 'width="0.0"' in box((0, 0), -3.0, 10, "part0")
