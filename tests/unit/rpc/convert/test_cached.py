"""What workers say of their prefix caches, on the wire."""

import pytest

from splitserve.core.cached import CacheEvent, CacheNews, Cleared, Removed, Stored
from splitserve.rpc import convert
from splitserve.rpc.gen import worker_pb2

LARGEST = 2**64 - 1


@pytest.mark.parametrize(
    "event",
    [
        Stored((1, LARGEST), None, (5, 6, 7, 2**32 - 1), 2),
        Stored((1,), 0, (5, 6), 2, (("adapter", "salt"),)),
        Stored((1, 2), 9, (5, 6, 7, 8), 2, (("salt",), None)),
        Removed((LARGEST, 0)),
        Cleared(),
    ],
)
def test_what_was_said_is_what_is_heard(event: CacheEvent) -> None:
    news = CacheNews(7, (event, Removed((3,))))
    wire = convert.cache_news_to_proto(news).SerializeToString()
    assert convert.cache_news_from_proto(worker_pb2.CacheNews.FromString(wire)) == news


def test_an_event_of_a_later_version_is_left_out() -> None:
    news = worker_pb2.CacheNews(number=1, events=[worker_pb2.CacheEvent()])
    assert convert.cache_news_from_proto(news) == CacheNews(1, ())
