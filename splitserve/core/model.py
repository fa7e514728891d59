"""What a Hugging Face model directory says of itself, read without torch or transformers."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from splitserve.core.errors import ConfigError


@dataclass(frozen=True)
class ModelInfo:
    """Shape and identity of one model. `fingerprint` agrees exactly when config and weight files do (names and sizes,
    not every byte: hashing 140 GB at each start would cost minutes)."""

    path: Path
    name: str
    vocab_size: int
    max_position_embeddings: int
    layers: int
    kv_heads: int
    head_dim: int
    eos_token_ids: tuple[int, ...]
    dtype: str = "float32"  # the weights' own; an engine may be told to use another

    @classmethod
    def read(cls, directory: str | Path, name: str = "") -> "ModelInfo":
        """Reads config.json (and generation_config.json if there). Raises ConfigError naming the file at fault."""
        path = Path(directory)
        config = _read_json(path / "config.json", path)
        text = config.get("text_config", config)
        try:
            heads = int(text["num_attention_heads"])
            return cls(
                path=path.resolve(),
                name=name or path.resolve().name,
                vocab_size=int(text["vocab_size"]),
                max_position_embeddings=int(text["max_position_embeddings"]),
                layers=int(text["num_hidden_layers"]),
                kv_heads=int(text.get("num_key_value_heads") or heads),
                head_dim=int(text.get("head_dim") or int(text["hidden_size"]) // heads),
                eos_token_ids=_eos(path, text),
                dtype=str(text.get("dtype") or text.get("torch_dtype") or "float32"),
            )
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            raise ConfigError(
                str(path / "config.json"),
                f"not a decoder model's configuration ({error!r}); need a Hugging Face "
                "directory of a Llama, Qwen, Mistral or similar causal language model",
            ) from error

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        for weights in sorted(self.path.glob("*.safetensors")):
            digest.update(f"{weights.name}:{weights.stat().st_size}".encode())
        return digest.hexdigest()[:16]


def _read_json(file: Path, directory: Path) -> dict[str, Any]:
    if not directory.is_dir():
        raise ConfigError(str(directory), "no such directory; --model takes a Hugging Face model directory")
    if not file.is_file():
        raise ConfigError(str(directory), "not a model directory: it has no config.json")
    try:
        loaded = json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(str(file), f"not valid JSON: {error}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(str(file), "must hold a JSON object")
    return loaded


def _eos(path: Path, config: dict[str, Any]) -> tuple[int, ...]:
    eos = config.get("eos_token_id")
    generation = path / "generation_config.json"
    if generation.is_file():
        eos = _read_json(generation, path).get("eos_token_id", eos)
    if eos is None:
        return ()
    return tuple(int(token) for token in (eos if isinstance(eos, list) else [eos]))
