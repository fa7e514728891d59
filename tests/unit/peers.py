"""KV peers of workers with one rank, and a ticket between two."""

from splitserve.core.worker import KvPart, KvPeer, Ticket

WHOLE = KvPart(first_layer=0, layers=4, first_head=0, heads=2)


def peer(uuid: str) -> KvPeer:
    """The one rank of a worker of four layers and two heads."""
    return KvPeer(uuid, f"tcp://{uuid}:1", WHOLE)


TICKET = Ticket("t", 1, (peer("p"),), (peer("d"),))
