"""Many runs of faulty worlds, planned so that every transition of both tables is met and struck.

First a census: runs without a target, which tell in which seeds a transition is met. Then, for every transition, runs
of such a seed with a fault at just that moment. What those runs meet for the first time is struck in turn, on top of
the fault that led there. The plan is the same every time.
"""

from collections import Counter, deque
from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from itertools import cycle, islice, product

from splitserve.kv.ledger import DESTINATION, SOURCE, DestinationEvent, DestinationState, SourceEvent, SourceState
from tests.unit.kv.faults import ONE_SIDED, Fault, Target
from tests.unit.kv.journeys import Journeys
from tests.unit.kv.rank import Row

State = SourceState | DestinationState
ROWS: frozenset[Row] = frozenset(SOURCE) | frozenset(DESTINATION)
# An honest source says Cancelled only after a Cancel, and who has sent that is not REGISTERED any more. The row is for
# a source that errs; `test_sides.py` has it.
DISHONEST: frozenset[Row] = frozenset({(DestinationState.REGISTERED, DestinationEvent.CANCELLED)})
KINDS = [(fault, peer) for fault in Fault for peer in (False, True) if fault in ONE_SIDED or not peer]

MOST_RECIPES = 8  # remembered for each transition
DEADLIEST = (Fault.KILL_AFTER, True)  # it leads to transitions that little else leads to


@dataclass(frozen=True, slots=True)
class Recipe:
    """A run that meets something."""

    seed: int
    targets: tuple[Target, ...] = ()


@dataclass
class Campaign:
    """`told`: how many keys ranks named as received, failed, released and sent."""

    runs: int = 0
    rows: Counter[Row] = field(default_factory=Counter)
    struck: set[tuple[Row, Fault, bool]] = field(default_factory=set)
    faults: Counter[str] = field(default_factory=Counter)
    told: Counter[str] = field(default_factory=Counter)
    recipes: dict[Row, list[Recipe]] = field(default_factory=dict)
    _unstruck: deque[Row] = field(default_factory=deque)
    _next_seed: int = 0

    def survey(self, runs: int) -> None:
        """The census: so many seeds more."""
        for _ in range(runs):
            self.run(Recipe(self._next_seed))
            self._next_seed += 1

    def seek(self, rows: Set[Row], most: int) -> None:
        """Until each of these was met: more strikes at what leads into its state, more seeds. At most so many each."""
        for row in sorted(rows - set(self.rows), key=str):
            for recipe in islice(self._ways_to(row[0]), most):
                if row in self.rows:
                    break
                self.run(recipe)
        for _ in range(most):
            if rows <= set(self.rows):
                return
            self.survey(1)

    def _ways_to(self, state: State) -> Iterator[Recipe]:
        """Runs that are known to come into this state, with a fault as they do."""
        leads = [row for row, after in _leads_to().items() if after is state is not row[0] and row in self.recipes]
        for number in range(MOST_RECIPES):
            for (fault, peer), row in product(KINDS, leads):
                for recipe in self.recipes[row][number : number + 1]:
                    yield Recipe(recipe.seed, (*recipe.targets, Target(row, fault, peer)))

    def strike(self, kinds_per_row: int) -> None:
        """So many kinds of fault at every transition that is known or becomes so: the other side's death, and others
        by turns."""
        kinds = cycle(kind for kind in KINDS if kind != DEADLIEST)
        while self._unstruck:
            row = self._unstruck.popleft()
            for fault, peer in (DEADLIEST, *islice(kinds, kinds_per_row - 1)):
                self._strike(row, fault, peer)

    def run(self, recipe: Recipe) -> Journeys:
        world = Journeys(recipe.seed, recipe.targets)
        try:
            world.run()
        except AssertionError as error:
            error.add_note(f"in the run {recipe}")
            raise
        self._count(world)
        for row in world.rows:
            if row not in self.recipes:
                self._unstruck.append(row)
            known = self.recipes.setdefault(row, [])
            if len(known) < MOST_RECIPES:
                known.append(recipe)
        return world

    def _strike(self, row: Row, fault: Fault, peer: bool) -> None:
        """Tries the runs that are known to meet this transition until the fault finds its victim alive and awake."""
        for recipe in tuple(self.recipes[row]):
            for nth in (1, 2):
                target = Target(row, fault, peer, nth)
                if target in self.run(Recipe(recipe.seed, (*recipe.targets, target))).struck:
                    self.struck.add((row, fault, peer))
                    return

    def _count(self, world: Journeys) -> None:
        self.runs += 1
        self.rows += world.rows
        self.faults += world.faults
        for rank in world.ranks.values():
            for name in ("received", "failed", "released", "sent"):
                self.told[name] += len(getattr(rank.told, name))


def _leads_to() -> dict[Row, State]:
    """The state after each transition."""
    after: dict[Row, State] = {row: outcome[0] for row, outcome in SOURCE.items()}
    for row, outcome in DESTINATION.items():
        after[row] = outcome[0]
    return after


def moot(row: Row, fault: Fault, peer: bool) -> bool:
    """What can't be struck: a process that is known to have ended, and one that is silent because it is stopped. Only
    such a source leaves a destination connecting until its deadline: one that is awake answers."""
    dead = row[1] in (SourceEvent.PEER_ENDED, DestinationEvent.PEER_ENDED)
    unanswered = row == (DestinationState.CONNECTING, DestinationEvent.DEADLINE)
    silent = row[1] is DestinationEvent.PEER_SILENT or unanswered
    return dead or (silent and fault is Fault.STOP and peer)
