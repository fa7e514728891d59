"""The demo's verdict, its prompts and its table."""

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console
from tokenizers import Tokenizer

from splitserve.cli.build import DEMO_MODEL
from splitserve.cli.demo import PROMPTS, Served, first_difference, results_table
from splitserve.cli.streams import Streams
from splitserve.core.request import Chunk, FinishReason, Timings, Usage

TIMINGS = Timings(0.001, 0.02, 0.0, 0.0214, 0.0055, "prefill-0", "decode-0", 2_000, 1_500, 1)
LAST = Chunk("r", 2, (), "", finish_reason=FinishReason.LENGTH, usage=Usage(1234, 3), timings=TIMINGS)


def served(*token_ids: int, last: Chunk = LAST) -> Served:
    return Served("Emma", token_ids, "text", last)


@pytest.mark.parametrize(
    ("split", "whole", "says"),
    [
        ((1, 2, 3), (1, 2, 3), None),
        ((), (), None),
        ((1, 2, 3), (1, 9, 3), "Emma: output token 1 is 2, colocated 9"),
        ((1, 2), (1, 2, 3), "Emma: 2 tokens, colocated 3"),
        ((1, 2, 3), (1,), "Emma: 3 tokens, colocated 1"),
        ((5,), (6, 7), "Emma: output token 0 is 5, colocated 6"),
    ],
)
def test_the_first_difference_is_named_by_its_position(
    split: tuple[int, ...], whole: tuple[int, ...], says: str | None
) -> None:
    assert first_difference(served(*split), served(*whole)) == says


def test_the_prompts_are_of_different_lengths_and_one_has_a_thousand_tokens() -> None:
    tokenizer = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    lengths = [len(tokenizer.encode(prompt["text"]).ids) for prompt in json.loads(PROMPTS.read_text())]
    assert len(lengths) >= 5
    assert len(set(lengths)) == len(lengths)
    assert min(lengths) < 20
    assert max(lengths) >= 1000


def table_text(results: list[Served]) -> str:
    out = io.StringIO()
    Console(file=out, width=200).print(results_table(results))
    return out.getvalue()


def test_the_table_has_a_requests_tokens_times_route_and_share_of_kv_moved_early() -> None:
    row = table_text([served(1, 2, 3)])
    for cell in ("Emma", "1,234", "21", "5.5", "prefill-0", "decode-0", "2,000", "75%"):
        assert cell in row


def test_a_request_that_moved_no_kv_has_no_share() -> None:
    local = replace(LAST, timings=replace(TIMINGS, prefill_worker="", kv_bytes=0, kv_bytes_before_prefill_ended=0))
    assert "%" not in table_text([served(1, last=local)])


def streamed(*pieces: str, terminal: bool = False) -> str:
    out = io.StringIO()
    streams = Streams(Console(file=out, width=80, force_terminal=terminal), ["Emma"])
    with streams.shown():
        for index, piece in enumerate(pieces):
            streams.add("Emma", piece, index == len(pieces) - 1)
    return out.getvalue()


def test_without_a_terminal_text_comes_in_whole_lines_with_its_name() -> None:
    lines = streamed("a short start ", "word " * 60, "and the end").splitlines()
    assert all(line.strip().startswith("Emma │ ") for line in lines)
    joined = " ".join(line.split("│ ", 1)[1] for line in lines)
    assert joined == "a short start " + "word " * 60 + "and the end"
    assert max(map(len, lines)) < 130


def test_a_word_longer_than_a_line_is_cut_rather_than_kept_back() -> None:
    assert streamed("x" * 250, "").count("x") == 250


def test_a_stream_without_text_prints_nothing() -> None:
    assert streamed("") == ""


def test_on_a_terminal_the_last_picture_has_the_end_of_the_text() -> None:
    assert "the very end" in streamed("word " * 200, "the very end", terminal=True)
