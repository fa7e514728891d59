"""The work of a Llama-shaped prefill, layer by layer, on a GPU or a CPU: the pace at which its KV comes into being.

A layer is its matmuls and its attention in the model's shapes, then its KV, which is written into a paged cache on the
same stream, and an event after it: what a connector's layer hook records. All layers share one set of weights (at 8B
far beyond any cache, so that each layer reads them from memory as if they were its own). Norms, rotary embedding and
the head are left out: a few per cent, which makes this prefill a little quicker, and a transfer harder to cover.
"""

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as functional

from splitserve.kv.transport import Fence

ELEMENT_BYTES = 2  # bfloat16
HASH = 2654435761  # Knuth's multiplicative hash: neighbours get values far apart


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Elements are bfloat16."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    block_size: int = 16

    @property
    def block_elements(self) -> int:
        """Of one block of one layer: keys and values."""
        return 2 * self.block_size * self.kv_heads * self.head_dim

    @property
    def block_bytes(self) -> int:
        return self.block_elements * ELEMENT_BYTES

    def kv_bytes(self, tokens: int) -> int:
        return tokens // self.block_size * self.block_bytes * self.layers

    def layer_flop(self, tokens: int) -> int:
        """Two per multiply-add; attention is causal, so half of the square."""
        width = self.heads * self.head_dim
        weights = self.hidden * (2 * width + 2 * self.kv_heads * self.head_dim + 3 * self.intermediate)
        return 2 * tokens * weights + 2 * tokens * tokens * width


LLAMA_8B = ModelShape(layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, intermediate=14336)
SMALL = ModelShape(layers=4, hidden=256, heads=4, kv_heads=2, head_dim=64, intermediate=512)


def content(shape: ModelShape, layer: int, blocks: int, device: str) -> torch.Tensor:
    """What a layer computes for a prompt's blocks, (block, element) as int16: each element tells where it belongs."""
    size = blocks * shape.block_elements
    numbers = torch.arange(layer * size, (layer + 1) * size, dtype=torch.int64, device=device)
    return ((numbers * HASH) >> 16).to(torch.int16).view(blocks, shape.block_elements)


def differing_bytes(found: torch.Tensor, expected: torch.Tensor) -> int:
    return int((found.view(torch.uint8) != expected.view(torch.uint8)).sum())


class Prefill:
    """Computes on a thread of its own, as an engine does. `computed` fills with (layer, fence) as layers are launched;
    `cache[l]` is layer l as (block, element)."""

    def __init__(self, shape: ModelShape, tokens: int, cache: torch.Tensor, table: Sequence[int]) -> None:
        device = cache.device
        self._shape = shape
        self._cache = cache
        self._blocks = torch.tensor(table, device=device)
        self._kv = [content(shape, layer, len(table), str(device)) for layer in range(shape.layers)]
        width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self._input = _random(device, tokens, shape.hidden)
        self._qkv = _random(device, shape.hidden, width + 2 * kv_width)
        self._output = _random(device, width, shape.hidden)
        self._up = _random(device, shape.hidden, 2 * shape.intermediate)
        self._down = _random(device, shape.intermediate, shape.hidden)
        self._split = (width, kv_width, kv_width)
        self.computed: deque[tuple[int, Fence]] = deque()

    def start(self) -> threading.Thread:
        """Join it before the next."""
        self.computed.clear()
        thread = threading.Thread(target=self._run, name="prefill", daemon=True)
        thread.start()
        return thread

    def _run(self) -> None:
        hidden = self._input
        with torch.inference_mode():
            for layer in range(self._shape.layers):
                hidden = self._layer(hidden)
                self._cache[layer].index_copy_(0, self._blocks, self._kv[layer])
                self.computed.append((layer, _fence(self._cache)))

    def _layer(self, hidden: torch.Tensor) -> torch.Tensor:
        attended = hidden + self._attention(hidden)
        gate, up = (attended @ self._up).chunk(2, dim=-1)
        return attended + (functional.silu(gate) * up) @ self._down

    def _attention(self, hidden: torch.Tensor) -> torch.Tensor:
        query, key, value = (self._by_head(part) for part in (hidden @ self._qkv).split(self._split, dim=-1))
        attention = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return attention[0].transpose(0, 1).reshape(len(hidden), -1) @ self._output

    def _by_head(self, part: torch.Tensor) -> torch.Tensor:
        """(1, head, token, element): fused attention wants a batch."""
        return part.reshape(1, len(part), -1, self._shape.head_dim).transpose(1, 2)


def _random(device: torch.device, rows: int, columns: int) -> torch.Tensor:
    """So small that many layers do not overflow."""
    return torch.randn(rows, columns, device=device, dtype=torch.bfloat16) / rows


def _fence(cache: torch.Tensor) -> Fence:
    """Of what was launched so far; on a CPU it is over."""
    if not cache.is_cuda:
        return lambda: True
    event = torch.cuda.Event()
    event.record()
    passed: Fence = event.query
    return passed
