"""Model directories: what is read from them and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from splitserve.core.errors import ConfigError
from splitserve.core.model import ModelInfo

CONFIG = {
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "hidden_size": 64,
    "eos_token_id": 2,
}


def model(directory: Path, config: object, generation: object = None, weights: int = 10) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    (directory / "model.safetensors").write_bytes(b"w" * weights)
    return directory


def test_the_shape_is_read_from_config_json(tmp_path: Path) -> None:
    info = ModelInfo.read(model(tmp_path / "tiny", {**CONFIG, "num_key_value_heads": 2}))
    assert (info.name, info.layers, info.kv_heads, info.head_dim) == ("tiny", 3, 2, 16)
    assert (info.vocab_size, info.max_position_embeddings, info.eos_token_ids) == (100, 512, (2,))


def test_without_grouped_heads_each_attention_head_has_its_own_kv(tmp_path: Path) -> None:
    assert ModelInfo.read(model(tmp_path / "m", CONFIG)).kv_heads == 4


def test_a_head_dim_that_is_said_wins_over_the_quotient(tmp_path: Path) -> None:
    assert ModelInfo.read(model(tmp_path / "m", {**CONFIG, "head_dim": 48})).head_dim == 48


def test_a_multimodal_config_is_read_from_its_text_part(tmp_path: Path) -> None:
    assert ModelInfo.read(model(tmp_path / "m", {"text_config": CONFIG})).vocab_size == 100


@pytest.mark.parametrize(
    ("generation", "eos"), [(None, (2,)), ({}, (2,)), ({"eos_token_id": 5}, (5,)), ({"eos_token_id": [5, 6]}, (5, 6))]
)
def test_generation_config_wins_over_config_for_the_end_token(
    tmp_path: Path, generation: object, eos: tuple[int, ...]
) -> None:
    assert ModelInfo.read(model(tmp_path / "m", CONFIG, generation)).eos_token_ids == eos


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("{", "not valid JSON"),
        ("[1]", "JSON object"),
        ({"vocab_size": 3}, "not a decoder model's configuration"),
        ({**CONFIG, "num_attention_heads": "many"}, "not a decoder model's configuration"),
        ({**CONFIG, "num_attention_heads": 0}, "not a decoder model's configuration"),
        ({**CONFIG, "num_hidden_layers": None}, "not a decoder model's configuration"),
        ({**CONFIG, "text_config": [1]}, "not a decoder model's configuration"),
        ({**CONFIG, "eos_token_id": "</s>"}, "not a decoder model's configuration"),
    ],
)
def test_a_config_that_is_no_decoder_models_is_refused_by_name(tmp_path: Path, config: object, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as refused:
        ModelInfo.read(model(tmp_path / "m", config))
    assert refused.value.path.startswith(str(tmp_path / "m"))


def test_a_directory_that_is_missing_or_holds_no_model_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such directory"):
        ModelInfo.read(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"no config\.json"):
        ModelInfo.read(tmp_path)


@pytest.mark.parametrize("change", [{"weights": 11}, {"config": {**CONFIG, "rope_theta": 5}}])
def test_the_fingerprint_tells_other_weights_and_another_config_apart(tmp_path: Path, change: dict[str, Any]) -> None:
    one = ModelInfo.read(model(tmp_path / "a", CONFIG))
    same = ModelInfo.read(model(tmp_path / "b", CONFIG))
    other = ModelInfo.read(model(tmp_path / "c", **{"config": CONFIG, **change}))
    assert one.fingerprint == same.fingerprint
    assert one.fingerprint != other.fingerprint
