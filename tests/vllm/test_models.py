"""Hugging Face directories of other families are served by push; what it can't move is refused at start, with why."""

import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from transformers import MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from benchmarks.remote_engine import RemoteEngine
from benchmarks.sensitive_model import TOKENIZER_FILES
from splitserve.core.config import KvTransferSettings, VllmSettings
from tests.contract.engines import a_decode, a_prefill, a_prompt, a_ticket, greedy, started
from tests.vllm.conftest import DEMO_MODEL, VOCAB_SIZE

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

SETTINGS = VllmSettings(dtype="float32", max_model_len=2048, kv_cache_gib=0.125, enable_prefix_caching=False)
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "initializer_range": 0.15,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def _directory(model: Any, out: Path) -> Path:
    model.float().save_pretrained(out)
    for name in TOKENIZER_FILES:
        shutil.copy(DEMO_MODEL / name, out / name)
    return out


def _engine(model: Path, core: int) -> RemoteEngine:
    engine = RemoteEngine(model, SETTINGS, KvTransferSettings(), uuid4().hex, core)
    engine.spawn()
    return engine


@pytest.mark.parametrize("family", ["qwen3", "mistral"])
def test_other_families_are_served_exactly(family: str, tmp_path: Path, cores: tuple[int, int]) -> None:
    made = {
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=None)),
    }
    model = _directory(made[family](), tmp_path)
    engines = [_engine(model, core) for core in cores]
    with ExitStack() as stack:
        source, destination = [stack.enter_context(started(engine)) for engine in engines]
        for tokens in (15, 128, 700):
            prompt = a_prompt(range(300, VOCAB_SIZE), tokens, tokens)
            ticket = a_ticket(source, destination)
            decode = destination.submit(a_decode(prompt, greedy(12), ticket))
            prefill = source.submit(a_prefill(prompt, ticket))
            alone = source.submit(a_decode(prompt, greedy(12)))
            assert prefill.outcome.failure is None
            assert decode.wait().tokens == alone.wait().tokens


def test_a_model_with_sliding_windows_is_refused_with_the_way_out(tmp_path: Path, cores: tuple[int, int]) -> None:
    model = _directory(MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=512)), tmp_path)
    engine = _engine(model, cores[0])
    with pytest.raises(RuntimeError, match=r"full attention in every layer.*set kv_transfer\.mode to pull"):
        engine.start(lambda deltas: None)
