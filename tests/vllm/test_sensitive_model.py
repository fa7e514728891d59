"""The models of the exactness tests depend on their KV: otherwise those tests couldn't fail. Transformers runs them."""

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from benchmarks.sensitive_model import (
    make_larger_sensitive_model,
    make_mla_model,
    make_sensitive_model,
    make_sliding_window_model,
)
from tests.vllm.conftest import DEMO_MODEL, VOCAB_SIZE

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

BLOCK = 128
OUTPUT_TOKENS = 12
Damage = tuple[int, slice]  # layer, tokens


def _one_kv_head(tokenizer_of: Path, out: Path, vocab_size: int) -> Path:
    return make_sensitive_model(tokenizer_of, out, vocab_size, kv_heads=1)


@pytest.fixture(
    scope="module",
    params=[make_sensitive_model, _one_kv_head, make_larger_sensitive_model, make_sliding_window_model, make_mla_model],
    ids=["llama", "one KV head", "larger llama", "sliding window", "mla"],
)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    make: Callable[[Path, Path, int], Path] = request.param
    made: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        make(DEMO_MODEL, tmp_path_factory.mktemp("model"), VOCAB_SIZE), dtype=torch.float32
    )
    return made.eval()


def _prompt(tokens: int) -> torch.Tensor:
    chooser = random.Random(tokens)
    return torch.tensor([[chooser.randrange(300, VOCAB_SIZE) for _ in range(tokens)]])


def _continued(model: PreTrainedModel, prompt: torch.Tensor, damages: Sequence[Damage] = ()) -> list[list[int]]:
    """Greedy tokens of the prompt, and after them those from KV with each damage."""
    with torch.inference_mode():
        cache = DynamicCache()
        model(prompt[:, :-1], past_key_values=cache)
        cache.batch_repeat_interleave(1 + len(damages))
        for row, damage in enumerate(damages, 1):
            _damage(cache, row, *damage)
        tokens = [prompt[:, -1:].repeat(1 + len(damages), 1)]
        for _ in range(OUTPUT_TOKENS):
            tokens.append(model(tokens[-1], past_key_values=cache).logits[:, -1:].argmax(-1))
    written: list[list[int]] = torch.cat(tokens[1:], 1).tolist()
    return written


def _damage(cache: DynamicCache, row: int, layer: int, tokens: slice) -> None:
    """Noise of the same size."""
    noise = torch.Generator().manual_seed(0)
    for kept in (cache.layers[layer].keys, cache.layers[layer].values):
        part = kept[row, :, tokens]
        part.copy_(torch.randn(part.shape, generator=noise) * part.std())


def _blocks_read(model: PreTrainedModel, layer: int, prompt_tokens: int) -> Iterator[slice]:
    """The whole blocks that the prompt's last token attends to in a layer."""
    kinds = getattr(model.config, "layer_types", None)
    windowed = kinds is not None and kinds[layer] == "sliding_attention"
    first = prompt_tokens - model.config.sliding_window if windowed else 0
    return (slice(start, start + BLOCK) for start in range(0, prompt_tokens - BLOCK, BLOCK) if start >= first)


@pytest.mark.parametrize("tokens", [15, 600])
def test_hardly_a_token_is_repeated(model: PreTrainedModel, tokens: int) -> None:
    assert len(set(_continued(model, _prompt(tokens))[0])) > OUTPUT_TOKENS // 2


def test_each_block_of_each_layer_is_seen_in_the_tokens(model: PreTrainedModel) -> None:
    prompt = _prompt(600)
    layers = range(model.config.num_hidden_layers)
    damages = [(layer, block) for layer in layers for block in _blocks_read(model, layer, prompt.shape[1])]
    whole, *damaged = _continued(model, prompt, damages)
    assert [damage for damage, tokens in zip(damages, damaged, strict=True) if tokens == whole] == []
