"""Tokens of a prefill worker's KV pushed to a decode worker equal those of one colocated engine, on real vLLM."""

import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.remote_engine import Collector, RemoteEngine
from splitserve.core.config import KvTransferSettings, VllmSettings
from splitserve.core.request import SamplingParams
from splitserve.core.worker import DecodeJob, Failure, KvPeer, Outcome, PrefillJob, Ticket
from splitserve.engine.protocol import EngineInfo, EngineLoad
from splitserve.kv.layout import Shard, blocks_for, part_of, tokens_to_move
from splitserve.kv.nixl import NixlTransport
from splitserve.kv.transfer import Offer, TransferKey, TransferService
from splitserve.kv.transport import Region
from tests.vllm.conftest import VOCAB_SIZE
from tests.vllm.oracle import Oracle

pytestmark = pytest.mark.vllm

MAX_MODEL_LEN = 8192
OUTPUT_TOKENS = 16
LENGTHS = (1, 15, 127, 128, 129, 1000, 4000)
ORDERS = ("decode first", "race", "prefill first")
DEADLINE_S = 120.0
GREEDY = SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0.0, ignore_eos=True)


@dataclass
class Worker:
    engine: RemoteEngine
    deltas: Collector
    info: EngineInfo

    @property
    def all_free(self) -> bool:
        return self.engine.load() == EngineLoad(self.info.total_blocks, 0, 0)

    @property
    def peers(self) -> tuple[KvPeer, ...]:
        return self.info.kv_peers


@dataclass
class Bench:
    """Two prefill workers with chunks of 128 and 256 tokens, a decode worker, and plain vLLM."""

    prefill: dict[int, Worker]
    decode: Worker
    oracle: Oracle

    @property
    def workers(self) -> list[Worker]:
        return [*self.prefill.values(), self.decode]

    def ticket(self, name: str, chunk: int) -> Ticket:
        return Ticket(name, 1, self.prefill[chunk].peers, self.decode.peers)

    def start_prefill(self, name: str, prompt: tuple[int, ...], chunk: int) -> None:
        job = PrefillJob(f"{name}/prefill", name, prompt, self.ticket(name, chunk), DEADLINE_S)
        self.prefill[chunk].engine.submit(job)

    def start_decode(self, name: str, prompt: tuple[int, ...], chunk: int) -> None:
        ticket = self.ticket(name, chunk)
        self.decode.engine.submit(DecodeJob(f"{name}/decode", name, prompt, GREEDY, DEADLINE_S, ticket=ticket))

    def start(self, name: str, prompt: tuple[int, ...], chunk: int, order: str) -> None:
        if order == "prefill first":
            self.start_prefill(name, prompt, chunk)
            self.prefill[chunk].deltas.wait_for_sign(f"{name}/prefill")
            self.start_decode(name, prompt, chunk)
            return
        self.start_decode(name, prompt, chunk)
        if order == "decode first":
            self.decode.engine.load()  # an answer means that the decode engine has taken the job
        self.start_prefill(name, prompt, chunk)

    def tokens(self, name: str) -> list[int]:
        outcome = self.decode.deltas.outcome(f"{name}/decode")
        assert outcome.failure is None, outcome.message
        return self.decode.deltas.tokens(f"{name}/decode")

    def prefill_outcome(self, name: str, chunk: int) -> Outcome:
        return self.prefill[chunk].deltas.outcome(f"{name}/prefill")


@pytest.fixture(scope="module")
def bench(sensitive_model: Path, cores: tuple[int, int]) -> Iterator[Bench]:
    oracle = Oracle(sensitive_model, MAX_MODEL_LEN, cores[1])
    chunks = {"prefill-128": 128, "prefill-256": 256, "decode": 2048}
    engines = {name: _engine(sensitive_model, name, chunk, cores) for name, chunk in chunks.items()}
    for engine in engines.values():
        engine.spawn()
    workers = {name: _started(engine) for name, engine in engines.items()}
    for worker in workers.values():
        worker.engine.connect([peer for other in workers.values() if other is not worker for peer in other.peers])
    yield Bench({128: workers["prefill-128"], 256: workers["prefill-256"]}, workers["decode"], oracle)
    for worker in workers.values():
        worker.engine.close()
    oracle.close()


@pytest.fixture(autouse=True)
def no_block_is_lost(bench: Bench) -> Iterator[None]:
    yield
    deadline = time.monotonic() + 20
    while not all(worker.all_free for worker in bench.workers):
        assert time.monotonic() < deadline, [worker.engine.load() for worker in bench.workers]
        threading.Event().wait(0.02)


def _engine(model: Path, name: str, chunk: int, cores: tuple[int, int]) -> RemoteEngine:
    settings = VllmSettings(
        dtype="float32", max_model_len=MAX_MODEL_LEN, max_num_batched_tokens=chunk, kv_cache_gib=0.25
    )
    return RemoteEngine(model, settings, KvTransferSettings(), f"uuid-{name}", cores[name == "decode"])


def _started(engine: RemoteEngine) -> Worker:
    deltas = Collector()
    info = engine.start(deltas)
    return Worker(engine, deltas, info)


def _prompt(seed: str, length: int) -> tuple[int, ...]:
    chooser = random.Random(seed)
    return tuple(chooser.randrange(300, VOCAB_SIZE) for _ in range(length))


@pytest.mark.parametrize("chunk", [128, 256])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("length", LENGTHS)
def test_pushed_kv_gives_the_tokens_of_one_engine(bench: Bench, length: int, order: str, chunk: int) -> None:
    name = f"{length}-{order}-{chunk}"
    prompt = _prompt(name, length)
    bench.start(name, prompt, chunk, order)
    assert [bench.tokens(name)] == bench.oracle.continue_each([prompt], OUTPUT_TOKENS)
    stats = bench.prefill_outcome(name, chunk).transfer
    kv = bench.decode.info.kv
    assert stats is not None
    assert stats.bytes == blocks_for(tokens_to_move(length), kv.block_size) * kv.layers * kv.block_bytes


@pytest.mark.parametrize("order", ORDERS)
def test_prompts_that_share_a_prefix_stay_exact_when_either_side_has_it_cached(bench: Bench, order: str) -> None:
    prefix = _prompt(f"prefix-{order}", 500)
    names = [f"shared-{order}-{number}" for number in range(4)]
    prompts = [prefix + _prompt(name, 30 + 70 * number) for number, name in enumerate(names)]
    tokens = []
    for name, prompt in zip(names, prompts, strict=True):
        bench.start(name, prompt, 128, order)
        tokens.append(bench.tokens(name))
        assert bench.prefill_outcome(name, 128).failure is None
    assert tokens == bench.oracle.continue_each(prompts, OUTPUT_TOKENS)


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "seed": 11},
        {"temperature": 1.0, "seed": -5},
        {"presence_penalty": 1.0, "frequency_penalty": 1.5, "repetition_penalty": 1.2},
        {"temperature": 0.8, "min_p": 0.01, "seed": 12, "presence_penalty": -1.5, "frequency_penalty": -2.0},
    ],
    ids=["filtered draws", "draws", "penalties", "both"],
)
def test_a_sampler_begun_elsewhere_goes_on_as_plain_vllms(bench: Bench, sampling: dict[str, float]) -> None:
    prompt = _prompt("sampler", 3 * 128 - 5)
    whole = bench.oracle.continue_each([prompt], OUTPUT_TOKENS, **sampling)[0]
    for sent in (0, 1, 5, 6, OUTPUT_TOKENS - 1):
        name = f"sampler-{sent}-{sampling}"
        params = replace(GREEDY, **sampling)  # type: ignore[arg-type]
        job = DecodeJob(f"{name}/decode", name, prompt, params, DEADLINE_S, output=tuple(whole[:sent]))
        bench.decode.engine.submit(job)
        assert whole[:sent] + bench.tokens(name) == whole


def test_sixteen_at_once_stay_exact(bench: Bench) -> None:
    names = [f"concurrent-{number}" for number in range(16)]
    prompts = [_prompt(name, 40 + 61 * number) for number, name in enumerate(names)]
    for number, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
        bench.start(name, prompt, (128, 256)[number % 2], ("decode first", "race")[number // 2 % 2])
    tokens = [bench.tokens(name) for name in names]
    for number, name in enumerate(names):
        assert bench.prefill_outcome(name, (128, 256)[number % 2]).failure is None
    assert tokens == bench.oracle.continue_each(prompts, OUTPUT_TOKENS)


def test_a_ticket_of_another_prompt_is_refused(bench: Bench) -> None:
    bench.start_prefill("mixed-up", _prompt("one", 300), 128)
    bench.start_decode("mixed-up", _prompt("other", 300), 128)
    outcome = bench.decode.deltas.outcome("mixed-up/decode")
    assert outcome.failure is Failure.TRANSFER
    assert "prompt" in outcome.message
    assert bench.prefill_outcome("mixed-up", 128).failure is Failure.TRANSFER


def test_a_consumed_ticket_serves_no_second_request(bench: Bench) -> None:
    prompt = _prompt("consumed", 300)
    bench.start("consumed", prompt, 128, "decode first")
    first = bench.tokens("consumed")
    job = DecodeJob("again/decode", "again", _prompt("again", 300), GREEDY, 3.0, ticket=bench.ticket("consumed", 128))
    bench.decode.engine.submit(job)
    outcome = bench.decode.deltas.outcome("again/decode")
    assert outcome.failure is Failure.TRANSFER
    assert [first] == bench.oracle.continue_each([prompt], OUTPUT_TOKENS)


def test_foreign_kv_gives_other_tokens_so_the_tests_above_can_fail(bench: Bench) -> None:
    """The negative twin: a source that follows the protocol and writes random bytes."""
    kv, prompt = bench.decode.info.kv, _prompt("foreign", 300)
    blocks = blocks_for(len(prompt), kv.block_size)
    memory = np.random.default_rng(0).standard_normal((kv.layers, blocks, kv.block_bytes // 4)).astype(np.float32)
    regions = [Region(layer.ctypes.data, kv.block_bytes, kv.block_bytes, blocks) for layer in memory]
    service = TransferService(
        uuid="uuid-forger",
        transport_factory=lambda: NixlTransport("uuid-forger", regions, [(memory.ctypes.data, memory.nbytes)]),
        kv=kv,
        shard=Shard(part_of(0, 1, kv.kv_heads, 0, kv.layers), kv.block_size, (0,) * kv.layers),
        settings=KvTransferSettings(),
        on_event=lambda event: None,
    )
    try:
        ticket = Ticket("foreign", 1, (service.start(),), bench.decode.peers)
        bench.decode.engine.submit(DecodeJob("foreign/decode", "foreign", prompt, GREEDY, DEADLINE_S, ticket=ticket))
        _write_everything(service, TransferKey("foreign", 1), bench.decode.peers, prompt, blocks, kv.layers)
        forged = bench.tokens("foreign")
    finally:
        service.close()
    assert [forged] != bench.oracle.continue_each([prompt], OUTPUT_TOKENS)


def _write_everything(
    service: TransferService,
    key: TransferKey,
    to: tuple[KvPeer, ...],
    prompt: tuple[int, ...],
    blocks: int,
    layers: int,
) -> None:
    service.offer(Offer(key, to, prompt, blocks))
    service.computing(key, [range(blocks)], 0)
    for layer in range(layers):
        service.computed(layer, [(key, len(prompt))])
    service.prefill_ended(key)
