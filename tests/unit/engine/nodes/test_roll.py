"""Who has joined a worker: time and connections are arguments."""

from collections.abc import Mapping
from types import MappingProxyType

import pytest

from splitserve.engine.nodes.messages import Join, Refused, ToNode, Waiting, Welcome
from splitserve.engine.nodes.roll import Roll

ALIKE = {"model": "m 1", "engine.max_model_len": "1024"}
SILENT_S = 10.0


@pytest.fixture
def roll() -> Roll:
    return Roll(3, "uuid", ALIKE, SILENT_S)


def joined(
    roll: Roll, node: int, process: str = "", now: float = 0.0, changes: Mapping[str, str] = MappingProxyType({})
) -> dict[bytes, ToNode]:
    """What is said to whom; a process has one connection, which is also its identity."""
    process = process or f"p{node}"
    said = Join(node, process, f"host-{node}", {**ALIKE, **changes})
    replies = roll.join(process.encode(), int.from_bytes(process.encode()), said, now)
    return dict(replies)


def test_nobody_begins_before_all_have_joined(roll: Roll) -> None:
    assert joined(roll, 2) == {b"p2": Waiting((1,))}
    assert roll.missing == (1,)
    assert joined(roll, 1) == {b"p1": Welcome("uuid"), b"p2": Welcome("uuid")}
    assert roll.complete


def test_whoever_asks_again_hears_the_same(roll: Roll) -> None:
    assert joined(roll, 2) == joined(roll, 2) == {b"p2": Waiting((1,))}
    joined(roll, 1)
    assert joined(roll, 2) == {b"p2": Welcome("uuid")}


@pytest.mark.parametrize("node", [0, 3, -1])
def test_a_rank_that_there_is_not_is_refused(roll: Roll, node: int) -> None:
    assert joined(roll, node, "p") == {b"p": Refused("nodes.rank", f"node {node} is none of 1 to 2")}
    assert roll.missing == (1, 2)


def test_a_node_with_another_setting_is_refused_by_its_name(roll: Roll) -> None:
    (refused,) = joined(roll, 1, changes={"engine.max_model_len": "512"}).values()
    sentence = "it is 512 on node 1 and 1024 on node 0; give all nodes of a worker the same"
    assert refused == Refused("engine.max_model_len", sentence)
    assert "node 1 (host-1) was refused: engine.max_model_len" in roll.refused
    assert roll.missing == (1, 2)


def test_a_setting_that_only_one_side_knows_differs(roll: Roll) -> None:
    (refused,) = joined(roll, 1, changes={"kv_transfer.new": "1"}).values()
    assert isinstance(refused, Refused)
    assert refused.field == "kv_transfer.new"


def test_a_process_started_anew_takes_the_place_of_the_former(roll: Roll) -> None:
    joined(roll, 1, "former")
    replies = joined(roll, 1, "later")
    assert isinstance(replies[b"former"], Refused)
    assert "another process, on host-1, has joined as node 1" in replies[b"former"].message
    assert replies[b"later"] == Waiting((2,))
    assert set(joined(roll, 2)) == {b"later", b"p2"}


def test_nobody_takes_a_place_in_a_worker_that_runs(roll: Roll) -> None:
    joined(roll, 1)
    joined(roll, 2)
    (refused,) = joined(roll, 2, "later").values()
    assert isinstance(refused, Refused)
    assert "all its nodes start together" in refused.message
    assert roll.identities == (b"p1", b"p2")


def test_who_leaves_before_the_beginning_may_come_back(roll: Roll) -> None:
    joined(roll, 1)
    member = roll.by_connection(int.from_bytes(b"p1"))
    assert member is not None
    assert roll.remove(member)
    assert joined(roll, 2) == {b"p2": Waiting((1,))}
    assert set(joined(roll, 1, "again")) == {b"again", b"p2"}
    assert roll.complete


def test_a_connection_that_nobody_joined_by_ends_unnoticed(roll: Roll) -> None:
    joined(roll, 1)
    assert roll.by_connection(7) is None


def test_a_node_is_silent_when_nothing_of_it_was_heard_for_so_long(roll: Roll) -> None:
    joined(roll, 1, now=0.0)
    joined(roll, 2, now=0.0)
    roll.heard(b"p1", 5.0)
    assert roll.silent(SILENT_S) is None
    gone = roll.silent(SILENT_S + 0.1)
    assert str(gone) == "node 2 (host-2)"
    assert gone is not None
    assert roll.remove(gone)
    assert roll.silent(SILENT_S + 0.1) is None


def test_the_end_of_a_former_process_is_not_that_of_the_one_in_its_place(roll: Roll) -> None:
    joined(roll, 1, "former")
    former = roll.by_connection(int.from_bytes(b"former"))
    joined(roll, 1, "later")
    assert former is not None
    assert not roll.remove(former)
    assert roll.missing == (2,)
