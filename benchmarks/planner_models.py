"""The models that the planner's predictions are checked with: the one that ships, and a larger one of random weights.

What a step costs does not depend on what the weights are.
"""

import json
from pathlib import Path

from benchmarks.sensitive_model import copy_tokenizer
from splitserve.cli.build import DEMO_MODEL

MODELS = ("tiny", "30m", "simulated")


def model_directory(name: str, scratch: Path) -> Path:
    """`tiny` and `simulated` are the demonstration model, `30m` a Llama of 28 million parameters in float32."""
    if name != "30m":
        return DEMO_MODEL
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=int(json.loads((DEMO_MODEL / "config.json").read_text())["vocab_size"]),
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
    )
    out = scratch / name
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(out)
    copy_tokenizer(DEMO_MODEL, out)
    return out
