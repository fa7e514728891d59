import json
from pathlib import Path
from typing import Any

import pytest

from splitserve.core.errors import ConfigError
from splitserve.latency.shape import Experts, known_models, shape

# What the models' makers say, in billions: parameters, and those active for a token.
_PUBLISHED = {
    "opt-13b": (12.85, None),
    "opt-66b": (65.7, None),
    "opt-175b": (175, None),
    "bloom-176b": (176.2, None),
    "llama2-70b": (69.0, None),
    "llama-3.1-8b": (8.03, None),
    "llama-3.1-70b": (70.6, None),
    "llama-3.1-405b": (405.9, None),
    "qwen3-8b": (8.2, None),
    "qwen3-32b": (32.8, None),
    "qwen3-235b-a22b": (235, 22),
    "mixtral-8x7b": (46.7, 12.9),
    "deepseek-v3": (671, 37),
    "gpt-oss-120b": (116.8, 5.13),
    "gemma-3-27b": (27.0, None),
}


@pytest.mark.parametrize("name", _PUBLISHED)
def test_parameters_are_what_the_makers_say_within_two_percent(name: str) -> None:
    total, active = _PUBLISHED[name]
    assert shape(name).params / 1e9 == pytest.approx(total, rel=0.01)
    if active:
        assert shape(name).active_params / 1e9 == pytest.approx(active, rel=0.02)


def test_kv_of_512_tokens_of_opt_66b_is_the_1_125_gib_that_distserve_states() -> None:
    assert shape("opt-66b").kv_bytes(512) == 1.125 * 2**30
    assert shape("opt-66b").kv_bytes_per_token * 512 == 1.125 * 2**30


def test_grouped_queries_keep_a_share_of_the_kv() -> None:
    assert shape("llama-3.1-70b").kv_bytes_per_token == 2 * 80 * 8 * 128 * 2


def test_latent_attention_keeps_one_latent_a_layer_whole_on_each_rank() -> None:
    deepseek = shape("deepseek-v3")
    assert deepseek.kv_bytes_per_token == 61 * (512 + 64) * 2
    assert deepseek.kv_share(8) == 1.0
    assert shape("llama-3.1-70b").kv_share(8) == 1 / 8
    assert shape("llama-3.1-70b").kv_share(16) == 1 / 8


def test_a_windowed_layer_keeps_its_window_only() -> None:
    gemma = shape("gemma-3-27b")
    assert gemma.windowed_layers == 52
    assert gemma.kv_bytes(1024) == 1024 * gemma.kv_bytes_per_token
    assert gemma.kv_bytes(8192) == gemma.kv_layer_bytes * (10 * 8192 + 52 * 1024)


def test_quantised_weights_are_smaller_and_tables_stay_as_they_are() -> None:
    wide, fp8, int4 = (shape("llama-3.1-8b", quantization=kind) for kind in (None, "fp8", "awq"))
    tables = 2 * 128256 * 4096 * 2
    assert fp8.weight_bytes - tables == (wide.weight_bytes - tables) / 2
    assert int4.weight_bytes - tables == pytest.approx((wide.weight_bytes - tables) * 4.15625 / 16)
    assert (wide.compute_dtype, fp8.compute_dtype, int4.compute_dtype) == ("bf16", "fp8", "bf16")


def test_mxfp4_is_of_the_experts_alone() -> None:
    gpt_oss = shape("gpt-oss-120b")
    assert gpt_oss.weight_bytes / 2**30 == pytest.approx(60.8, rel=0.01)  # the checkpoint's own size


def test_kv_in_eight_bits_is_half() -> None:
    assert shape("opt-13b", kv_dtype="fp8").kv_bytes_per_token * 2 == shape("opt-13b").kv_bytes_per_token
    assert shape("opt-13b", kv_dtype="auto") == shape("opt-13b")


def test_the_configs_own_quantisation_is_taken_unless_told_otherwise() -> None:
    assert shape("deepseek-v3").weight_dtype == "fp8"
    assert shape("deepseek-v3", quantization="none").weight_dtype == "bf16"


@pytest.mark.parametrize(
    "spelling",
    ["meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Meta-Llama-3.1-8B", "LLAMA-3.1-8b"],
)
def test_a_hub_name_is_the_model_it_names(spelling: str) -> None:
    assert shape(spelling) == shape("llama-3.1-8b")
    assert shape("meta-llama/Llama-2-70b-chat-hf") == shape("llama2-70b")


def test_an_unknown_model_is_refused_with_the_known_names() -> None:
    with pytest.raises(ConfigError, match=r"'gpt-9' is neither a directory with a config\.json nor one of: bloom-176b"):
        shape("gpt-9")


@pytest.mark.parametrize(
    ("options", "option"),
    [({"dtype": "int3"}, "--dtype"), ({"quantization": "q5"}, "--quantization"), ({"kv_dtype": "q5"}, "--kv-dtype")],
)
def test_an_unknown_number_type_names_its_option(options: dict[str, str], option: str) -> None:
    with pytest.raises(ConfigError, match=f"^{option}: .* is not known; one of"):
        shape("opt-13b", **options)


def test_experts_touched_grow_from_the_chosen_to_all() -> None:
    experts = Experts(layers=1, count=128, chosen=8, expert_params=1, shared_params=0)
    assert experts.touched(1) == pytest.approx(8)
    assert experts.touched(16) == pytest.approx(128 * (1 - (120 / 128) ** 16))
    assert experts.touched(4096) == pytest.approx(128)


# directories

_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}


def _directory(tmp_path: Path, **changes: Any) -> str:
    config = {key: value for key, value in {**_LLAMA, **changes}.items() if value is not ...}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


def test_a_directory_is_read(tmp_path: Path) -> None:
    read = shape(_directory(tmp_path))
    assert read.params == 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128) + 2 * 1000 * 64
    assert (read.name, read.dtype, read.max_model_len) == (tmp_path.name, "fp16", 512)


def test_a_multimodal_directory_is_read_as_its_text_model(tmp_path: Path) -> None:
    plain = shape(_directory(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": _LLAMA}))
    assert shape(str(tmp_path)) == plain


def test_what_gemma_3_leaves_out_is_the_familys_default(tmp_path: Path) -> None:
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    config = {"model_type": "gemma3", "text_config": {**text, "sliding_window": 1024}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = shape(str(tmp_path))
    assert read.params / 1e9 == pytest.approx(3.88, rel=0.01)  # of Gemma 3 4B without its vision tower
    assert (read.window, read.windowed_layers) == (1024, 29)


def test_shared_experts_and_leading_dense_layers_are_counted(tmp_path: Path) -> None:
    read = shape(
        _directory(
            tmp_path,
            model_type="deepseek",
            num_hidden_layers=3,
            n_routed_experts=8,
            num_experts_per_tok=2,
            n_shared_experts=1,
            moe_intermediate_size=32,
            first_k_dense_replace=1,
        )
    )
    assert read.experts == Experts(2, 8, 2, 3 * 64 * 32, 3 * 64 * 32 + 64 * 8)


@pytest.mark.parametrize(
    ("said", "weights"),
    [
        ({"quant_method": "awq", "bits": 4}, "int4"),
        ({"quant_method": "gptq", "bits": 8}, "int8"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "int4"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float"}}},
            },
            "fp8",
        ),
    ],
)
def test_a_directory_says_how_its_weights_are_quantised(tmp_path: Path, said: dict[str, Any], weights: str) -> None:
    assert shape(_directory(tmp_path, quantization_config=said)).weight_dtype == weights


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_hidden_layers": ...}, "num_hidden_layers: missing"),
        ({"hidden_size": "wide"}, "hidden_size: must be a whole number"),
        ({"num_attention_heads": 5}, "num_attention_heads: 5 heads do not divide hidden_size 64"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder: encoder-decoder models"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "layer_types: layers of kind linear_attention"),
        ({"model_type": "llama4_text"}, "model_type: Llama 4's chunked attention"),
        ({"quantization_config": {"quant_method": "magic"}}, "quant_method 'magic' is not known"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "neither 4 nor 8 bits"),
        ({"num_experts": 4, "num_experts_per_tok": 5}, "num_experts_per_tok: 5 is more than the 4 experts"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        shape(_directory(tmp_path, **changes))


def test_a_directory_without_a_config_or_with_a_broken_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"it has no config\.json"):
        shape(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        shape(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="must hold a JSON object"):
        shape(str(tmp_path))


def test_every_packaged_model_is_read() -> None:
    assert all(shape(name).params > 1e9 for name in known_models())
