"""What a decode job has made, from vLLM's tokens: text by vLLM's detokeniser, told apart by its parsers, and the end.

Runner's thread. A resumed job replays the tokens that its client already has, and goes on from there.
"""

from typing import Any

from splitserve.core.request import FinishReason
from splitserve.core.worker import DecodeJob
from splitserve.engine.vllm.parsing import OutputParser, Parsed
from splitserve.engine.vllm.translate import detokenizer


class Output:
    """`sent`: output tokens that the client has or is being sent. `parser` None: the output is plain text."""

    def __init__(self, tokenizer: Any, job: DecodeJob, parser: OutputParser | None) -> None:
        self._parser = parser
        skips = parser.skip_special_tokens if parser is not None else job.sampling.skip_special_tokens
        self._detokenizer = detokenizer(tokenizer, job, skips)
        self.sent = 0
        for token in job.output:
            self.take([token], None)

    def take(self, tokens: list[int], reason: str | None) -> tuple[list[int], Parsed, FinishReason | None]:
        """Of one step's tokens those that count (a stop string may cut the last), and what they add; `reason` is vLLM's
        for ending."""
        stop_string = self._detokenizer.update(tokens, reason == "stop")
        finish = FinishReason.STOP if stop_string is not None else FinishReason(reason) if reason else None
        before, self.sent = self.sent, self._detokenizer.num_output_tokens()
        kept = tokens[: self.sent - before]
        text = self._detokenizer.get_next_output_text(finish is not None, delta=True)
        if self._parser is None:
            return kept, Parsed(text), finish
        parsed = self._parser.feed(text, kept, finish is not None)
        if finish is FinishReason.STOP and self._parser.called:
            finish = FinishReason.TOOL_CALLS
        return kept, parsed, finish
