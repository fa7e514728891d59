"""Whom a decision looks at. Pure state, one owner: the fleet, or the simulated router.

Of a small fleet all. Of a larger one some of each kind, where a kind is the pool that workers are in and what they do
now: with roles that change request by request it is those free to read a prompt and those with room for one more decode
that a good route is made of, however few they are of how many. Each costs the same, so a decision costs no more in a
larger fleet.
"""

from enum import IntEnum, auto
from math import inf
from random import Random

from splitserve.core.worker import Pool
from splitserve.routing.candidate import Candidate

WHOLE = 16  # workers of a fleet that a decision looks at one by one


class Doing(IntEnum):
    """What a worker does now. An integer, since a decision looks kinds up, and other enumerations hash slowly."""

    NOTHING = auto()
    READING = auto()  # prompts, and it has no decodes
    DECODING = auto()  # with room for one more like those it has
    FULL = auto()


_DECODES = (Doing.DECODING, Doing.FULL)

# How many of each it looks at in a larger one, beside those that changed last; half as many of each of two pools.
SHARES = {Doing.NOTHING: 4, Doing.READING: 2, Doing.DECODING: 6, Doing.FULL: 2}

_Kind = tuple[Pool, Doing]


class Sample:
    """Candidates that can be drawn, in the order of no one's choosing."""

    def __init__(self) -> None:
        self._kinds: dict[_Kind, list[Candidate]] = {}
        self._places: dict[str, tuple[_Kind, int]] = {}  # by uuid: of which kind, and where in its list
        self._latest: dict[_Kind, Candidate] = {}
        self._decoding = 0

    def put(self, candidate: Candidate) -> None:
        """It is new, or something about it has changed."""
        kind, place = (candidate.pool, doing(candidate)), self._places.get(candidate.info.uuid)
        if place is None or place[0] != kind:
            self.remove(candidate)
            members = self._kinds.setdefault(kind, [])
            self._places[candidate.info.uuid] = kind, len(members)
            members.append(candidate)
            self._decoding += kind[1] in _DECODES
        if kind[1] is not Doing.FULL:
            self._latest[kind] = candidate

    def remove(self, candidate: Candidate) -> None:
        """Nothing happens if it is not there."""
        place = self._places.pop(candidate.info.uuid, None)
        if place is None:
            return
        kind, at = place
        self._decoding -= kind[1] in _DECODES
        members = self._kinds[kind]
        last = members.pop()
        if last is not candidate:  # the last one takes its place
            members[at] = last
            self._places[last.info.uuid] = place
        if self._latest.get(kind) is candidate:
            del self._latest[kind]
        if not members:
            del self._kinds[kind]

    @property
    def workers(self) -> int:
        return len(self._places)

    @property
    def decoding(self) -> int:
        """Workers with decodes."""
        return self._decoding

    def draw(self, random: Random) -> list[Candidate]:
        """As many of each kind, evenly spread over it from one drawn at random, and of each that has any room the one
        that changed last, so that room which has just appeared is always seen."""
        drawn = list(self._latest.values())
        pools = len({pool for pool, _ in self._kinds})
        for (_, does), members in self._kinds.items():
            drawn += _spread(members, SHARES[does] // pools, random)
        return drawn


def _spread(members: list[Candidate], share: int, random: Random) -> list[Candidate]:
    count = len(members)
    if count <= share:
        return members
    first = int(random.random() * count)
    return [members[(first + each * count // share) % count] for each in range(share)]


def doing(candidate: Candidate) -> Doing:
    load = candidate.load
    if candidate.decodes <= 0:
        return Doing.READING if load.prefill_tokens else Doing.NOTHING
    if load.free_sequences < 1 or load.parked_limit_blocks < 1 or load.free_blocks < 1:
        return Doing.FULL
    if candidate.latency is None or candidate.tpot_s == inf:
        return Doing.DECODING
    return Doing.FULL if candidate.outlook.is_full else Doing.DECODING
