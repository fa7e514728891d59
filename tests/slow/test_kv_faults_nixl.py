"""Faults between real processes over NIXL: ranks of two workers are stopped, woken and killed at random moments while
their letters are late, lost, doubled and out of order. Seeded; what real time adds differs from run to run.

Every rank has an engine (tests/unit/kv/engine.py) that gives freed blocks out again at once and compares every byte
that it receives. In the end each living rank has its blocks back, untouched, and owes nobody anything.
"""

import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from random import Random

import pytest

from splitserve.core.config import KvTransferSettings
from splitserve.kv.transfer import TransferKey
from tests.contract.kv_ranks import Child, Rank, Worker, Workers, child_process
from tests.contract.rank_server import Chances, Read
from tests.unit.kv.numbered import Shape

pytestmark = [pytest.mark.slow, pytest.mark.nixl, pytest.mark.timeout(1800)]

RUNS = 16  # for each way in which UCX may move bytes
SETTINGS = KvTransferSettings(peer_silent_s=0.6, lease_s=1.5)
LASTS_S = 2.0  # until the faults end
RESTS_WITHIN_S = 40.0
SHAPES = (Shape(1, 1), Shape(2, 1), Shape(1, 2), Shape(1, 1, 6), Shape(2, 1, 8, True), Shape(1, 1, 4, True))
ENDS = ("end_prefill", "end_prefill", "abort_prefill")


class Ranks:
    """As many processes as a run needs; one that was killed is replaced."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self.made: list[Child] = []

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def ready(self) -> list[Child]:
        self.made = [child for child in self.made if child.process.is_alive()]
        while len(self.made) < 4:
            self.made.append(self._stack.enter_context(child_process()))
        return self.made


class Run:
    """One seed: a plan of what engines do and what befalls their processes, then the reckoning."""

    def __init__(self, seed: int, ranks: Ranks) -> None:
        self.dice = Random(seed)
        self.counts: Counter[str] = Counter()
        self._ranks = ranks
        self._seed = seed
        self._plan: list[tuple[float, int, Rank, str, tuple[object, ...]]] = []
        self._stopped: set[str] = set()

    def run(self) -> None:
        windowed = self.dice.random() < 0.3
        shapes = [shape for shape in SHAPES if shape.windowed is windowed]
        source, destination = self.dice.choice(shapes), self.dice.choice(shapes)
        with self._begun(source, destination) as workers:
            self._make_plan(workers)
            self._follow_plan()
            self._reckon([*workers.source.ranks, *workers.destination.ranks])

    @contextmanager
    def _begun(self, source: Shape, destination: Shape) -> Iterator[Workers]:
        heads = self.dice.choice((1, 2))
        with Workers.begun(self._ranks.ready(), "nixl", source, destination, 2, heads, SETTINGS) as workers:
            chances = Chances(
                self.dice.choice((0.0, 0.1)), self.dice.choice((0.0, 0.2)), self.dice.choice((0.0, 0.05, 0.4))
            )
            for number, rank in enumerate([*workers.source.ranks, *workers.destination.ranks]):
                rank.call("run_engine", self._seed * 10 + number, chances)
            yield workers

    # The plan --------------------------------------------------------------------------------------------------------
    def _make_plan(self, workers: Workers) -> None:
        for number in range(4):
            read = Read(self._seed * 100 + number, self.dice.randint(1, 80), workers.layers, workers.heads)
            ways = (workers.source, workers.destination), (workers.destination, workers.source)
            self._plan_transfer(TransferKey(f"t{number}", 1), read, *ways[self.dice.random() < 0.2])
        for rank in (*workers.source.ranks, *workers.destination.ranks):
            self._plan_fate(rank)

    def _plan_transfer(self, key: TransferKey, read: Read, source: Worker, destination: Worker) -> None:
        begins, takes_s = self.dice.uniform(0.0, 0.8), self.dice.choice((0.0, 0.2, 0.8))
        limit_s, ends = self.dice.choice((0.5, 2.0, 4.0)), self.dice.choice(ENDS)
        claims = max(0.0, begins + self.dice.choice((-0.3, 0.0, takes_s + 0.1, takes_s + 2.0)))
        hit = self.dice.choice((0, 0, read.tokens // 2))
        for rank in source.ranks:
            self._at(begins, rank, "engine_does", "offer", key, read, destination.peers, hit)
            for share in (0.3, 0.7):
                upto = max(1, int(share * read.tokens))
                self._at(begins + share * takes_s, rank, "engine_ends", "chunk", key, upto)
            if self.dice.random() < 0.15:
                self._at(begins + 0.5 * takes_s, rank, "engine_ends", "preempt", key)
            self._at(begins + takes_s, rank, "engine_ends", ends, key)
        abandons = claims + self.dice.choice((0.05, 0.3, limit_s + 0.5, limit_s + 0.5))
        for rank in destination.ranks:
            first = self.dice.choice(((0, 0), (1, 0), (2, 2)))
            self._at(claims, rank, "engine_does", "claim", key, read, source.peers, None, first, limit_s)
            self._at(abandons, rank, "engine_ends", "abandon", key)

    def _plan_fate(self, rank: Rank) -> None:
        if self.dice.random() < 0.35:
            stops, sleeps = self.dice.uniform(0.0, LASTS_S), self.dice.choice((0.1, 0.5, 1.5))
            self._at(stops, rank, "SIGSTOP")
            self._at(stops + sleeps, rank, "SIGCONT")
        if self.dice.random() < 0.12:
            self._at(self.dice.uniform(0.2, LASTS_S), rank, "SIGKILL")

    def _at(self, at_s: float, rank: Rank, name: str, *args: object) -> None:
        self._plan.append((at_s, len(self._plan), rank, name, args))

    # The run ---------------------------------------------------------------------------------------------------------
    def _follow_plan(self) -> None:
        """Commands to a process that is stopped wait in its pipe, and nobody waits for their answers here."""
        begun, pause = time.monotonic(), threading.Event()
        for at_s, _, rank, name, args in sorted(self._plan, key=lambda step: step[:2]):
            pause.wait(max(0.0, begun + at_s - time.monotonic()))
            if not rank.child.process.is_alive():
                continue
            if name.startswith("SIG"):
                self._signal(rank, signal.Signals[name])
            else:
                rank.child.send(name, *args)

    def _signal(self, rank: Rank, number: signal.Signals) -> None:
        self.counts[number.name] += 1
        if number is signal.SIGKILL:
            rank.child.kill()
        else:
            rank.child.signal(number)

    def _reckon(self, ranks: list[Rank]) -> None:
        living = [rank for rank in ranks if rank.child.process.is_alive()]
        for rank in living:
            rank.child.catch_up()
            rank.call("finish")
        pause, deadline = threading.Event(), time.monotonic() + RESTS_WITHIN_S
        while not all(rank.call("engine_rests") for rank in living):
            assert time.monotonic() < deadline, f"seed {self._seed}: {[rank.call('state') for rank in living]}"
            pause.wait(0.02)
        for rank in living:
            fault, told = rank.call("books")
            assert not fault, f"seed {self._seed}: {fault}"
            for name in ("received", "failed", "released", "sent"):
                self.counts[name] += len(getattr(told, name))


@pytest.mark.parametrize("ways", ["all that UCX has", "tcp,self"])
def test_no_fault_between_processes_loses_a_block_or_brings_a_wrong_byte(
    ways: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("nixl")
    if "," in ways:
        monkeypatch.setenv("UCX_TLS", ways)
    counts: Counter[str] = Counter()
    with Ranks() as ranks:
        for seed in range(RUNS):
            run = Run(seed, ranks)
            run.run()
            counts += run.counts
    with capsys.disabled():
        print(f"\n{RUNS} runs over {ways}: {dict(counts)}")
    assert min(counts[name] for name in ("received", "failed", "released", "sent")) > RUNS / 4
    assert min(counts[name] for name in ("SIGSTOP", "SIGKILL")) > RUNS / 8
