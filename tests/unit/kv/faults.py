"""A world in which whatever can go wrong does, by the dice: letters are lost, late, doubled, out of order or cut short,
WRITEs are slow or fail half way, processes stop, wake and die. Discrete events over a virtual clock; a seed is a run,
and two runs of one seed are the same.

Until `HEALS_AT_S` faults come by themselves (`Weather`) and, where a `Target` says so, at one transition of a ledger's
table. Then everything that lives works, and must come to rest.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from itertools import count
from math import inf
from random import Random

from splitserve.core.config import KvTransferSettings
from splitserve.kv.ledger import SourceState
from splitserve.kv.ticket import LegKey
from splitserve.kv.transport import WriteState
from tests.unit.kv.blocks import SLOT, DeviceFence
from tests.unit.kv.numbered import Shape
from tests.unit.kv.rank import Rank, Row
from tests.unit.kv.world import ModelWrite, World

SETTINGS = KvTransferSettings(peer_silent_s=1.0, lease_s=2.0)  # A WRITE is stuck after 2 s.
HEALS_AT_S = 6.0
RESTS_WITHIN_S = 30.0
FAULT_S = 0.8  # how long letters between two ranks suffer from one fault


class Fault(Enum):
    KILL = auto()  # at once: what it was about to say is not said
    KILL_AFTER = auto()  # once it has said it
    STOP = auto()
    GIVE_UP = auto()  # the engine aborts the prefill, or abandons the claim
    DELAY = auto()
    DUPLICATE = auto()
    REORDER = auto()
    TRUNCATE = auto()  # letters lose their tails, WRITEs theirs
    LOSE = auto()


ONE_SIDED = frozenset({Fault.KILL, Fault.KILL_AFTER, Fault.STOP, Fault.GIVE_UP})


@dataclass(frozen=True, slots=True)
class Target:
    """A fault when a rank makes this transition for the `nth` time in the run; to itself or, `peer`, to the rank that
    it has this leg with."""

    row: Row
    fault: Fault
    peer: bool = False
    nth: int = 1


@dataclass(frozen=True, slots=True)
class Weather:
    """Chances, of a letter or a WRITE, and per run of a process."""

    lose: float = 0.0
    cut: float = 0.0
    double: float = 0.0
    late: float = 0.0
    slow: float = 0.0
    fail: float = 0.0
    stops: float = 0.0
    kills: float = 0.0
    refuses: float = 0.0  # of two ranks, that the one can't reach the other's memory

    @classmethod
    def by(cls, dice: Random) -> "Weather":
        """A quarter of all runs is fair, so that targets meet every state."""
        if dice.random() < 0.25:
            return cls(slow=dice.choice((0.0, 0.4, 1.0)))
        lose, cut, double, late, fail = (dice.choice((0.0, 0.05, 0.2)) for _ in range(5))
        slow, refuses = dice.choice((0.0, 0.2, 0.7, 1.0)), dice.choice((0.0, 0.0, 0.0, 0.2))
        return cls(lose, cut, double, late, slow, fail, dice.choice((0.0, 0.3, 0.6)), dice.choice((0.0, 0.3)), refuses)


class FaultyWorld(World):
    """What its engines do is a subclass's to say."""

    def __init__(self, seed: int, targets: tuple[Target, ...] = ()) -> None:
        self.dice = Random(seed)
        self._targets = targets
        self._met: Counter[Target] = Counter()  # how often the row of each
        self.struck: set[Target] = set()
        self.weather = Weather.by(self.dice)
        heads = self.dice.choice((1, 2, 4))
        windowed = self.dice.random() < 0.3
        one, other = self._shape(heads, windowed), self._shape(heads, windowed)
        super().__init__(one, other, self.dice.choice((1, 2, 3)), heads, SETTINGS)
        self.faults: Counter[str] = Counter()  # what befell letters, WRITEs and processes
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = count()
        self._suffering: dict[tuple[frozenset[str], Fault], float] = {}  # until when
        self._last_arrival: dict[tuple[str, str], float] = defaultdict(float)
        self._wakes_at: dict[str, float] = {}
        self._backlog: dict[str, list[Callable[[], None]]] = defaultdict(list)
        self._missed: set[tuple[str, str]] = set()  # (who, whom)
        self._freezes = self.dice.random() < 0.5  # a stopped process's WRITEs stop as well
        self._strangers = [pair for pair in self.pairs() if self.dice.random() < self.weather.refuses]
        for rank in self.ranks.values():
            self._squeeze(rank)

    def _shape(self, heads: int, windowed: bool) -> Shape:
        tensor = self.dice.choice([ranks for ranks in (1, 1, 2, 4) if heads % ranks == 0 or ranks % heads == 0])
        pipeline = 1 if tensor == 4 else self.dice.choice((1, 1, 2))
        return Shape(tensor, pipeline, self.dice.choice((2, 3, 4)), windowed)

    def _squeeze(self, rank: Rank) -> None:
        """Limits of a few blocks, as settings in MiB can't say."""
        writer, block = rank.source._writer, rank.shard.block_size * SLOT * self.heads
        writer._most_write_bytes = block * self.dice.choice((1, 2, 8))
        writer._most_in_flight_bytes = block * self.dice.choice((1, 3, 16))

    # A run -----------------------------------------------------------------------------------------------------------
    def plan(self) -> None:
        """What the engines will do."""

    def finish_engines(self, rank: Rank) -> None:
        """After the faults: this rank's engine brings to its end what it has begun."""

    def run(self) -> None:
        """Raises AssertionError where a rule is broken."""
        self.plan()
        for rank in self.ranks.values():
            self.at(self.dice.uniform(0.0, 0.1), partial(self._tick, rank))
            self._plan_fate(rank)
        self._run_until(HEALS_AT_S)
        for uuid in list(self._wakes_at):
            self._wake(self.ranks[uuid])
        while not self._rests() and self.now < HEALS_AT_S + RESTS_WITHIN_S:
            self._run_until(self.now + 0.5)
        self.assert_at_rest()

    def at(self, delay_s: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + delay_s, next(self._number), event))

    def do(self, rank: Rank, action: Callable[[], None]) -> None:
        """On this rank's thread: now, when it wakes, or never."""
        if not rank.alive:
            return
        if rank.uuid in self._wakes_at:
            self._backlog[rank.uuid].append(action)
            return
        action()
        if self.dice.random() < 0.4:
            rank.step()

    @property
    def healed(self) -> bool:
        return self.now >= HEALS_AT_S

    def _run_until(self, end: float) -> None:
        while self._events and self._events[0][0] < end:
            self.now, _, event = heapq.heappop(self._events)
            event()
        self.now = end

    def _tick(self, rank: Rank) -> None:
        if not rank.alive:
            return
        if rank.uuid not in self._wakes_at:
            rank.poll()
            rank.expire()
            rank.step()
            for key in [key for key in rank.decoding if self.dice.random() < 0.1]:
                rank.end_decode(key)
            if self.healed:
                self.finish_engines(rank)
        self.at(self.dice.uniform(0.03, 0.12), partial(self._tick, rank))

    def _rests(self) -> bool:
        living = [rank for rank in self.ranks.values() if rank.alive]
        return all(rank.at_rest and not rank.prefills and not rank.claims for rank in living)

    # Letters ---------------------------------------------------------------------------------------------------------
    def on_letter(self, sender: str, recipient: str, frame: bytes) -> None:
        pair = frozenset((sender, recipient))
        if self._befalls(pair, Fault.LOSE, self.weather.lose):
            return
        if self._befalls(pair, Fault.TRUNCATE, self.weather.cut):
            frame = frame[: self.dice.randrange(len(frame))]
        arrivals = [self._arrival(sender, recipient)]
        if self._befalls(pair, Fault.DUPLICATE, self.weather.double):
            arrivals.append(arrivals[0] + self.dice.uniform(0.0, 1.5))
        for arrival in arrivals:
            self.at(arrival - self.now, partial(self._arrive, sender, recipient, frame))

    def _arrival(self, sender: str, recipient: str) -> float:
        pair, arrival = frozenset((sender, recipient)), self.now + self.dice.expovariate(200.0)
        if self._befalls(pair, Fault.REORDER, self.weather.late):
            return arrival + self.dice.uniform(0.0, 0.6)
        if self._befalls(pair, Fault.DELAY, 0.0):
            arrival += self.dice.uniform(0.3, 3.0)
        arrival = max(arrival, self._last_arrival[sender, recipient])
        self._last_arrival[sender, recipient] = arrival
        return arrival

    def _arrive(self, sender: str, recipient: str, frame: bytes) -> None:
        rank = self.ranks[recipient]
        self.do(rank, partial(rank.hear, sender, frame))

    def _befalls(self, pair: frozenset[str], fault: Fault, chance: float) -> bool:
        suffers = self._suffering.get((pair, fault), -inf) > self.now or self.dice.random() < chance
        if suffers and not self.healed:
            self.faults[fault.name.lower()] += 1
            return True
        return False

    # WRITEs ----------------------------------------------------------------------------------------------------------
    def on_write(self, write: ModelWrite) -> None:
        takes_s = self.dice.expovariate(50.0)
        if not self.healed and self.dice.random() < self.weather.slow:
            takes_s += self.dice.uniform(0.1, 3.0)
        pair = frozenset((write.source.uuid, write.destination.uuid))
        cut = self._befalls(pair, Fault.TRUNCATE, self.weather.fail)
        self.at(takes_s * self.dice.random(), partial(self._move, write, self.dice.randrange(write.bytes)))
        self.at(takes_s, partial(self._end_write, write, WriteState.FAILED if cut else WriteState.DONE))

    def _move(self, write: ModelWrite, upto: int) -> None:
        if write.state is WriteState.IN_FLIGHT and not self._frozen(write):
            write.move(upto)

    def _end_write(self, write: ModelWrite, state: WriteState) -> None:
        if self._frozen(write):
            self.at(0.05, partial(self._end_write, write, state))
        elif write.state is WriteState.IN_FLIGHT:
            write.end(state if write.destination.alive else WriteState.FAILED)

    def _frozen(self, write: ModelWrite) -> bool:
        return self._freezes and write.source.uuid in self._wakes_at

    def is_staged(self, uuid: str) -> bool:
        return self.dice.random() < 0.2

    def on_land(self, fence: DeviceFence) -> None:
        self.at(self.dice.choice((0.0, 0.05, 0.5)), fence.open)

    # Processes -------------------------------------------------------------------------------------------------------
    def on_connect(self, rank: Rank, peer: str) -> None:
        self.at(self.dice.expovariate(100.0), partial(self._greet, rank, self.ranks[peer]))

    def _greet(self, rank: Rank, other: Rank) -> None:
        """Its Hello arrives; the answer to it comes back."""
        if not other.alive:
            self._prove_end(rank, other)
            return
        self.do(other, partial(self._meet, other, rank))
        self.do(other, partial(self.at, 0.01, partial(self._answered, rank, other)))

    def _answered(self, rank: Rank, other: Rank) -> None:
        if other.alive:
            self.do(rank, partial(self._meet, rank, other))
        else:
            self._prove_end(rank, other)

    def _meet(self, rank: Rank, other: Rank) -> None:
        if (rank, other) in self._strangers:
            rank.refuse(other)
        else:
            rank.meet(other)
        if not other.alive:  # Its words outlived it.
            self._prove_end(rank, other)

    def _plan_fate(self, rank: Rank) -> None:
        if self.dice.random() < self.weather.stops:
            self.at(self.dice.uniform(0.0, 4.0), partial(self._stop, rank))
        if self.dice.random() < self.weather.kills:
            self.at(self.dice.uniform(0.0, 5.0), partial(self._kill, rank))

    def _kill(self, rank: Rank) -> None:
        if not rank.alive or self.healed:
            return
        self.faults["kill"] += 1
        rank.alive = False
        for one, other in self.pairs():
            if other is rank and rank.uuid in one.known:
                self._prove_end(one, rank)

    def _prove_end(self, rank: Rank, dead: Rank) -> None:
        self.at(self.dice.uniform(0.02, 1.0), lambda: self.do(rank, partial(rank.bury, dead)))

    def _stop(self, rank: Rank) -> None:
        if not rank.alive or self.healed or rank.uuid in self._wakes_at:
            return
        self.faults["stop"] += 1
        asleep_s = self.dice.choice((0.2, 0.7, 1.5, 4.0))
        self._wakes_at[rank.uuid] = self.now + asleep_s
        self.at(SETTINGS.peer_silent_s, partial(self._fall_silent, rank, self.now + asleep_s))
        self.at(asleep_s, partial(self._wake, rank))

    def _fall_silent(self, rank: Rank, wakes_at: float) -> None:
        if self._wakes_at.get(rank.uuid) == wakes_at and rank.alive:
            for one, other in self.pairs():
                if other is rank and rank.uuid in one.known:
                    self._missed.add((one.uuid, rank.uuid))
                    self.do(one, partial(one.miss, rank))

    def _wake(self, rank: Rank) -> None:
        if self._wakes_at.pop(rank.uuid, None) is None or not rank.alive:
            return
        backlog, self._backlog[rank.uuid] = self._backlog[rank.uuid], []
        for action in backlog:
            self.do(rank, action)
        for one, other in list(self.pairs()):
            if other is rank and (one.uuid, rank.uuid) in self._missed:
                self._missed.discard((one.uuid, rank.uuid))
                self.at(self.dice.expovariate(20.0), lambda one=one: self._answered(one, rank))  # type: ignore[misc]
                if self.dice.random() < 0.5 and one.uuid in rank.known:  # It has not heard of the other for as long.
                    rank.miss(one)
                    self.at(self.dice.expovariate(20.0), lambda one=one: self._answered(rank, one))  # type: ignore[misc]

    # The target ------------------------------------------------------------------------------------------------------
    def on_row(self, rank: Rank, row: Row, leg: LegKey) -> None:
        super().on_row(rank, row, leg)
        for target in self._targets:
            if target.row == row and not self.healed:
                self._met[target] += 1
                if self._met[target] == target.nth:
                    self._strike(target, rank, leg)

    def _strike(self, target: Target, rank: Rank, leg: LegKey) -> None:
        other = self.ranks[leg.peer]
        victim = other if target.peer else rank
        if not (rank.alive and other.alive) or (target.fault is Fault.STOP and victim.uuid in self._wakes_at):
            return
        self.struck.add(target)
        match target.fault:
            case Fault.KILL:
                self._kill(victim)
            case Fault.KILL_AFTER:
                self.at(0.0, partial(self._kill, victim))
            case Fault.STOP:
                self.at(0.0, partial(self._stop, victim))
            case Fault.GIVE_UP:
                sends = isinstance(target.row[0], SourceState) is not target.peer
                give_up = victim.abort_prefill if sends else victim.abandon
                self.at(0.0, partial(self.do, victim, partial(give_up, leg.transfer)))
            case _:
                self._suffering[frozenset((rank.uuid, other.uuid)), target.fault] = self.now + FAULT_S
        if target.fault is Fault.TRUNCATE:
            for write in self.in_flight:
                if {write.source, write.destination} == {rank, other}:
                    self._end_write(write, WriteState.FAILED)
