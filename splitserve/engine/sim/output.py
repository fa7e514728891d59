"""What a decode job has made: its tokens, its text, and when it is over.

Used by the engine's thread. A resumed job replays the tokens that its client already has, and goes on from there.
"""

import secrets
from collections.abc import Callable

from tokenizers import Tokenizer

from splitserve.core.request import FinishReason, Logprob, ToolCall
from splitserve.core.worker import DecodeJob, Delta, Outcome, TransferStats
from splitserve.engine.sim.sampler import Context, Sampled, Vocabulary, logprobs_of, sample
from splitserve.engine.sim.script import Script, Told, told_apart
from splitserve.engine.sim.text import TextStream


class DecodeOutput:
    """`max_model_len` bounds prompt and output together."""

    def __init__(
        self, job: DecodeJob, tokenizer: Tokenizer, vocabulary: Vocabulary, max_model_len: int, script: Script
    ) -> None:
        self._job = job
        self._script = script
        self._raw, self._told = "", Told()
        self._sampling = job.sampling
        self._vocabulary = vocabulary
        self._stream = TextStream(tokenizer, job.prompt, job.sampling)
        self._seed = job.sampling.seed if job.sampling.seed is not None else secrets.randbits(64)
        room = max_model_len - len(job.prompt)
        self._most = min(room, job.sampling.max_tokens) if job.sampling.max_tokens is not None else room
        self._tokens: list[int] = []
        self.finished: FinishReason | None = None if self._most > 0 else FinishReason.LENGTH
        for token in job.output:
            self._tell(self._take(token))

    def advance(self, digests: bytes, stats: TransferStats | None) -> Delta:
        """Samples one token; `digests` is what the KV of everything before it holds. The last delta has the outcome."""
        context = Context(self._job.prompt, self._tokens, self._seed)
        forced = self._script.forced(context.position, self._vocabulary.eos)
        sampled = sample(digests, self._vocabulary, self._sampling, context, forced)
        index = len(self._tokens)
        text, reasoning, calls = self._tell(self._take(sampled.token))
        logprobs = self._shown_logprobs(sampled)
        return Delta(self._job.job_id, index, (sampled.token,), text, logprobs, self.outcome(stats), reasoning, calls)

    def prompt_logprobs(self, read: Callable[[int], bytes]) -> tuple[tuple[Logprob, ...], ...]:
        """With the first token of all, if asked for; `read` gives what the KV of so many tokens holds."""
        most, prompt = self._sampling.prompt_logprobs, self._job.prompt
        if most is None or len(self._tokens) != 1:
            return ()
        rest = range(1, len(prompt))
        return ((), *(logprobs_of(read(count), self._vocabulary, prompt[count], most) for count in rest))

    def outcome(self, stats: TransferStats | None) -> Outcome | None:
        """None while it goes on."""
        return None if self.finished is None else Outcome(finish_reason=self.finished, transfer=stats)

    @property
    def made(self) -> int:
        """Tokens made here, without those that the client had already."""
        return len(self._tokens) - len(self._job.output)

    @property
    def length(self) -> int:
        """Of the whole output; 0 while it has no end."""
        return len(self._tokens) if self.finished is not None else 0

    @property
    def last_token(self) -> int:
        return self._tokens[-1]

    def _shown_logprobs(self, sampled: Sampled) -> tuple[tuple[Logprob, ...], ...]:
        return () if self._sampling.logprobs is None else (sampled.logprobs,)

    def _tell(self, released: str) -> tuple[str, str, tuple[ToolCall, ...]]:
        """What this text adds: text, reasoning, pieces of a call."""
        if not (self._script.reasons or self._script.calls):
            return released, "", ()
        self._raw += released
        before, now = self._told, told_apart(self._raw, self._script, self.finished is not None)
        self._told = now
        if now.name and self.finished is FinishReason.STOP and not self._script.by_name:
            self.finished = FinishReason.TOOL_CALLS
        return now.text[len(before.text) :], now.reasoning[len(before.reasoning) :], self._pieces(before, now)

    def _pieces(self, before: Told, now: Told) -> tuple[ToolCall, ...]:
        more = now.arguments[len(before.arguments) :]
        if now.name and not before.name:
            return (ToolCall(id=f"call-{self._job.request_id}", name=now.name, arguments=more),)
        return (ToolCall(arguments=more),) if more else ()

    def _take(self, token: int) -> str:
        """Appends a token; returns the text that it releases."""
        self._tokens.append(token)
        past_minimum = len(self._tokens) > self._sampling.min_tokens
        if past_minimum and self._ends(token):
            self.finished = FinishReason.STOP
            shown = self._stream.push(token, watch_stop=False).text if self._sampling.include_stop else ""
            return shown or self._stream.flush()
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
