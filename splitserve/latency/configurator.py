"""NVIDIA's measured kernel tables, by the optional package `aiconfigurator-core` (0.12): the one file that knows it.

Its engine answers a step in tens of microseconds; a simulator asks millions of times. So it is asked once for a grid,
and curves through the answers are the model (`TableLatency`): prefill by tokens and by pairs, decode by sequences and
by tokens read. `error` is that of the curves against its own answers between the grid's points, not against a machine.
Its times are kernels only, without an engine's overhead, and don't change with pipeline stages: `staged` cuts them.

It would download the configuration of a model that it doesn't carry: only those that it carries are asked for.
"""

import importlib
import importlib.util
import logging
import statistics
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

from splitserve.latency.checks import Finding, falls, pooled
from splitserve.latency.curves import Curve
from splitserve.latency.gpus import Gpu
from splitserve.latency.model import pairs
from splitserve.latency.sizes import ModelShape
from splitserve.latency.table import Hull, TableLatency

EXTRA = "aiconfigurator"
_SYSTEMS = {  # with tables of vLLM's kernels
    "a100-80g": "a100_sxm",
    "h100": "h100_sxm",
    "h200": "h200_sxm",
    "b200": "b200_sxm",
    "gb200": "gb200",
    "l40s": "l40s",
}
_MODELS = {
    "llama-3.1-8b": "meta-llama/Meta-Llama-3.1-8B",
    "llama-3.1-70b": "meta-llama/Meta-Llama-3.1-70B",
    "llama-3.1-405b": "meta-llama/Meta-Llama-3.1-405B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "qwen3-32b": "Qwen/Qwen3-32B",
    "qwen3-235b-a22b": "Qwen/Qwen3-235B-A22B",
    "deepseek-v3": "deepseek-ai/DeepSeek-V3",
    "gpt-oss-120b": "openai/gpt-oss-120b",
}
_OWN_TYPES = {"deepseek-v3": "fp8", "gpt-oss-120b": "mxfp4"}  # of weights, that the package reads from the model itself
_TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
_SHORT = 128  # tokens of a prompt whose attention costs next to nothing
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_MANY = 64  # sequences at which the cost of reading is taken
_CONTEXTS = (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class Predictor(Protocol):
    """What is asked of the package's engine; milliseconds."""

    def predict_prefill_latency(self, bs: int, isl: int, prefix: int = 0) -> float:
        """Of `bs` prompts of `isl` tokens, of which `prefix` were computed before."""

    def predict_decode_latency(self, bs: int, isl: int) -> float:
        """Of one token of each of `bs` sequences of `isl` tokens."""


def installed() -> bool:
    return importlib.util.find_spec("aiconfigurator_core") is not None


@cache
def configurator(model: ModelShape, gpu: Gpu, tp: int) -> TableLatency | str:
    """One pipeline stage's worth of the model, or a sentence why the package has none. It must be installed."""
    unknown = _unknown(model, gpu)
    if unknown:
        return unknown
    source = f"aiconfigurator-core's kernel tables, {model.name} on {gpu.name}, TP {tp}"
    try:
        return table(_compiled(model, gpu, tp), source)
    except Exception as error:  # its errors share no class of their own
        return f"aiconfigurator-core can't answer for {model.name} on {gpu.name} at TP {tp}: {error}"


def table(predictor: Predictor, source: str) -> TableLatency:
    """Curves through a grid of its answers."""
    together = {n: _prompts_s(predictor, n) for n in _TOKENS}
    alone = {n: predictor.predict_prefill_latency(1, n) / 1e3 for n in _TOKENS}
    reading = {c: predictor.predict_decode_latency(_MANY, c) / 1e3 for c in _CONTEXTS}
    read = _curve({0: 0.0, **{_MANY * c: seconds - reading[_CONTEXTS[0]] for c, seconds in reading.items()}})
    decode = {b: predictor.predict_decode_latency(b, _SHORT) / 1e3 for b in _BATCHES}
    batch = _curve({b: seconds - read.of(b * _SHORT) for b, seconds in decode.items()})
    base = _curve(together)
    length = _curve({0: 0.0, **{pairs(n, 0): max(alone[n] - base.of(n), 0.0) for n in _TOKENS}})
    return TableLatency(
        base=base,
        length=length,
        batch=batch,
        read=read,
        hull=Hull(_TOKENS[0], _TOKENS[-1], _TOKENS[-1] // _SHORT, _BATCHES[-1], _CONTEXTS[-1]),
        source=source,
        error=_error(base, length, batch, read, predictor),
        findings=_findings(source, alone, decode, reading),
    )


def _unknown(model: ModelShape, gpu: Gpu) -> str | None:
    if gpu.name not in _SYSTEMS:
        return f"aiconfigurator-core has no tables of {gpu.name}; it has {', '.join(sorted(_SYSTEMS))}"
    if model.name not in _MODELS:
        return f"aiconfigurator-core doesn't carry {model.name}; it carries {', '.join(sorted(_MODELS))}"
    served = _OWN_TYPES.get(model.name, "bf16")
    weights = {"fp16": "bf16"}.get(model.weight_dtype, model.weight_dtype)
    if weights not in (served, "fp8") or (model.experts and weights != served):
        return f"aiconfigurator-core has no tables of {model.name} with {model.weight_dtype} weights"
    if model.kv_dtype not in ("fp16", "bf16", "fp8"):
        return f"aiconfigurator-core has no tables of {model.kv_dtype} KV"
    return None


def _compiled(model: ModelShape, gpu: Gpu, tp: int) -> Predictor:
    logging.getLogger("aiconfigurator_core").setLevel(logging.ERROR)  # it warns of tables that we don't ask for
    compile_engine: Callable[..., Any] = importlib.import_module("aiconfigurator_core.sdk.engine").EngineHandle.compile
    options: dict[str, Any] = {"tp_size": tp}
    if model.experts:
        options["moe_tp_size"] = tp
    if model.weight_dtype == "fp8" and model.name not in _OWN_TYPES:
        options["gemm_quant_mode"] = "fp8"
    if model.kv_dtype == "fp8":
        options["kvcache_quant_mode"] = "fp8"
    predictor: Predictor = compile_engine(_MODELS[model.name], _SYSTEMS[gpu.name], "vllm", **options)
    return predictor


def _prompts_s(predictor: Predictor, tokens: int) -> float:
    prompts = max(tokens // _SHORT, 1)
    return predictor.predict_prefill_latency(prompts, tokens // prompts) / 1e3


def _curve(line: dict[int, float]) -> Curve:
    xs = sorted(line)
    return Curve.through(xs, pooled([line[x] for x in xs]).tolist())


def _error(base: Curve, length: Curve, batch: Curve, read: Curve, predictor: Predictor) -> float:
    """Mean relative error off the grid."""
    errors = []
    for prompts, tokens, before in ((1, 700, 0), (1, 3000, 0), (4, 1000, 0), (1, 1024, 1024), (1, 512, 3000)):
        said = predictor.predict_prefill_latency(prompts, before + tokens, before) / 1e3
        errors.append((base.of(prompts * tokens) + length.of(prompts * pairs(tokens, before))) / said - 1)
    for sequences, context in ((3, 500), (24, 900), (100, 2000), (200, 300), (12, 6000)):
        said = predictor.predict_decode_latency(sequences, context) / 1e3
        errors.append((batch.of(sequences) + read.of(sequences * context)) / said - 1)
    return statistics.fmean(abs(error) for error in errors)


def _findings(
    source: str, alone: dict[int, float], decode: dict[int, float], reading: dict[int, float]
) -> tuple[Finding, ...]:
    lines = (("prompt tokens", alone), ("decode batch", decode), (f"context of {_MANY} decodes", reading))
    return tuple(
        finding
        for axis, line in lines
        for finding in falls(source, axis, list(line), list(line.values()), "averaged with its neighbours")
    )
