"""What a model's sizes say of its cost: weights to hold and read, KV to keep, FLOPs to spend. Pure values.

`shape.shape(name)` makes one. Expert and data parallelism are no part of it: a worker splits a model by tensor and
pipeline ranks only. Biases and norms are left out of the counts: under 0.1% of the parameters of any model here.
"""

from dataclasses import dataclass

_WEIGHT_BITS = {
    "fp32": 32.0,
    "fp16": 16.0,
    "bf16": 16.0,
    "fp8": 8.0,
    "int8": 8.0,
    # AWQ and GPTQ keep a 16-bit scale and a 4-bit zero point for each group of 128; MX an 8-bit scale for each 32.
    "int4": 4 + 20 / 128,
    "mxfp4": 4 + 8 / 32,
}


@dataclass(frozen=True, slots=True)
class Experts:
    """The mixture of experts in `layers` of the layers. Each token passes `chosen` of `count` experts, drawn by a
    router, and the shared ones always. Parameters are one layer's."""

    layers: int
    count: int
    chosen: int
    expert_params: int  # of one expert
    shared_params: int  # shared experts and the router

    def touched(self, tokens: float) -> float:
        """How many of a layer's experts a step of that many tokens reads, expected, if tokens choose evenly and
        independently: count * (1 - (1 - chosen / count) ** tokens)."""
        missed: float = (1.0 - self.chosen / self.count) ** tokens
        return self.count * (1.0 - missed)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """One decoder model and the number types that it is served in.

    `attention_params` and `mlp_params` are one layer's linear layers; `mlp_params` is of the layers without experts.
    `kv_values` is what one token leaves in one layer's cache: 2 * kv_heads * head_dim, or MLA's latent, which every
    tensor rank keeps whole (`latent_kv`). `pair_flops` and `decode_pair_flops` are one layer's attention for one query
    and one key, when a prompt is read and when a token is made. `windowed_layers` see the last `window` tokens only.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    max_model_len: int
    attention_params: int
    mlp_params: int
    embedding_params: int  # looked up, not multiplied: input and position tables
    tied: bool  # the output head is the input table
    kv_values: int
    latent_kv: bool
    pair_flops: float
    decode_pair_flops: float
    dtype: str  # of activations and unquantised weights: fp32, fp16, bf16
    weight_dtype: str  # of the quantised layers; `dtype` if none are
    kv_dtype: str
    experts: Experts | None = None
    window: int = 0
    windowed_layers: int = 0

    @property
    def head_params(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def dense_params(self) -> int:
        """Of all layers' linear layers that every token passes."""
        experts = self.experts
        always = self.layers * self.attention_params
        if experts is None:
            return always + self.layers * self.mlp_params
        return always + (self.layers - experts.layers) * self.mlp_params + experts.layers * experts.shared_params

    @property
    def routed_params(self) -> int:
        """Of all layers' routed experts."""
        return self.experts.layers * self.experts.count * self.experts.expert_params if self.experts else 0

    @property
    def params(self) -> int:
        head = 0 if self.tied else self.head_params
        return self.dense_params + self.routed_params + self.embedding_params + head

    @property
    def active_params(self) -> int:
        """That multiply for each token: the chosen experts and the output head, not what is only looked up."""
        experts = self.experts
        chosen = experts.layers * experts.chosen * experts.expert_params if experts else 0
        return self.dense_params + chosen + self.head_params

    @property
    def compute_dtype(self) -> str:
        """What the layers multiply in. 4-bit weights are widened first."""
        return self.weight_dtype if self.weight_dtype in ("fp8", "int8") else self.dtype

    @property
    def dense_bytes(self) -> float:
        """Weights of `dense_params`. MXFP4 quantises the routed experts only."""
        kind = self.dtype if self.weight_dtype == "mxfp4" else self.weight_dtype
        return self.dense_params * _WEIGHT_BITS[kind] / 8

    @property
    def routed_bytes(self) -> float:
        return self.routed_params * _WEIGHT_BITS[self.weight_dtype] / 8

    @property
    def head_bytes(self) -> float:
        """Of the output head, which quantisation leaves alone."""
        return self.head_params * _WEIGHT_BITS[self.dtype] / 8

    @property
    def weight_bytes(self) -> int:
        """Of the whole model."""
        unquantised = self.embedding_params + (0 if self.tied else self.head_params)
        return int(self.dense_bytes + self.routed_bytes + unquantised * _WEIGHT_BITS[self.dtype] / 8)

    @property
    def activation_bytes(self) -> float:
        """Of one value."""
        return _WEIGHT_BITS[self.dtype] / 8

    @property
    def kv_layer_bytes(self) -> float:
        """Of one token in one layer."""
        return self.kv_values * _WEIGHT_BITS[self.kv_dtype] / 8

    @property
    def kv_bytes_per_token(self) -> int:
        """Of one token in all layers; those with a window forget it later."""
        return int(self.layers * self.kv_layer_bytes)

    def kv_bytes(self, tokens: int) -> float:
        """Of a sequence of that many tokens, its windowed layers keeping their window only."""
        full = self.layers - self.windowed_layers
        return self.kv_layer_bytes * (full * tokens + self.windowed_layers * min(tokens, self.window))

    def kv_share(self, tp: int) -> float:
        """The part of a token's KV that one of `tp` tensor ranks keeps: an even one, unless there are fewer KV heads
        than ranks (each keeps one head) or the KV is a latent (each keeps all)."""
        return 1.0 if self.latent_kv else max(1.0 / tp, 1.0 / self.kv_heads)
