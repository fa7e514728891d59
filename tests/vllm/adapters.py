"""A small LoRA adapter of the models under test, drawn at random: neither matrix is zero, so that it matters."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

RANK = 4
HIDDEN, HEAD_DIM = 256, 64


def make_adapter(out: Path, layers: int = 4, heads: int = 4, kv_heads: int = 2, seed: int = 0) -> Path:
    """In PEFT's format, for a Llama of benchmarks/sensitive_model's shape."""
    drawn = torch.Generator().manual_seed(seed)
    widths = {"q_proj": heads * HEAD_DIM, "k_proj": kv_heads * HEAD_DIM, "v_proj": kv_heads * HEAD_DIM}
    weights = {}
    for layer in range(layers):
        for name, width in widths.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{prefix}.lora_A.weight"] = 0.3 * torch.randn(RANK, HIDDEN, generator=drawn)
            weights[f"{prefix}.lora_B.weight"] = 0.3 * torch.randn(width, RANK, generator=drawn)
    out.mkdir(parents=True, exist_ok=True)
    save_file(weights, out / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "target_modules": sorted(widths)}
    (out / "adapter_config.json").write_text(json.dumps({**said, "r": RANK, "lora_alpha": 2 * RANK}))
    return out
