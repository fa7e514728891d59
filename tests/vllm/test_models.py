"""Hugging Face directories of other families, with other shapes of KV, are served by push exactly; what push can't move
is refused at start, with why. Each family's two engines compute prompts in chunks and keep prefixes cached."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from benchmarks.remote_engine import RemoteEngine
from benchmarks.sensitive_model import (
    SHARED_SHAPE,
    SLIDING_WINDOW,
    copy_tokenizer,
    make_mla_model,
    make_sliding_window_model,
)
from splitserve.core.config import KvTransferSettings, VllmSettings
from splitserve.kv.layout import blocks_for, first_kept_block, tokens_to_move
from tests.contract.engines import Listener, Run, a_decode, a_prefill, a_prompt, a_ticket, greedy, started
from tests.vllm.conftest import DEMO_MODEL, VOCAB_SIZE
from tests.vllm.oracle import Oracle

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

MAX_MODEL_LEN = 2048
OUTPUT_TOKENS = 16
SETTINGS = VllmSettings(dtype="float32", max_model_len=MAX_MODEL_LEN, max_num_batched_tokens=256, kv_cache_gib=0.125)
# Around a block of 128, a window of 256 and the first token that pushes a block out of it; 895: see `tokens_to_move`.
LENGTHS = (1, 15, 128, 129, 255, 256, 257, 384, 385, 700, 895, 896, 1000)
SHAPE = SHARED_SHAPE | {
    "vocab_size": VOCAB_SIZE,
    "intermediate_size": 512,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
Prompt = tuple[int, ...]
Make = Callable[[Path], Path]


def _qwen3(out: Path) -> Path:
    return _saved(Qwen3ForCausalLM(Qwen3Config(**SHAPE, num_hidden_layers=3)), out)


def _mistral(out: Path) -> Path:
    """A window in every layer, so one KV group."""
    return _saved(MistralForCausalLM(MistralConfig(**SHAPE, num_hidden_layers=3, sliding_window=SLIDING_WINDOW)), out)


def _gpt_oss(out: Path) -> Path:
    """Every other layer has a window; attention sinks; experts."""
    layers = ["sliding_attention", "full_attention"] * 2
    config = GptOssConfig(
        **SHAPE,
        num_hidden_layers=len(layers),
        layer_types=layers,
        sliding_window=SLIDING_WINDOW,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    return _saved(GptOssForCausalLM(config), out)


def _saved(model: Any, out: Path) -> Path:
    model.float().save_pretrained(out)
    copy_tokenizer(DEMO_MODEL, out)
    return out


FAMILIES: dict[str, Make] = {
    "qwen3": _qwen3,
    "mistral with a window": _mistral,
    "gemma-3": lambda out: make_sliding_window_model(DEMO_MODEL, out, VOCAB_SIZE),
    "gpt-oss": _gpt_oss,
    "deepseek-v2 (MLA)": lambda out: make_mla_model(DEMO_MODEL, out, VOCAB_SIZE),
}


@dataclass(frozen=True, slots=True)
class Served:
    """One family's engines; `windows`: of each layer."""

    source: Listener
    destination: Listener
    oracle: Oracle
    windows: tuple[int | None, ...]

    def expected(self, prompt: Prompt) -> Prompt:
        return tuple(self.oracle.continue_each([prompt], OUTPUT_TOKENS)[0])

    def hand_over(self, prompt: Prompt, decode_first: bool = True) -> tuple[Run, Run]:
        """The prefill and the decode of a prompt."""
        ticket = a_ticket(self.source, self.destination)
        decode_job = a_decode(prompt, greedy(OUTPUT_TOKENS), ticket)
        decode = self.destination.submit(decode_job) if decode_first else None
        prefill = self.source.submit(a_prefill(prompt, ticket))
        if decode is None:
            prefill.wait_news()
            decode = self.destination.submit(decode_job)
        assert prefill.outcome.failure is None, prefill.outcome
        assert decode.wait().outcome.failure is None, decode.outcome
        return prefill, decode

    def kept_bytes(self, tokens: int) -> int:
        """Of a prompt's KV, what its decode still looks at."""
        kv, moved = self.destination.info.kv, tokens_to_move(tokens)
        needed = blocks_for(moved, kv.block_size)
        return kv.block_bytes * sum(needed - first_kept_block(moved, kv.block_size, each) for each in self.windows)


@pytest.fixture(scope="module", params=FAMILIES)
def started_engines(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, cores: tuple[int, int]
) -> Iterator[Served]:
    torch.manual_seed(0)
    model = FAMILIES[request.param](tmp_path_factory.mktemp("model"))
    with ExitStack() as stack:
        engines = [RemoteEngine(model, SETTINGS, KvTransferSettings(), uuid4().hex, core) for core in cores]
        for engine in engines:
            engine.spawn()
        oracle = Oracle(model, MAX_MODEL_LEN, cores[1])
        stack.callback(oracle.close)
        source, destination = [stack.enter_context(started(engine)) for engine in engines]
        yield Served(source, destination, oracle, _windows(model))


def _windows(model: Path) -> tuple[int | None, ...]:
    config = MistralConfig.get_config_dict(model)[0]
    every = "sliding_attention" if config.get("sliding_window") else "full_attention"
    kinds = config.get("layer_types") or [every] * config["num_hidden_layers"]
    return tuple(SLIDING_WINDOW if kind == "sliding_attention" else None for kind in kinds)


@pytest.fixture
def served(started_engines: Served) -> Iterator[Served]:
    """After each test all blocks are free on both."""
    yield started_engines
    started_engines.source.wait_at_rest()
    started_engines.destination.wait_at_rest()


def drawn(tokens: int, seed: str) -> Prompt:
    return a_prompt(range(300, VOCAB_SIZE), tokens, int.from_bytes(f"{seed} {tokens}".encode()))


@pytest.mark.parametrize("decode_first", [True, False], ids=["decode first", "prefill first"])
def test_other_families_are_served_exactly(served: Served, decode_first: bool) -> None:
    for tokens in LENGTHS:
        prompt = drawn(tokens, f"{decode_first}")
        _, decode = served.hand_over(prompt, decode_first)
        assert decode.tokens == served.expected(prompt), f"{tokens} prompt tokens"


@pytest.mark.parametrize("decode_first", [True, False], ids=["decode first", "prefill first"])
def test_a_cached_prefix_on_either_side_changes_nothing(served: Served, decode_first: bool) -> None:
    prefix = drawn(500, f"prefix {decode_first}")
    for worker in (served.source, served.destination):
        own = prefix + drawn(10, worker.info.uuid)
        assert worker.submit(a_decode(own, greedy(OUTPUT_TOKENS))).wait().tokens == served.expected(own)
        for tokens in (1, 30, 395):
            prompt = prefix + drawn(tokens, f"{worker.info.uuid} {decode_first}")
            _, decode = served.hand_over(prompt, decode_first)
            assert decode.tokens == served.expected(prompt), f"{len(prompt)} prompt tokens"


def test_only_what_the_decode_looks_at_is_moved(served: Served) -> None:
    for tokens in LENGTHS[1:]:
        prefill, _ = served.hand_over(drawn(tokens, "bytes"))
        assert prefill.outcome.transfer is not None
        assert prefill.outcome.transfer.bytes == served.kept_bytes(tokens), f"{tokens} prompt tokens"


def test_damaged_kv_is_seen_in_the_tokens(served: Served) -> None:
    """So the tests above could fail."""
    assert isinstance(served.source.engine, RemoteEngine)
    for tokens in (200, 700):
        prompt = drawn(tokens, "damaged")
        with served.source.engine.misreading():
            _, decode = served.hand_over(prompt)
        assert decode.tokens != served.expected(prompt)
