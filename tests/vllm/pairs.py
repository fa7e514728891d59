"""Two real workers that push KV to each other, plain vLLM beside them, and the hand-over of one prompt between them."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from transformers import PretrainedConfig

from benchmarks.remote_engine import RemoteEngine
from splitserve.core.config import KvTransferSettings, VllmSettings
from splitserve.core.worker import KvPart, TransferStats
from splitserve.kv.layout import blocks_for, first_kept_block, tokens_to_move
from tests.contract.engines import Listener, Run, a_decode, a_prefill, a_prompt, a_ticket, greedy, started
from tests.vllm.conftest import VOCAB_SIZE
from tests.vllm.oracle import Oracle

Prompt = tuple[int, ...]

MAX_MODEL_LEN = 2048
OUTPUT_TOKENS = 24
# Prompts of more than 256 tokens are computed in several chunks.
SETTINGS = VllmSettings(dtype="float32", max_model_len=MAX_MODEL_LEN, max_num_batched_tokens=256, kv_cache_gib=0.125)
# vLLM's CPU operator rotates queries and keys wrongly where they are parts of longer rows, as MLA's are: what the model
# writes then depends on what else is in the batch.
MLA_ON_CPU: Mapping[str, Any] = {"compilation_config": {"custom_ops": ["all", "-rotary_embedding"]}}


@dataclass(frozen=True, slots=True)
class Pair:
    """`windows`: of each layer, in tokens. `direction`: for prompts that neither worker has cached."""

    source: Listener
    destination: Listener
    oracle: Oracle
    windows: tuple[int | None, ...]
    direction: str = "there"

    @property
    def turned(self) -> "Pair":
        return replace(self, source=self.destination, destination=self.source, direction="back")

    def expected(self, prompt: Prompt) -> Prompt:
        return tuple(self.oracle.continue_each([prompt], OUTPUT_TOKENS)[0])

    def alone(self, worker: Listener, prompt: Prompt) -> Prompt:
        """What a worker writes without the other."""
        return worker.submit(a_decode(prompt, greedy(OUTPUT_TOKENS))).wait().tokens

    def start(self, prompt: Prompt, decode_first: bool = True) -> tuple[Run, Run]:
        """The prefill and the decode of a prompt; the later one starts at once, or when the earlier one has news."""
        ticket = a_ticket(self.source, self.destination)
        prefill_job, decode_job = a_prefill(prompt, ticket), a_decode(prompt, greedy(OUTPUT_TOKENS), ticket)
        if decode_first:
            decode = self.destination.submit(decode_job)
            return self.source.submit(prefill_job), decode
        prefill = self.source.submit(prefill_job).wait_news()
        return prefill, self.destination.submit(decode_job)

    def hand_over(self, prompt: Prompt, decode_first: bool = True) -> tuple[Prompt, TransferStats]:
        """What the destination writes, and what moved."""
        return finished(*self.start(prompt, decode_first))

    def kept_bytes(self, tokens: int) -> int:
        """Of a prompt's KV, what its decode still looks at, over all ranks of the destination."""
        kv, moved = self.destination.info.kv, tokens_to_move(tokens)
        needed, block = blocks_for(moved, kv.block_size), kv.block_bytes // kv.kv_heads
        first = [first_kept_block(moved, kv.block_size, window) for window in self.windows]
        parts = [peer.part for peer in self.destination.info.kv_peers]
        return sum(part.heads * block * (needed - first[layer]) for part in parts for layer in _layers(part))

    def wait_at_rest(self) -> None:
        self.source.wait_at_rest()
        self.destination.wait_at_rest()


def finished(prefill: Run, decode: Run) -> tuple[Prompt, TransferStats]:
    assert prefill.outcome.failure is None, prefill.outcome
    assert decode.outcome.failure is None, decode.outcome
    assert prefill.outcome.transfer is not None
    return decode.tokens, prefill.outcome.transfer


def start_pair(
    stack: ExitStack,
    model: Path,
    cores: tuple[int, int],
    settings: tuple[VllmSettings, VllmSettings] = (SETTINGS, SETTINGS),
    extra: Mapping[str, Any] | None = None,
) -> Pair:
    """A source and a destination on a core each. `extra`: EngineArgs of all engines, the oracle's too."""
    engines = [
        RemoteEngine(model, _with(each, extra or {}), KvTransferSettings(), uuid4().hex, core)
        for each, core in zip(settings, cores, strict=True)
    ]
    for engine in engines:
        engine.spawn()
    oracle = Oracle(model, MAX_MODEL_LEN, cores[1], extra or {})
    stack.callback(oracle.close)
    source, destination = [stack.enter_context(started(engine)) for engine in engines]
    source.engine.connect(destination.info.kv_peers)
    destination.engine.connect(source.info.kv_peers)
    return Pair(source, destination, oracle, _windows(model))


def drawn(tokens: int, seed: str) -> Prompt:
    return a_prompt(range(300, VOCAB_SIZE), tokens, int.from_bytes(f"{seed} {tokens}".encode()))


def _with(settings: VllmSettings, extra: Mapping[str, Any]) -> VllmSettings:
    return settings.model_copy(update={"extra": settings.extra | dict(extra)})


def _layers(part: KvPart) -> range:
    return range(part.first_layer, part.first_layer + part.layers)


def _windows(model: Path) -> tuple[int | None, ...]:
    config = PretrainedConfig.get_config_dict(model)[0]
    window = config.get("sliding_window")
    kinds = config.get("layer_types") or ["sliding_attention" if window else ""] * config["num_hidden_layers"]
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
