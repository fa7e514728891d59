"""What is made of what vLLM's parsers say, without vLLM. With them: tests/vllm."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from splitserve.core.errors import EngineError
from splitserve.core.request import ToolCall
from splitserve.engine.vllm.parsing import OutputParser, Parsed
from splitserve.kv.job_params import GrammarStart

END, IMPLICIT_END = 7, 8
REQUEST = SimpleNamespace(structured_outputs=None, skip_special_tokens=False, _grammar_from_parser=False)


class Reasoner:
    """Reasoning ends with either token; the second is the content's first as well."""

    def is_reasoning_end_streaming(self, tokens: Sequence[int], new: Sequence[int]) -> bool:
        assert list(tokens)[-len(new) :] == list(new)
        return new[0] in (END, IMPLICIT_END)

    def find_reasoning_end(self, tokens: Sequence[int]) -> Any:
        return SimpleNamespace(implicit=tokens[0] == IMPLICIT_END)


class Parser:
    def __init__(self, messages: Sequence[Any] = (), reasoner: Reasoner | None = None) -> None:
        self.messages = list(messages)
        self.reasoning_parser = reasoner

    def is_reasoning_end(self, tokens: Sequence[int]) -> bool:
        return END in tokens

    def parse_delta(self, text: str, tokens: list[int], request: Any, prompt: list[int], *, finished: bool) -> Any:
        message = self.messages.pop(0)
        if isinstance(message, Exception):
            raise message
        return message


def said(content: str | None = None, reasoning: str | None = None, *calls: Any) -> SimpleNamespace:
    return SimpleNamespace(content=content, reasoning=reasoning, tool_calls=list(calls))


def a_call(index: int, id: str | None = None, name: str | None = None, arguments: str | None = None) -> SimpleNamespace:
    return SimpleNamespace(index=index, id=id, function=SimpleNamespace(name=name, arguments=arguments))


def an_output(parser: Parser, prompt: tuple[int, ...] = (1,), counts_calls: bool = True) -> OutputParser:
    return OutputParser(parser, REQUEST, prompt, counts_calls)


def test_what_is_not_said_is_empty() -> None:
    output = an_output(Parser([None, said(), said("a", "b")]))
    assert [output.feed("", [5], False) for _ in range(3)] == [Parsed(), Parsed(), Parsed("a", "b")]
    assert not output.called


def test_a_call_in_pieces_ends_the_output_as_a_call_unless_the_function_was_chosen() -> None:
    pieces = [said(None, None, a_call(0, "id", "f")), said(None, None, a_call(0, arguments="{}"))]
    output = an_output(Parser(pieces))
    assert output.feed("", [5], False).tool_calls == (ToolCall(0, "id", "f"),)
    assert output.feed("", [5], True).tool_calls == (ToolCall(0, arguments="{}"),)
    assert output.called
    by_name = an_output(Parser(pieces), counts_calls=False)
    assert by_name.feed("", [5], True).tool_calls
    assert not by_name.called


@pytest.mark.parametrize(
    ("prompt", "output", "start"),
    [
        ((1,), (5, 6), GrammarStart(False, 0)),
        ((1,), (5, END), GrammarStart(True, 0)),
        ((1,), (5, END, 6, 6), GrammarStart(True, 2)),
        ((1,), (5, IMPLICIT_END, 6), GrammarStart(True, 2)),
        ((1, END), (5, 6), GrammarStart(True, 2)),
    ],
)
def test_a_grammar_has_accepted_what_came_after_the_reasoning(
    prompt: tuple[int, ...], output: tuple[int, ...], start: GrammarStart
) -> None:
    assert an_output(Parser(reasoner=Reasoner()), prompt).grammar_start(output) == start


def test_without_a_reasoner_a_grammar_has_accepted_all() -> None:
    assert an_output(Parser()).grammar_start((5, 6)) == GrammarStart(True, 2)


def test_a_parser_that_breaks_fails_its_request_alone() -> None:
    with pytest.raises(EngineError, match=r"parser broke on this request: KeyError: 'name'"):
        an_output(Parser([KeyError("name")])).feed("", [5], False)
