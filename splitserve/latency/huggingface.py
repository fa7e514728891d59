"""Reads a Hugging Face config.json as a `ModelShape`, whatever the family calls its fields. Pure; needs no torch.

One file knows those spellings. A kind of model whose cost `ModelShape` can't state (state-space layers, encoders,
chunked attention) is refused with a sentence, not approximated.
"""

import json
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

from splitserve.core.errors import ConfigError
from splitserve.latency.sizes import Experts, ModelShape

_DTYPES = {
    "float32": "fp32",
    "float": "fp32",
    "fp32": "fp32",
    "float16": "fp16",
    "half": "fp16",
    "fp16": "fp16",
    "bfloat16": "bf16",
    "bf16": "bf16",
}
_QUANTIZATIONS = {
    "fp8": "fp8",
    "int8": "int8",
    "int4": "int4",
    "awq": "int4",
    "gptq": "int4",
    "awq_marlin": "int4",
    "gptq_marlin": "int4",
    "mxfp4": "mxfp4",
}
_KV_DTYPES = {**_DTYPES, "fp8": "fp8", "fp8_e4m3": "fp8", "fp8_e5m2": "fp8", "int8": "int8"}
# Families whose MLP is two matrices, up and down; all others have a gate as well.
_PLAIN_MLP = {
    "opt",
    "bloom",
    "gpt2",
    "gptj",
    "gpt_neox",
    "gpt_bigcode",
    "falcon",
    "mpt",
    "phi",
    "starcoder2",
    "nemotron",
}
_TIED = {"opt", "bloom", "gpt2", "falcon", "mpt", "gemma", "gemma2", "gemma3", "gemma3_text", "cohere", "cohere2"}
_WINDOW_PATTERN = {"gemma2": 2, "gemma3": 6, "gemma3_text": 6}  # every n-th layer sees all; older configs leave it out
# What Gemma 3's config.json leaves out where it is the family's default.
_GEMMA_3 = {
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 4096,
}
_DEFAULTS = {"gemma3": _GEMMA_3, "gemma3_text": _GEMMA_3}
_ALIASES = {"bloom": "bloom-176b", "deepseek-r1": "deepseek-v3", "mixtral": "mixtral-8x7b"}
_SUFFIX = re.compile(r"-(hf|it|pt|instruct|chat|base|fp8|v0\.1|0324|0528|2507)$")


def read(name: str, dtype: str | None, quantization: str | None, kv_dtype: str | None) -> ModelShape:
    """See `shape.shape`."""
    directory = Path(name).expanduser()
    if directory.is_dir():
        return _Config(str(directory / "config.json"), directory.resolve().name, _loaded(directory)).shape(
            dtype, quantization, kv_dtype
        )
    known = _known(name)
    text = files("splitserve.latency").joinpath(f"data/models/{known}.json").read_text(encoding="utf-8")
    return _Config(f"model {known}", known, json.loads(text)).shape(dtype, quantization, kv_dtype)


def known_models() -> tuple[str, ...]:
    """Names that need no directory."""
    folder = files("splitserve.latency").joinpath("data/models")
    return tuple(sorted(entry.name.removesuffix(".json") for entry in folder.iterdir()))


def _known(name: str) -> str:
    wanted = name.strip().lower().rsplit("/", 1)[-1].replace("meta-", "").replace("llama-2-", "llama2-")
    while (shorter := _SUFFIX.sub("", wanted)) != wanted:
        wanted = shorter
    wanted = _ALIASES.get(wanted, wanted)
    if wanted in known_models():
        return wanted
    listed = ", ".join(known_models())
    raise ConfigError("model", f"{name!r} is neither a directory with a config.json nor one of: {listed}")


def _loaded(directory: Path) -> Mapping[str, Any]:
    file = directory / "config.json"
    if not file.is_file():
        raise ConfigError(str(directory), "not a model directory: it has no config.json")
    try:
        loaded = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(str(file), f"not valid JSON: {error}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(str(file), "must hold a JSON object")
    return loaded


class _Config:
    """One config.json, and where it came from for errors."""

    def __init__(self, where: str, name: str, config: Mapping[str, Any]) -> None:
        self._where = where
        self._name = name
        self._whole = config
        inner = config.get("text_config")
        text = inner if isinstance(inner, dict) else config
        self._kind = str(text.get("model_type") or config.get("model_type") or "")
        self._text: Mapping[str, Any] = {**_DEFAULTS.get(self._kind, {}), **text}

    def shape(self, dtype: str | None, quantization: str | None, kv_dtype: str | None) -> ModelShape:
        self._refuse_unknown_kinds()
        layers, hidden = (
            self._int("num_hidden_layers", "n_layer", "n_layers"),
            self._int("hidden_size", "n_embd", "d_model"),
        )
        heads = self._int("num_attention_heads", "n_head", "n_heads")
        vocabulary, longest = self._int("vocab_size"), self._longest()
        activations = self._dtype(dtype)
        window, windowed = self._windows(layers)
        latent = self._text.get("kv_lora_rank") is not None
        attention = self._latent_attention(hidden, heads) if latent else self._attention(hidden, heads)
        experts = self._experts(layers, hidden)
        return ModelShape(
            name=self._name,
            layers=layers,
            hidden=hidden,
            heads=heads,
            vocabulary=vocabulary,
            max_model_len=longest,
            mlp_params=self._mlp(hidden, self._intermediate(hidden)),
            embedding_params=self._embeddings(vocabulary, hidden, longest),
            tied=bool(
                self._text.get("tie_word_embeddings", self._whole.get("tie_word_embeddings", self._kind in _TIED))
            ),
            dtype=activations,
            weight_dtype=self._quantization(quantization) or activations,
            kv_dtype=self._kv_dtype(kv_dtype) or activations,
            experts=experts,
            window=window,
            windowed_layers=windowed,
            **attention,
        )

    # attention

    def _attention(self, hidden: int, heads: int) -> dict[str, Any]:
        kv_heads = self._kv_heads(heads)
        head_dim = self._optional("head_dim", "kv_channels") or self._whole_head(hidden, heads)
        return {
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "attention_params": 2 * hidden * heads * head_dim + 2 * hidden * kv_heads * head_dim,
            "kv_values": 2 * kv_heads * head_dim,
            "latent_kv": False,
            "pair_flops": 4.0 * heads * head_dim,
            "decode_pair_flops": 4.0 * heads * head_dim,
        }

    def _latent_attention(self, hidden: int, heads: int) -> dict[str, Any]:
        """MLA (DeepSeek-V2, arXiv:2405.04434 section 2.1): prompts are read with keys and values expanded, tokens are
        made against the latent itself."""
        latent, rope = self._int("kv_lora_rank"), self._int("qk_rope_head_dim")
        nope, value = self._int("qk_nope_head_dim"), self._int("v_head_dim")
        low = self._optional("q_lora_rank")
        query = (hidden + heads * (nope + rope)) * low if low else hidden * heads * (nope + rope)
        return {
            "kv_heads": heads,
            "head_dim": nope + rope,
            "attention_params": query
            + hidden * (latent + rope)
            + latent * heads * (nope + value)
            + heads * value * hidden,
            "kv_values": latent + rope,
            "latent_kv": True,
            "pair_flops": 2.0 * heads * (nope + rope + value),
            "decode_pair_flops": 2.0 * heads * (2 * latent + rope),
        }

    def _kv_heads(self, heads: int) -> int:
        if self._text.get("multi_query") and not self._text.get("new_decoder_architecture"):
            return 1
        return self._optional("num_key_value_heads", "num_kv_heads", "n_head_kv") or heads

    def _whole_head(self, hidden: int, heads: int) -> int:
        if hidden % heads:
            self._fail(
                "num_attention_heads", f"{heads} heads do not divide hidden_size {hidden}, and there is no head_dim"
            )
        return hidden // heads

    def _windows(self, layers: int) -> tuple[int, int]:
        """The window in tokens and how many layers have one."""
        window = self._optional("sliding_window") or 0
        if not window or self._text.get("use_sliding_window") is False:
            return 0, 0
        kinds = self._text.get("layer_types")
        if isinstance(kinds, list):
            return window, sum(kind == "sliding_attention" for kind in kinds)
        pattern = self._optional("sliding_window_pattern") or _WINDOW_PATTERN.get(self._kind)
        return window, layers - layers // pattern if pattern else layers

    # MLP

    def _intermediate(self, hidden: int) -> int:
        return self._optional("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size") or 4 * hidden

    def _mlp(self, hidden: int, intermediate: int) -> int:
        return (2 if self._kind in _PLAIN_MLP else 3) * hidden * intermediate

    def _experts(self, layers: int, hidden: int) -> Experts | None:
        count = self._optional("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts") or 0
        if count < 2:
            return None
        size = self._optional("moe_intermediate_size", "expert_ffn_hidden_size") or self._intermediate(hidden)
        shared = self._optional("shared_expert_intermediate_size") or size * (self._optional("n_shared_experts") or 0)
        chosen = self._int("num_experts_per_tok", "experts_per_token", "num_experts_per_token", "moe_topk")
        if chosen > count:
            self._fail("num_experts_per_tok", f"{chosen} is more than the {count} experts there are")
        return Experts(
            layers=layers - self._dense_layers(layers),
            count=count,
            chosen=chosen,
            expert_params=self._mlp(hidden, size),
            shared_params=self._mlp(hidden, shared) + hidden * count,
        )

    def _dense_layers(self, layers: int) -> int:
        first = self._optional("first_k_dense_replace") or 0
        every = self._optional("moe_layer_freq", "decoder_sparse_step") or 1
        named = self._text.get("mlp_only_layers") or ()
        step_from = 0 if "moe_layer_freq" in self._text else 1
        sparse = [layer for layer in range(first, layers) if layer not in named and (layer + step_from) % every == 0]
        return layers - len(sparse)

    def _embeddings(self, vocabulary: int, hidden: int, longest: int) -> int:
        learned_positions = longest if self._kind in ("opt", "gpt2", "gpt_bigcode") else 0
        return (vocabulary + learned_positions) * hidden

    def _longest(self) -> int:
        # BLOOM's positions are relative and its config has no limit; 2,048 is what it was trained on.
        return self._optional("max_position_embeddings", "n_positions", "max_seq_len", "seq_length") or 2048

    # number types

    def _dtype(self, asked: str | None) -> str:
        if asked and asked != "auto":
            return _looked_up("--dtype", asked, _DTYPES)
        said = str(
            self._text.get("dtype") or self._text.get("torch_dtype") or self._whole.get("torch_dtype") or "bfloat16"
        )
        return _DTYPES.get(said.removeprefix("torch."), "bf16")

    def _quantization(self, asked: str | None) -> str | None:
        if asked == "none":
            return None
        if asked and asked != "auto":
            return _looked_up("--quantization", asked, _QUANTIZATIONS)
        said = self._whole.get("quantization_config") or self._text.get("quantization_config")
        return self._said_quantization(said) if isinstance(said, dict) else None

    def _said_quantization(self, said: Mapping[str, Any]) -> str | None:
        method = str(said.get("quant_method", ""))
        if method in ("awq", "gptq") and said.get("bits", said.get("w_bit", 4)) == 8:
            return "int8"
        if method == "bitsandbytes":
            return "int4" if said.get("load_in_4bit") else "int8"
        if method == "compressed-tensors":
            return self._compressed(said)
        if method not in _QUANTIZATIONS:
            self._fail("quantization_config", f"quant_method {method!r} is not known; give --quantization")
        return _QUANTIZATIONS[method]

    def _compressed(self, said: Mapping[str, Any]) -> str:
        for group in dict(said.get("config_groups") or {}).values():
            weights = group.get("weights") or {}
            if weights.get("num_bits") == 4:
                return "int4"
            if weights.get("num_bits") == 8:
                return "fp8" if weights.get("type") == "float" else "int8"
        return self._fail(
            "quantization_config", "its config_groups state neither 4 nor 8 bits for the weights; give --quantization"
        )

    def _kv_dtype(self, asked: str | None) -> str | None:
        return None if asked in (None, "auto") else _looked_up("--kv-dtype", str(asked), _KV_DTYPES)

    # fields

    def _refuse_unknown_kinds(self) -> None:
        if self._whole.get("is_encoder_decoder"):
            self._fail("is_encoder_decoder", "encoder-decoder models are not served here")
        if self._kind.startswith("llama4"):
            self._fail("model_type", "Llama 4's chunked attention is not modelled")
        kinds = self._text.get("layer_types")
        if isinstance(kinds, list):
            strange = {str(kind) for kind in kinds} - {"full_attention", "sliding_attention"}
            if strange:
                self._fail("layer_types", f"layers of kind {', '.join(sorted(strange))} are not modelled")

    def _int(self, *names: str) -> int:
        found = self._optional(*names)
        if not found:
            self._fail(names[0], "missing; need the config.json of a decoder-only language model")
        return found

    def _optional(self, *names: str) -> int | None:
        for name in names:
            value = self._text.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                self._fail(name, f"must be a whole number that is not negative, is {value!r}")
            return value
        return None

    def _fail(self, field: str, sentence: str) -> NoReturn:
        raise ConfigError(self._where, f"{field}: {sentence}")


def _looked_up(option: str, asked: str, table: Mapping[str, str]) -> str:
    if asked.lower() in table:
        return table[asked.lower()]
    raise ConfigError(option, f"{asked!r} is not known; one of {', '.join(sorted(table))}")
