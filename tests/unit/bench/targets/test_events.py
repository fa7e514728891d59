import msgspec
import pytest

from splitserve.bench.targets.events import EventStream
from splitserve.core.errors import SplitserveError


def event(**said: object) -> bytes:
    return b"data: " + msgspec.json.encode(said) + b"\n\n"


def text(said: str, **beside: object) -> bytes:
    return event(choices=[{"index": 0, "text": said, "finish_reason": None, **beside}], usage=None)


def usage(tokens: int) -> dict[str, int]:
    return {"prompt_tokens": 7, "total_tokens": 7 + tokens, "completion_tokens": tokens}


DONE = b"data: [DONE]\n\n"


def test_usage_in_each_event_counts_what_has_been_added() -> None:
    stream = EventStream()
    counts = [stream.feed(event(choices=[{"text": "abc"}], usage=usage(tokens))) for tokens in (1, 4, 4, 5)]
    assert counts == [1, 3, 0, 1]


def test_token_ids_count_where_no_usage_does() -> None:
    heard: list[int] = []
    stream = EventStream(heard.extend)
    assert stream.feed(text("ab", token_ids=[5, 6, 7])) == 3
    assert stream.feed(text("", token_ids=[8])) == 1
    assert stream.feed(event(choices=[], usage=usage(4))) == 0
    assert heard == [5, 6, 7, 8]


def test_else_each_text_is_one_token_and_the_last_usage_adds_what_is_missing() -> None:
    stream = EventStream()
    assert [stream.feed(text(said)) for said in ("a", "", "bc")] == [1, 0, 1]
    assert stream.feed(event(choices=[], usage=usage(4))) == 2


def test_a_token_once_told_of_is_not_taken_back() -> None:
    stream = EventStream()
    assert stream.feed(text("a") + text("b")) == 2
    assert stream.feed(event(choices=[], usage=usage(1))) == 0


def test_a_chats_role_is_no_token_and_its_reasoning_is() -> None:
    deltas = ({"role": "assistant", "content": ""}, {"reasoning": "Hm"}, {"reasoning_content": "m"}, {"content": "Yes"})
    stream = EventStream()
    assert [stream.feed(event(choices=[{"delta": delta}])) for delta in deltas] == [0, 1, 1, 1]


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_however_the_network_cuts_it_the_count_is_the_same(size: int) -> None:
    whole = b": a comment\n" + text("a") + text("b").replace(b"\n", b"\r\n") + event(choices=[], usage=usage(5)) + DONE
    stream = EventStream()
    assert sum(stream.feed(whole[at : at + size]) for at in range(0, len(whole), size)) == 5
    assert stream.ended


def test_a_stream_ends_with_done_or_a_reason_to_finish() -> None:
    stream = EventStream()
    stream.feed(text("a"))
    assert not stream.ended
    stream.feed(text("b", finish_reason="length"))
    assert stream.ended
    other = EventStream()
    other.feed(DONE)
    assert other.ended


@pytest.mark.parametrize("said", [{"error": {"message": "broke"}}, {"object": "error", "message": "broke"}])
def test_an_error_instead_of_an_end_is_kept_as_it_was_sent(said: dict[str, object]) -> None:
    stream = EventStream()
    assert stream.feed(text("a") + event(**said)) == 1
    assert stream.error == msgspec.json.encode(said)
    assert not stream.ended


@pytest.mark.parametrize("line", [b"data: not json\n", b'data: {"choices": 3}\n', b"data: 7\n"])
def test_what_is_no_event_is_named(line: bytes) -> None:
    with pytest.raises(SplitserveError, match=r"no event of OpenAI's API"):
        EventStream().feed(line)
