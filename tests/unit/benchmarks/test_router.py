"""The router benchmark: its arithmetic, what it reads of the kernel, its fake workers' pace, its load client."""

import asyncio
import json
import os
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from rich.console import Console

from benchmarks.router import http2
from benchmarks.router.fake import Connection, Engine, Pace, first_request
from benchmarks.router.figures import Memory, Phase, Record, Sample, best_peer, ratio, spread, turns
from benchmarks.router.load import Load, grpc_request, http_request, lanes_of, serve, tokens_of
from benchmarks.router.measure import Size, fleet_of, plans
from benchmarks.router.peers import PEERS
from benchmarks.router.processes import Failed, answers, child, cpu_s, cpu_ticks, line, rss_kib, rss_mib, tree
from benchmarks.router.report import Report, print_report, thousands, verdict
from benchmarks.router.systems import cluster_config
from splitserve.core.worker import Pool
from splitserve.rpc.gen import inference_pb2, inference_pb2_grpc

PYTHON = (sys.executable, "-c")
LOAD = Load("http", "127.0.0.1:1", concurrent=3, warm_requests=0, requests=7, prompt_tokens=10, output_tokens=5)


def a_sample(tokens: int = 1000, router_cpu_s: float = 0.1, ttft_s: float = 0.02) -> Sample:
    return Sample(10, tokens, tokens // 2, 2.0, router_cpu_s, 0.5, ttft_s)


def a_record(ours: bool, *tokens: int, phase: Phase = Phase.BURST) -> Record:
    record = Record(ours)
    for count in tokens:
        record.add(phase, a_sample(count))
    return record


# The kernel's figures ------------------------------------------------------------------------------------------------
def test_cpu_is_that_of_the_process_and_of_children_that_have_ended_whatever_its_name() -> None:
    stat = "42 (a ) b (c) S 1 42 42 0 -1 4194304 100 0 0 0 11 22 33 44 20 0 1 0 100 0 0"
    assert cpu_ticks(stat) == 11 + 22 + 33 + 44


def test_cpu_of_a_live_process_is_what_it_says_itself() -> None:
    before = sum(os.times()[:4])
    assert cpu_s(os.getpid()) >= before - 0.05


async def test_what_a_process_started_counts_as_its_own(tmp_path: Path) -> None:
    program = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(1, flush=True); input()'])"
    async with child([*PYTHON, program], tmp_path / "log") as process:
        await line(process, tmp_path / "log", 30)
        assert len(list(tree(process.pid))) == 2
        assert rss_mib(process.pid) > rss_mib(list(tree(process.pid))[1])


def test_resident_memory_of_a_process_that_has_ended_is_none() -> None:
    assert rss_kib("Name:\tx\nVmRSS:\t    2048 kB\n") == 2048
    assert rss_kib("Name:\tx\nState:\tZ (zombie)\n") == 0


async def test_a_process_is_ended_however_the_run_ends(tmp_path: Path) -> None:
    started: list[Process] = []

    async def broken_run() -> None:
        async with child([*PYTHON, "print('up', flush=True); input()"], tmp_path / "log") as process:
            started.append(process)
            await line(process, tmp_path / "log", 30)
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        await broken_run()
    assert started[0].returncode is not None


async def test_a_process_that_ends_early_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    async with child([*PYTHON, "raise SystemExit('no port is free')"], tmp_path / "log") as process:
        with pytest.raises(Failed, match="no port is free"):
            await line(process, tmp_path / "log", 30)


async def test_a_system_that_never_answers_is_told(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("still loading\n")
    with pytest.raises(Failed, match="still loading"):
        await answers("http://127.0.0.1:1/health", tmp_path / "log", 0.2)


# Arithmetic ----------------------------------------------------------------------------------------------------------
def test_tokens_count_for_the_cpu_of_the_router_alone() -> None:
    sample = a_sample(tokens=1000, router_cpu_s=0.1)
    assert sample.tokens_per_core == pytest.approx(10_000)
    assert sample.cpu_ms_per_request == pytest.approx(10)
    assert (sample.router_cores, sample.client_cores) == pytest.approx((0.05, 0.25))
    assert sample.tokens_per_message == pytest.approx(2)


def test_the_spread_is_that_of_the_rounds() -> None:
    found = a_record(True, 1000, 4000, 2000).tokens_per_core(Phase.BURST)
    assert found is not None
    assert (found.median, found.least, found.most) == pytest.approx((20_000, 10_000, 40_000))
    assert spread([]) is None


def test_the_best_peer_is_another_system_by_its_median() -> None:
    records = {"mine": a_record(True, 9000), "slow": a_record(False, 2000), "quick": a_record(False, 1000, 3000, 4000)}
    best = best_peer(records, Phase.BURST)
    assert best is not None
    assert best[0] == "quick"
    assert best[1] == pytest.approx(30_000)
    assert ratio(records["mine"], records, Phase.BURST) == pytest.approx(3.0)
    assert ratio(records["slow"], records, Phase.BURST) == pytest.approx(2 / 3)


def test_without_peers_or_samples_there_is_no_ratio() -> None:
    alone = {"mine": a_record(True, 9000)}
    assert best_peer(alone, Phase.BURST) is None
    assert ratio(alone["mine"], alone, Phase.BURST) is None
    assert ratio(Record(True), {"peer": a_record(False, 1000)}, Phase.BURST) is None


def test_added_ttft_is_taken_round_by_round() -> None:
    record = Record(ours=False, straight_s=[0.020, 0.030])
    record.add(Phase.FIRST_TOKEN, a_sample(ttft_s=0.021))
    record.add(Phase.FIRST_TOKEN, a_sample(ttft_s=0.033))
    added = record.added_ttft_ms()
    assert added is not None
    assert (added.least, added.most) == pytest.approx((1.0, 3.0))


def test_memory_of_a_stream_is_what_all_added() -> None:
    assert Memory(idle_mib=100, held_mib=300, streams=2000).kib_per_stream == pytest.approx(102.4)


def test_systems_take_turns() -> None:
    assert turns(["a", "b"], 2) == ["a", "b", "a", "b"]


# Printing ------------------------------------------------------------------------------------------------------------
def test_the_report_names_every_system_and_says_which_side_we_are_on() -> None:
    records = {"mine": a_record(True, 1000), "theirs": a_record(False, 2000)}
    records["mine"].memory = Memory(80, 160, 2000)
    console = Console(record=True, width=200)
    print_report(Report({"machine": "two cores"}, records), console)
    said = console.export_text()
    assert all(word in said for word in ("mine", "theirs", "two cores", "80 → 160 at 2,000"))
    assert verdict(Report({}, records)) == "mine, burst: 0.50 times the tokens a core of theirs: behind it."


def test_a_figure_comes_with_its_range() -> None:
    assert thousands(spread([12_340, 15_000, 9_000])) == "12.3k (9.0-15.0)"
    assert thousands(None) == ""


# What is asked -------------------------------------------------------------------------------------------------------
def test_prompts_have_the_length_that_is_asked_for_and_differ() -> None:
    bodies = [json.loads(http_request(LOAD, number).partition(b"\r\n\r\n")[2]) for number in (0, 1, 1000)]
    assert [len(body["prompt"]) for body in bodies] == [10, 10, 10]
    assert len({tuple(body["prompt"]) for body in bodies}) == 3


def test_a_text_prompt_has_as_many_words() -> None:
    words = Load("http", "127.0.0.1:1", 1, 0, 1, prompt_tokens=10, output_tokens=5, text_prompt=True)
    assert len(json.loads(http_request(words, 0).partition(b"\r\n\r\n")[2])["prompt"].split()) == 10


def test_workers_of_ours_take_the_time_of_the_fakes() -> None:
    plan = plans(Size())[Phase.FIRST_TOKEN]
    pools = cluster_config(fleet_of(plan, Size()), {}).pools
    prompt_s = Size().prompt_tokens * pools[Pool.PREFILL].engine["prefill_token_s"]
    assert prompt_s == pytest.approx(plan.pace.prefill_s)
    assert pools[Pool.DECODE].engine["step_s"] == plan.pace.step_s


def test_every_peer_listens_on_loopback_alone() -> None:
    for peer in PEERS:
        command = list(peer.command("http://127.0.0.1:1", "http://127.0.0.1:2", 3, 4))
        assert command[command.index("--host") + 1] == "127.0.0.1"
        assert command[command.index("--prometheus-host") + 1] == "127.0.0.1"


# The fake worker -----------------------------------------------------------------------------------------------------
class Wire(asyncio.Transport):
    """What a connection wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.ended = asyncio.Event()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += bytes(data)
        if b"[DONE]" in self.written:
            self.ended.set()

    def is_closing(self) -> bool:
        return False


def a_request(body: bytes) -> bytes:
    return b"POST /v1/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


def test_a_request_is_read_once_it_is_whole() -> None:
    whole = a_request(b"{}")
    assert first_request(whole[:-1]) is None
    assert first_request(whole[:20]) is None
    found = first_request(whole + b"GET /health HTTP/1.1\r\n\r\n")
    assert found is not None
    assert (found.path, found.body, found.size) == ("/v1/completions", b"{}", len(whole))


async def test_every_stream_gets_a_token_in_each_step_but_one_whose_socket_is_full() -> None:
    engine = Engine(Pace(0, 0), colocated=False)
    streams = [Connection(engine) for _ in range(2)]
    wires = [Wire(), Wire()]
    body = json.dumps({"prompt": [1, 2], "max_tokens": 2, "stream": True}).encode()
    for stream, wire in zip(streams, wires, strict=True):
        stream.connection_made(wire)
        stream.data_received(a_request(body))
    stepping = asyncio.create_task(engine.run())
    streams[1].pause_writing()
    await wires[0].ended.wait()
    assert wires[0].written.count(b" token") == 2
    assert b'"completion_tokens": 2' in wires[0].written
    assert wires[1].written.count(b" token") == 0
    streams[1].resume_writing()
    await wires[1].ended.wait()
    assert wires[1].written.count(b" token") == 2
    stepping.cancel()


# The load client -----------------------------------------------------------------------------------------------------
@asynccontextmanager
async def a_fake_worker() -> AsyncIterator[str]:
    engine = Engine(Pace(0, 0), colocated=True)
    server = await asyncio.get_running_loop().create_server(lambda: Connection(engine), "127.0.0.1", 0)
    stepping = asyncio.create_task(engine.run())
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        stepping.cancel()
        server.close()


async def test_the_client_counts_every_token_of_an_http_stream() -> None:
    async with a_fake_worker() as address:
        load = Load("http", address, LOAD.concurrent, 0, LOAD.requests, LOAD.prompt_tokens, LOAD.output_tokens)
        lanes = await lanes_of(load)
        served = await serve(load, lanes, iter(range(load.requests)))
        for lane in lanes:
            lane.close()
    assert [one.tokens for one in served] == [load.output_tokens] * load.requests
    assert all(one.ttft_s > 0 for one in served)


def test_a_stream_that_does_not_say_how_much_it_made_is_no_success() -> None:
    assert tokens_of(b'"usage":{"completion_tokens":5},"usage": {"completion_tokens": 17}}') == 17
    with pytest.raises(ConnectionError, match="without usage"):
        tokens_of(b"data: [DONE]\n\n")


class Inference(inference_pb2_grpc.InferenceServicer):
    """So many tokens of so long a text, each a message; with `fails`, none."""

    def __init__(self, text: str = "", fails: bool = False) -> None:
        self._text = text
        self._fails = fails

    async def Generate(
        self, message: inference_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        for _ in range(message.sampling.max_tokens):
            yield inference_pb2.GenerateResponse(text=self._text, token_ids=[1])
        if self._fails:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "no worker")
        usage = inference_pb2.Usage(prompt_tokens=1, output_tokens=message.sampling.max_tokens)
        yield inference_pb2.GenerateResponse(usage=usage)


@asynccontextmanager
async def a_grpc_server(service: Inference) -> AsyncIterator[Load]:
    server = grpc.aio.server()
    inference_pb2_grpc.add_InferenceServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield Load("grpc", f"127.0.0.1:{port}", LOAD.concurrent, 0, LOAD.requests, 10, LOAD.output_tokens)
    finally:
        await server.stop(None)


@pytest.mark.parametrize("length", [1, 100_000])
async def test_the_client_counts_every_message_of_a_grpc_stream_also_one_larger_than_a_frame(length: int) -> None:
    async with a_grpc_server(Inference("x" * length)) as load:
        lanes = await lanes_of(load)
        served = await serve(load, lanes, iter(range(load.requests)))
        for lane in lanes:
            lane.close()
    assert [one.tokens for one in served] == [load.output_tokens] * load.requests
    assert [one.messages for one in served] == [load.output_tokens + 1] * load.requests


async def test_a_call_that_fails_is_no_success() -> None:
    async with a_grpc_server(Inference(fails=True)) as load:
        lanes = await lanes_of(load)
        with pytest.raises(ExceptionGroup, match="unhandled") as raised:
            await serve(load, lanes, iter(range(1)))
        for lane in lanes:
            lane.close()
    assert raised.group_contains(ConnectionError, match="ended a stream early")


def test_a_grpc_request_asks_for_the_same() -> None:
    message = inference_pb2.GenerateRequest.FromString(grpc_request(LOAD, 3))
    assert (len(message.token_ids.ids), message.sampling.max_tokens) == (LOAD.prompt_tokens, LOAD.output_tokens)
    assert message.sampling.ignore_eos


def test_a_frame_begins_with_its_length_kind_flags_and_stream() -> None:
    assert http2.frame(0, 1, 3, b"ab") == b"\x00\x00\x02\x00\x01\x00\x00\x00\x03ab"
