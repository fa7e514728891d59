from collections.abc import Sequence

import pytest
from tokenizers import Tokenizer

from splitserve.cli.build import DEMO_MODEL
from splitserve.core.errors import ConfigError
from splitserve.core.model import ModelInfo
from splitserve.core.request import SamplingParams
from splitserve.engine.sim.text import TextStream, load_tokenizer, vocabulary


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(ModelInfo.read(DEMO_MODEL))


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def a_stream(tokenizer: Tokenizer, prompt: Sequence[int], stop: tuple[str, ...], **others: bool) -> TextStream:
    return TextStream(tokenizer, prompt, SamplingParams(stop=stop, **others))  # type: ignore[arg-type]


def pieces(stream: TextStream, tokens: list[int]) -> list[str]:
    return [stream.push(token).text for token in tokens]


@pytest.mark.parametrize("text", ["It is a truth universally acknowledged", "naïve — “ça va?” 日本 🎉🎉", " a\n\n b"])
def test_the_pieces_of_a_text_are_the_text(tokenizer: Tokenizer, text: str) -> None:
    stream = a_stream(tokenizer, ids(tokenizer, "Before."), ())
    assert "".join(pieces(stream, ids(tokenizer, text))) + stream.flush() == text


def test_a_character_of_several_tokens_comes_out_whole(tokenizer: Tokenizer) -> None:
    tokens = ids(tokenizer, "🎉!")
    assert len(tokens) > 2, "the emoji must be several tokens for this test to say anything"
    shown = pieces(a_stream(tokenizer, (), ()), tokens)
    assert [piece for piece in shown if piece] == ["🎉", "!"]


@pytest.mark.parametrize("text", ["naïve 🎉 and 日本", "plain words"])
def test_replaying_any_part_of_an_output_continues_at_the_same_character(tokenizer: Tokenizer, text: str) -> None:
    tokens, prompt = ids(tokenizer, text), ids(tokenizer, "So")
    for sent in range(len(tokens)):
        first, second = a_stream(tokenizer, prompt, ("zzz",)), a_stream(tokenizer, prompt, ("zzz",))
        shown = "".join(pieces(first, tokens[:sent]))
        pieces(second, tokens[:sent])
        assert shown + "".join(pieces(second, tokens[sent:])) + second.flush() == text


def test_what_may_begin_a_stop_string_is_held_back_until_it_does_not(tokenizer: Tokenizer) -> None:
    stream = a_stream(tokenizer, (), ("END.",))
    assert "".join(pieces(stream, ids(tokenizer, "the EN"))) == "the "
    assert "".join(pieces(stream, ids(tokenizer, "TRY"))) == "ENTRY"


def test_a_stop_string_over_several_tokens_cuts_the_text_before_it(tokenizer: Tokenizer) -> None:
    stream = a_stream(tokenizer, (), ("zzz", "wor"))
    shown = [stream.push(token) for token in ids(tokenizer, "Hello, w") + ids(tokenizer, "ords")]
    assert "".join(piece.text for piece in shown if not piece.stopped) == "Hello, "
    assert any(piece.stopped for piece in shown)


def test_a_stop_string_may_be_part_of_the_text(tokenizer: Tokenizer) -> None:
    stream = a_stream(tokenizer, (), ("wor",), include_stop=True)
    assert "".join(pieces(stream, ids(tokenizer, "Hello, words"))).startswith("Hello, wor")
    assert stream.flush() in ("", "ds")


def test_the_earliest_of_several_matches_wins(tokenizer: Tokenizer) -> None:
    stream = a_stream(tokenizer, (), ("c", "b"))
    shown = [stream.push(token) for token in ids(tokenizer, "abc")]
    assert "".join(piece.text for piece in shown) == "a"


def test_below_min_tokens_nothing_stops_and_nothing_is_held_back(tokenizer: Tokenizer) -> None:
    stream = a_stream(tokenizer, (), ("wo", "rl"))
    shown = [stream.push(token, watch_stop=False) for token in ids(tokenizer, "a wor")]
    assert "".join(piece.text for piece in shown) == "a wor"
    assert not any(piece.stopped for piece in shown)


def test_broken_bytes_do_not_hold_the_text_for_ever(tokenizer: Tokenizer) -> None:
    broken = ids(tokenizer, "🎉")[0]
    stream = a_stream(tokenizer, (), ())
    shown = pieces(stream, [broken] * 20 + ids(tokenizer, "on"))
    assert "�" in "".join(shown[:20])
    assert "".join(shown).endswith("on")


def test_the_vocabulary_has_only_tokens_that_are_text_by_themselves(tokenizer: Tokenizer) -> None:
    known = vocabulary(ModelInfo.read(DEMO_MODEL), tokenizer)
    assert len(known.plain) > 1000
    assert not set(known.plain) & set(known.eos)
    assert all("�" not in tokenizer.decode([token]) for token in known.plain)


def test_a_model_without_a_tokenizer_is_named(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("model")
    (directory / "config.json").write_text((DEMO_MODEL / "config.json").read_text())
    with pytest.raises(ConfigError, match=r"tokenizer\.json: no such file"):
        load_tokenizer(ModelInfo.read(directory))
