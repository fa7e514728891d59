"""Prompts as text, for servers that take no token ids: one common English word a token. Pure.

Vocabularies of byte pairs (GPT, Llama, Qwen, Mistral) have each of these, with the space before it, as one token, so a
prompt has as many tokens as words, and what the server puts around it; other tokenizers may cut words otherwise.
"""

from collections.abc import Sequence

# fmt: off
_WORDS = (
    "the", "of", "and", "to", "in", "is", "was", "for", "that", "on", "with", "as", "by", "at", "from", "it", "be",
    "are", "this", "have", "not", "or", "had", "his", "they", "which", "one", "were", "all", "we", "when", "there",
    "can", "an", "your", "their", "said", "if", "do", "will", "each", "about", "how", "up", "out", "them", "then",
    "she", "many", "some", "so", "these", "would", "other", "into", "has", "more", "her", "two", "like", "him",
    "see", "time", "could", "no", "make", "than", "first", "been", "its", "who", "now", "people", "my", "made",
    "over", "did", "down", "only", "way", "find", "use", "may", "water", "long", "little", "very", "after", "words",
    "called", "just", "where", "most", "know",
)
# fmt: on
VOCABULARY = len(_WORDS)


def text_of(ids: Sequence[int]) -> str:
    """As many words as there are ids, each below `VOCABULARY`."""
    return "".join([f" {_WORDS[number]}" for number in ids])
