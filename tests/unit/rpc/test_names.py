"""Names into addresses."""

import socket
from collections.abc import Callable
from typing import Any

import pytest

from splitserve.core.errors import Unavailable
from splitserve.rpc.names import Names, Place, resolved, resolved_here

NAME = "routers.serving.svc:50051"
ONE, OTHER = Place(NAME, "10.0.0.1:50051"), Place(NAME, "[fd00::2]:50051")


def answering(monkeypatch: pytest.MonkeyPatch, answer: Callable[..., Any]) -> None:
    """What the machine's resolver says, to whoever asks it."""
    monkeypatch.setattr(socket, "getaddrinfo", answer)


def test_a_router_is_called_by_its_name_and_where_it_is() -> None:
    assert str(ONE) == "routers.serving.svc:50051 (10.0.0.1)"
    assert str(OTHER) == "routers.serving.svc:50051 ([fd00::2])"
    assert str(Place("10.0.0.1:50051", "10.0.0.1:50051")) == "10.0.0.1:50051"


def test_an_address_needs_no_resolver() -> None:
    names = Names(["10.0.0.1:1", "[::1]:2", NAME])
    assert names.to_look_up == (NAME,)
    assert names.places == (Place("10.0.0.1:1", "10.0.0.1:1"), Place("[::1]:2", "[::1]:2"))


def test_a_name_stands_for_what_was_said_last() -> None:
    names = Names([NAME, "other:1"])
    assert list(names.unknown) == [NAME, "other:1"]
    for said in ((ONE, OTHER), (OTHER,)):
        names.heard(NAME, said)
        assert list(names.unknown) == ["other:1"]
        assert names.places == said


def test_an_empty_answer_takes_nothing_back() -> None:
    names = Names([NAME])
    names.heard(NAME, (ONE,))
    names.heard(NAME, ())
    assert names.places == (ONE,)


def test_a_router_of_two_names_is_one() -> None:
    names = Names([NAME, "other:50051"])
    names.heard(NAME, (ONE,))
    names.heard("other:50051", (Place("other:50051", ONE.address),))
    assert names.places == (ONE,)


async def test_all_addresses_of_a_name_are_found_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(host: str, port: str, *_: Any, **__: Any) -> list[Any]:
        assert (host, port) == ("routers.serving.svc", "50051")
        four = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.1", 50051))
        return [four, (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("fd00::2", 50051, 0, 0)), four]

    answering(monkeypatch, answer)
    assert resolved_here(NAME) == (ONE, OTHER)
    assert await resolved(NAME) == (ONE, OTHER)


async def test_the_machines_resolver_knows_this_machine() -> None:
    assert Place("localhost:7", "127.0.0.1:7") in await resolved("localhost:7")


async def test_a_name_without_an_address_is_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(*_: Any, **__: Any) -> list[Any]:
        raise socket.gaierror(-2, "Name or service not known")

    answering(monkeypatch, answer)
    sentence = r"routers.serving.svc:50051 has no address \(Name or service not known\)"
    with pytest.raises(Unavailable, match=sentence):
        resolved_here(NAME)
    with pytest.raises(Unavailable, match=sentence):
        await resolved(NAME)
