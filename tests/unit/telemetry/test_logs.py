"""One line per event, whatever reads it."""

import asyncio
import io
import json
import logging
from collections.abc import Iterator

import pytest

from splitserve.telemetry.logs import Logger, about, configure


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers = []  # `configure` closes those it replaces
    yield
    root.handlers, root.level = handlers, level


@pytest.fixture
def lines() -> io.StringIO:
    return io.StringIO()


def test_json_lines_have_the_event_and_its_fields(lines: io.StringIO) -> None:
    configure(as_json=True, stream=lines)
    Logger("router").info("request finished", request_id="r", ttft_s=0.25)
    entry = json.loads(lines.getvalue())
    assert (entry["event"], entry["level"], entry["logger"]) == ("request finished", "info", "splitserve.router")
    assert (entry["request_id"], entry["ttft_s"]) == ("r", 0.25)


def test_key_value_lines_quote_what_would_end_a_field(lines: io.StringIO) -> None:
    configure(stream=lines)
    Logger("router").warning("worker left", worker="p 0", reason='said "no"', uuid="u", attempts=2, empty="")
    line = lines.getvalue()
    assert line.count("\n") == 1
    for field in ('worker="p 0"', 'reason="said \\"no\\""', "uuid=u", "attempts=2", 'empty=""', "warning"):
        assert field in line


def test_what_someone_else_wrote_can_not_begin_a_line_of_its_own(lines: io.StringIO) -> None:
    configure(stream=lines)
    Logger("router").info("request failed", reason="a\n2026 error forged")
    assert lines.getvalue().count("\n") == 1


@pytest.mark.parametrize("as_json", [True, False])
def test_our_own_mistakes_come_with_a_traceback(lines: io.StringIO, as_json: bool) -> None:
    configure(as_json=as_json, stream=lines)
    try:
        raise ValueError("broken")
    except ValueError as error:
        Logger("router").exception("request broke the router", error, request_id="r")
    assert "ValueError: broken" in lines.getvalue()
    assert "Traceback" in lines.getvalue()


def test_levels_below_the_chosen_one_are_left_out(lines: io.StringIO) -> None:
    configure(level=logging.WARNING, stream=lines)
    Logger("router").info("chatter")
    assert lines.getvalue() == ""


def test_debug_lines_are_ours_alone_and_only_where_they_are_asked_for(lines: io.StringIO) -> None:
    for debug, said in ((True, ["route"]), (False, [])):
        configure(as_json=True, debug=debug, stream=lines)
        assert Logger("router").debugs is debug
        Logger("router").debug("route")
        logging.getLogger("someone.else").debug("chatter")
        assert [json.loads(line)["event"] for line in lines.getvalue().splitlines()] == said
        lines.seek(0)
        lines.truncate()


async def test_every_line_about_a_request_names_it_also_in_its_tasks_and_threads(lines: io.StringIO) -> None:
    configure(as_json=True, stream=lines)

    async def task() -> None:
        await asyncio.to_thread(Logger("test").info, "in a thread")

    with about(request_id="r-1"):
        Logger("test").info("here", tokens=3)
        await asyncio.create_task(task())
        logging.getLogger("someone.else").info("a library")
    Logger("test").info("outside")
    said = {entry["event"]: entry.get("request_id") for entry in map(json.loads, lines.getvalue().splitlines())}
    assert said == {"here": "r-1", "in a thread": "r-1", "a library": "r-1", "outside": None}
