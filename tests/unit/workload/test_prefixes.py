import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitserve.core.errors import ConfigError
from splitserve.workload.prefixes import Sharing, chosen, offsets_of, repeated_share
from splitserve.workload.requests import Prefixes

PROMPTS = np.random.default_rng(0).integers(100, 3000, 5000)


def drawn(sharing: Sharing) -> Prefixes:
    return sharing.draw(PROMPTS, np.random.default_rng(1))


def csr(*runs: list[int], block_tokens: int = 10) -> Prefixes:
    ids = np.array([block for run in runs for block in run], dtype=np.int64)
    return Prefixes(ids, offsets_of(np.array([len(run) for run in runs])), block_tokens)


def hits(prefixes: Prefixes, prompts: list[int]) -> int:
    """By the definition: leading blocks that any earlier prompt had, with a set."""
    seen: set[int] = set()
    total = 0
    for request, prompt in enumerate(prompts):
        run = prefixes.of(request).tolist()
        leading = next((at for at, block in enumerate(run) if block not in seen), len(run))
        total += min(leading * prefixes.block_tokens, prompt - 1)
        seen.update(run)
    return total


def test_the_share_asked_for_is_what_prompts_share() -> None:
    prefixes = drawn(Sharing(0.4, groups=4))
    assert len(prefixes.ids) * 16 / PROMPTS.sum() == pytest.approx(0.4, abs=0.005)
    assert repeated_share(prefixes, PROMPTS) == pytest.approx(0.4, abs=0.01)


def test_prompts_of_a_group_begin_alike_and_of_two_groups_never() -> None:
    prefixes = drawn(Sharing(0.5, groups=3))
    for a in range(40):
        for b in range(40):
            first, second = prefixes.of(a), prefixes.of(b)
            shorter = min(len(first), len(second))
            same = first[:shorter] == second[:shorter]
            assert same.all() or not same.any()
    assert len({int(prefixes.of(request)[0]) for request in range(len(PROMPTS))}) == 3


def test_a_session_ends_after_its_turns_and_another_begins() -> None:
    prefixes = drawn(Sharing(0.5, groups=8, turns=5))
    members = np.unique([int(prefixes.of(request)[0]) for request in range(len(PROMPTS))], return_counts=True)[1]
    assert members.max() == 5
    assert (members < 5).sum() <= 8  # those that go on
    assert repeated_share(prefixes, PROMPTS) < 0.5 * 4 / 5


def test_one_turn_shares_nothing() -> None:
    assert repeated_share(drawn(Sharing(0.5, turns=1)), PROMPTS) == 0.0


def test_a_prefix_is_never_longer_than_its_prompt() -> None:
    prefixes = drawn(Sharing(1.0, block_tokens=64))
    assert np.all(np.diff(prefixes.offsets) * 64 <= PROMPTS)


def test_chosen_prompts_keep_their_blocks_in_the_order_chosen() -> None:
    prefixes = csr([1, 2], [], [3], [1, 4, 5])
    picked = chosen(prefixes, np.array([3, 0, 3, 1]))
    assert [picked.of(request).tolist() for request in range(4)] == [[1, 4, 5], [1, 2], [1, 4, 5], []]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 6), max_size=5, unique=True), min_size=1, max_size=12))
def test_the_share_repeated_is_what_a_cache_without_bound_would_hit(runs: list[list[int]]) -> None:
    prompts = [len(run) * 10 + 3 for run in runs]
    prefixes = csr(*runs)
    assert repeated_share(prefixes, np.array(prompts)) == pytest.approx(hits(prefixes, prompts) / sum(prompts))


def test_a_prompts_last_token_is_never_a_hit() -> None:
    assert repeated_share(csr([1], [1]), np.array([10, 10])) == pytest.approx(9 / 20)


def test_nothing_shared_is_no_hit() -> None:
    assert repeated_share(csr([], []), np.array([10, 10])) == 0.0
    assert repeated_share(csr(), np.array([], dtype=np.int64)) == 0.0


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Sharing(1.5), "shared: 1.5 is not a share"),
        (lambda: Sharing(-0.1), "shared: -0.1"),
        (lambda: Sharing(0.5, groups=0), "groups: 0"),
        (lambda: Sharing(0.5, turns=0), "turns: 0"),
        (lambda: Sharing(0.5, block_tokens=-16), "block: -16"),
    ],
)
def test_sharing_that_cannot_be_is_an_error(make: object, sentence: str) -> None:
    assert callable(make)
    with pytest.raises(ConfigError, match=sentence):
        make()
