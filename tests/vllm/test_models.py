"""Hugging Face directories of other families, with other shapes of KV, are served by push exactly; what push can't move
is refused at start, with why. The engines compute long prompts in chunks and keep prefixes cached."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    JambaConfig,
    JambaForCausalLM,
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
from splitserve.core.config import KvTransferSettings
from tests.vllm.conftest import DEMO_MODEL, VOCAB_SIZE
from tests.vllm.pairs import MLA_ON_CPU, SETTINGS, Pair, drawn, start_pair

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

# Around a block of 128 tokens, a window of 256, and where a token more would push another block out of the window.
LENGTHS = (1, 15, 128, 129, 255, 256, 257, 384, 385, 700, 895, 896, 1000)
SHAPE = SHARED_SHAPE | {
    "vocab_size": VOCAB_SIZE,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
}


@dataclass(frozen=True, slots=True)
class Family:
    make: Callable[[Path], Path]
    extra: Mapping[str, Any] = field(default_factory=dict)  # EngineArgs


def _qwen3(out: Path) -> Path:
    return _saved(Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=64)), out)


def _mistral(out: Path) -> Path:
    """A window in every layer, so one KV group."""
    return _saved(MistralForCausalLM(MistralConfig(**SHAPE, head_dim=64, sliding_window=SLIDING_WINDOW)), out)


def _gpt_oss(out: Path) -> Path:
    """A window in every other layer, attention sinks, experts."""
    layers = ["sliding_attention", "full_attention"] * 2
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    config = GptOssConfig(**SHAPE, **experts, head_dim=64, layer_types=layers, sliding_window=SLIDING_WINDOW)
    return _saved(GptOssForCausalLM(config), out)


def _jamba(out: Path) -> Path:
    """Every other layer keeps a state in place of keys and values."""
    layers = {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "num_experts_per_tok": 1}
    return _saved(JambaForCausalLM(JambaConfig(**SHAPE, **layers, use_mamba_kernels=False)), out)


def _saved(model: Any, out: Path) -> Path:
    model.float().save_pretrained(out)
    copy_tokenizer(DEMO_MODEL, out)
    return out


FAMILIES = {
    "qwen3": Family(_qwen3),
    "mistral with a window": Family(_mistral),
    "gemma-3": Family(lambda out: make_sliding_window_model(DEMO_MODEL, out, VOCAB_SIZE)),
    "gpt-oss": Family(_gpt_oss),
    "deepseek-v2": Family(lambda out: make_mla_model(DEMO_MODEL, out, VOCAB_SIZE), MLA_ON_CPU),
}


@pytest.fixture(scope="module", params=FAMILIES)
def started_pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, cores: tuple[int, int]
) -> Iterator[Pair]:
    family = FAMILIES[request.param]
    torch.manual_seed(0)
    with ExitStack() as stack:
        yield start_pair(stack, family.make(tmp_path_factory.mktemp("model")), cores, extra=family.extra)


@pytest.fixture
def pair(started_pair: Pair) -> Iterator[Pair]:
    """After each test all blocks are free on both."""
    yield started_pair
    started_pair.wait_at_rest()


@pytest.mark.parametrize("decode_first", [True, False], ids=["decode first", "prefill first"])
def test_other_families_are_served_exactly(pair: Pair, decode_first: bool) -> None:
    for tokens in LENGTHS:
        prompt = drawn(tokens, f"{decode_first}")
        written, stats = pair.hand_over(prompt, decode_first)
        assert written == pair.expected(prompt), f"{tokens} prompt tokens"
        assert stats.bytes == pair.kept_bytes(tokens), f"{tokens} prompt tokens"


@pytest.mark.parametrize("decode_first", [True, False], ids=["decode first", "prefill first"])
def test_a_cached_prefix_on_either_side_changes_nothing(pair: Pair, decode_first: bool) -> None:
    prefix = drawn(500, f"prefix {decode_first}")
    for name, worker in {"source": pair.source, "both": pair.destination}.items():
        own = prefix + drawn(10, name)
        assert pair.alone(worker, own) == pair.expected(own)
        for tokens in (1, 30, 395):
            prompt = prefix + drawn(tokens, f"{name} {decode_first}")
            written, _ = pair.hand_over(prompt, decode_first)
            assert written == pair.expected(prompt), f"{len(prompt)} prompt tokens"


def test_damaged_kv_is_seen_in_the_tokens(pair: Pair) -> None:
    """So the tests above could fail."""
    assert isinstance(pair.source.engine, RemoteEngine)
    for tokens in (200, 700):
        prompt = drawn(tokens, "damaged")
        with pair.source.engine.misreading():
            written, _ = pair.hand_over(prompt)
        assert written != pair.expected(prompt)


def test_a_model_whose_kv_push_cannot_move_is_refused_with_the_way_out(tmp_path: Path, cores: tuple[int, int]) -> None:
    engine = RemoteEngine(_jamba(tmp_path), SETTINGS, KvTransferSettings(), uuid4().hex, cores[0])
    engine.spawn()
    with pytest.raises(RuntimeError, match=r"kv_transfer\.mode: push .* this model has .*MambaSpec.*; use pull"):
        engine.start(lambda deltas: None)
