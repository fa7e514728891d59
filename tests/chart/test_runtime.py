"""The whole chart runs, without Kubernetes: the pods of values-sim.yaml, as rendered, find each other by the names that
the chart gives them, serve over gRPC and HTTP, move KV from pod to pod, drain on SIGTERM and get over a kill."""

import json
import re
import signal
import subprocess
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.certificates import Authority
from tests.chart.kubelet import Cluster, cluster_of, fetch
from tests.chart.pods import Pod, why_not
from tests.chart.tools import Chart, Document, merged, one
from tests.chart.variants import SIMULATED

REASON = why_not()
pytestmark = [pytest.mark.skipif(bool(REASON), reason=REASON), pytest.mark.timeout(240)]

LONG = " ".join(["It is a truth universally acknowledged, that a single man in possession of a good fortune"] * 20)
# Steps that take long enough for something to happen between two tokens.
VALUES = merged(
    SIMULATED,
    {
        "engine": {"step_s": 0.02},
        "router": {"config": {"heartbeat_timeout_s": 3.0, "probe_after_s": 600}, "preStopSeconds": 1},
        "gateway": {"preStopSeconds": 1},
    },
)


@pytest.fixture(scope="module")
def found(chart: Chart) -> list[Document]:
    return chart.documents(VALUES)


@pytest.fixture(scope="module")
def running(found: list[Document], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster_of(found, tmp_path_factory.mktemp("pods")) as cluster:
        cluster.until_ready()
        yield cluster


@pytest.fixture
def cluster(running: Cluster) -> Iterator[Cluster]:
    """Every pod is ready, before and after."""
    running.until_ready()
    yield running
    running.until_ready()


def _test_pod(found: list[Document], container: str) -> tuple[Document, Document]:
    manifest = one(found, "Pod", "test")
    return manifest, next(each for each in manifest["spec"]["containers"] if each["name"] == container)


def _generate(cluster: Cluster, found: list[Document], *options: str) -> Pod:
    """The test pod's own command, with another prompt and other options."""
    manifest, container = _test_pod(found, "grpc")
    kept = [arg for arg in container["args"][2:] if not arg.startswith("--max-tokens")]
    return cluster.client(manifest, {**container, "args": ["generate", LONG, *kept, *options]})


def _chunks(client: Pod) -> list[dict[str, Any]]:
    return [json.loads(line) for line in client.output.splitlines() if line.startswith("{")]


def _tokens(client: Pod) -> list[int]:
    """In order, none missing and none twice."""
    tokens: list[int] = []
    for chunk in _chunks(client):
        assert chunk["index"] == len(tokens), client.output
        tokens += chunk["token_ids"]
    return tokens


def _under_way(cluster: Cluster, client: Pod) -> None:
    cluster.until(lambda: client.exit_code is not None or len(_chunks(client)) > 3, "the first tokens")
    assert client.exit_code is None, client.output


def _finished(cluster: Cluster, client: Pod) -> dict[str, Any]:
    """Its last chunk."""
    cluster.until(lambda: client.exit_code is not None, "the answer")
    assert client.exit_code == 0, f"{client.output}\n{cluster.logs()}"
    return _chunks(client)[-1]


def _metric(pod: Pod, name: str) -> float:
    text = fetch(f"http://{pod.address}:9400/metrics").read().decode()
    return sum(float(value) for value in re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.M))


def test_what_helm_test_sends_is_answered(cluster: Cluster, found: list[Document]) -> None:
    _answers(cluster, found)


def _answers(cluster: Cluster, found: list[Document]) -> None:
    for name in ("grpc", "http"):
        client = cluster.client(*_test_pod(found, name))
        cluster.until(lambda client=client: client.exit_code is not None, f"the {name} test's end")  # type: ignore[misc]
        assert client.exit_code == 0, f"{client.output}\n{cluster.logs()}"
        assert _answered(client)


def _answered(client: Pod) -> bool:
    last = json.loads([line for line in client.output.splitlines() if line.startswith("{")][-1])
    usage = last["usage"]
    return bool(usage.get("output_tokens", usage.get("completion_tokens")) == 8)


def test_every_worker_joins_every_router(cluster: Cluster) -> None:
    for router in cluster.of("router"):
        cluster.until(lambda router=router: _metric(router, "splitserve_workers") == 3, "three workers")  # type: ignore[misc]


def test_kv_moves_from_pod_to_pod(cluster: Cluster, found: list[Document]) -> None:
    (prefill,) = cluster.of("worker", "prefill")
    before = _metric(prefill, "splitserve_worker_kv_written_bytes_total")
    last = _finished(cluster, _generate(cluster, found, "--max-tokens=8"))
    assert last["timings"]["prefill_worker"] == prefill.name
    assert last["timings"]["decode_worker"] in [pod.name for pod in cluster.of("worker", "decode")]
    assert last["timings"]["kv_bytes"] > 0
    assert _metric(prefill, "splitserve_worker_kv_written_bytes_total") - before == last["timings"]["kv_bytes"]


def test_a_killed_worker_costs_no_token_and_comes_back(cluster: Cluster, found: list[Document]) -> None:
    options = ("--max-tokens=200", "--temperature=0", "--ignore-eos")
    expected = _generate(cluster, found, *options)
    _finished(cluster, expected)
    client = _generate(cluster, found, *options)
    _under_way(cluster, client)
    victim = _decoding(cluster)
    restarts = victim.restarts
    victim.signal(signal.SIGKILL)
    last = _finished(cluster, client)
    assert last["timings"]["attempts"] > 1
    assert last["timings"]["decode_worker"] != victim.name
    assert _tokens(client) == _tokens(expected)
    cluster.until(lambda: victim.restarts == restarts + 1 and victim.ready, "the worker's return")


def _decoding(cluster: Cluster) -> Pod:
    (worker,) = [pod for pod in cluster.of("worker", "decode") if _metric(pod, "splitserve_worker_running_jobs")]
    return worker


def test_a_worker_that_is_taken_away_drains(cluster: Cluster, found: list[Document]) -> None:
    client = _generate(cluster, found, "--max-tokens=200", "--ignore-eos")
    _under_way(cluster, client)
    leaving = _decoding(cluster)
    assert cluster.delete(leaving) == 0
    assert _finished(cluster, client)["usage"]["output_tokens"] == 200
    assert len(_tokens(client)) == 200
    cluster.replace(leaving)


def test_a_router_that_is_taken_away_ends_its_streams_and_gets_no_more(cluster: Cluster, found: list[Document]) -> None:
    client = _generate(cluster, found, "--max-tokens=200", "--ignore-eos")
    _under_way(cluster, client)
    (leaving,) = [pod for pod in cluster.of("router") if _metric(pod, "splitserve_running_requests")]
    (other,) = [pod for pod in cluster.of("router") if pod is not leaving]
    assert cluster.delete(leaving) == 0
    _finished(cluster, client)
    assert len(_tokens(client)) == 200
    ended = _metric(other, "splitserve_requests_total")
    _finished(cluster, _generate(cluster, found, "--max-tokens=8"))
    assert _metric(other, "splitserve_requests_total") == ended + 1
    cluster.replace(leaving)
    cluster.until(lambda: leaving.ready and _metric(leaving, "splitserve_workers") == 3, "the workers' return")


def test_a_router_more_is_joined_and_used_while_no_other_pod_is_told_of_it(
    cluster: Cluster, found: list[Document]
) -> None:
    """What `kubectl scale` does: a pod more behind the Service's name, and not a file anywhere that changes."""
    pids = {pod.name: pod.pid for pod in cluster.pods.values()}
    router = cluster.scale_up("try-splitserve-router")
    cluster.until(
        lambda: router.ready and _metric(router, "splitserve_workers") == 3, "three workers at the new router"
    )
    gateway = cluster.of("gateway")[0]
    ask = {**_test_pod(found, "http")[1]}
    ask["args"] = [ask["args"][0], f"http://{gateway.address}:8000", *ask["args"][2:]]

    def serves() -> bool:
        client = cluster.client(_test_pod(found, "http")[0], ask)
        cluster.until(lambda: client.exit_code is not None, "the answer by the gateway")
        assert client.exit_code == 0, client.output
        return _metric(router, "splitserve_requests_total") > 0

    cluster.until(serves, "requests of the gateway at the new router")
    assert {name: cluster.pods[name].pid for name in pids} == pids, "nobody was started anew"
    assert cluster.scale_down(router) == 0
    gone = f"{router.address})"
    for worker in cluster.of("worker"):
        cluster.until(lambda worker=worker: _left(worker, gone), "the workers leave it")  # type: ignore[misc]
    assert serves_still(cluster, found)


def _left(worker: Pod, router: str) -> bool:
    return any("router left" in line and router in line for line in worker.output.splitlines())


def serves_still(cluster: Cluster, found: list[Document]) -> bool:
    return bool(_finished(cluster, _generate(cluster, found, "--max-tokens=8"))["usage"]["output_tokens"] == 8)


def test_a_gateway_that_is_taken_away_drains(cluster: Cluster, found: list[Document]) -> None:
    leaving = cluster.of("gateway")[0]
    stream = _stream(cluster, found, leaving)
    cluster.until(lambda: stream.exit_code is not None or "data:" in stream.output, "the first tokens")
    assert cluster.delete(leaving) == 0
    cluster.until(lambda: stream.exit_code is not None, "the stream's end")
    assert stream.exit_code == 0, stream.output
    assert stream.output.rstrip().endswith("data: [DONE]")
    client = cluster.client(*_test_pod(found, "http"))  # the other gateway answers
    cluster.until(lambda: client.exit_code is not None, "the http test's end")
    assert client.exit_code == 0, client.output
    cluster.replace(leaving)


_STREAM = """
import sys, json, urllib.request
asked = {"model": "demo", "prompt": "It is", "max_tokens": 200, "stream": True, "ignore_eos": True}
request = urllib.request.Request(sys.argv[1], json.dumps(asked).encode(), {"content-type": "application/json"})
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
for line in opener.open(request, timeout=60):
    print(line.decode().rstrip(), flush=True)
"""


def _stream(cluster: Cluster, found: list[Document], gateway: Pod) -> Pod:
    manifest, container = _test_pod(found, "http")
    url = f"http://{gateway.address}:8000/v1/completions"
    return cluster.client(manifest, {**container, "args": [_STREAM, url]})


def test_a_pod_can_write_nowhere_but_where_the_chart_says(cluster: Cluster) -> None:
    worker = cluster.of("worker", "decode")[0]
    wrote = {}
    for path in ("/home/splitserve/x", "/tmp/x", "/etc/splitserve/config/x", "/x", "/usr/x"):
        wrote[path] = worker.exec("touch", path, stderr=subprocess.DEVNULL).wait(10) == 0
    assert wrote == {path: path.startswith(("/home/splitserve", "/tmp")) for path in wrote}


# With certificates and keys -------------------------------------------------------------------------------------------
KEYS = {"worker": "the-key-of-every-worker", "client": "the-key-of-helm-test"}
SECURED = {
    "insecure": False,
    "tls": {"mode": "certManager", "mutual": True, "certManager": {"issuerRef": {"name": "ours"}}},
    "apiKeys": {"secretName": "keys"},
    "router": {"replicas": 1, "http": True},
    "gateway": {"replicas": 1},
    "pools": {"decode": {"workers": 1}},
}


def _secrets(found: list[Document], directory: Path) -> dict[str, dict[str, str]]:
    """What cert-manager makes of the Certificates, and the Secret of keys that the values name."""
    authority = Authority(directory)
    secrets = {}
    for spec in (each["spec"] for each in found if each["kind"] == "Certificate"):
        files = (*authority.issue(spec["secretName"], *spec["dnsNames"]), authority.ca)
        texts = [Path(file).read_text() for file in files]
        secrets[spec["secretName"]] = dict(zip(("tls.crt", "tls.key", "ca.crt"), texts, strict=True))
    scopes = {"worker": ["worker"], "client": ["inference"]}
    entries = [{"name": name, "key": key, "scopes": scopes[name]} for name, key in KEYS.items()]
    return {**secrets, "keys": {**KEYS, "keys.yaml": json.dumps({"keys": entries})}}


def test_it_serves_with_mutual_tls_and_keys(chart: Chart, tmp_path: Path) -> None:
    found = chart.documents(merged(VALUES, SECURED))
    secrets = _secrets(found, tmp_path / "authority")
    with cluster_of(found, tmp_path, secrets) as cluster:
        cluster.until_ready()  # by probes that show no certificate
        _answers(cluster, found)
        (router,) = cluster.of("router")
        with pytest.raises(urllib.error.HTTPError, match="403"):
            fetch(f"https://{router.address}:9400/metrics")
        manifest, container = _test_pod(found, "grpc")
        stranger = [{"name": "SPLITSERVE_API_KEY", "value": "a-key-that-nobody-has"}]
        client = cluster.client(manifest, {**container, "env": [*container["env"], *stranger]})
        cluster.until(lambda: client.exit_code is not None, "the stranger's end")
        assert client.exit_code != 0
        assert "key" in client.output


def test_a_pod_that_misnames_a_router_never_gets_ready(found: list[Document], tmp_path: Path) -> None:
    """The twin of all these: names matter, so a wrong one must show."""
    wrong = json.loads(json.dumps(found).replace("-routers.serving.svc", "-router.serving.svc"))
    few = [
        each
        for each in wrong
        if each["kind"] in ("ConfigMap", "Service") or each["metadata"]["name"].endswith(("-prefill", "-router"))
    ]
    with cluster_of(few, tmp_path) as cluster:
        (worker,) = cluster.of("worker")
        cluster.until(lambda: "router not attached" in worker.output, "the worker's complaint")
        assert not worker.ready
