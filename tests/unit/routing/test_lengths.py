"""How many more tokens a request may make."""

from math import exp

import pytest

from splitserve.routing.lengths import FEWEST, FIRST, WINDOW, OutputLengths


def lengths(*ended: int) -> OutputLengths:
    found = OutputLengths()
    for tokens in ended:
        found.add(tokens)
    return found


def test_nothing_is_said_of_too_few_outputs() -> None:
    assert lengths(*[100] * (FEWEST - 1)).remaining(0, 0.1) == 0
    assert lengths(*[100] * FEWEST).remaining(0, 0.1) == 100


def test_only_outputs_that_were_longer_count() -> None:
    ended = lengths(*range(1, 101))
    assert ended.remaining(0, 0.1) == 11
    assert ended.remaining(50, 0.1) == 6
    assert ended.remaining(50, 0.5) == 26
    assert ended.remaining(95, 0.1) == 0


def test_old_outputs_are_forgotten() -> None:
    ended = lengths(*[1000] * 100, *[10] * WINDOW)
    assert ended.remaining(0, 0.0) == ended.remaining(0, 0.99) == 10
    assert ended.remaining(10, 0.0) == 0


def test_before_enough_have_ended_outputs_are_as_long_as_the_tokens_made_for_each_end() -> None:
    """All but a tenth of outputs of a mean of m have -ln(0.9) m tokens if any token may be the last."""
    tenth = 1 - exp(-0.1)
    assert lengths().to_come(0, tenth, 0) == pytest.approx(0.1 * FIRST, abs=1)
    assert lengths().to_come(20, tenth, 3 * FIRST) == pytest.approx(0.4 * FIRST - 20, abs=1)
    assert lengths().to_come(500, tenth, 3 * FIRST) == 0
    assert lengths(FIRST).to_come(0, tenth, 4 * FIRST) == pytest.approx(0.3 * FIRST, abs=1)
    assert lengths(*[1] * (FEWEST - 1)).to_come(0, tenth, 0) == pytest.approx(
        0.1 * (FIRST + FEWEST - 1) / FEWEST, abs=1
    )


def test_then_they_are_as_long_as_those_that_ended() -> None:
    assert lengths(*[100] * FEWEST).to_come(40, 0.1, 5000) == 60
