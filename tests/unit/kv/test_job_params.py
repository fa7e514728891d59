import msgspec
import pytest

from splitserve.core.worker import Objectives, Ticket
from splitserve.kv.job_params import (
    DESTINATION,
    SOURCE,
    GrammarStart,
    grammar_of,
    grammar_params,
    job_params,
    pace_of,
    pace_params,
    ticket_params,
    waits_for_kv,
)

TICKET = Ticket("t", 1, (), ())


@pytest.mark.parametrize("start", [GrammarStart(True, 7), GrammarStart(False, 0), None])
def test_a_grammars_start_is_read_as_it_was_written_beside_other_things(start: GrammarStart | None) -> None:
    said = {"kv_transfer_params": job_params("job"), **grammar_params(start)}
    assert grammar_of(said) == start


def test_a_request_of_nobodys_has_none() -> None:
    assert grammar_of(None) is None
    assert grammar_of({}) is None


@pytest.mark.parametrize("objectives", [Objectives(), Objectives(tpot_s=0.02), Objectives(1.5, 0.02, 0.1)])
@pytest.mark.parametrize("made_elsewhere", [0, 7])
def test_objectives_are_read_as_they_were_written_beside_other_things(
    objectives: Objectives, made_elsewhere: int
) -> None:
    said = grammar_params(GrammarStart(True, 7)) | pace_params(objectives, made_elsewhere)
    carried = msgspec.msgpack.decode(msgspec.msgpack.encode(said))  # to an engine core in another process
    assert pace_of(carried) == (objectives, made_elsewhere)


def test_a_job_without_objectives_says_nothing_of_them() -> None:
    assert pace_params(Objectives(), 0) == {}
    assert pace_of(None) == pace_of({}) == (Objectives(), 0)


@pytest.mark.parametrize(
    ("params", "waits"),
    [
        (None, False),
        (job_params("job"), False),
        (ticket_params("job", TICKET, SOURCE, 1.0), False),
        (ticket_params("job", TICKET, DESTINATION, 1.0), True),
        ({"do_remote_decode": True}, False),
        ({"do_remote_prefill": True}, True),
        ({"do_remote_prefill": False}, False),
    ],
)
def test_a_destination_waits_for_kv_in_either_mode(params: dict[str, object] | None, waits: bool) -> None:
    assert waits_for_kv(params) is waits
