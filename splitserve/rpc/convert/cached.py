"""Between wire messages and core's nouns for what workers say of their prefix caches. Pure.

See the package's docstring. What a later version may add is left out: the index then knows less.
"""

from splitserve.core.cached import CacheEvent, CacheNews, Cleared, Removed, Stored
from splitserve.rpc.gen import worker_pb2


def cache_news_to_proto(news: CacheNews) -> worker_pb2.CacheNews:
    return worker_pb2.CacheNews(number=news.number, events=[_event_to_proto(event) for event in news.events])


def cache_news_from_proto(message: worker_pb2.CacheNews) -> CacheNews:
    events = (_event_from_proto(event) for event in message.events)
    return CacheNews(message.number, tuple(event for event in events if event is not None))


def _event_to_proto(event: CacheEvent) -> worker_pb2.CacheEvent:
    match event:
        case Stored():
            extras = [worker_pb2.BlockKeys(keys=keys or ()) for keys in event.extras]
            stored = worker_pb2.BlocksStored(
                hashes=event.hashes,
                parent=event.parent,
                tokens=event.tokens,
                block_size=event.block_size,
                extras=extras,
            )
            return worker_pb2.CacheEvent(stored=stored)
        case Removed():
            return worker_pb2.CacheEvent(removed=worker_pb2.BlocksRemoved(hashes=event.hashes))
        case Cleared():
            return worker_pb2.CacheEvent(cleared=worker_pb2.BlocksCleared())


def _event_from_proto(message: worker_pb2.CacheEvent) -> CacheEvent | None:
    match message.WhichOneof("event"):
        case "stored":
            stored = message.stored
            parent = stored.parent if stored.HasField("parent") else None
            extras = tuple(tuple(each.keys) or None for each in stored.extras)
            return Stored(tuple(stored.hashes), parent, tuple(stored.tokens), stored.block_size, extras)
        case "removed":
            return Removed(tuple(message.removed.hashes))
        case "cleared":
            return Cleared()
        case _:
            return None
