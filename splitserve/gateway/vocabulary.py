"""What each token of a model is written as, from its tokenizer.json: only log probabilities need it."""

from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer

from splitserve.core.errors import ConfigError

_KEPT = 16_384  # most outputs use few of a vocabulary's tokens


class TokenizerVocabulary:
    """Raises ConfigError if the model's directory has no readable tokenizer."""

    def __init__(self, model_path: Path) -> None:
        file = model_path / "tokenizer.json"
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises Exception itself, nothing narrower
            raise ConfigError(str(file), f"not a tokenizer: {error}") from error
        self._decoded = lru_cache(_KEPT)(self._decode)

    def text_of(self, token_id: int) -> str:
        """As vLLM writes it: bytes that are no whole character become U+FFFD."""
        return self._decoded(token_id)

    def _decode(self, token_id: int) -> str:
        return str(self._tokenizer.decode([token_id], skip_special_tokens=False))
