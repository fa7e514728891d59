"""Files for machines without Kubernetes: cluster files, compose, systemd, each read by what will read it."""

import json
import re
import shutil
import subprocess
from datetime import timedelta
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from splitserve.cli.local import Machine, Overrides, cluster_of, plan_router, plan_workers, with_http
from splitserve.cli.main import app
from splitserve.core.config import ClusterConfig, KvTransferSettings, RouterConfig, WorkerConfig, load, read
from splitserve.core.errors import ConfigError
from splitserve.core.exposure import check_router, check_worker
from splitserve.gateway.config import GatewayConfig
from tests.deploy.rules import DEPLOY
from tests.deploy.tools import missing, promtool

CLUSTERS = DEPLOY / "clusters"
SYSTEMD = DEPLOY / "systemd"
GPUS = {"laptop": 0, "simulated": 0, "eight_gpus": 8, "first": 4}
# What a process may take to drain, by its settings' own defaults, seconds.
DRAIN_S = {
    "router": RouterConfig().drain_timeout_s,
    "gateway": GatewayConfig().drain_timeout_s,
    "worker": RouterConfig().deadline_s + KvTransferSettings().lease_s,
}


def cluster(file: Path) -> ClusterConfig:
    return cluster_of(with_http(read(file)), Overrides(), str(file))


def parse_command(arguments: list[str]) -> None:
    """As the command line does; nothing is run. Fails for an option that there is not."""
    commands: Any = typer.main.get_command(app)
    commands.commands[arguments[0]].make_context(arguments[0], arguments[1:])


@pytest.mark.parametrize(
    "file", [*CLUSTERS.glob("*.yaml"), CLUSTERS / "two_machines" / "first.yaml"], ids=lambda f: f.stem
)
def test_a_cluster_file_deals_out_every_gpu_once(file: Path) -> None:
    machine = Machine((0, 1), tuple(map(str, range(GPUS[file.stem]))), lambda port: True)
    described = cluster(file)
    workers = plan_workers(described, described.router.listen, machine, str(file))
    dealt = [gpu for plan in workers for gpu in plan.gpus]
    assert sorted(dealt) == sorted(machine.gpus)
    router = plan_router(described).config
    assert isinstance(router, RouterConfig)
    check_router(router)


def test_both_machines_files_describe_workers_that_fit_together() -> None:
    first, second = (
        cluster(CLUSTERS / "two_machines" / "first.yaml"),
        load(WorkerConfig, CLUSTERS / "two_machines" / "second.yaml"),
    )
    assert second.routers == [first.router.listen]
    assert (second.model, second.engine) == (first.model, first.engine)
    assert second.kv_transfer.model_copy(update={"host": first.kv_transfer.host}) == first.kv_transfer
    check_worker(second)


def test_a_misspelt_key_in_a_cluster_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text((CLUSTERS / "laptop.yaml").read_text().replace("kv_cache_gib", "kv_cache_gb"))
    with pytest.raises(ConfigError, match=r"engine\.kv_cache_gb"):
        cluster(file)


# compose -------------------------------------------------------------------------------------------------------------
def compose() -> dict[str, Any]:
    return dict(yaml.safe_load((DEPLOY / "compose.yaml").read_text()))


def command_of(service: dict[str, Any]) -> list[str]:
    """What splitserve is given, if it is what runs."""
    if "entrypoint" not in service:
        return list(service["command"])
    (script,) = service["command"]
    words = script.replace('"$$HOSTNAME"', "10.0.0.7").split()
    assert words[:2] == ["exec", "splitserve"]
    return list(words[2:])


def seconds(text: str) -> float:
    match = re.fullmatch(r"(?:(\d+)m)?(?:(\d+)s)?", text)
    assert match is not None, text
    return timedelta(minutes=int(match[1] or 0), seconds=int(match[2] or 0)).total_seconds()


def test_compose_is_what_the_compose_specification_says() -> None:
    if find_spec("compose_spec") is None:
        missing("compose-spec")
    specification, said = import_module("compose_spec").PyCompose, compose()
    names = specification.from_json(json.dumps(said)).service_names()
    assert set(names) == {"router", "gateway", "prefill", "decode", "prometheus", "grafana"}
    said["services"]["decode"]["deploy"]["replicas"] = "two"
    with pytest.raises(ValueError, match=r"replicas|two"):
        specification.from_json(json.dumps(said))


@pytest.mark.parametrize("name", ["router", "gateway", "prefill", "decode"])
def test_a_services_command_is_one_that_splitserve_takes_and_it_gets_the_time_to_drain(name: str) -> None:
    service = compose()["services"][name]
    parse_command(command_of(service))
    role = name if name in DRAIN_S else "worker"
    assert seconds(service["stop_grace_period"]) >= DRAIN_S[role]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]


def test_an_option_that_there_is_not_is_refused() -> None:
    with pytest.raises(Exception, match="No such option: --kv-hosts"):
        parse_command([*command_of(compose()["services"]["decode"]), "--kv-hosts", "x"])


def test_nothing_of_compose_is_published_beyond_this_machine() -> None:
    published = [port for service in compose()["services"].values() for port in service.get("ports", [])]
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_what_compose_mounts_is_there_and_prometheus_takes_its_configuration(tmp_path: Path) -> None:
    mounted = [volume for service in compose()["services"].values() for volume in service.get("volumes", [])]
    for source in (volume.split(":")[0] for volume in mounted if volume.startswith(".")):
        assert (DEPLOY / source).exists(), source
    text = (DEPLOY / "prometheus" / "compose.yml").read_text()
    (tmp_path / "prometheus.yml").write_text(
        text.replace("/etc/prometheus/rules.yml", str(DEPLOY / "prometheus" / "rules.yml"))
    )
    checked = promtool("check", "config", "prometheus.yml", directory=tmp_path)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_prometheus_finds_compose_services_by_names_and_ports_that_they_have() -> None:
    services = compose()["services"]
    for job in yaml.safe_load((DEPLOY / "prometheus" / "compose.yml").read_text())["scrape_configs"]:
        for names in (found["names"] for found in job["dns_sd_configs"]):
            assert set(names) <= set(services)
            for name in names:
                assert f"0.0.0.0:{job['dns_sd_configs'][0]['port']}" in command_of(services[name])


# systemd -------------------------------------------------------------------------------------------------------------
UNITS = sorted(SYSTEMD.glob("*.service"))


def role_of(unit: Path) -> str:
    return unit.stem.removeprefix("splitserve-").rstrip("@")


def setting(unit: Path, key: str) -> str:
    (value,) = re.findall(rf"^{key}=(.*)$", unit.read_text(), re.MULTILINE)
    return str(value)


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_a_units_command_is_one_that_splitserve_takes_and_it_gets_the_time_to_drain(unit: Path) -> None:
    program, *arguments = setting(unit, "ExecStart").replace("%i", "decode-0").split()
    assert program == "/opt/splitserve/bin/splitserve"
    parse_command(arguments)
    assert float(setting(unit, "TimeoutStopSec")) > DRAIN_S[role_of(unit)]


def test_the_units_examples_are_read_and_let_no_strangers_in() -> None:
    check_router(load(RouterConfig, SYSTEMD / "router.yaml"))
    check_worker(load(WorkerConfig, SYSTEMD / "decode-0.yaml"))
    gateway = load(GatewayConfig, SYSTEMD / "gateway.yaml")
    assert gateway.tls is not None
    assert not gateway.insecure


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_systemd_finds_nothing_wrong_with_a_unit_and_its_exposure_small(unit: Path, tmp_path: Path) -> None:
    """The program, its user and its files are not on this machine: copies name what is."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed: apt-get install systemd")
    here = tmp_path / unit.name
    text = unit.read_text().replace("/opt/splitserve/bin/splitserve", "/bin/true")
    here.write_text(re.sub(r"^(User|Group)=splitserve$", r"\1=daemon", text, flags=re.MULTILINE))
    verified = analyze("verify", "--man=no", str(here))
    assert (verified.returncode, verified.stdout + verified.stderr) == (0, "")
    exposed = analyze("security", "--offline=yes", "--threshold=50", str(here))
    assert exposed.returncode == 0, exposed.stdout[-400:]


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, timeout=60, check=False)
