"""KV pushed between workers of unequal parallelism gives the tokens of one engine: real vLLM, a process per rank.

Each pair is started once, both of its workers with all their ranks, and serves in both directions. The oracle has one
rank: tensor and pipeline parallelism write what it writes with these models in float32, which is tested first.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from benchmarks.sensitive_model import make_mla_model, make_sensitive_model, make_sliding_window_model
from splitserve.core.config import VllmSettings
from tests.vllm.conftest import DEMO_MODEL, VOCAB_SIZE
from tests.vllm.pairs import MLA_ON_CPU, SETTINGS, Pair, drawn, finished, start_pair

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(900)]

Make = Callable[[Path, Path, int], Path]

LENGTHS = (1, 2, 15, 128, 129, 130, 600, 895, 1000)  # around a block of 128 tokens, and several chunks of 256
ONE_RANK = SETTINGS
TENSOR = SETTINGS.model_copy(update={"tensor_parallel_size": 2})
STAGES = SETTINGS.model_copy(update={"pipeline_parallel_size": 2})


def make_single_kv_head(tokenizer_of: Path, out: Path, vocab_size: int) -> Path:
    return make_sensitive_model(tokenizer_of, out, vocab_size, kv_heads=1)


@dataclass(frozen=True, slots=True)
class Setup:
    """Two workers that hand KV to each other, and their model."""

    one: VllmSettings
    other: VllmSettings
    make: Make = make_sensitive_model
    extra: Mapping[str, Any] = field(default_factory=dict)  # EngineArgs


SETUPS = {
    "TP 2 and 1": Setup(TENSOR, ONE_RANK),
    "TP 2 and 2": Setup(TENSOR, TENSOR),
    "PP 2 and 1": Setup(STAGES, ONE_RANK),
    "TP 2 and PP 2": Setup(TENSOR, STAGES),
    "TP 2 and 1, replicated heads": Setup(TENSOR, ONE_RANK, make_single_kv_head),
    "TP 2 and 1, MLA": Setup(TENSOR, ONE_RANK, make_mla_model, MLA_ON_CPU),
    "PP 2 and TP 2, sliding windows": Setup(STAGES, TENSOR, make_sliding_window_model),
}


@pytest.fixture(scope="module", params=SETUPS)
def started_pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, cores: tuple[int, int]
) -> Iterator[Pair]:
    setup = SETUPS[request.param]
    model = setup.make(DEMO_MODEL, tmp_path_factory.mktemp("model"), VOCAB_SIZE)
    with ExitStack() as stack:
        yield start_pair(stack, model, cores, (setup.one, setup.other), setup.extra)


@pytest.fixture(params=["there", "back"])
def pair(request: pytest.FixtureRequest, started_pair: Pair) -> Iterator[Pair]:
    """After each test all blocks are free on both."""
    yield started_pair if request.param == "there" else started_pair.turned
    started_pair.wait_at_rest()


def test_several_ranks_write_what_one_does(pair: Pair) -> None:
    for length in LENGTHS:
        prompt = drawn(length, f"alone {pair.direction}")
        assert pair.alone(pair.source, prompt) == pair.expected(prompt), f"{length} prompt tokens"


@pytest.mark.parametrize("decode_first", [True, False], ids=["decode first", "prefill first"])
def test_kv_pushed_between_unlike_workers_gives_the_tokens_of_one(pair: Pair, decode_first: bool) -> None:
    for length in LENGTHS:
        prompt = drawn(length, f"{pair.direction} {decode_first}")
        written, stats = pair.hand_over(prompt, decode_first)
        assert written == pair.expected(prompt), f"{length} prompt tokens"
        assert stats.bytes == pair.kept_bytes(length), f"{length} prompt tokens"


def test_eight_at_once_are_each_exact(pair: Pair) -> None:
    prompts = [drawn(40 + 90 * number, f"eight {pair.direction}") for number in range(8)]
    runs = [pair.start(prompt) for prompt in prompts]
    for prompt, (prefill, decode) in zip(prompts, runs, strict=True):
        written, _ = finished(prefill, decode)
        assert written == pair.expected(prompt), f"{len(prompt)} prompt tokens"


@pytest.mark.parametrize(
    ("settings", "mistake"), [(TENSOR, "SwappedHeads"), (STAGES, "SwappedStages")], ids=["heads", "stages"]
)
def test_swapped_ranks_are_seen_in_the_tokens(
    settings: VllmSettings, mistake: str, sensitive_model: Path, cores: tuple[int, int]
) -> None:
    """So the tests above would notice it."""
    mistaken = settings.model_copy(update={"extra": {"worker_cls": f"tests.slow.mistaken_worker.{mistake}"}})
    with ExitStack() as stack:
        pair = start_pair(stack, sensitive_model, cores, (mistaken, ONE_RANK))
        for length in (15, 600):
            prompt = drawn(length, "mistaken")
            written, _ = pair.hand_over(prompt)
            assert written != pair.expected(prompt)
        pair.wait_at_rest()
