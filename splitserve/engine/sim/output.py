"""What a decode job has made: its tokens, its text, and when it is over.

Used by the engine's thread. A resumed job replays the tokens that its client already has, and goes on from there.
"""

import secrets

from tokenizers import Tokenizer

from splitserve.core.request import FinishReason, Logprob
from splitserve.core.worker import DecodeJob, Delta, Outcome, TransferStats
from splitserve.engine.sim.sampler import Context, Sampled, Vocabulary, sample
from splitserve.engine.sim.text import TextStream


class DecodeOutput:
    """`max_model_len` bounds prompt and output together."""

    def __init__(self, job: DecodeJob, tokenizer: Tokenizer, vocabulary: Vocabulary, max_model_len: int) -> None:
        self._job = job
        self._sampling = job.sampling
        self._vocabulary = vocabulary
        self._stream = TextStream(tokenizer, job.prompt, job.sampling.stop)
        self._seed = job.sampling.seed if job.sampling.seed is not None else secrets.randbits(64)
        room = max_model_len - len(job.prompt)
        self._most = min(room, job.sampling.max_tokens) if job.sampling.max_tokens is not None else room
        self._tokens: list[int] = []
        self.finished: FinishReason | None = None if self._most > 0 else FinishReason.LENGTH
        for token in job.output:
            self._take(token)

    def advance(self, digests: bytes, stats: TransferStats | None) -> Delta:
        """Samples one token; `digests` is what the KV of everything before it holds. The last delta has the outcome."""
        context = Context(self._job.prompt, self._tokens, self._seed)
        sampled = sample(digests, self._vocabulary, self._sampling, context)
        index, text = len(self._tokens), self._take(sampled.token)
        return Delta(
            self._job.job_id, index, (sampled.token,), text, self._shown_logprobs(sampled), self.outcome(stats)
        )

    def outcome(self, stats: TransferStats | None) -> Outcome | None:
        """None while it goes on."""
        return None if self.finished is None else Outcome(finish_reason=self.finished, transfer=stats)

    @property
    def made(self) -> int:
        """Tokens made here, without those that the client had already."""
        return len(self._tokens) - len(self._job.output)

    @property
    def last_token(self) -> int:
        return self._tokens[-1]

    def _shown_logprobs(self, sampled: Sampled) -> tuple[tuple[Logprob, ...], ...]:
        return () if self._sampling.logprobs is None else (sampled.logprobs,)

    def _take(self, token: int) -> str:
        """Appends a token; returns the text that it releases."""
        self._tokens.append(token)
        past_minimum = len(self._tokens) > self._sampling.min_tokens
        if past_minimum and self._ends(token):
            self.finished = FinishReason.STOP
            return self._stream.flush()
        released = self._stream.push(token, watch_stop=past_minimum)
        if released.stopped:
            self.finished = FinishReason.STOP
        elif len(self._tokens) >= self._most:
            self.finished = FinishReason.LENGTH
            return released.text + self._stream.flush()
        return released.text

    def _ends(self, token: int) -> bool:
        is_eos = token in self._vocabulary.eos and not self._sampling.ignore_eos
        return is_eos or token in self._sampling.stop_token_ids
