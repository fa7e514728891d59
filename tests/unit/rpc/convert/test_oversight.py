"""What operators are shown comes back as it was, and from a router that is older too."""

from math import inf

from splitserve.core.fleet import (
    ClassStatus,
    FleetStatus,
    LinkStatus,
    Percentiles,
    Phase,
    RecentOutputs,
    RunningRequest,
    RunningRequests,
)
from splitserve.rpc import convert
from splitserve.rpc.gen import admin_pb2

RECENT = RecentOutputs(8, 6, Percentiles(0.1, 0.2, 0.3), Percentiles(0.01, 0.02, -1.0))
CHAT = ClassStatus("chat", 1.0, 0.0005, 0.05, inf, 100, 93, 0.31, RECENT)
LINKS = (LinkStatus("p0", "d0", 3, 1, 4096, 1024), LinkStatus("", "", 1, 0, 1, 1))
REQUESTS = tuple(RunningRequest(f"r#{at}", "chat", phase, 40, 7, 1.5, "p0", "d0") for at, phase in enumerate(Phase))


def test_a_fleet_comes_back_with_its_last_minute_and_links() -> None:
    status = FleetStatus("demo", (), 4, 5, "router", (CHAT,), LINKS)
    assert convert.fleet_status_from_proto(convert.fleet_status_to_proto(status)) == status


def test_requests_of_every_phase_come_back() -> None:
    running = RunningRequests(REQUESTS, 17)
    assert convert.running_requests_from_proto(convert.running_requests_to_proto(running)) == running


def test_an_older_router_has_no_last_minute() -> None:
    message = admin_pb2.FleetStatus(model="demo", classes=[admin_pb2.ClassStatus(name="chat", ttft_s=1.0, ended=3)])
    (told,) = convert.fleet_status_from_proto(message).classes
    assert (told.name, told.ended, told.last_minute) == ("chat", 3, RecentOutputs())
