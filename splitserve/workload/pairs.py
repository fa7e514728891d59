"""Prompt and output lengths together: who fits a model's length with both."""

import math
from dataclasses import dataclass

import numpy as np

from splitserve.core.errors import ConfigError
from splitserve.workload.lengths import (
    CLOSE,
    CORRECTIONS,
    Floats,
    Lengths,
    Tokens,
    lognormal_of,
    of_shares,
)


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """Prompt and output lengths, independent of each other but for `limit_tokens`: requests that are longer in total
    are left out, as a model of that length would refuse them."""

    prompt: Lengths
    output: Lengths
    limit_tokens: int | None = None

    def draw(self, count: int, prompts: np.random.Generator, outputs: np.random.Generator) -> tuple[Tokens, Tokens]:
        """Prompt and output tokens of `count` requests. Raises ConfigError if nothing fits."""
        output = self.outputs().draw(count, outputs)
        levels = 1.0 - prompts.random(count)
        if self.limit_tokens is not None:
            levels *= _fitting(self.prompt, self.output, self.limit_tokens)[output]
        return self.prompt.at(levels), output

    def prompts(self) -> Lengths:
        """Prompt lengths of the requests that are not left out."""
        return _beside(self.prompt, self.output, self.limit_tokens)

    def outputs(self) -> Lengths:
        """Output lengths of the requests that are not left out."""
        return _beside(self.output, self.prompt, self.limit_tokens)

    def kept(self) -> float:
        """The share of requests that is not left out."""
        if self.limit_tokens is None:
            return 1.0
        return float((self.output.shares * _fitting(self.prompt, self.output, self.limit_tokens)).sum())


def lognormal_pair(prompt_mean: float, output_mean: float, sigma: float, limit_tokens: int) -> Pair:
    """Both lognormal with deviation `sigma` of the logarithms, and with these means after those are left out that are
    longer than the limit together. Raises ConfigError if there is no such pair."""
    if limit_tokens < 2 or prompt_mean + output_mean >= limit_tokens:
        raise ConfigError("limit", f"{limit_tokens} tokens is not above the means together: raise it")
    prompt_mu, output_mu = math.log(prompt_mean), math.log(output_mean)
    for _ in range(CORRECTIONS):
        pair = Pair(_cut(prompt_mu, sigma, limit_tokens), _cut(output_mu, sigma, limit_tokens), limit_tokens)
        prompt_error = math.log(prompt_mean / pair.prompts().mean)
        output_error = math.log(output_mean / pair.outputs().mean)
        if max(abs(prompt_error), abs(output_error)) < CLOSE:
            return pair
        prompt_mu, output_mu = prompt_mu + prompt_error, output_mu + output_error
    raise ConfigError("limit", f"no lognormal pair has these means within {limit_tokens} tokens: raise it")


def _cut(mu: float, sigma: float, limit_tokens: int) -> Lengths:
    return lognormal_of(mu, sigma, 1, limit_tokens - 1)


def _beside(lengths: Lengths, other: Lengths, limit_tokens: int | None) -> Lengths:
    if limit_tokens is None:
        return lengths
    return of_shares(lengths.shares * _fitting(other, lengths, limit_tokens))


def _fitting(other: Lengths, lengths: Lengths, limit_tokens: int) -> Floats:
    """Per number of tokens of `lengths`, the share of the `other` that fits beside it."""
    room = limit_tokens - np.arange(len(lengths.cumulative))
    return np.where(room >= 0, other.cumulative[np.clip(room, 0, len(other.cumulative) - 1)], 0.0)
