"""What pods are started with is what splitserve takes: files by its own parsers, options by its own command line; and
what they name (addresses, files, certificates) is what the chart makes."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from typer.core import TyperGroup
from typer.testing import CliRunner

from splitserve.cli import build
from splitserve.cli.main import app
from splitserve.core.config import RouterConfig, Settings, WorkerConfig, parse
from splitserve.core.exposure import check_leader, check_router, check_worker
from splitserve.engine.vllm.ranks import check_spread
from splitserve.gateway.config import GatewayConfig
from tests.chart.tools import NAMESPACE, Chart, Document, containers, merged, one, pod_templates
from tests.chart.variants import VARIANTS

CLASSES: dict[str, type[Settings]] = {
    "router.yaml": RouterConfig,
    "gateway.yaml": GatewayConfig,
    "worker.yaml": WorkerConfig,
}
ENDS_IN_TIME_S = 10  # after its drain bound: stopping, and what the kubelet takes
every_variant = pytest.mark.parametrize("name", VARIANTS)


def _configs(found: list[Document], file: str) -> Iterator[Any]:
    for each in found:
        if each["kind"] == "ConfigMap" and file in each["data"]:
            yield parse(CLASSES[file], yaml.safe_load(each["data"][file]), file)


@every_variant
def test_every_configuration_is_one_that_splitserve_takes(rendered: dict[str, list[Document]], name: str) -> None:
    routers, workers = (list(_configs(rendered[name], file)) for file in ("router.yaml", "worker.yaml"))
    assert len(routers) == 1
    assert workers
    for router in routers:
        check_router(router)
    for worker in workers:
        check_worker(worker)
    list(_configs(rendered[name], "gateway.yaml"))


@every_variant
def test_every_command_line_is_one_that_splitserve_takes(rendered: dict[str, list[Document]], name: str) -> None:
    commands = typer.main.get_command(app)
    assert isinstance(commands, TyperGroup)
    started = 0
    for _, pod in pod_templates(rendered[name]):
        for container in pod["spec"]["containers"]:
            if container["command"][-1] == "splitserve":
                command, *options = container["args"]
                with commands.commands[command].make_context(command, options):
                    started += 1
    assert started >= 3


@every_variant
def test_workers_and_gateways_know_the_one_name_of_all_routers(rendered: dict[str, list[Document]], name: str) -> None:
    found = rendered[name]
    routers, service = one(found, "Deployment", "router"), one(found, "Service", "routers")
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"].items() <= routers["spec"]["template"]["metadata"]["labels"].items()
    named = f"{service['metadata']['name']}.{NAMESPACE}.svc:{service['spec']['ports'][0]['port']}"
    for worker in _configs(found, "worker.yaml"):
        assert worker.routers == [named]
    for gateway in _configs(found, "gateway.yaml"):
        assert gateway.router == named


@every_variant
def test_another_number_of_routers_changes_nothing_but_that_number(chart: Chart, name: str) -> None:
    """Else it would roll the workers."""
    two, three = (chart.documents(merged(VARIANTS[name], {"router": {"replicas": many}})) for many in (2, 3))
    changed = [(one, other) for one, other in zip(two, three, strict=True) if one != other]
    for before, after in changed:
        assert (before["kind"], before["metadata"]["name"]) == ("Deployment", "try-splitserve-router")
        assert before["spec"].pop("replicas") == 2
        assert after["spec"].pop("replicas") == 3
        assert before == after
    assert len(changed) == (name != "hpa"), "where an autoscaler owns the number, nothing changes at all"


@every_variant
def test_files_that_a_configuration_names_are_mounted(rendered: dict[str, list[Document]], name: str) -> None:
    maps = {each["metadata"]["name"]: each["data"] for each in rendered[name] if each["kind"] == "ConfigMap"}
    for where, pod in pod_templates(rendered[name]):
        container = pod["spec"]["containers"][0]
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        if "config" not in volumes:
            continue
        data = maps[volumes["config"]["configMap"]["name"]]
        text = next(text for file, text in data.items() if file in CLASSES)
        for file in _files(yaml.safe_load(text)):
            directory, _, base = file.rpartition("/")
            volume = volumes[mounts[directory]]
            if "configMap" in volume:
                assert base in data, where
            elif "items" in volume["secret"]:
                assert base in [item["path"] for item in volume["secret"]["items"]], where
            else:
                assert base in ("tls.crt", "tls.key", "ca.crt"), where
        model = yaml.safe_load(text).get("model", "demo")
        assert model == "demo" or "/models" in mounts, where


def _host(address: str) -> str:
    return address.rpartition(":")[0]


def _files(config: Any) -> Iterator[str]:
    if isinstance(config, dict):
        for value in config.values():
            yield from _files(value)
    elif isinstance(config, str) and config.startswith("/etc/splitserve/"):
        yield config


def test_a_worker_sees_no_key_but_its_own(rendered: dict[str, list[Document]]) -> None:
    for pool in ("prefill", "decode"):
        volumes = one(rendered["secured"], "Deployment", pool)["spec"]["template"]["spec"]["volumes"]
        keys = next(volume["secret"] for volume in volumes if volume["name"] == "api-keys")
        assert keys["items"] == [{"key": "worker", "path": "worker"}]
        assert "tls" not in [volume["name"] for volume in volumes]  # the routers' certificate


@pytest.mark.parametrize("name", ["cert-manager", "simulated-secured"])
def test_certificates_have_the_names_that_callers_use(rendered: dict[str, list[Document]], name: str) -> None:
    found = rendered[name]
    server = set(one(found, "Certificate", "")["spec"]["dnsNames"])
    worker = set(one(found, "Certificate", "worker")["spec"]["dnsNames"])
    for worker_config in _configs(found, "worker.yaml"):
        assert worker_config.router_tls.server_name is None
        assert {_host(each) for each in worker_config.routers} <= server
    for gateway_config in _configs(found, "gateway.yaml"):
        assert gateway_config.router_tls.server_name is None
        assert _host(gateway_config.router) in server
    test = one(found, "Pod", "test")
    called = [arg for container in test["spec"]["containers"] for arg in container["args"] if ".svc:" in arg]
    assert len(called) == 2
    assert all(arg.rpartition(":")[0].rpartition("=")[2].rpartition("/")[2] in server for arg in called)
    for monitor in (each for each in found if each["kind"] == "ServiceMonitor"):
        assert monitor["spec"]["endpoints"][0]["tlsConfig"]["serverName"] in server
    (pods,) = [each for each in found if each["kind"] == "PodMonitor"]
    assert pods["spec"]["podMetricsEndpoints"][0]["tlsConfig"]["serverName"] in worker


@every_variant
def test_a_pod_gets_the_time_that_its_drain_may_take(rendered: dict[str, list[Document]], name: str) -> None:
    (router,) = _configs(rendered[name], "router.yaml")
    gateways = list(_configs(rendered[name], "gateway.yaml"))
    bounds = {"router": router.drain_timeout_s, "worker": router.deadline_s, "test": 0.0}
    bounds |= {"gateway": gateways[0].drain_timeout_s} if gateways else {}
    for _, pod in pod_templates(rendered[name]):
        component = pod["metadata"]["labels"]["app.kubernetes.io/component"]
        hook = pod["spec"]["containers"][0].get("lifecycle", {}).get("preStop")
        before = float(hook["exec"]["command"][1]) if hook else 0.0
        if component != "test":
            assert pod["spec"]["terminationGracePeriodSeconds"] >= before + bounds[component] + ENDS_IN_TIME_S


def test_a_change_rolls_the_pods_that_it_concerns_and_no_others(chart: Chart) -> None:
    base = VARIANTS["secured"]
    assert _rolled(chart, base, {"pools": {"decode": {"engine": {"max_num_seqs": 9}}}}) == {"decode"}
    assert _rolled(chart, base, {"router": {"config": {"chunk_gap_s": 0.1}}}) == {"router"}
    assert _rolled(chart, base, {"gateway": {"config": {"max_body_mib": 9}}}) == {"gateway"}
    assert _rolled(chart, base, {"kvTransfer": {"settings": {"lease_s": 9}}}) == {
        *("prefill", "decode", "decode-a100", "mixed")
    }
    assert not _rolled(chart, base, {"pools": {"decode": {"workers": 9}}, "slo": {"attainment": 0.5}})


def _rolled(chart: Chart, base: dict[str, Any], change: dict[str, Any]) -> set[str]:
    def pods(values: dict[str, Any]) -> dict[str, Document]:
        return {name: pod for name, pod in pod_templates(chart.documents(values)) if not name.startswith("Pod/")}

    before, after = pods(base), pods(merged(base, change))
    return {name.partition("/try-splitserve-")[2] for name in before if before[name] != after[name]}


def test_options_of_a_pool_go_over_those_of_all(chart: Chart) -> None:
    values = merged(
        VARIANTS["minimal"],
        {
            "engine": {"max_num_seqs": 32, "extra": {"quantization": "fp8"}},
            "poolDefaults": {"workers": 2, "tolerations": [{"key": "gpu"}]},
            "pools": {
                "prefill": {"role": "prefill", "workers": 0, "engine": {"extra": {"seed": 1}}, "tolerations": []},
                "decode": {"role": "decode", "engine": {"max_num_seqs": 64}},
                "trial": {"role": "decode", "engine": {"kind": "sim"}},
            },
        },
    )
    found = chart.documents(values)
    engines = {
        pool: parse(WorkerConfig, yaml.safe_load(one(found, "ConfigMap", pool)["data"]["worker.yaml"]), pool).engine
        for pool in ("prefill", "decode", "trial")
    }
    assert engines["prefill"].model_dump(exclude_unset=True)["extra"] == {"quantization": "fp8", "seed": 1}
    assert (engines["prefill"].max_num_seqs, engines["decode"].max_num_seqs) == (32, 64)
    assert engines["trial"].kind == "sim"
    prefill, decode = (one(found, "Deployment", pool)["spec"] for pool in ("prefill", "decode"))
    assert (prefill["replicas"], decode["replicas"]) == (0, 2)
    assert "tolerations" not in prefill["template"]["spec"]
    assert decode["template"]["spec"]["tolerations"] == [{"key": "gpu"}]


def test_pods_of_one_worker_find_their_place_in_what_leader_worker_set_says(
    rendered: dict[str, list[Document]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its webhook puts these variables before all others."""
    group = one(rendered["spanning"], "LeaderWorkerSet", "decode")["spec"]["leaderWorkerTemplate"]
    container = group["workerTemplate"]["spec"]["containers"][0]
    of_the_set = {"LWS_LEADER_ADDRESS": "try-splitserve-decode-0.sets.serving", "LWS_GROUP_SIZE": "2"}
    of_the_set |= {"LWS_WORKER_INDEX": "1"}
    variables = dict(of_the_set)
    for each in container["env"]:
        value = each.get("value", "10.0.0.7")
        variables[each["name"]] = re.sub(r"\$\((\w+)\)", lambda name: variables[name[1]], value)
    started: list[WorkerConfig] = []

    async def run(config: WorkerConfig, *_: object) -> int:
        started.append(config)
        return 0

    monkeypatch.setattr(build, "run_worker", run)
    file = tmp_path / "worker.yaml"
    file.write_text(one(rendered["spanning"], "ConfigMap", "decode")["data"]["worker.yaml"])
    options = [each.replace("/etc/splitserve/config/worker.yaml", str(file)) for each in container["args"]]
    result = CliRunner(env=variables).invoke(app, options, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    (config,) = started
    check_spread(config)
    check_leader(config, "a-key-of-this-fleets-workers")
    assert (config.nodes.count, config.nodes.rank) == (group["size"], 1)
    assert config.nodes.leader == of_the_set["LWS_LEADER_ADDRESS"]
    assert (config.nodes.wait_s, config.kv_transfer.host) == (1800, "10.0.0.7")


def test_gpus_are_asked_for_as_parallelism_says(rendered: dict[str, list[Document]]) -> None:
    limits = {
        where.rpartition("try-splitserve-")[2]: containers(pod)[-1]["resources"]["limits"]
        for variant in ("secured", "spanning")
        for where, pod in pod_templates(rendered[variant])
        if pod["metadata"]["labels"]["app.kubernetes.io/component"] == "worker"
    }
    assert limits["prefill"] == {"nvidia.com/gpu": 2}
    assert limits["decode-a100"] == {"nvidia.com/mig-3g": 1}
    assert limits["decode/workerTemplate"] == {"nvidia.com/gpu": 8}  # of each of two pods


def test_a_routers_download_leaves_the_weights_out(rendered: dict[str, list[Document]]) -> None:
    left_out = {}
    for where, pod in pod_templates(rendered["minimal"]):
        for each in pod["spec"].get("initContainers", []):
            left_out[where] = {variable["name"]: variable.get("value") for variable in each["env"]}["NOT"]
    assert "*.safetensors" in left_out["Deployment/try-splitserve-router"]
    assert "*.safetensors" not in left_out["Deployment/try-splitserve-decode"]
