"""What our scheduler makes of vLLM's requests; stand-ins have those of their fields that it reads."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from math import inf
from typing import Any, cast

import pytest

from splitserve.core.worker import Objectives, Pace
from splitserve.engine.vllm import paced as module
from splitserve.engine.vllm.paced import Bound, Paced
from splitserve.kv.job_params import DESTINATION, job_params, pace_params
from splitserve.latency.linear import LinearLatency
from splitserve.routing.lengths import FEWEST
from splitserve.routing.pace import Batch, PacedJobs
from splitserve.routing.slack import LEAST_CHUNK, STEPS_WITHOUT, TOKENS_IN_HAND

LATENCY = LinearLatency(fixed_s=0.006, prefill_token_s=0.00025, decode_token_s=0.0005)
STEP_S = 0.0065  # of one decode
MOST = 1024
TIGHT = Objectives(tpot_s=0.007)
PATIENT = Objectives(tpot_s=0.05)
NONE = Objectives()
KV = {"side": DESTINATION}


class Status(Enum):
    WAITING = auto()
    WAITING_FOR_REMOTE_KVS = auto()
    RUNNING = auto()
    FINISHED_STOPPED = auto()
    FINISHED_LENGTH_CAPPED = auto()
    FINISHED_ABORTED = auto()


@dataclass
class Sampling:
    extra_args: dict[str, Any] | None


@dataclass(eq=False)
class Request:
    request_id: str
    num_prompt_tokens: int
    sampling_params: Sampling | None
    kv_transfer_params: dict[str, Any] | None = None
    max_tokens: int = 100
    status: Status = Status.WAITING
    num_computed_tokens: int = 0
    num_output_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + self.num_output_tokens


@dataclass
class Clock:
    now: float = 100.0

    def monotonic(self) -> float:
        return self.now


@dataclass
class Engine:
    """vLLM's part: it runs what a test says, and takes `step_s` for it."""

    clock: Clock
    decode_tokens: int = 1
    told: list[Pace] = field(default_factory=list)
    running: list[Request] = field(default_factory=list)
    waiting: list[Request] = field(default_factory=list)
    known: dict[str, Request] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.jobs = PacedJobs(LATENCY)
        for number in range(FEWEST):  # enough have ended for nobody to be expected to go on
            self.jobs.add(str(number), PATIENT, waits_for_kv=False, now=0.0)
            self.jobs.end(str(number), output_tokens=1)
        self.paced = Paced(self.jobs, self.decode_tokens, self.told.append)

    def add(
        self,
        name: str,
        prompt: int,
        objectives: Objectives = NONE,
        kv: dict[str, Any] | None = None,
        before: int = 0,
        max_tokens: int = 100,
    ) -> Request:
        request = Request(name, prompt, Sampling(pace_params(objectives, before)), kv or job_params(name), max_tokens)
        self.known[name] = request
        self.waiting.append(request)
        self.paced.add(cast(Any, request))
        return request

    def decode(
        self, name: str, objectives: Objectives = NONE, prompt: int = 10, ahead: int = 0, **named: Any
    ) -> Request:
        """One that has its first token, and so many more that came at once."""
        request = self.add(name, prompt, objectives, **named)
        self.start(request)
        self.step({name: prompt})
        request.num_computed_tokens += ahead
        request.num_output_tokens += ahead
        self.jobs.made(name, request.num_output_tokens, self.clock.now)
        return request

    def start(self, request: Request) -> None:
        self.waiting.remove(request)
        self.running.append(request)
        request.status = Status.RUNNING

    def step(self, tokens: dict[str, int], seconds: float = STEP_S) -> None:
        for name, count in tokens.items():
            self.known[name].num_computed_tokens += count
        self.paced.scheduled(tokens, cast(Any, self.known))
        self.clock.now += seconds
        for name in tokens:
            request = self.known[name]
            request.num_output_tokens += request.num_computed_tokens >= request.num_tokens
        self.paced.stepped(bool(self.running))
        self.paced.tell()

    def end(self, request: Request, status: Status) -> None:
        request.status = status
        (self.running if request in self.running else self.waiting).remove(request)
        self.paced.ended([request.request_id])

    def bound(self, most: int = MOST) -> Bound | None:
        return self.paced.bound(cast(Any, self.running), cast(Any, self.waiting), most)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def engine(clock: Clock) -> Engine:
    return Engine(clock)


def names(bound: Bound | None) -> list[str]:
    assert bound is not None
    return [request.request_id for request in bound.put_off]


# What is bound ------------------------------------------------------------------------------------------------------
def test_without_objectives_vllm_does_as_it_likes(engine: Engine) -> None:
    engine.decode("d")
    engine.add("p", 2000, TIGHT)  # of a request without a token
    assert engine.bound() is None


def test_where_nothing_is_read_nothing_is_bound(engine: Engine) -> None:
    engine.decode("d", TIGHT)
    assert engine.bound() is None
    engine.add("parked", 500, kv=KV)
    assert engine.bound() is None


def test_a_prompt_is_read_in_what_the_decodes_leave(engine: Engine) -> None:
    for number in range(3):
        engine.decode(f"d{number}", Objectives(tpot_s=0.03), ahead=TOKENS_IN_HAND)
    engine.add("p", 2000)
    bound = engine.bound()
    assert bound is not None
    assert LEAST_CHUNK <= bound.of_one < 200
    assert bound.tokens == 3 + bound.of_one
    assert not bound.put_off


def test_a_prompt_goes_on_where_it_stands(engine: Engine) -> None:
    """The one that runs is first, whatever waits; the rest of a step is not for others."""
    engine.decode("d", Objectives(tpot_s=0.03), ahead=TOKENS_IN_HAND)
    begun = engine.add("begun", 2000)
    engine.add("next", 2000)
    engine.start(begun)
    engine.step({"d": 1, "begun": 64})
    assert names(engine.bound()) == ["next"]


def test_what_a_prompts_last_chunk_leaves_is_for_the_next(engine: Engine) -> None:
    engine.decode("d", Objectives(tpot_s=0.06), ahead=TOKENS_IN_HAND)
    short = engine.add("short", 40)
    engine.start(short)
    for name in ("second", "third"):
        engine.add(name, 2000)
    bound = engine.bound()
    assert bound is not None
    assert 40 < bound.of_one < 300
    assert names(bound) == ["third"]


def test_decodes_with_time_for_whole_chunks_leave_them_whole(engine: Engine) -> None:
    engine.decode("d", Objectives(tpot_s=10.0), ahead=TOKENS_IN_HAND)
    engine.add("p", 2000)
    assert engine.bound() == Bound(MOST, MOST - 1)


def test_a_prompt_gets_nothing_where_it_would_make_decodes_late_and_a_little_after_a_few_steps(engine: Engine) -> None:
    engine.decode("d", TIGHT)
    engine.add("p", 2000)
    for _ in range(STEPS_WITHOUT):
        bound = engine.bound()
        assert bound is not None
        assert (bound.tokens, names(bound)) == (1, ["p"])
        engine.step({"d": 1})
    assert engine.bound() == Bound(1 + LEAST_CHUNK, LEAST_CHUNK)


def test_a_prompt_that_began_in_the_cache_is_a_prompt_though_it_got_one_token(engine: Engine) -> None:
    engine.decode("d", TIGHT)
    cached = engine.add("cached", 2000)
    assert names(engine.bound()) == ["cached"]
    cached.num_computed_tokens = 1024
    engine.start(cached)
    engine.step({"d": 1, "cached": 1})
    bound = engine.bound()
    assert bound is not None
    assert bound.tokens < LEAST_CHUNK


def test_what_was_preempted_is_read_again(engine: Engine) -> None:
    engine.decode("d", TIGHT)
    for params in (None, KV):
        lost = engine.decode(f"lost {params}", prompt=500, kv=params)
        lost.num_computed_tokens = 0
        engine.running.remove(lost)
        engine.waiting.append(lost)
        assert names(engine.bound()) == [lost.request_id]
        engine.end(lost, Status.FINISHED_ABORTED)


def test_when_decodes_fill_the_step_nothing_is_bound(engine: Engine) -> None:
    for number in range(4):
        engine.decode(f"d{number}", TIGHT)
    engine.add("p", 2000)
    assert engine.bound(most=4) is None


# KV from elsewhere --------------------------------------------------------------------------------------------------
def test_requests_are_parked_and_taken_up_beside_a_prompt_that_gets_nothing(engine: Engine) -> None:
    """One token for each of them, and the one that the running prompt takes before they are looked at."""
    engine.decode("d", TIGHT)
    begun = engine.add("begun", 2000)
    engine.start(begun)
    engine.add("next", 2000)
    for number in range(3):
        engine.add(f"kv{number}", 500, kv=KV)
    bound = engine.bound()
    assert bound == Bound(1 + 1 + 3, 1, bound.put_off if bound else ())
    assert names(bound) == ["next"]


def test_requests_are_parked_and_taken_up_beside_prompts_that_share_a_chunk(engine: Engine) -> None:
    engine.decode("d", Objectives(tpot_s=0.05), ahead=TOKENS_IN_HAND)
    for name in ("one", "two"):
        engine.start(engine.add(name, 2000))
        engine.step({"d": 1, name: 1})
    alone = engine.bound()
    assert alone is not None
    assert alone.tokens == 1 + alone.of_one
    engine.add("kv", 500, kv=KV)
    shared = engine.bound()
    assert shared is not None
    assert shared.tokens - 1 - 2 * shared.of_one >= 1
    assert shared.of_one == alone.of_one // 2


def test_a_waiting_prompt_leaves_its_step_to_none_but_those_whose_kv_comes(engine: Engine) -> None:
    engine.decode("d", Objectives(tpot_s=0.03), ahead=TOKENS_IN_HAND)
    for name in ("first", "second"):
        engine.add(name, 2000)
    engine.add("kv", 500, kv=KV)
    bound = engine.bound()
    assert bound is not None
    assert bound.tokens == 1 + bound.of_one + 1
    assert names(bound) == ["second"]


def test_one_that_has_got_its_kv_is_a_decode_and_not_a_prompt(engine: Engine) -> None:
    engine.decode("d", TIGHT)
    here = engine.add("kv", 500, kv=KV)
    here.num_computed_tokens = 499
    assert engine.bound() is None
    engine.start(here)
    engine.step({"d": 1, "kv": 1})
    assert engine.jobs.parked == 0


def test_drafts_have_their_room(clock: Clock) -> None:
    """vLLM wants a sequence's drafts whole or not at all."""
    engine = Engine(clock, decode_tokens=4)
    engine.decode("d", TIGHT)
    engine.add("p", 2000)
    engine.add("kv", 500, kv=KV)
    bound = engine.bound()
    assert bound == Bound(4 + 4, 4, bound.put_off if bound else ())
    assert engine.bound(most=6) == Bound(6, 4, bound.put_off)


# What is noted ------------------------------------------------------------------------------------------------------
def test_the_slack_grows_with_what_a_decode_has_made(engine: Engine) -> None:
    engine.decode("d", PATIENT, ahead=TOKENS_IN_HAND)
    engine.add("p", 2000)
    first = engine.bound()
    for _ in range(3):
        engine.step({"d": 1})
    later = engine.bound()
    assert first is not None
    assert later is not None
    assert later.of_one > 2 * first.of_one


def test_lengths_are_those_of_outputs_that_have_their_end_with_what_was_made_elsewhere(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(engine.jobs, "end", lambda job_id, output_tokens=0: ended.append(output_tokens))
    for status, before in [
        (Status.FINISHED_STOPPED, 0),
        (Status.FINISHED_LENGTH_CAPPED, 30),
        (Status.FINISHED_ABORTED, 0),
    ]:
        request = engine.decode(status.name, before=before)
        engine.step({status.name: 1})
        engine.end(request, status)
    prefill = engine.decode("prefill", max_tokens=1)
    engine.end(prefill, Status.FINISHED_LENGTH_CAPPED)
    assert ended == [2, 32, 0, 0]


@pytest.mark.parametrize(
    "begin",
    [
        lambda engine: engine.decode("r", TIGHT),
        lambda engine: engine.add("r", 500, TIGHT),
        lambda engine: engine.add("r", 500, TIGHT, kv=KV),
    ],
    ids=["a decode", "a prompt", "one that waits for KV"],
)
def test_what_was_aborted_is_forgotten(engine: Engine, begin: Callable[[Engine], Request]) -> None:
    request = begin(engine)
    engine.end(request, Status.FINISHED_ABORTED)
    engine.paced.ended(["r"])  # vLLM names it again
    assert (engine.jobs.parked, engine.jobs.tpot_s) == (0, inf)
    engine.decode("other")
    engine.add("p", 2000)
    assert engine.bound() is None


def test_a_request_that_ends_within_its_step_is_no_surprise(engine: Engine) -> None:
    request = engine.add("r", 10, TIGHT)
    engine.start(request)
    request.num_computed_tokens += 10
    engine.paced.scheduled({"r": 10}, cast(Any, engine.known))
    engine.end(request, Status.FINISHED_ABORTED)
    engine.paced.stepped(goes_on=False)
    assert engine.jobs.tpot_s == inf


# What is told -------------------------------------------------------------------------------------------------------
def test_slowdown_is_what_steps_take_whoever_is_in_them(engine: Engine) -> None:
    engine.decode("d")
    for _ in range(200):
        engine.step({"d": 1}, 2 * STEP_S)
    assert engine.told[-1].slowdown == pytest.approx(2.0, rel=0.05)


def test_the_time_without_work_is_no_part_of_a_step(engine: Engine, clock: Clock) -> None:
    engine.running.remove(engine.decode("d"))
    engine.step({}, 0.0)
    before = engine.jobs.pacer.slowdown
    clock.now += 60.0
    engine.step({"d": 1})
    assert engine.jobs.pacer.slowdown == pytest.approx(before, abs=0.1)


def test_what_the_engine_does_between_two_steps_is_a_part_of_the_later(engine: Engine, clock: Clock) -> None:
    engine.decode("d")
    for _ in range(200):
        clock.now += STEP_S
        engine.step({"d": 1})
    assert engine.jobs.pacer.slowdown == pytest.approx(2.0, rel=0.05)


def test_a_step_that_was_begun_while_another_ran_counts_from_its_end(engine: Engine, clock: Clock) -> None:
    engine.decode("d")
    before = engine.jobs.pacer.slowdown
    for _ in range(2):
        engine.paced.scheduled({"d": 1}, cast(Any, engine.known))
    for _ in range(2):
        clock.now += STEP_S
        engine.paced.stepped(goes_on=True)
    assert engine.jobs.pacer.slowdown == pytest.approx(before, abs=0.1)


def test_routers_hear_at_once_of_another_tightest_objective(engine: Engine) -> None:
    loose = engine.decode("loose", PATIENT)
    assert engine.told[-1].tpot_s == PATIENT.tpot_s
    tight = engine.decode("tight", TIGHT)
    assert engine.told[-1].tpot_s == TIGHT.tpot_s
    engine.end(tight, Status.FINISHED_STOPPED)
    engine.paced.tell()
    assert engine.told[-1].tpot_s == PATIENT.tpot_s
    engine.end(loose, Status.FINISHED_ABORTED)
    engine.paced.tell()
    assert (engine.told[-1].tpot_s, engine.told[-1].slack_s) == (inf, inf)


def test_of_two_with_one_objective_the_other_still_has_it(engine: Engine) -> None:
    first, _ = engine.decode("first", TIGHT), engine.decode("second", TIGHT)
    engine.end(first, Status.FINISHED_STOPPED)
    engine.paced.tell()
    assert engine.told[-1].tpot_s == TIGHT.tpot_s
    engine.add("p", 2000)
    assert names(engine.bound()) == ["p"]


def test_routers_hear_the_slack_as_decodes_stand_then(engine: Engine) -> None:
    engine.decode("d", PATIENT)
    first = engine.told[-1].slack_s
    assert first < 0.0  # what is to be in hand is not there yet
    for _ in range(10):
        engine.step({"d": 1})
    assert 0.0 < engine.told[-1].slack_s < (11 - TOKENS_IN_HAND) * PATIENT.tpot_s


def test_else_they_hear_now_and_then(engine: Engine) -> None:
    engine.decode("d", PATIENT)
    engine.told.clear()
    for _ in range(100):
        engine.step({"d": 1}, 0.001)
    assert 4 <= len(engine.told) <= 5


def test_and_less_often_where_it_takes_long_to_say(
    engine: Engine, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.decode("d", PATIENT)
    said = engine.jobs.pace

    def slowly(batch: Batch, now: float) -> Pace:
        clock.now += 0.001
        return said(batch, now)

    monkeypatch.setattr(engine.jobs, "pace", slowly)
    engine.told.clear()
    for _ in range(1000):
        engine.step({"d": 1}, 0.001)
    assert 4 <= len(engine.told) <= 6


def test_an_objective_that_no_step_could_keep_bounds_nothing_and_is_no_news(engine: Engine) -> None:
    engine.decode("d", Objectives(tpot_s=STEP_S / 2))
    engine.add("p", 2000)
    assert engine.bound() is None
    engine.told.clear()
    for _ in range(100):
        engine.step({"d": 1}, 0.001)
    assert 1 <= len(engine.told) <= 5
    assert engine.told[-1].tpot_s == inf
