"""Bad input, found before it costs anything: every check raises InvalidRequest with the proto field and what to do.

Pure. What a request asks for and this version can't do is refused here too, never ignored.
"""

import json
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace

from splitserve.core.config import DEFAULT_CLASS, RequestLimits
from splitserve.core.errors import InvalidRequest, ModelNotFound
from splitserve.core.request import Chat, GenerateRequest, Prompt, SamplingParams, StructuredOutput, Tool

LONGEST_ID = 256
DEEPEST_SCHEMA = 64  # levels
LARGEST_BIAS = 100.0  # OpenAI's bound
HOTTEST = 2  # vLLM takes no more
PRIORITIES = range(-1000, 1001)
_SEEDS = range(-(2**63), 2**63)


@dataclass(frozen=True, slots=True)
class Limits:
    """What the fleet can serve now. `max_tokens`: prompt and output together."""

    model: str
    vocab_size: int
    max_tokens: int
    loras: tuple[str, ...] = ()
    slo_classes: tuple[str, ...] = (DEFAULT_CLASS,)
    request: RequestLimits = field(default_factory=RequestLimits)

    @property
    def prompt_tokens(self) -> int:
        """Longest prompt, and one token to generate."""
        return min(self.max_tokens - 1, self.request.prompt_tokens or self.max_tokens)


def check_request(request: GenerateRequest, limits: Limits) -> GenerateRequest:
    """All that can be said before the prompt is tokenised. Returns the request with the adapter, if `model` names one,
    in `lora`. Raises ModelNotFound too."""
    named = replace(request, lora=lora_of(request.model, request.lora, limits.model, limits.loras))
    _check_routing(request, limits.slo_classes)
    _check_prompt(request.prompt, limits)
    _check_sampling(request.sampling, limits)
    _check_output(request, limits)
    return named


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
    _check_prompt_logprobs(request.sampling, len(token_ids), limits.request)
    sampling = replace(request.sampling, max_tokens=asked if asked is not None else room)
    _check(len(request.output) < (sampling.max_tokens or 0), "output", "has all of max_tokens already; nothing is left")
    return sampling


def lora_of(model: str, lora: str, served: str, loras: Collection[str]) -> str:
    """The adapter that a request names by `model` or `lora`; "" for none. Raises ModelNotFound."""
    if model in ("", served):
        named = lora
    elif model in loras and lora in ("", model):
        named = model
    else:
        there = ", ".join(repr(name) for name in (served, *loras))
        raise ModelNotFound(f"model: {model!r} is not served here; there are: {there}")
    if named and named not in loras:
        raise ModelNotFound(f"lora: no worker has {named!r}; there are: {', '.join(loras) or 'none'}")
    return named


def _check_prompt_logprobs(sampling: SamplingParams, prompt_tokens: int, limits: RequestLimits) -> None:
    if sampling.prompt_logprobs is not None:
        entries, most = prompt_tokens * (sampling.prompt_logprobs + 1), limits.prompt_logprobs
        sentence = f"makes {entries} entries for {prompt_tokens} prompt tokens; at most {most}: ask for fewer of each"
        _check(entries <= most, "sampling.prompt_logprobs", sentence)


def _check_routing(request: GenerateRequest, slo_classes: Sequence[str]) -> None:
    for name in ("deadline_s", "inter_token_deadline_s"):
        value = getattr(request, name)
        _check(
            value is None or (math.isfinite(value) and value > 0), name, f"{value} must be a number of seconds above 0"
        )
    for name in ("request_id", "session_id"):
        value = getattr(request, name)
        _check(len(value) <= LONGEST_ID and value.isprintable(), name, f"at most {LONGEST_ID} printable characters")
    _check(request.priority in PRIORITIES, "priority", f"must be within [{PRIORITIES[0]}, {PRIORITIES[-1]}]")
    _check(request.slo_class in slo_classes, "slo_class", f"unknown; this router has {', '.join(slo_classes)}")


def _check_prompt(prompt: Prompt, limits: Limits) -> None:
    field = _prompt_field(prompt)
    if isinstance(prompt, Chat):
        _check(bool(prompt.messages), field, "is empty; a chat needs one message at least")
        _check_tools(prompt, limits.request)
        return
    _check(bool(prompt), field, "is empty; a prompt needs one token at least")
    if not isinstance(prompt, str):
        _room(prompt, field, limits)  # first: looking at each of millions would hold up every other request
        _check_token_ids(prompt, field, limits)


def _check_tools(chat: Chat, most: RequestLimits) -> None:
    field, names = "messages.tools", [tool.name for tool in chat.tools]
    _check(len(names) <= most.tools, field, f"{len(names)} functions; at most {most.tools}")
    size = sum(len(tool.parameters) + len(tool.description) for tool in chat.tools)
    _check(size <= most.schema_kib * 1024, field, f"{size} characters; all tools together have {most.schema_kib} KiB")
    for at, tool in enumerate(chat.tools):
        _check(bool(tool.name), f"{field}[{at}].name", "is empty; a function needs a name")
        _check_parameters(tool, f"{field}[{at}].parameters")
    function = chat.tool_choice.function
    _check(not function or function in names, "messages.tool_choice", f"{function!r} is not among the tools")


def _check_parameters(tool: Tool, field: str) -> None:
    schema = json_of(tool.parameters, field) if tool.parameters else {}
    _check(isinstance(schema, dict), field, "must be a JSON schema: an object")
    _check_depth(schema, field)


def json_of(text: str, field: str) -> object:
    """Raises InvalidRequest naming the field."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(field, f"is not JSON: {error}") from error


def _check_depth(value: object, field: str) -> None:
    """A grammar compiler goes as deep as a schema, on its thread's stack."""
    level, depth = [value], 0
    while level:
        _check(depth <= DEEPEST_SCHEMA, field, f"nests deeper than {DEEPEST_SCHEMA} levels; make it flatter")
        depth += 1
        level = [inner for outer in level for inner in _inner(outer)]


def _inner(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _check_output(request: GenerateRequest, limits: Limits) -> None:
    _check(not request.output or request.sampling.n == 1, "output", "can't be said with sampling.n above 1")
    _check_token_ids(request.output, "output", limits)


def _room(token_ids: Sequence[object], field: str, limits: Limits) -> int:
    """Tokens that may be generated after the prompt: one at least."""
    many, most = len(token_ids), limits.prompt_tokens
    _check(many <= most, field, f"{many} tokens, and one to generate makes more than the {most + 1} there is room for")
    return limits.max_tokens - many


def _check_token_ids(token_ids: Sequence[object], field: str, limits: Limits) -> None:
    for place, token in enumerate(token_ids):
        if not (isinstance(token, int) and 0 <= token < limits.vocab_size):
            sentence = f"{token} at position {place} is outside the vocabulary of {limits.vocab_size} tokens"
            raise InvalidRequest(field, sentence)


def _prompt_field(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return "text"
    return "messages" if isinstance(prompt, Chat) else "token_ids.ids"


def _check_sampling(sampling: SamplingParams, limits: Limits) -> None:
    _check_counts(sampling, limits.request)
    _check_shape(sampling)
    _check_stops(sampling, limits)
    _check_biases(sampling, limits)
    if sampling.structured_output is not None:
        _check_structured(sampling.structured_output, limits.request)


def _check_counts(sampling: SamplingParams, limits: RequestLimits) -> None:
    most, least = sampling.max_tokens, sampling.min_tokens
    _check(most is None or most >= 1, "sampling.max_tokens", f"{most} must be 1 or more")
    _check(least >= 0, "sampling.min_tokens", f"{least} must be 0 or more")
    _check(most is None or least <= most, "sampling.min_tokens", f"{least} must not be above max_tokens, {most}")
    for name in ("logprobs", "prompt_logprobs"):
        top = getattr(sampling, name)
        sentence = f"{top} must be within [0, {limits.logprobs}]"
        _check(top is None or 0 <= top <= limits.logprobs, f"sampling.{name}", sentence)
    _check(1 <= sampling.n <= limits.choices, "sampling.n", f"{sampling.n} must be within [1, {limits.choices}]")
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
    count, most = len(sampling.stop), limits.request.stop_strings
    _check(count <= most, "sampling.stop", f"{count} strings; at most {most} are matched")
    _check(all(sampling.stop), "sampling.stop", "holds an empty string, which would match at once; leave it out")
    _check_token_ids(sampling.stop_token_ids, "sampling.stop_token_ids", limits)


def _check_biases(sampling: SamplingParams, limits: Limits) -> None:
    field, most = "sampling.logit_bias", limits.request.logit_biases
    _check(len(sampling.logit_bias) <= most, field, f"{len(sampling.logit_bias)} tokens; at most {most}")
    _check_token_ids(tuple(sampling.logit_bias), field, limits)
    for token, bias in sampling.logit_bias.items():
        _check(abs(bias) <= LARGEST_BIAS, f"{field}[{token}]", f"{bias} must be within [-100, 100]")


def _check_structured(structured: StructuredOutput, limits: RequestLimits) -> None:
    field = "sampling.structured_output"
    texts = (structured.json_schema, structured.regex, structured.grammar, *structured.choice)
    size, most = sum(map(len, texts)), limits.schema_kib
    _check(size <= most * 1024, field, f"{size} characters; at most {most} KiB")
    if structured.json_schema:
        _check_depth(json_of(structured.json_schema, f"{field}.json_schema"), f"{field}.json_schema")


def _check(holds: bool, field: str, message: str) -> None:
    if not holds:
        raise InvalidRequest(field, message)
