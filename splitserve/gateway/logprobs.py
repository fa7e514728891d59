"""Log probabilities as OpenAI's two endpoints and vLLM's extension write them.

Pure. A token's text comes from a `Vocabulary`; without one a token is called `token_id:7`, as vLLM's
`return_tokens_as_token_ids` has it.
"""

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

from splitserve.core.request import Logprob
from splitserve.gateway.backend import Vocabulary

LEAST = -9999.0  # vLLM's stand-in for minus infinity, which JSON has no number for

Tokens = Sequence[tuple[Logprob, ...]]


def chat_logprobs(tokens: Tokens, top: int, vocabulary: Vocabulary | None) -> dict[str, Any]:
    """Of a chat's choice; `top` of the likeliest tokens for each."""
    return {"content": [_chat_token(token, top, vocabulary) for token in tokens], "refusal": None}


def completion_logprobs(tokens: Tokens, offset: int, vocabulary: Vocabulary | None) -> dict[str, Any]:
    """Of a completion's choice, whose first token here begins at character `offset` of its text."""
    texts = [token_text(token[0].token_id, vocabulary) for token in tokens]
    return {
        "tokens": texts,
        "token_logprobs": [_finite(token[0].logprob) for token in tokens],
        "top_logprobs": [
            {token_text(one.token_id, vocabulary): _finite(one.logprob) for one in _distinct(token)} for token in tokens
        ],
        "text_offset": list(accumulate(map(len, texts[:-1]), initial=offset)) if texts else [],
    }


def prompt_logprobs(tokens: Tokens, vocabulary: Vocabulary | None) -> list[dict[str, Any] | None]:
    """vLLM's: by token id; nothing comes before the first."""
    return [{str(one.token_id): _ranked(one, vocabulary) for one in token} or None for token in tokens]


def token_text(token_id: int, vocabulary: Vocabulary | None) -> str:
    return vocabulary.text_of(token_id) if vocabulary is not None else f"token_id:{token_id}"


def _chat_token(token: tuple[Logprob, ...], top: int, vocabulary: Vocabulary | None) -> dict[str, Any]:
    likeliest = sorted((one for one in _distinct(token) if one.rank <= top), key=lambda one: one.rank)
    return {**_said(token[0], vocabulary), "top_logprobs": [_said(one, vocabulary) for one in likeliest]}


def _said(one: Logprob, vocabulary: Vocabulary | None) -> dict[str, Any]:
    text = token_text(one.token_id, vocabulary)
    return {"token": text, "logprob": _finite(one.logprob), "bytes": list(text.encode(errors="replace"))}


def _ranked(one: Logprob, vocabulary: Vocabulary | None) -> dict[str, Any]:
    said = {"logprob": _finite(one.logprob), "rank": one.rank}
    return {**said, "decoded_token": vocabulary.text_of(one.token_id)} if vocabulary is not None else said


def _distinct(token: tuple[Logprob, ...]) -> Iterable[Logprob]:
    """The sampled token comes first, and may come again among the likeliest."""
    return {one.token_id: one for one in token}.values() if len(token) > 1 else token


def _finite(logprob: float) -> float:
    return logprob if logprob > LEAST else LEAST  # NaN too: it is above nothing
