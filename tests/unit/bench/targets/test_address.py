import pytest

from splitserve.bench.targets.address import Kind, Options, Target, opened, parse
from splitserve.core.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "kind", "name", "address"),
    [
        ("127.0.0.1:50051", Kind.ROUTER, "grpc://127.0.0.1:50051", "127.0.0.1:50051"),
        ("grpc://a:1,b:2", Kind.ROUTER, "grpc://a:1,b:2", "a:1,b:2"),
        (" GRPC://a:1, b:2 ", Kind.ROUTER, "grpc://a:1,b:2", "a:1,b:2"),
        ("grpc://[::1]:50051", Kind.ROUTER, "grpc://[::1]:50051", "[::1]:50051"),
        ("http://a:8000", Kind.OPENAI, "http://a:8000/v1", "http://a:8000/v1"),
        ("http://a:8000/", Kind.OPENAI, "http://a:8000/v1", "http://a:8000/v1"),
        ("http://a:8000/v1/", Kind.OPENAI, "http://a:8000/v1", "http://a:8000/v1"),
        ("https://api.example.org/llm/v1", Kind.OPENAI, *["https://api.example.org/llm/v1"] * 2),
        ("worker://127.0.0.1:0", Kind.WORKER, "worker://127.0.0.1:0", "127.0.0.1:0"),
    ],
)
def test_a_target_is_its_kind_and_where_it_is(text: str, kind: Kind, name: str, address: str) -> None:
    assert parse(text) == Target(kind, name, address)
    assert parse(name) == parse(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "nothing is not host:port"),
        ("nowhere", "nowhere is not host:port"),
        ("grpc://a:1,", "nothing is not host:port"),
        ("grpc://a:0", "a:0 is not host:port"),
        ("grpc://:50051", ":50051 is not host:port"),
        ("grpc://a:seven", "seven"),
        ("grpc://a:70000", "out of range"),
        ("grpc://a:1/v1", "is not host:port"),
        ("worker://", "nothing is not host:port"),
        ("ftp://a:1", "ftp:// is unknown; there are grpc://"),
        ("http://", "a server is http://host:port"),
        ("http://a:0", "a server is http://host:port"),
        ("http://user:secret@a:1", "an API key is an option"),
        ("http://a:1/v1?key=x", "an API key is an option"),
    ],
)
def test_what_is_no_target_is_named(text: str, reason: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(text)
    assert raised.value.path == text
    assert reason in raised.value.message


@pytest.mark.parametrize("text", ["grpc://127.0.0.1:1", "http://127.0.0.1:1", "worker://127.0.0.1:0"])
async def test_a_vocabulary_must_be_said(text: str) -> None:
    target = parse(text)
    for options, reason in ((Options(), "vocab_size"), (Options(vocabulary=1), "at least 2")):
        with pytest.raises(ConfigError, match=reason) as raised:
            async with opened(target, options):
                pass
        assert raised.value.path == target.name
