"""Which latency model to believe for a worker, and how many tokens' KV it can hold. Pure but for a profile's file.

In order of trust: a measured profile if one is given; a published table of exactly that model, GPU and number type;
aiconfigurator's kernel tables where installed; the roofline. A table that has the model on that GPU is not filled up
from another source where it lacks a parallelism: a search would then compare a measured worker with a guessed one and
pick the guess. `source=` asks for one by name.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from splitserve.core.errors import ConfigError
from splitserve.latency import configurator, distserve, splitwise
from splitserve.latency import profile as profiles
from splitserve.latency.checks import Finding
from splitserve.latency.gpus import Gpu
from splitserve.latency.model import LatencyModel
from splitserve.latency.roofline import hop, roofline
from splitserve.latency.sizes import ModelShape

SOURCES = ("auto", "profile", "distserve", "distserve-vllm", "splitwise", "aiconfigurator", "roofline")
_USABLE = 0.9  # of a GPU's memory: vLLM's gpu_memory_utilization
_RUNTIME_BYTES = 2**30  # CUDA context, graphs and collectives' buffers of one GPU
_STEP_TOKENS = 8192  # of the largest step that activations are kept for


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of one worker. `source` is one of `SOURCES`; `notes` are assumptions, one sentence each."""

    latency: LatencyModel
    kv_tokens: int
    source: str
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()


class _Worker(NamedTuple):
    model: ModelShape
    gpu: Gpu
    tp: int
    pp: int


def costs(
    model: ModelShape, gpu: Gpu, tp: int, pp: int, *, source: str = "auto", profile: Path | None = None
) -> Known | str:
    """The worker of `tp` * `pp` GPUs, or a sentence why there is none: ranks that don't divide the heads, weights that
    don't fit, a parallelism that the source never measured.

    Raises ConfigError for a source that doesn't exist, isn't installed or doesn't have this model on this GPU, and for
    a profile's file that can't be read or is of another model or GPU.
    """
    if source not in SOURCES:
        raise ConfigError("--source", f"{source!r} is not a source of latencies; one of {', '.join(SOURCES)}")
    if source == "profile" and profile is None:
        raise ConfigError("--profile", "the source is a profile, but no file is given")
    worker = _Worker(model, gpu, tp, pp)
    refused = _refused(model, tp, pp)
    if refused:
        return refused
    if profile is not None and source in ("auto", "profile"):
        return _profiled(worker, profile)
    if _kv_tokens(worker) <= 0:
        return _too_small(worker)
    return _SOURCES[_most_trusted(worker) if source == "auto" else source](worker)


def unsupported(expert: int = 1, data: int = 1) -> str | None:
    """Why a worker can't split its model so; None if it is not asked to."""
    if expert > 1:
        return "expert parallelism is not supported: experts are split by tensor rank; use --tp, or one worker a node"
    if data > 1:
        return "data parallelism within a worker is not supported: use that many workers, which the router balances"
    return None


def kv_capacity(model: ModelShape, gpu: Gpu, tp: int, pp: int) -> int:
    """Tokens whose KV fit beside the weights on the fullest GPU; 0 or less if none do.

    0.9 of the memory, less its share of the weights, less activations of a step of 8,192 tokens and 1 GiB of runtime.
    Windowed layers are counted as if they kept all: so does an engine that moves KV to another.
    """
    left = gpu.memory_bytes * _USABLE - _weight_bytes(model, tp, pp) - _activation_bytes(model, tp) - _RUNTIME_BYTES
    per_token = math.ceil(model.layers / pp) * model.kv_layer_bytes * model.kv_share(tp)
    return int(left // per_token)


# the sources


def _most_trusted(worker: _Worker) -> str:
    if _in_distserve(worker, "distserve"):
        return "distserve"
    if _in_splitwise(worker):
        return "splitwise"
    if configurator.installed() and not isinstance(configurator.configurator(*worker[:3]), str):
        return "aiconfigurator"
    return "roofline"


def _profiled(worker: _Worker, file: Path) -> Known | str:
    measured = profiles.read(file)
    asked, said = (worker.model.name, worker.gpu.name), (measured.model, measured.hardware)
    if asked != said:
        raise ConfigError(str(file), f"is of {said[0]} on {said[1]}, not of {asked[0]} on {asked[1]}")
    if (measured.tp, measured.pp) != (worker.tp, worker.pp):
        return f"the profile is of TP {measured.tp} PP {measured.pp}, not of TP {worker.tp} PP {worker.pp}"
    kv_tokens = measured.kv_tokens or _kv_tokens(worker)
    return Known(measured.latency(), kv_tokens, "profile") if kv_tokens > 0 else _too_small(worker)


def _distserve(worker: _Worker, engine: str = "distserve") -> Known | str:
    model, named = worker.model.name, "distserve" if engine == "distserve" else "distserve-vllm"
    if not _in_distserve(worker, engine):
        raise _absent(named, worker, f"it has opt-13b and opt-66b in 16 bits on {distserve.GPU}")
    latency = distserve.distserve(model, worker.tp, worker.pp, engine)
    if latency is None:
        tps = ", ".join(map(str, distserve.measured_tps(model, engine)))
        return f"DistServe's table has {model} at TP {tps} only; --source roofline estimates TP {worker.tp}"
    return Known(latency, _kv_tokens(worker), named, latency.findings)


def _distserve_vllm(worker: _Worker) -> Known | str:
    return _distserve(worker, "vllm")


def _splitwise(worker: _Worker) -> Known | str:
    if not _in_splitwise(worker):
        raise _absent("splitwise", worker, "it has llama2-70b and bloom-176b in 16 bits on a100-80g and h100")
    model, gpu = worker.model.name, worker.gpu.name
    table = splitwise.splitwise(model, gpu, worker.tp)
    if table is None or worker.pp > 1:
        tps = ", ".join(map(str, splitwise.measured_tps(model, gpu)))
        return f"Splitwise's table has {model} on {gpu} at TP {tps}, PP 1 only; --source roofline estimates others"
    return Known(table, _kv_tokens(worker), "splitwise", table.findings)


def _configured(worker: _Worker) -> Known | str:
    if not configurator.installed():
        install = f"pip install 'splitserve[{configurator.EXTRA}]'"
        raise ConfigError("--source", f"aiconfigurator is not installed: {install}")
    table = configurator.configurator(*worker[:3])
    if isinstance(table, str):
        return table
    hop_s, hop_token_s = hop(worker.model, worker.gpu)
    notes = ("aiconfigurator's times are of kernels alone: an engine's own overhead comes on top",)
    staged = table.staged(worker.pp, hop_s, hop_token_s)
    return Known(staged, _kv_tokens(worker), "aiconfigurator", table.findings, notes)


def _roofline(worker: _Worker) -> Known | str:
    notes: tuple[str, ...] = (
        "the roofline is what a good engine of today reaches; measured ones of 2023 took up to 4 times as long",
    )
    if worker.model.experts or worker.model.latent_kv:
        notes += (
            "the roofline is less sure of experts and latent attention: measured kernels take 0.8 to 2.8 times it",
        )
    return Known(roofline(*worker), _kv_tokens(worker), "roofline", (), notes)


_SOURCES: dict[str, Callable[[_Worker], Known | str]] = {
    "distserve": _distserve,
    "distserve-vllm": _distserve_vllm,
    "splitwise": _splitwise,
    "aiconfigurator": _configured,
    "roofline": _roofline,
}


def _in_distserve(worker: _Worker, engine: str) -> bool:
    model, gpu = worker.model, worker.gpu
    return gpu.name == distserve.GPU and _sixteen_bits(model) and bool(distserve.measured_tps(model.name, engine))


def _in_splitwise(worker: _Worker) -> bool:
    return _sixteen_bits(worker.model) and bool(splitwise.measured_tps(worker.model.name, worker.gpu.name))


def _sixteen_bits(model: ModelShape) -> bool:
    return {model.dtype, model.weight_dtype, model.kv_dtype} <= {"fp16", "bf16"}


def _absent(source: str, worker: _Worker, has: str) -> ConfigError:
    model = worker.model
    of = f"{model.name} ({model.weight_dtype} weights, {model.kv_dtype} KV) on {worker.gpu.name}"
    return ConfigError("--source", f"{source} has no {of}; {has}")


# what fits


def _kv_tokens(worker: _Worker) -> int:
    """DistServe's own count where it has one."""
    if _in_distserve(worker, "distserve"):
        counted = distserve.max_num_tokens(worker.model.name, worker.tp, worker.pp)
        if counted is not None:
            return counted
    return kv_capacity(*worker)


def _refused(model: ModelShape, tp: int, pp: int) -> str | None:
    if tp < 1 or pp < 1:
        return f"TP {tp} PP {pp} is no worker: both are at least 1"
    if model.heads % tp:
        return f"TP {tp} does not divide the {model.heads} attention heads of {model.name}"
    if not model.latent_kv and model.kv_heads % tp and tp % model.kv_heads:
        return f"TP {tp} neither divides nor is a multiple of the {model.kv_heads} KV heads of {model.name}"
    if pp > model.layers:
        return f"PP {pp} is more than the {model.layers} layers of {model.name}"
    return None


def _too_small(worker: _Worker) -> str:
    model, gpu, tp, pp = worker
    held = f"{model.name} in {model.weight_dtype} is {model.weight_bytes / 2**30:.0f} GiB of weights"
    has = f"{tp * pp} x {gpu.name} of {gpu.memory_bytes / 2**30:.0f} GiB (TP {tp} PP {pp}) leave no room for KV"
    fits = _least(model, gpu)
    return f"{held}; {has}; " + (f"{fits} would do" if fits else "no worker of up to 512 GPUs would do")


def _least(model: ModelShape, gpu: Gpu) -> str | None:
    """The smallest worker of powers of two that holds the model and at least one sequence of 2,048 tokens."""
    splits = [(tp, pp) for tp in (1, 2, 4, 8, 16) for pp in (1, 2, 4, 8, 16, 32) if _refused(model, tp, pp) is None]
    fitting = [split for split in splits if kv_capacity(model, gpu, *split) >= 2048]
    if not fitting:
        return None
    tp, pp = min(fitting, key=lambda split: (split[0] * split[1], split[1]))
    return f"{tp * pp} (TP {tp} PP {pp})"


def _weight_bytes(model: ModelShape, tp: int, pp: int) -> float:
    """Of the fullest GPU: the widest stage's layers, and the larger of what the first and the last stage add."""
    layers = (model.dense_bytes + model.routed_bytes) * math.ceil(model.layers / pp) / model.layers
    tables = model.weight_bytes - model.dense_bytes - model.routed_bytes
    ends = tables if pp == 1 else max(model.head_bytes, tables - model.head_bytes)
    return (layers + ends) / tp


def _activation_bytes(model: ModelShape, tp: int) -> float:
    """Of one step: the residual stream and its copies, and the widest inner layer."""
    inner = model.mlp_params / model.hidden / tp
    return _STEP_TOKENS * (4 * model.hidden + inner) * model.activation_bytes
