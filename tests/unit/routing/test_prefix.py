"""What is cached where, as events tell it."""

from collections.abc import Sequence
from itertools import accumulate

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from splitserve.core.cached import CacheEvent, Cleared, Extra, Removed, Stored
from splitserve.routing.prefix import PrefixIndex, chain_of

SIZE = 4  # tokens of a block
PROMPT = tuple(range(100, 141))  # 10 blocks and a token


def hashes_of(blocks: int, seed: int = 0) -> list[int]:
    """What some engine calls them."""
    return [1000 * seed + number for number in range(blocks)]


def stored(tokens: Sequence[int], seed: int = 0, after: int = 0, extras: Sequence[Extra] = ()) -> Stored:
    """The whole blocks of this prompt, but for those before `after`."""
    hashes = hashes_of(len(tokens) // SIZE, seed)
    parent = hashes[after - 1] if after else None
    return Stored(hashes[after:], parent, tokens[after * SIZE : len(hashes) * SIZE], SIZE, extras)


def index(*events: CacheEvent, limit: int = 1000, uuid: str = "a") -> PrefixIndex:
    """Of one worker that said this."""
    found = PrefixIndex(limit)
    found.join(uuid)
    found.apply(uuid, 0, events)
    return found


def cached(found: PrefixIndex, tokens: Sequence[int] = PROMPT, lora: str = "", salt: str = "") -> dict[str, int]:
    return found.cached_tokens(chain_of(tokens, SIZE, lora, salt))


def test_a_prompt_is_found_as_far_as_its_blocks_are_cached() -> None:
    found = index(stored(PROMPT[:20]))
    assert cached(found) == {"a": 20}
    assert cached(found, PROMPT[:13]) == {"a": 12}
    assert cached(found, (7, *PROMPT)) == {}
    assert cached(found, PROMPT[:3]) == {}


def test_the_last_token_of_a_prompt_is_never_cached() -> None:
    found = index(stored(PROMPT[:20]))
    assert cached(found, PROMPT[:20]) == {"a": 16}
    assert cached(found, PROMPT[:4]) == {}
    assert cached(found, ()) == {}


def test_blocks_that_are_stored_one_by_one_make_one_beginning() -> None:
    found = index(stored(PROMPT[:8]), stored(PROMPT[:20], after=2), stored(PROMPT[:24], after=5))
    assert cached(found) == {"a": 24}


def test_each_worker_is_found_with_what_it_has() -> None:
    """Whatever each calls its blocks."""
    found = index(stored(PROMPT[:20]))
    for number, uuid in enumerate(("b", "c", "d"), start=1):
        found.join(uuid)
        found.apply(uuid, 0, [stored(PROMPT[: 8 * number], seed=number % 2)])
    found.apply("d", 1, [Cleared()])
    assert cached(found) == {"a": 20, "b": 8, "c": 16}


def test_a_removed_block_ends_what_is_cached() -> None:
    found = index(stored(PROMPT), Removed([3]))
    assert cached(found) == {"a": 12}
    found.apply("a", 1, [stored(PROMPT[:16], after=3)])
    assert cached(found) == {"a": 40}


def test_a_block_that_is_gone_already_can_be_removed_again() -> None:
    found = index(stored(PROMPT), Removed([3]), Removed([3, 77]))
    assert len(found) == 9


def test_a_worker_that_cleared_its_cache_has_nothing() -> None:
    found = index(stored(PROMPT), Cleared())
    assert cached(found) == {}
    assert len(found) == 0


def test_a_worker_that_left_takes_its_entries_along() -> None:
    found = index(stored(PROMPT))
    found.join("b")
    found.apply("b", 0, [stored(PROMPT[:8])])
    found.leave("a")
    assert cached(found) == {"b": 8}
    assert len(found) == 2
    found.join("c")
    assert cached(found) == {"b": 8}


def test_an_adapter_keys_every_block_and_a_salt_the_first() -> None:
    """As vLLM's events name them."""
    tokens = PROMPT[:12]
    plain, lora, salt = (
        stored(tokens),
        stored(tokens, 1, extras=[("l",)] * 3),
        stored(tokens, 2, extras=[("s",), None, None]),
    )
    both = stored(tokens, 3, extras=[("l", "s"), ("l",), ("l",)])
    for event, keyed in ((plain, ("", "")), (lora, ("l", "")), (salt, ("", "s")), (both, ("l", "s"))):
        found = index(event)
        for asked in (("", ""), ("l", ""), ("", "s"), ("l", "s"), ("m", "s")):
            assert cached(found, PROMPT, *asked) == ({"a": 12} if asked == keyed else {})


def test_workers_with_other_block_sizes_are_asked_for_with_other_chains() -> None:
    found = index(stored(PROMPT[:20]), Stored([90, 91], None, PROMPT[:16], 8))
    assert found.cached_tokens(chain_of(PROMPT, 8)) == {"a": 16}
    assert found.cached_tokens(chain_of(PROMPT, 4)) == {"a": 20}
    assert found.cached_tokens(chain_of(PROMPT, 2)) == {}


def test_what_follows_an_unknown_block_is_left_out() -> None:
    found = index(stored(PROMPT, after=3))
    assert len(found) == 0
    assert cached(found) == {}


def test_an_event_that_leaves_blocks_out_is_left_out() -> None:
    """Those of a sliding window have more tokens than blocks."""
    assert len(index(Stored([1, 2], None, PROMPT[:12], SIZE))) == 0


def test_a_hash_that_names_another_block_now_names_the_old_one_no_more() -> None:
    other = tuple(range(200, 220))
    found = index(stored(PROMPT[:20]), stored(other))
    assert cached(found, (*other, 1)) == {"a": 20}
    assert cached(found) == {}
    assert len(found) == 5


def test_a_block_with_a_new_hash_is_removed_by_that() -> None:
    found = index(stored(PROMPT[:20]), stored(PROMPT[:20], seed=1), Removed([0]))
    assert cached(found) == {"a": 20}
    found.apply("a", 1, [Removed([1000])])
    assert cached(found) == {}
    assert len(found) == 4


# Numbers --------------------------------------------------------------------------------------------------------------
def test_nothing_is_believed_after_a_gap_until_what_is_missing_came() -> None:
    found = index(stored(PROMPT[:8]))
    later = [stored(PROMPT[:20], after=2)]
    assert found.apply("a", 3, later) == range(1, 3)
    assert cached(found) == {"a": 8}
    assert not found.apply("a", 1, [])
    assert not found.apply("a", 2, [Removed([1])])
    assert not found.apply("a", 3, later)
    assert cached(found) == {"a": 4}


def test_without_what_is_missing_a_worker_starts_from_nothing() -> None:
    found = index(stored(PROMPT[:8]))
    assert found.apply("a", 9, [])
    found.restart("a", 9)
    assert cached(found) == {}
    assert not found.apply("a", 9, [stored(PROMPT[:20])])
    assert cached(found) == {"a": 20}


def test_a_batch_that_comes_twice_counts_once() -> None:
    found = index(stored(PROMPT[:8]))
    found.apply("a", 1, [Removed([1])])
    assert not found.apply("a", 0, [stored(PROMPT[:8])])
    assert cached(found) == {"a": 4}


def test_who_joins_later_misses_what_came_before() -> None:
    found = PrefixIndex(10)
    found.join("a")
    assert found.apply("a", 5, []) == range(5)


def test_a_worker_that_has_not_joined_is_our_mistake() -> None:
    with pytest.raises(KeyError):
        PrefixIndex(10).apply("a", 0, [])


# Memory ---------------------------------------------------------------------------------------------------------------
def test_no_more_blocks_are_kept_than_the_limit() -> None:
    found = index(stored(PROMPT), limit=6)
    assert len(found) == 6
    assert cached(found) == {"a": 24}


def test_what_was_named_last_is_kept() -> None:
    """By a prompt, too: the beginning of most prompts is stored once and then only asked for."""
    found = index(stored(PROMPT[:16]), limit=10)
    for number in range(1, 6):
        assert cached(found) == {"a": 16}
        other = tuple(range(1000 * number, 1000 * number + 16))
        found.apply("a", number, [Stored(hashes_of(4, number), None, other, SIZE)])
    assert cached(found) == {"a": 16}
    assert len(found) == 10


def test_a_block_of_several_workers_counts_for_each() -> None:
    found = index(stored(PROMPT[:16]), limit=8)
    for uuid in ("b", "c"):
        found.join(uuid)
        found.apply(uuid, 0, [stored(PROMPT[:16])])
    assert len(found) == 6
    assert cached(found) == {"a": 8, "b": 8, "c": 8}


# Against a model of the workers' caches ------------------------------------------------------------------------------
Block = tuple[tuple[int, ...], Extra]
UUIDS = st.sampled_from("abc")
TOKENS = st.lists(st.integers(0, 1), max_size=14).map(tuple)  # so few that prompts begin alike
KEYED = st.sampled_from([("", ""), ("l", ""), ("", "s")])


def blocks_of(tokens: Sequence[int], lora: str, salt: str) -> list[Block]:
    starts = range(0, len(tokens) // 2 * 2, 2)
    found = [
        (tuple(tokens[at : at + 2]), ((lora,) if lora else ()) + ((salt,) if salt and not at else ())) for at in starts
    ]
    return [(block, extra or None) for block, extra in found]


class Caches(RuleBasedStateMachine):
    """`has`: the beginnings that each worker has cached, all of which it has told; a beginning is named by itself.
    `lost`: batches that did not come."""

    limit = 10**6

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex(self.limit)
        self.has: dict[str, set[tuple[Block, ...]]] = {}
        self.sent: dict[str, list[list[CacheEvent]]] = {}
        self.lost: dict[str, int] = {}

    @rule(uuid=UUIDS)
    def join_or_leave(self, uuid: str) -> None:
        if uuid in self.has:
            self.index.leave(uuid)
            del self.has[uuid]
        else:
            self.index.join(uuid)
            self.has[uuid], self.sent[uuid], self.lost[uuid] = set(), [], 0

    @precondition(lambda self: self.has)
    @rule(data=st.data(), tokens=TOKENS, keyed=KEYED, skip=st.integers(0, 3), lost=st.booleans())
    def store(
        self, data: st.DataObject, tokens: tuple[int, ...], keyed: tuple[str, str], skip: int, lost: bool
    ) -> None:
        uuid = self._someone(data)
        beginnings = list(accumulate((block,) for block in blocks_of(tokens, *keyed)))
        skip = max(n for n in range(min(skip, len(beginnings)) + 1) if not n or beginnings[n - 1] in self.has[uuid])
        parent = hash(beginnings[skip - 1]) if skip else None
        added = beginnings[skip:]
        self.has[uuid] |= set(added)
        extras = [beginning[-1][1] for beginning in added]
        event = Stored([hash(each) for each in added], parent, tokens[2 * skip : 2 * len(beginnings)], 2, extras)
        self._tell(uuid, event, lost)

    @precondition(lambda self: any(self.has.values()))
    @rule(data=st.data(), lost=st.booleans())
    def remove(self, data: st.DataObject, lost: bool) -> None:
        uuid = data.draw(st.sampled_from(sorted(uuid for uuid in self.has if self.has[uuid])))
        gone = data.draw(st.lists(st.sampled_from(sorted(self.has[uuid], key=str)), unique=True, max_size=3))
        self.has[uuid] -= set(gone)
        self._tell(uuid, Removed([hash(each) for each in gone]), lost)

    @precondition(lambda self: self.has)
    @rule(data=st.data(), lost=st.booleans())
    def clear(self, data: st.DataObject, lost: bool) -> None:
        uuid = self._someone(data)
        self.has[uuid].clear()
        self._tell(uuid, Cleared(), lost)

    @precondition(lambda self: self.has)
    @rule(data=st.data())
    def restart(self, data: st.DataObject) -> None:
        """Nothing can be sent again."""
        uuid = self._someone(data)
        self.index.restart(uuid, len(self.sent[uuid]))
        self.has[uuid].clear()
        self.lost[uuid] = 0

    @rule(tokens=TOKENS, keyed=KEYED)
    def ask(self, tokens: tuple[int, ...], keyed: tuple[str, str]) -> None:
        found = self.index.cached_tokens(chain_of(tokens, 2, *keyed))
        beginnings = list(accumulate((block,) for block in blocks_of(tokens[: max(0, len(tokens) - 1)], *keyed)))
        for uuid, has in self.has.items():
            missing = (n for n, beginning in enumerate(beginnings) if beginning not in has)
            self.check(found.pop(uuid, 0), 2 * next(missing, len(beginnings)))
        assert not found

    def check(self, found: int, cached: int) -> None:
        assert found == cached

    @invariant()
    def memory_is_bounded(self) -> None:
        assert len(self.index) <= min(self.limit, sum(map(len, self.has.values())))

    def _someone(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(sorted(self.has)))

    def _tell(self, uuid: str, event: CacheEvent, lost: bool) -> None:
        """What is lost is sent again before the next check, if somebody notices."""
        batches = self.sent[uuid]
        batches.append([event])
        if lost:
            batches.append([])
        first = len(batches) - 1
        missing = self.index.apply(uuid, first, batches[first])
        assert missing == (range(first - 1, first) if lost else range(0))
        for number in missing:
            assert not self.index.apply(uuid, number, batches[number])
        assert not self.index.apply(uuid, first, batches[first])


class FewBlocks(Caches):
    """With less memory it knows of less, and never of what isn't there."""

    limit = 5

    def check(self, found: int, cached: int) -> None:
        assert found <= cached


TestCaches = Caches.TestCase
TestFewBlocks = FewBlocks.TestCase
TestCaches.settings = TestFewBlocks.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
