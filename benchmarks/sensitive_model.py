"""A small random Llama whose output depends on its KV cache: changing the first 900 of 1,000 prompt tokens changes
nearly every output token. With the default initialiser (range 0.02) stale KV would still "match": a test that can't
fail.
"""

import shutil
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def make_sensitive_model(tokenizer_of: Path, out: Path, vocab_size: int) -> Path:
    """Writes the model to `out` with the tokenizer of another model directory."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        initializer_range=0.15,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(1.5)
    model.to(torch.float32).save_pretrained(out)
    for name in TOKENIZER_FILES:
        if (tokenizer_of / name).exists():
            shutil.copy(tokenizer_of / name, out / name)
    return out
