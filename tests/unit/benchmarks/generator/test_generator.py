"""The benchmark of the load generator: its fake router against the real client, and its arithmetic."""

import json

import numpy as np
import pytest

from benchmarks.generator.__main__ import main
from benchmarks.generator.fake import Streams
from benchmarks.generator.sending import WARM_S, Asked, drawn, seen
from splitserve.bench.open_loop import run
from splitserve.rpc.gen import inference_pb2
from tests.unit.bench.test_open_loop import Server
from tests.unit.bench.virtual import run_virtually


def started(number: int, tokens: int) -> inference_pb2.ManyRequest:
    request = inference_pb2.ManyRequest(number=number)
    request.start.request.sampling.max_tokens = tokens
    return request


def test_the_fake_makes_one_token_a_step_for_every_stream_and_ends_each_once() -> None:
    streams = Streams()
    streams.take(started(7, 1))
    streams.take(started(9, 3))
    steps = [inference_pb2.ManyResponse.FromString(streams.step()).events for _ in range(4)]
    assert [[(event.number, event.end) for event in events] for events in steps] == [
        [(9, False), (7, True)],
        [(9, False)],
        [(9, True)],
        [],
    ]
    assert all(len(event.response.token_ids) == 1 for events in steps for event in events)
    assert steps[2][0].response.usage.output_tokens == 3


def test_the_fake_forgets_who_cancels() -> None:
    streams = Streams()
    streams.take(started(7, 5))
    streams.take(inference_pb2.ManyRequest(number=7, cancel=True))
    assert streams.step() == b""


def test_tokens_count_while_requests_come_and_cpu_in_the_whole_run() -> None:
    requests = drawn(Asked("grpc", "", 20.0, 30.0, 10, 50))
    found = run_virtually(run(requests, Server(ttft_s=0.01, gap_s=0.01, tokens=50).send))
    said = seen(found)
    assert said.tokens_per_s == pytest.approx(20.0 * 50, rel=0.15)
    assert said.tokens_per_core == pytest.approx(len(requests) * 50 / found.cpu_s)
    assert (said.failed, said.overload) == (0, "")
    assert said.late_max_s < 1e-4
    assert found.scheduled_s[-1] > WARM_S
    assert np.isfinite(found.ended_s).all()


@pytest.mark.parametrize("kind", ["grpc", "http"])
def test_the_generator_receives_every_token_of_a_real_process(
    kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--kind", kind, "--tokens", "500", "--seconds", "1", "--output", "20", "--prompt", "16", "--json"]
    monkeypatch.setattr("sys.argv", ["generator", *options])
    main()
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["failed"] == 0
    assert row["tokens_per_core"] > 0
