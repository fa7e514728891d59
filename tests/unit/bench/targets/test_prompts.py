import numpy as np

from splitserve.bench.targets.prompts import prompt_ids
from splitserve.workload.prefixes import offsets_of
from splitserve.workload.requests import Prefixes, Requests

REQUESTS = Requests(
    arrival_s=np.array([0.0, 1.0, 2.0]),
    prompt_tokens=np.array([70, 50, 40]),
    output_tokens=np.array([4, 5, 6]),
    prefixes=Prefixes(np.array([7, 8, 9, 7, 8, 5]), offsets_of(np.array([3, 2, 1])), 16),
)


def test_prompts_share_the_blocks_that_the_workload_says_and_no_more() -> None:
    first, second, third = (prompt_ids(REQUESTS, index, vocabulary=50_000) for index in range(3))
    assert np.array_equal(first[:32], second[:32])
    assert (first[32:48] != second[32:48]).any()
    assert (first[:16] != third[:16]).any()
    assert (first[48:64] != first[:16]).any()


def test_the_same_seed_makes_the_same_prompts_and_another_does_not() -> None:
    assert np.array_equal(prompt_ids(REQUESTS, 0, 50_000, seed=1), prompt_ids(REQUESTS, 0, 50_000, seed=1))
    assert not np.array_equal(prompt_ids(REQUESTS, 0, 50_000, seed=1), prompt_ids(REQUESTS, 0, 50_000, seed=2))


def test_ids_are_of_the_vocabulary() -> None:
    ids = np.concatenate([prompt_ids(REQUESTS, index, vocabulary=5) for index in range(3)])
    assert set(ids.tolist()) == {0, 1, 2, 3, 4}


def test_without_prefixes_prompts_differ_from_their_first_block_on() -> None:
    plain = Requests(REQUESTS.arrival_s, REQUESTS.prompt_tokens, REQUESTS.output_tokens)
    assert (prompt_ids(plain, 0, 50_000)[:16] != prompt_ids(plain, 1, 50_000)[:16]).any()
