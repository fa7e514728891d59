"""When a router may call a worker silent."""

from splitserve.router.attention import Attention


def looks(attention: Attention, *times: float) -> list[bool]:
    return [attention.looks_up(now) for now in times]


def test_a_router_that_was_there_all_the_time_may_judge() -> None:
    attention = Attention(gap_s=1.0, heartbeat_timeout_s=4.0, now=0.0)
    assert looks(attention, 1.0, 2.0, 3.0, 4.0, 5.0) == [False, False, False, True, True]


def test_a_router_that_stood_still_listens_for_a_whole_timeout_first() -> None:
    attention = Attention(gap_s=1.0, heartbeat_timeout_s=4.0, now=0.0)
    looks(attention, 1.0, 2.0, 3.0, 4.0)
    assert looks(attention, 20.0, 21.0, 22.0, 23.0) == [False] * 4
    assert attention.looks_up(24.0)


def test_a_router_that_is_a_little_late_each_time_still_judges() -> None:
    attention = Attention(gap_s=1.0, heartbeat_timeout_s=4.0, now=0.0)
    assert looks(attention, 2.0, 4.0, 6.0) == [False, True, True]
