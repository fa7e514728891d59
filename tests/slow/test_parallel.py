"""KV pushed between workers of unequal parallelism gives the tokens of one engine: real vLLM, a process per rank.

Each pairing is started once, both of its workers with all their ranks, and serves in both directions. `Oracle` is one
rank: tensor and pipeline parallelism write what it writes with these models in float32, which is tested first.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import pytest

from benchmarks.remote_engine import RemoteEngine
from benchmarks.sensitive_model import make_sensitive_model
from splitserve.core.config import KvTransferSettings, VllmSettings
from splitserve.core.worker import TransferStats
from splitserve.kv.layout import blocks_for, tokens_to_move
from tests.contract.engines import Listener, Run, a_decode, a_prefill, a_prompt, a_ticket, greedy, started
from tests.vllm.conftest import DEMO_MODEL, VOCAB_SIZE
from tests.vllm.oracle import Oracle

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(900)]

Prompt = tuple[int, ...]

MAX_MODEL_LEN = 2048
OUTPUT_TOKENS = 24
LENGTHS = (1, 2, 15, 128, 129, 130, 600, 1000)  # around a block of 128 tokens, and several chunks of 256
DIRECTIONS = ("there", "back")
ONE_RANK = VllmSettings(dtype="float32", max_model_len=MAX_MODEL_LEN, max_num_batched_tokens=256, kv_cache_gib=0.125)
TENSOR = ONE_RANK.model_copy(update={"tensor_parallel_size": 2})
STAGES = ONE_RANK.model_copy(update={"pipeline_parallel_size": 2})


@dataclass(frozen=True, slots=True)
class Setup:
    """Two workers that hand KV to each other, and their model's number of KV heads."""

    one: VllmSettings
    other: VllmSettings
    kv_heads: int = 2


SETUPS = {
    "TP 2 and 1": Setup(TENSOR, ONE_RANK),
    "TP 2 and 2": Setup(TENSOR, TENSOR),
    "PP 2 and 1": Setup(STAGES, ONE_RANK),
    "TP 2 and PP 2": Setup(TENSOR, STAGES),
    "TP 2 and 1, replicated heads": Setup(TENSOR, ONE_RANK, kv_heads=1),
}


@dataclass(frozen=True, slots=True)
class Pairing:
    one: Listener
    other: Listener
    oracle: Oracle

    def towards(self, direction: str) -> tuple[Listener, Listener]:
        """Source and destination."""
        return (self.one, self.other) if direction == "there" else (self.other, self.one)

    def expected(self, prompt: Prompt) -> Prompt:
        return tuple(self.oracle.continue_each([prompt], OUTPUT_TOKENS)[0])

    def wait_at_rest(self) -> None:
        self.one.wait_at_rest()
        self.other.wait_at_rest()


def _start(stack: ExitStack, setup: Setup, model: Path, cores: tuple[int, int]) -> Pairing:
    engines = [
        RemoteEngine(model, settings, KvTransferSettings(), uuid4().hex, core)
        for settings, core in zip((setup.one, setup.other), cores, strict=True)
    ]
    for engine in engines:
        engine.spawn()
    oracle = Oracle(model, MAX_MODEL_LEN, cores[1])
    stack.callback(oracle.close)
    one, other = [stack.enter_context(started(engine)) for engine in engines]
    one.engine.connect(other.info.kv_peers)
    other.engine.connect(one.info.kv_peers)
    return Pairing(one, other, oracle)


@pytest.fixture(scope="module")
def models(sensitive_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """By their number of KV heads."""
    single = make_sensitive_model(DEMO_MODEL, tmp_path_factory.mktemp("one-kv-head"), VOCAB_SIZE, kv_heads=1)
    return {1: single, 2: sensitive_model}


@pytest.fixture(scope="module", params=SETUPS)
def started_pairing(
    request: pytest.FixtureRequest, models: dict[int, Path], cores: tuple[int, int]
) -> Iterator[Pairing]:
    setup = SETUPS[request.param]
    with ExitStack() as stack:
        yield _start(stack, setup, models[setup.kv_heads], cores)


@pytest.fixture
def pairing(started_pairing: Pairing) -> Iterator[Pairing]:
    """After each test all blocks are free on both."""
    yield started_pairing
    started_pairing.wait_at_rest()


def drawn(tokens: int, seed: str) -> Prompt:
    return a_prompt(range(300, VOCAB_SIZE), tokens, seed_of(seed, tokens))


def seed_of(seed: str, tokens: int) -> int:
    return int.from_bytes(f"{seed} {tokens}".encode())


def hand_over(workers: tuple[Listener, Listener], prompt: Prompt, decode_first: bool = True) -> tuple[Run, Run]:
    """The prefill and the decode of a prompt."""
    source, destination = workers
    ticket = a_ticket(source, destination)
    decode = destination.submit(a_decode(prompt, greedy(OUTPUT_TOKENS), ticket)) if decode_first else None
    prefill = source.submit(a_prefill(prompt, ticket))
    if decode is None:
        prefill.wait_news()
        decode = destination.submit(a_decode(prompt, greedy(OUTPUT_TOKENS), ticket))
    return prefill, decode


def moved(prefill: Run) -> TransferStats:
    assert prefill.outcome.failure is None, prefill.outcome
    assert prefill.outcome.transfer is not None
    return prefill.outcome.transfer


def test_several_ranks_write_what_one_does(pairing: Pairing) -> None:
    for worker in (pairing.one, pairing.other):
        for length in LENGTHS:
            prompt = drawn(length, "alone")
            alone = worker.submit(a_decode(prompt, greedy(OUTPUT_TOKENS))).wait()
            assert alone.tokens == pairing.expected(prompt), f"{length} prompt tokens"


@pytest.mark.parametrize("decode_first", [True, False], ids=["decode first", "prefill first"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_kv_pushed_between_unlike_workers_gives_the_tokens_of_one(
    pairing: Pairing, direction: str, decode_first: bool
) -> None:
    workers = pairing.towards(direction)
    for length in LENGTHS:
        prompt = drawn(length, f"{direction} {decode_first}")
        prefill, decode = hand_over(workers, prompt, decode_first)
        assert decode.wait().outcome.failure is None, (length, decode.outcome)
        assert decode.tokens == pairing.expected(prompt), f"{length} prompt tokens"
        moved(prefill)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_what_is_written_is_what_the_destination_holds(pairing: Pairing, direction: str) -> None:
    source, destination = pairing.towards(direction)
    prefill, decode = hand_over((source, destination), drawn(600, f"bytes {direction}"))
    decode.wait()
    kv = destination.info.kv
    blocks = blocks_for(tokens_to_move(600), kv.block_size)
    copies = sum(peer.part.layers * peer.part.heads for peer in destination.info.kv_peers) // kv.kv_heads
    assert moved(prefill).bytes == blocks * copies * kv.block_bytes


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_eight_at_once_are_each_exact(pairing: Pairing, direction: str) -> None:
    prompts = [drawn(40 + 90 * number, f"eight {direction}") for number in range(8)]
    workers = pairing.towards(direction)
    runs = [hand_over(workers, prompt) for prompt in prompts]
    for prompt, (prefill, decode) in zip(prompts, runs, strict=True):
        assert decode.wait().tokens == pairing.expected(prompt)
        moved(prefill)


@pytest.mark.parametrize(
    ("settings", "mistake"), [(TENSOR, "SwappedHeads"), (STAGES, "SwappedStages")], ids=["heads", "stages"]
)
def test_swapped_ranks_are_seen_in_the_tokens(
    settings: VllmSettings, mistake: str, models: dict[int, Path], cores: tuple[int, int]
) -> None:
    """So the tests above would notice it."""
    mistaken = settings.model_copy(update={"extra": {"worker_cls": f"tests.slow.mistaken_worker.{mistake}"}})
    with ExitStack() as stack:
        pairing = _start(stack, Setup(mistaken, ONE_RANK), models[2], cores)
        for length in (15, 600):
            prompt = drawn(length, "mistaken")
            prefill, decode = hand_over(pairing.towards("there"), prompt)
            moved(prefill)
            assert decode.wait().outcome.failure is None
            assert decode.tokens != pairing.expected(prompt)
        pairing.wait_at_rest()
