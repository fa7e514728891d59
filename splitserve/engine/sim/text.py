"""From the simulated engine's tokens to text: incremental detokenising and stop strings. The real engine uses vLLM's.

One stream per request, used by the engine's thread. What `push` releases depends on the tokens alone, so replaying the
output that a client already has brings a resumed request to the exact character where it was interrupted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from splitserve.core.errors import ConfigError
from splitserve.core.model import ModelInfo
from splitserve.core.request import SamplingParams
from splitserve.engine.sim.sampler import Vocabulary

_PROMPT_TAIL = 6  # tokens of the prompt that may change how the first output token reads
_INCOMPLETE = "�"
_LONGEST_CHARACTER = 8  # tokens held for an incomplete character; broken bytes are released after that


@dataclass(frozen=True, slots=True)
class Released:
    text: str
    stopped: bool = False  # a stop string matched: what follows is cut off


class TextStream:
    """Text of one output. Held back: bytes of an incomplete character, and what may be the start of a stop string."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], sampling: SamplingParams) -> None:
        self._tokenizer = tokenizer
        self._stop = sampling.stop
        self._include_stop = sampling.include_stop
        self._skip_special_tokens = sampling.skip_special_tokens
        self._ids = list(prompt[-_PROMPT_TAIL:])
        self._shown = len(self._ids)  # ids whose text is out of the detokeniser
        self._before = 0  # ids from here on give their context
        self._held = ""

    def push(self, token: int, watch_stop: bool = True) -> Released:
        """One more token. Without `watch_stop` (below min_tokens) nothing matches and nothing is held back for it."""
        self._held += self._detokenise(token)
        if not watch_stop:
            return Released(self._take(len(self._held)))
        matches = [(found, string) for string in self._stop if (found := self._held.find(string)) >= 0]
        if matches:
            begin, string = min(matches)
            return Released(self._take(begin + len(string) * self._include_stop), stopped=True)
        return Released(self._take(len(self._held) - self._possible_start()))

    def flush(self) -> str:
        """What was held back, when the output ends without a stop string."""
        return self._take(len(self._held))

    def _detokenise(self, token: int) -> str:
        self._ids.append(token)
        known = self._decode(self._ids[self._before : self._shown])
        text = self._decode(self._ids[self._before :])
        waiting = len(self._ids) - self._shown
        if len(text) <= len(known) or (text.endswith(_INCOMPLETE) and waiting < _LONGEST_CHARACTER):
            return ""
        self._before, self._shown = self._shown, len(self._ids)
        return text[len(known) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special_tokens)

    def _possible_start(self) -> int:
        """Length of the longest end of the text that a stop string starts with."""
        longest = max((len(string) - 1 for string in self._stop), default=0)
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(string.startswith(self._held[-length:]) for string in self._stop):
                return length
        return 0

    def _take(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        return text


def load_tokenizer(model: ModelInfo) -> Tokenizer:
    """Raises ConfigError naming the file."""
    file = model.path / "tokenizer.json"
    if not file.is_file():
        raise ConfigError(str(file), "no such file; the simulated engine needs the model's fast tokenizer")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ConfigError(str(file), f"not a tokenizer: {error}") from error


def vocabulary(model: ModelInfo, tokenizer: Tokenizer) -> Vocabulary:
    """Tokens that the simulated engine may produce: those that are whole characters by themselves."""
    ids = [[token] for token in range(min(model.vocab_size, tokenizer.get_vocab_size()))]
    texts = tokenizer.decode_batch(ids, skip_special_tokens=True)
    plain = tuple(token for token, text in enumerate(texts) if text and _INCOMPLETE not in text)
    if not plain:
        raise ConfigError(str(model.path / "tokenizer.json"), "has no token that is text by itself")
    return Vocabulary(plain, model.eos_token_ids)
