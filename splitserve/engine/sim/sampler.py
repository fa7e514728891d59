"""The simulated engine's "model": what tokens may follow, given what the KV blocks hold, and which one is sampled.

Pure. The digests of a context are hashed into a ranking of a few tokens with falling logits; penalties, temperature,
top-k, top-p and min-p then work on it as they do on real logits. Greedy sampling takes the best. A draw of a seeded
request depends on its seed and the output position alone, and penalties count the whole output, wherever it was made: a
request begun elsewhere goes on as if it had not been interrupted.
"""

import math
import struct
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b, shake_128

from splitserve.core.request import Logprob, SamplingParams

RANKED = 32  # tokens with a chance; more than the 20 logprobs a request may ask for
EOS_EVERY = 512  # a context ends the text once in so many
FIRST_LOGIT = -0.5
LOGIT_STEP = -0.7
UNRANKED = FIRST_LOGIT + LOGIT_STEP * (RANKED + 1)  # of every other token


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """`plain`: token ids that are ordinary text by themselves; `eos`: those that end it."""

    plain: tuple[int, ...]
    eos: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Context:
    """Tokens before the one to sample, whose output index is `position`; `seed`: the request's, or one drawn for it."""

    prompt: Sequence[int]
    output: Sequence[int]
    seed: int

    @property
    def position(self) -> int:
        return len(self.output)


@dataclass(frozen=True, slots=True)
class Sampled:
    token: int
    logprobs: tuple[Logprob, ...]


Ranking = list[tuple[float, int]]  # (logit, token), best first


def sample(
    digests: bytes, vocabulary: Vocabulary, sampling: SamplingParams, context: Context, forced: int | None = None
) -> Sampled:
    """The next token after a context whose KV reads `digests`; `forced`: the only one that may come."""
    if forced is not None:
        return Sampled(forced, () if sampling.logprobs is None else (Logprob(forced, 0.0, 1),))
    banned = _banned(vocabulary, sampling, context)
    ranking = _biased(_ranking(digests, vocabulary, banned), sampling.logit_bias, banned)
    ranking = _penalised(ranking, sampling, context)
    index = 0 if sampling.temperature == 0 else _draw(_kept(ranking, sampling), _uniform(context))
    token = ranking[index][1]
    return Sampled(token, () if sampling.logprobs is None else _logprobs(ranking, index, sampling.logprobs))


def logprobs_of(digests: bytes, vocabulary: Vocabulary, token: int, most: int) -> tuple[Logprob, ...]:
    """Of a token that did come after such a context, and of the likeliest `most`."""
    ranking = _ranking(digests, vocabulary, ())
    places = [place for place, (_, ranked) in enumerate(ranking) if ranked == token]
    if not places:
        ranking.append((UNRANKED, token))
    return _logprobs(ranking, places[0] if places else len(ranking) - 1, most)


def _banned(vocabulary: Vocabulary, sampling: SamplingParams, context: Context) -> Collection[int]:
    """Below min_tokens nothing that would end the output is sampled."""
    if context.position >= sampling.min_tokens:
        return ()
    return {*sampling.stop_token_ids, *(() if sampling.ignore_eos else vocabulary.eos)}


def _ranking(digests: bytes, vocabulary: Vocabulary, banned: Collection[int]) -> Ranking:
    words = struct.unpack(f"<{RANKED + 1}I", shake_128(blake2b(digests).digest()).digest(4 * (RANKED + 1)))
    plain = vocabulary.plain
    tokens = [plain[word % len(plain)] for word in words[1:]]
    if vocabulary.eos and words[0] % EOS_EVERY == 0:
        tokens.insert(0, vocabulary.eos[0])
    unique = [token for token in dict.fromkeys(tokens) if token not in banned]
    return [(FIRST_LOGIT + LOGIT_STEP * rank, token) for rank, token in enumerate(unique or tokens[-1:])]


def _biased(ranking: Ranking, bias: Mapping[int, float], banned: Collection[int]) -> Ranking:
    if not bias:
        return ranking
    logits = {token: logit for logit, token in ranking}
    for token in bias.keys() - banned:
        logits[token] = logits.get(token, UNRANKED) + bias[token]
    return sorted(((logit, token) for token, logit in logits.items()), reverse=True)


def _penalised(ranking: Ranking, sampling: SamplingParams, context: Context) -> Ranking:
    """As vLLM: repetition looks at prompt and output, and divides a positive logit; the others look at the output."""
    if not (sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1):
        return ranking
    made, seen = Counter(context.output), {*context.prompt, *context.output}

    def penalised(logit: float, token: int) -> float:
        if token in seen:
            repetition = sampling.repetition_penalty
            logit = logit / repetition if logit > 0 else logit * repetition
        return logit - sampling.frequency_penalty * made[token] - sampling.presence_penalty * (token in made)

    return sorted(((penalised(logit, token), token) for logit, token in ranking), reverse=True)


def _kept(ranking: Ranking, sampling: SamplingParams) -> list[float]:
    """Weights of the best tokens that temperature, top-k, top-p and min-p leave."""
    best = ranking[0][0]
    weights = [math.exp((logit - best) / sampling.temperature) for logit, _ in ranking]
    weights = weights[: sampling.top_k] if sampling.top_k > 0 else weights
    weights = [weight for weight in weights if weight >= sampling.min_p * weights[0]]
    share, total = 0.0, sum(weights)
    for count, weight in enumerate(weights, start=1):
        share += weight / total
        if share >= sampling.top_p:
            return weights[:count]
    return weights


def _draw(weights: Sequence[float], uniform: float) -> int:
    left = uniform * sum(weights)
    for index, weight in enumerate(weights):
        left -= weight
        if left < 0:
            return index
    return len(weights) - 1


def _uniform(context: Context) -> float:
    """In [0, 1)."""
    digest = blake2b(f"{context.seed}:{context.position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def _logprobs(ranking: Ranking, sampled: int, most: int) -> tuple[Logprob, ...]:
    """The sampled token first, then the likeliest `most`, without it, in order."""
    best = ranking[0][0]  # taken off first: a strong penalty leaves nothing of exp
    normaliser = best + math.log(sum(math.exp(logit - best) for logit, _ in ranking))
    every = [Logprob(token, logit - normaliser, rank) for rank, (logit, token) in enumerate(ranking, start=1)]
    return every[sampled], *(one for one in every[:most] if one.rank != sampled + 1)
