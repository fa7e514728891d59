"""The analytic model, for any shape on any GPU of the datasheet: each part of a step takes as long as its arithmetic or
its memory traffic, whichever is longer (the roofline: Williams et al., CACM 2009), and the parts add up.

    linear layers    2 FLOPs a parameter and token, the weights read once (of experts: those expected to be touched)
    output head      2 FLOPs a parameter and sequence, read once
    prompt attention `pair_flops` a layer and pair;  a window bounds what a token sees
    decode attention `decode_pair_flops` a layer and token read;  the KV is read, by each rank its share
    all-reduce       twice a layer and tensor group, ring: 2 (tp - 1) / tp of the activations, and a latency
    pipeline         activations to the next stage
    overhead         of launching a layer's kernels, and of the engine's own work per stage

Nothing overlaps. A step of prefill and decode reads the weights once for all its tokens. It predicts what a good engine
of today reaches; `Efficiency` holds all that is not a datasheet's. Predicted over measured, by `pytest -s
tests/unit/latency/test_roofline.py`: 0.49 to 1.06 of DistServe's fit and 0.25 to 1.00 of Splitwise's table (engines of
2023, whose constant costs weigh on short steps), within a quarter of the kernels that aiconfigurator-core 0.12 measured
for dense models; of experts and latent attention it is less sure (DeepSeek-V3 on H200: 0.36 to 0.79).
"""

import math
from dataclasses import dataclass

from splitserve.latency.gpus import Gpu
from splitserve.latency.model import Provenance, Step, Trust
from splitserve.latency.sizes import Experts, ModelShape

_NVLINK_BYTES_PER_S = 100e9  # a link at least so fast is a switch or mesh made for collectives, not PCIe


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Shares of the datasheet's peaks, and times that it doesn't state.

    `gemm`: DistServe's fit has OPT-13B prefill at 0.10 ms a token on A100, 81% of its peak at the margin and, with its
    fixed cost, 58% at 512 tokens. `gemm_8_bit` and `experts` (many small matrices) are what the measured kernels of
    aiconfigurator-core 0.12 come to for Llama-3.1-8B in FP8 and Qwen3-235B-A22B. `attention`: FlashAttention-2 reaches
    50-73% of A100's peak forward without a causal mask, less with one (arXiv:2307.08691 section 4). `memory`, `link`:
    what copy kernels and NCCL's ring are commonly seen to reach. Latencies and overheads are estimates.
    """

    gemm: float = 0.7
    gemm_8_bit: float = 0.5
    experts: float = 0.35
    attention: float = 0.5
    memory: float = 0.8
    link: float = 0.7
    nvlink_latency_s: float = 10e-6
    pcie_latency_s: float = 30e-6
    layer_s: float = 15e-6  # between a layer's kernels, replayed as one CUDA graph
    stage_s: float = 2e-3  # scheduling, input preparation and sampling of one step


@dataclass(frozen=True, slots=True)
class _Experts:
    flops_s: float  # per token
    expert_s: float  # to read one expert in all layers of the share
    count: int
    missed: float  # the chance that a token leaves an expert alone

    @classmethod
    def of(cls, experts: Experts, flops_per_s: float, bytes_per_s: float, bytes_each: float, tp: int) -> "_Experts":
        flops = 2.0 * experts.layers * experts.chosen * experts.expert_params
        return cls(
            flops / flops_per_s / tp,
            experts.layers * bytes_each / bytes_per_s / tp,
            experts.count,
            1.0 - experts.chosen / experts.count,
        )

    def seconds(self, tokens: int) -> float:
        flops_s: float = self.flops_s * tokens
        read_s: float = self.expert_s * self.count * (1.0 - self.missed**tokens)
        return flops_s if flops_s > read_s else read_s


@dataclass(frozen=True, slots=True)
class RooflineLatency:
    """One worker. Everything in seconds of all layers on one of `tp` ranks; `share` is the slowest stage's part."""

    fixed_s: float  # a pass's overheads and latencies
    stage_fixed_s: float
    weights_s: float  # reading the linear layers that every token passes
    token_s: float  # multiplying them, per token
    sent_s: float  # all-reduce, per token
    experts: _Experts | None
    head_read_s: float
    head_s: float
    pair_s: float  # full layers, per pair
    window_pair_s: float  # windowed layers
    read_s: float  # decode attention, full layers, per token read
    window_read_s: float
    window: int
    hop_s: float  # to the next stage, per token
    share: float
    stages: int
    source: str

    def step_s(self, step: Step) -> float:
        tokens = step[0] + step[3]
        if not tokens:
            return 0.0
        return (
            self.fixed_s + self._layers_s(step, tokens) + self._head_s(step) + self.hop_s * (self.stages - 1) * tokens
        )

    def stage_s(self, step: Step) -> float:
        tokens = step[0] + step[3]
        if not tokens:
            return 0.0
        layers_s = self._layers_s(step, tokens) * self.share
        hop_s = self.hop_s * tokens if self.stages > 1 else 0.0
        return self.stage_fixed_s + layers_s + self._head_s(step) + hop_s

    def _layers_s(self, step: Step, tokens: int) -> float:
        prompt, pairs, _, decodes, context = step
        linear = self.token_s * tokens
        seconds = (linear if linear > self.weights_s else self.weights_s) + self.sent_s * tokens
        if self.experts is not None:
            seconds += self.experts.seconds(tokens)
        seconds += self.pair_s * pairs + self.read_s * context
        if self.window:
            seen, kept = prompt * self.window, decodes * self.window
            seconds += self.window_pair_s * (pairs if pairs < seen else seen)
            seconds += self.window_read_s * (context if context < kept else kept)
        return seconds

    def _head_s(self, step: Step) -> float:
        multiplied = self.head_s * (step[2] + step[3])
        return multiplied if multiplied > self.head_read_s else self.head_read_s

    def provenance(self, step: Step) -> Provenance:
        return Provenance(Trust.ANALYTIC, self.source)


def roofline(model: ModelShape, gpu: Gpu, tp: int, pp: int, efficiency: Efficiency | None = None) -> RooflineLatency:
    """The worker of `tp` * `pp` GPUs. Whether the weights fit it doesn't ask: `catalog.costs` does."""
    e = efficiency or Efficiency()
    bytes_per_s = gpu.memory_bytes_per_s * e.memory
    flops_per_s = gpu.flops_per_s(model.compute_dtype)
    eight_bit = model.compute_dtype in ("fp8", "int8") and gpu.multiplies(model.compute_dtype)
    dense_per_s = flops_per_s * (e.gemm_8_bit if eight_bit else e.gemm)
    link_latency_s, hop_token_s = hop(model, gpu, e)
    widest = math.ceil(model.layers / pp)
    full, windowed = model.layers - model.windowed_layers, model.windowed_layers
    pair_s, read_s = _attention(model, gpu, tp, e)
    layer_fixed_s = e.layer_s + (2 * link_latency_s if tp > 1 else 0.0)
    hop_latency_s = link_latency_s if pp > 1 else 0.0
    return RooflineLatency(
        fixed_s=model.layers * layer_fixed_s + pp * (e.stage_s + hop_latency_s),
        stage_fixed_s=widest * layer_fixed_s + e.stage_s + hop_latency_s,
        weights_s=model.dense_bytes / tp / bytes_per_s,
        token_s=2.0 * model.dense_params / tp / dense_per_s,
        sent_s=2 * model.layers * hop_token_s * 2 * (tp - 1) / tp,
        experts=_experts(model, flops_per_s * e.experts, bytes_per_s, tp),
        head_read_s=model.head_bytes / tp / bytes_per_s,
        head_s=2.0 * model.head_params / tp / (gpu.flops_per_s(model.dtype) * e.gemm),
        pair_s=pair_s * full,
        window_pair_s=pair_s * windowed,
        read_s=read_s * full,
        window_read_s=read_s * windowed,
        window=model.window if windowed else 0,
        hop_s=hop_token_s,
        share=widest / model.layers,
        stages=pp,
        source=f"roofline, {model.name} ({model.weight_dtype}) on {gpu.name}, TP {tp}"
        + (f" PP {pp}" if pp > 1 else ""),
    )


def hop(model: ModelShape, gpu: Gpu, efficiency: Efficiency | None = None) -> tuple[float, float]:
    """Seconds to hand a step to the next pipeline stage: of the message, and per token."""
    e = efficiency or Efficiency()
    return _latency_s(gpu, e), model.hidden * model.activation_bytes / (gpu.link_bytes_per_s * e.link)


def _experts(model: ModelShape, flops_per_s: float, bytes_per_s: float, tp: int) -> _Experts | None:
    experts = model.experts
    if experts is None:
        return None
    each = model.routed_bytes / experts.layers / experts.count
    return _Experts.of(experts, flops_per_s, bytes_per_s, each, tp)


def _attention(model: ModelShape, gpu: Gpu, tp: int, e: Efficiency) -> tuple[float, float]:
    """Seconds of one layer: per pair of a prompt, per token that a decode reads. In 16 bits whatever the weights."""
    flops_per_s = gpu.flops_per_s(model.dtype) * e.attention
    multiplied = model.decode_pair_flops / tp / flops_per_s
    read = model.kv_layer_bytes * model.kv_share(tp) / (gpu.memory_bytes_per_s * e.memory)
    return model.pair_flops / tp / flops_per_s, max(multiplied, read)


def _latency_s(gpu: Gpu, e: Efficiency) -> float:
    return e.nvlink_latency_s if gpu.link_bytes_per_s >= _NVLINK_BYTES_PER_S else e.pcie_latency_s
