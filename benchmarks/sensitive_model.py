"""Small random models whose greedy output depends on every block of their KV cache, one per shape of KV.

With transformers' own initialisation stale KV would still "match": a test that can't fail. Three things make it depend:
weights spread widely; attention that is sharp, but not stuck on one token; and input embeddings that are not the output
embeddings and are large enough for each token to change the next, without which most outputs repeat one token for ever.
`tests/vllm/test_sensitive_model.py` measures it. Nothing is downloaded: the tokenizer is another model's.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
SLIDING_WINDOW = 256  # tokens
SHARED_SHAPE: dict[str, Any] = {
    "hidden_size": 256,
    "num_attention_heads": 4,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "initializer_range": 0.15,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def make_sensitive_model(tokenizer_of: Path, out: Path, vocab_size: int, kv_heads: int = 2) -> Path:
    """A Llama of 4 layers, written to `out` with the tokenizer of another model directory."""
    config = LlamaConfig(
        **SHARED_SHAPE,
        vocab_size=vocab_size,
        intermediate_size=768,
        num_hidden_layers=4,
        num_key_value_heads=kv_heads,
        head_dim=64,
    )
    model = _drawn(LlamaForCausalLM, config, {"q_proj": 1.2, "k_proj": 1.2, "embed_tokens": 24.0})
    return _saved(model, tokenizer_of, out)


def make_larger_sensitive_model(tokenizer_of: Path, out: Path, vocab_size: int) -> Path:
    """The same of 11 million parameters: on a CPU core in float32 its prefill is bound by compute, and its decode step
    takes several times what the engine adds to it."""
    config = LlamaConfig(
        **{**SHARED_SHAPE, "hidden_size": 384, "num_attention_heads": 6, "initializer_range": 0.12},
        vocab_size=vocab_size,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_key_value_heads=2,
        head_dim=64,
    )
    model = _drawn(LlamaForCausalLM, config, {"q_proj": 1.2, "k_proj": 1.2, "embed_tokens": 30.0})
    return _saved(model, tokenizer_of, out)


def make_sliding_window_model(tokenizer_of: Path, out: Path, vocab_size: int) -> Path:
    """A Gemma-3 text model: six layers, every third with full attention, the others with a window. vLLM makes three KV
    groups of it, of two layers each."""
    config = Gemma3TextConfig(
        **SHARED_SHAPE,
        vocab_size=vocab_size,
        intermediate_size=512,
        num_hidden_layers=6,
        num_key_value_heads=2,
        head_dim=64,
        sliding_window=SLIDING_WINDOW,
        query_pre_attn_scalar=64,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
    )
    model = _drawn(Gemma3ForCausalLM, config, {"embed_tokens": 2.0})  # Gemma multiplies them by 16 here
    _fill(model, {"q_norm": 1.0, "k_norm": 1.0, "post_attention_layernorm": 0.5})  # Gemma adds 1 to these
    return _saved(model, tokenizer_of, out)


def make_mla_model(tokenizer_of: Path, out: Path, vocab_size: int) -> Path:
    """A DeepSeek-V2 without experts: four layers with multi-head latent attention, whose KV is one vector per token.
    Its sizes are the only ones that vLLM's CPU kernel takes: a latent of 512 and 64 rotary dimensions."""
    config = DeepseekV2Config(
        **SHARED_SHAPE,
        vocab_size=vocab_size,
        intermediate_size=512,
        num_hidden_layers=4,
        num_key_value_heads=4,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        first_k_dense_replace=4,
        n_routed_experts=2,
        num_experts_per_tok=1,
        n_shared_experts=1,
        moe_intermediate_size=64,
        n_group=1,
        topk_group=1,
    )
    model = _drawn(DeepseekV2ForCausalLM, config, {"q_proj": 1.5, "embed_tokens": 32.0})
    return _saved(model, tokenizer_of, out)


def copy_tokenizer(tokenizer_of: Path, out: Path) -> None:
    for name in TOKENIZER_FILES:
        if (tokenizer_of / name).exists():
            shutil.copy(tokenizer_of / name, out / name)


def _drawn(family: type[PreTrainedModel], config: Any, factors: dict[str, float]) -> PreTrainedModel:
    """The same weights every time; those whose name holds a key are multiplied."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = family(config)
    with torch.no_grad():
        for parameter, factor in _matching(model, factors):
            parameter.mul_(factor)
    return model


def _fill(model: PreTrainedModel, constants: dict[str, float]) -> None:
    with torch.no_grad():
        for parameter, constant in _matching(model, constants):
            parameter.fill_(constant)


def _matching(model: PreTrainedModel, values: dict[str, float]) -> Iterator[tuple[torch.nn.Parameter, float]]:
    for name, parameter in model.named_parameters():
        yield from ((parameter, value) for key, value in values.items() if key in name)


def _saved(model: PreTrainedModel, tokenizer_of: Path, out: Path) -> Path:
    model.to(torch.float32).save_pretrained(out)
    copy_tokenizer(tokenizer_of, out)
    return out
