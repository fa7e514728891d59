"""How many more tokens a request may make."""

from splitserve.routing.lengths import FEWEST, WINDOW, OutputLengths


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
