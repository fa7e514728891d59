"""Bad input, found before it costs anything: every check raises InvalidRequest with the proto field and what to do.

Pure. What a request asks for and this version can't do is refused here too, never ignored.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from splitserve.core.errors import InvalidRequest, ModelNotFound
from splitserve.core.request import ChatMessage, GenerateRequest, SamplingParams

MOST_STOP_STRINGS = 16
MOST_LOGPROBS = 20
LONGEST_ID = 256
HOTTEST = 2  # vLLM takes no more
PRIORITIES = range(-1000, 1001)
SLO_CLASSES = ("standard",)
_SEEDS = range(-(2**63), 2**63)


@dataclass(frozen=True, slots=True)
class Limits:
    """What the fleet can serve now. `max_tokens`: prompt and output together."""

    model: str
    vocab_size: int
    max_tokens: int


def check_request(request: GenerateRequest, limits: Limits) -> None:
    """All that can be said before the prompt is tokenised. Raises ModelNotFound too."""
    if request.model not in ("", limits.model):
        raise ModelNotFound(f"model: {request.model!r} is not served here; ask for {limits.model!r} or leave it empty")
    _check_routing(request)
    _check_prompt(request.prompt, limits)
    _check_sampling(request.sampling, limits)


def check_prompt(request: GenerateRequest, token_ids: Sequence[int], limits: Limits) -> SamplingParams:
    """Returns the sampling parameters with `max_tokens` filled in."""
    field, most = _prompt_field(request.prompt), limits.max_tokens
    _check(bool(token_ids), field, "holds no token; a prompt needs one at least")
    room = _room(token_ids, field, limits)
    asked = request.sampling.max_tokens
    _check(
        asked is None or asked <= room,
        "sampling.max_tokens",
        f"{asked}, but {len(token_ids)} prompt tokens leave {room} of {most}; ask for fewer or shorten the prompt",
    )
    _check(request.sampling.min_tokens <= room, "sampling.min_tokens", f"more than the {room} there is room for")
    return replace(request.sampling, max_tokens=asked if asked is not None else room)


def _check_routing(request: GenerateRequest) -> None:
    for name in ("deadline_s", "inter_token_deadline_s"):
        value = getattr(request, name)
        _check(
            value is None or (math.isfinite(value) and value > 0), name, f"{value} must be a number of seconds above 0"
        )
    for name in ("request_id", "session_id"):
        value = getattr(request, name)
        _check(len(value) <= LONGEST_ID and value.isprintable(), name, f"at most {LONGEST_ID} printable characters")
    _check(request.priority in PRIORITIES, "priority", f"must be within [{PRIORITIES[0]}, {PRIORITIES[-1]}]")
    _check(request.slo_class in SLO_CLASSES, "slo_class", f"unknown; this router has {', '.join(SLO_CLASSES)}")


def _check_prompt(prompt: str | tuple[int, ...] | tuple[ChatMessage, ...], limits: Limits) -> None:
    field = _prompt_field(prompt)
    _check(bool(prompt), field, "is empty; a prompt needs one token at least")
    if field == "token_ids.ids":
        _room(prompt, field, limits)  # first: looking at each of millions would hold up every other request
        _check_token_ids(prompt, field, limits)


def _room(token_ids: Sequence[object], field: str, limits: Limits) -> int:
    """Tokens that may be generated after the prompt: one at least."""
    room = limits.max_tokens - len(token_ids)
    sentence = f"{len(token_ids)} tokens, and one to generate makes more than the {limits.max_tokens} there is room for"
    _check(room >= 1, field, sentence)
    return room


def _check_token_ids(token_ids: Sequence[object], field: str, limits: Limits) -> None:
    for place, token in enumerate(token_ids):
        if not (isinstance(token, int) and 0 <= token < limits.vocab_size):
            sentence = f"{token} at position {place} is outside the vocabulary of {limits.vocab_size} tokens"
            raise InvalidRequest(field, sentence)


def _prompt_field(prompt: str | tuple[int, ...] | tuple[ChatMessage, ...]) -> str:
    if isinstance(prompt, str):
        return "text"
    return "messages" if prompt and isinstance(prompt[0], ChatMessage) else "token_ids.ids"


def _check_sampling(sampling: SamplingParams, limits: Limits) -> None:
    _check_counts(sampling)
    _check_shape(sampling)
    _check_stops(sampling, limits)


def _check_counts(sampling: SamplingParams) -> None:
    most, least, top = sampling.max_tokens, sampling.min_tokens, sampling.logprobs
    _check(most is None or most >= 1, "sampling.max_tokens", f"{most} must be 1 or more")
    _check(least >= 0, "sampling.min_tokens", f"{least} must be 0 or more")
    _check(most is None or least <= most, "sampling.min_tokens", f"{least} must not be above max_tokens, {most}")
    _check(top is None or 0 <= top <= MOST_LOGPROBS, "sampling.logprobs", f"{top} must be within [0, {MOST_LOGPROBS}]")
    _check(sampling.seed is None or sampling.seed in _SEEDS, "sampling.seed", "must fit 64 bits")
    _check(sampling.top_k >= -1, "sampling.top_k", f"{sampling.top_k} must be 0 or -1 (all tokens) or more")


def _check_shape(sampling: SamplingParams) -> None:
    """NaN fails every comparison, infinity the upper bound."""
    heat = sampling.temperature
    _check(0 <= heat <= HOTTEST, "sampling.temperature", f"{heat} must be within [0, {HOTTEST}]")
    _check(0 < sampling.top_p <= 1, "sampling.top_p", f"{sampling.top_p} must be above 0 and at most 1")
    _check(0 <= sampling.min_p <= 1, "sampling.min_p", f"{sampling.min_p} must be within [0, 1]")
    for name in ("presence_penalty", "frequency_penalty"):
        _check(
            -2 <= getattr(sampling, name) <= 2, f"sampling.{name}", f"{getattr(sampling, name)} must be within [-2, 2]"
        )
    repetition = sampling.repetition_penalty
    _check(0 < repetition < math.inf, "sampling.repetition_penalty", f"{repetition} must be above 0 and finite")


def _check_stops(sampling: SamplingParams, limits: Limits) -> None:
    count = len(sampling.stop)
    _check(count <= MOST_STOP_STRINGS, "sampling.stop", f"{count} strings; at most {MOST_STOP_STRINGS} are matched")
    _check(all(sampling.stop), "sampling.stop", "holds an empty string, which would match at once; leave it out")
    _check_token_ids(sampling.stop_token_ids, "sampling.stop_token_ids", limits)


def _check(holds: bool, field: str, message: str) -> None:
    if not holds:
        raise InvalidRequest(field, message)
