from splitserve.engine.sim.memory import BlockPool
from splitserve.engine.sim.schedule import Plan, Schedule, Sequence

BLOCK = 4


def schedule(blocks: int = 20, sequences: int = 4, batched: int = 16) -> Schedule:
    return Schedule(BlockPool(blocks), BLOCK, sequences, batched)


def sequence(name: str, tokens: int, order: int = 0, priority: int = 0, waits: bool = False) -> Sequence:
    return Sequence(name, [7] * tokens, (priority, order), waits)


def planned(plan: Plan) -> list[tuple[str, int]]:
    return [(chunk.sequence.job_id, chunk.tokens) for chunk in plan.chunks]


def step(of: Schedule, makes_tokens: bool = True, prompt_tokens: int | None = None) -> Plan:
    """Plans and computes one step; sequences that are through make a token."""
    plan = of.plan(prompt_tokens)
    for chunk in plan.chunks:
        of.commit(chunk)
        if makes_tokens and chunk.sequence.left == 0:
            chunk.sequence.tokens.append(9)
    return plan


def test_a_long_prompt_is_computed_in_chunks_of_the_steps_budget() -> None:
    of = schedule(batched=16)
    of.add(sequence("long", 40))
    assert [planned(step(of)) for _ in range(4)] == [[("long", 16)], [("long", 16)], [("long", 8)], [("long", 1)]]


def test_running_sequences_come_before_waiting_ones() -> None:
    of = schedule(batched=16)
    of.add(sequence("a", 16, order=1))
    step(of)
    of.add(sequence("b", 30, order=2))
    assert planned(step(of)) == [("a", 1), ("b", 15)]


def test_a_lower_priority_number_and_an_earlier_arrival_start_first() -> None:
    of = schedule(batched=8)
    for job in (
        sequence("late", 8, order=2),
        sequence("early", 8, order=1),
        sequence("urgent", 8, order=3, priority=-1),
    ):
        of.add(job)
    assert [planned(of.plan())[0][0] for _ in range(1)] == ["urgent"]


def test_no_more_sequences_run_than_fit_a_step() -> None:
    of = schedule(sequences=2)
    for order in range(3):
        of.add(sequence(str(order), 2, order=order))
    assert planned(step(of)) == [("0", 2), ("1", 2)]


def test_a_sequence_that_waits_for_kv_gets_all_its_blocks_and_computes_nothing() -> None:
    of = schedule(blocks=10)
    parked = sequence("parked", 30, waits=True)
    of.add(parked)
    plan = of.plan()
    assert (plan.parked, plan.chunks, of.pool.free) == ([parked], [], 2)


def test_once_its_kv_is_there_a_sequence_computes_its_last_token_alone() -> None:
    of = schedule()
    parked = sequence("parked", 6, waits=True)
    of.add(parked)
    of.plan()
    parked.received()
    of.add(parked)
    plan = of.plan()
    assert planned(plan) == [("parked", 1)]
    assert plan.chunks[0].decodes
    assert (parked.computed, plan.chunks[0].end) == (5, 6)


def test_the_queue_stops_at_the_first_that_does_not_fit() -> None:
    of = schedule(blocks=4, batched=100)
    of.add(sequence("large", 20, order=1))
    of.add(sequence("small", 1, order=2))
    assert of.plan() == Plan()


def received(of: Schedule, name: str, tokens: int, order: int) -> Sequence:
    """One whose KV has come, and which waits for its turn."""
    parked = sequence(name, tokens, order, waits=True)
    of.add(parked)
    of.plan(0)
    of.remove(parked)
    parked.received()
    of.add(parked)
    return parked


def test_prompts_together_get_at_most_what_they_may_and_the_first_comes_first() -> None:
    of = schedule(batched=16)
    of.add(sequence("a", 6, order=1))
    of.add(sequence("b", 20, order=2))
    assert planned(step(of, prompt_tokens=10)) == [("a", 6), ("b", 4)]
    assert planned(step(of, prompt_tokens=10)) == [("a", 1), ("b", 10)]


def test_a_decode_gets_its_token_whatever_prompts_may_have() -> None:
    of = schedule(batched=16)
    of.add(sequence("decode", 4, order=1))
    step(of)
    of.add(sequence("prompt", 40, order=2))
    assert planned(step(of, prompt_tokens=15)) == [("decode", 1), ("prompt", 15)]
    assert planned(step(of, prompt_tokens=0)) == [("decode", 1)]
    assert planned(step(of, prompt_tokens=3)) == [("decode", 1), ("prompt", 3)]


def test_a_prompt_before_a_decode_in_the_order_takes_none_of_its_tokens() -> None:
    of = schedule(batched=16)
    of.add(sequence("decode", 4, order=1))
    step(of)
    of.add(sequence("urgent", 40, order=2, priority=-1))
    assert sorted(planned(step(of, prompt_tokens=16 - len(of.decodes)))) == [("decode", 1), ("urgent", 15)]
    assert planned(step(of, prompt_tokens=16 - len(of.decodes))) == [("urgent", 15), ("decode", 1)]


def test_a_prompt_that_gets_nothing_now_holds_up_none_that_has_its_kv_or_awaits_it() -> None:
    of = schedule(batched=16, blocks=20)
    of.add(sequence("prompt", 10, order=1))
    ready = received(of, "ready", 6, order=2)
    parked = sequence("parked", 5, order=3, waits=True)
    of.add(parked)
    assert of.decodes == [ready]
    plan = step(of, prompt_tokens=0)
    assert (planned(plan), plan.parked) == ([("ready", 1)], [parked])
    assert planned(step(of, prompt_tokens=8)) == [("ready", 1), ("prompt", 8)]


def test_prompts_that_wait_for_time_keep_their_order() -> None:
    of = schedule(batched=16)
    for job in (sequence("late", 8, order=2), sequence("early", 8, order=1), sequence("urgent", 8, 3, priority=-1)):
        of.add(job)
    assert planned(step(of, prompt_tokens=0)) == []
    assert planned(step(of, prompt_tokens=8)) == [("urgent", 8)]
    assert planned(step(of, prompt_tokens=12)) == [("urgent", 1), ("early", 8), ("late", 4)]


def test_the_queue_stops_at_what_finds_no_block_though_prompts_are_bounded() -> None:
    of = schedule(blocks=4, batched=100)
    of.add(sequence("large", 20, order=1))
    of.add(sequence("small", 1, order=2))
    assert of.plan(20) == Plan()


def test_the_prompt_that_is_read_next_is_the_first_that_waits_for_no_kv() -> None:
    of = schedule()
    of.add(sequence("parked", 6, order=0, waits=True))
    of.add(second := sequence("second", 8, order=2))
    of.add(first := sequence("first", 8, order=1))
    assert of.prompt is first
    step(of, prompt_tokens=12)
    assert of.prompt is second
    step(of)
    assert of.prompt is None


def test_out_of_blocks_the_last_sequence_is_preempted_and_starts_anew() -> None:
    of = schedule(blocks=4)
    first, last = sequence("first", 8, order=1), sequence("last", 8, order=2)
    of.add(first)
    of.add(last)
    step(of)
    plan = step(of)
    assert (plan.preempted, planned(plan)) == ([last], [("first", 1)])
    assert (last.table, last.computed, of.preemptions) == ([], 0, 1)
    of.remove(first)
    of.release(first)
    assert planned(step(of)) == [("last", 9)], "with the token that it had made"


def test_a_sequence_alone_that_finds_no_block_preempts_itself() -> None:
    of = schedule(blocks=3)
    of.add(sequence("parked", 4, order=1, waits=True))
    growing = sequence("growing", 8, order=2)
    of.add(growing)
    step(of)
    assert step(of).preempted == [growing]
    assert of.pool.free == 2


def test_removed_sequences_keep_their_blocks_until_released() -> None:
    of = schedule(blocks=5)
    job = sequence("job", 8)
    of.add(job)
    step(of)
    of.remove(job)
    assert of.pool.free == 3
    of.release(job)
    assert of.pool.free == 5
