"""Who of a worker's nodes has joined, as its leader knows it. Plain: time and connections are arguments."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from splitserve.engine.nodes.channel import difference
from splitserve.engine.nodes.messages import Join, Refused, ToNode, Waiting, Welcome

Replies = Sequence[tuple[bytes, ToNode]]


@dataclass(slots=True)
class Member:
    """`identity`: its socket's; `connection`: the descriptor that its messages come by."""

    node: int
    process: str
    host: str
    identity: bytes
    connection: int
    heard_at: float

    def __str__(self) -> str:
        return f"node {self.node} ({self.host})"


class Roll:
    """Complete once every node has joined; from then on nobody may come or go."""

    def __init__(self, count: int, uuid: str, alike: Mapping[str, str], silent_s: float) -> None:
        self._count = count
        self._uuid = uuid
        self._alike = alike
        self._silent_s = silent_s
        self._members: dict[int, Member] = {}
        self.complete = False
        self.refused = ""  # the last refusal, for whoever waits in vain

    @property
    def missing(self) -> tuple[int, ...]:
        return tuple(node for node in range(1, self._count) if node not in self._members)

    @property
    def identities(self) -> tuple[bytes, ...]:
        return tuple(member.identity for member in self._members.values())

    def join(self, identity: bytes, connection: int, said: Join, now: float) -> Replies:
        """What to say to whom."""
        if (refused := self._fault(said)) is not None:
            self.refused = f"node {said.node} ({said.host}) was refused: {refused.field}: {refused.message}"
            return [(identity, refused)]
        before = self._members.get(said.node)
        if before is None or before.identity != identity:
            self._members[said.node] = Member(said.node, said.process, said.host, identity, connection, now)
        if self.complete:
            return [(identity, Welcome(self._uuid))]  # said before, and asked again meanwhile
        replies: list[tuple[bytes, ToNode]] = []
        if before is not None and before.process != said.process:
            sentence = (
                f"another process, on {said.host}, has joined as node {said.node}; each node has a rank of its own"
            )
            replies.append((before.identity, Refused("nodes.rank", sentence)))
        if self.missing:
            return [*replies, (identity, Waiting(self.missing))]
        self.complete = True
        return [*replies, *((each, Welcome(self._uuid)) for each in self.identities)]

    def member(self, identity: bytes) -> Member | None:
        return next((member for member in self._members.values() if member.identity == identity), None)

    def heard(self, identity: bytes, now: float) -> None:
        if (member := self.member(identity)) is not None:
            member.heard_at = now

    def by_connection(self, connection: int) -> Member | None:
        """Who speaks by it."""
        return next((each for each in self._members.values() if each.connection == connection), None)

    def silent(self, now: float) -> Member | None:
        """One that has said nothing for too long."""
        return next((each for each in self._members.values() if now - each.heard_at > self._silent_s), None)

    def remove(self, member: Member) -> bool:
        """It is gone; False if another process has taken its place."""
        if self._members.get(member.node) is not member:
            return False
        del self._members[member.node]
        return True

    def _fault(self, said: Join) -> Refused | None:
        if not 0 < said.node < self._count:
            return Refused("nodes.rank", f"node {said.node} is none of 1 to {self._count - 1}")
        if (found := difference(self._alike, said.alike, said.node)) is not None:
            return Refused(*found)
        member = self._members.get(said.node)
        if self.complete and (member is None or member.process != said.process):
            return Refused(
                "nodes.rank", f"the worker runs already, with a node {said.node}; all its nodes start together"
            )
        return None
