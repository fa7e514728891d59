"""Settings: what is refused, and how the refusal names the place."""

from pathlib import Path

import pytest

from splitserve.core.config import (
    ClusterConfig,
    RouterConfig,
    Settings,
    SimSettings,
    SloClass,
    VllmSettings,
    WorkerConfig,
    load,
    parse,
    read,
)
from splitserve.core.errors import ConfigError
from splitserve.core.worker import KvMode, Pool


def write(directory: Path, text: str) -> Path:
    file = directory / "some.yaml"
    file.write_text(text)
    return file


@pytest.mark.parametrize(
    ("kind", "text", "path", "says"),
    [
        (RouterConfig, "deadline: 3", "deadline", "unknown key"),
        (RouterConfig, "deadline_s: 0", "deadline_s", "greater than 0"),
        (RouterConfig, "deadline_s: .nan", "deadline_s", "greater than 0|finite"),
        (RouterConfig, "deadline_s: .inf", "deadline_s", "finite"),
        (RouterConfig, "listen: 50051", "listen", "string"),
        (RouterConfig, "listen: localhost", "listen", "host:port"),
        (RouterConfig, "listen: localhost:70000", "listen", "^the port must be at most 65535"),
        (RouterConfig, "max_attempts: 0", "max_attempts", "greater than or equal to 1"),
        (RouterConfig, "slo_classes: {x: {ttft_per_token_s: 0.1}}", "slo_classes.x", "ttft_s: say that too"),
        (RouterConfig, "slo_classes: {x: {late: refuse}}", "slo_classes.x", "ttft_s: say that too"),
        (RouterConfig, "slo_classes: {x: {ttft: 1}}", "slo_classes.x.ttft", "unknown key"),
        (RouterConfig, "slo_classes: {x: {tpot_s: -1}}", "slo_classes.x.tpot_s", "greater than 0"),
        (RouterConfig, "slo_classes: {x: {itl_p99_s: .inf}}", "slo_classes.x.itl_p99_s", "finite"),
        (
            RouterConfig,
            "slo_classes: {x: {ttft_s: 1, ttft_per_token_s: .inf}}",
            "slo_classes.x.ttft_per_token_s",
            "finite",
        ),
        (RouterConfig, "slo_classes: {x: {priority: 5000}}", "slo_classes.x.priority", "less than or equal to 1000"),
        (RouterConfig, "slo_classes: {x: {late: drop}}", "slo_classes.x.late", "'queue' or 'refuse'"),
        (ClusterConfig, "router: {slo_classes: {x: {ttfts: 1}}}", "router.slo_classes.x.ttfts", "unknown key"),
        (WorkerConfig, "pool: middle", "pool", "'prefill' or 'decode'"),
        (WorkerConfig, "{}", "pool", "required"),
        (WorkerConfig, "{pool: decode, routers: []}", "routers", "at least 1"),
        (WorkerConfig, "{pool: decode, engine: {blocksize: 3}}", "engine.blocksize", "unknown key"),
        (
            WorkerConfig,
            "{pool: decode, engine: {kind: sim, step_s: -1}}",
            "engine.step_s",
            "greater than or equal to 0",
        ),
        (
            WorkerConfig,
            "{pool: decode, engine: {kind: sim, latency: {model: opt-13b}}}",
            "engine.latency",
            "either profile, or model and gpu",
        ),
        (WorkerConfig, "{pool: decode, engine: {kind: tpu}}", "engine", "'vllm', 'sim'"),
        (WorkerConfig, "{pool: decode, kv_transfer: {mode: shove}}", "kv_transfer.mode", "'push' or 'pull'"),
        (ClusterConfig, "pools: {decode: {workers: -1}}", "pools.decode.workers", "greater than or equal to 0"),
        (ClusterConfig, "router: {listen: '1:1', models: x}", "router.models", "unknown key"),
    ],
)
def test_what_is_wrong_is_named_by_file_and_path(
    tmp_path: Path, kind: type[Settings], text: str, path: str, says: str
) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ConfigError) as refused:
        load(kind, file)
    assert refused.value.path == f"{file}: {path}"
    with pytest.raises(AssertionError, match=says):
        raise AssertionError(refused.value.message)


@pytest.mark.parametrize("text", ["[1, 2]", "just words", "{", "a: b: c", "\t- x"])
def test_a_file_that_is_no_mapping_is_refused_by_name(tmp_path: Path, text: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ConfigError, match=r"YAML|mapping") as refused:
        read(file)
    assert refused.value.path == str(file)


def test_a_file_that_is_not_text_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    file.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ConfigError, match="not valid YAML"):
        read(file)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file") as refused:
        load(RouterConfig, tmp_path / "none.yaml")
    assert refused.value.path == str(tmp_path / "none.yaml")


def test_an_empty_file_means_the_defaults(tmp_path: Path) -> None:
    assert load(RouterConfig, write(tmp_path, "")) == RouterConfig()


def test_an_engine_without_a_kind_is_vllm() -> None:
    worker = parse(WorkerConfig, {"pool": "decode", "engine": {"block_size": 32}}, "test")
    assert isinstance(worker.engine, VllmSettings)
    assert worker.engine.block_size == 32


def test_the_defaults_are_the_documented_ones() -> None:
    router, cluster = RouterConfig(), ClusterConfig()
    assert (router.listen, router.metrics) == ("127.0.0.1:50051", "127.0.0.1:9400")
    assert (router.deadline_s, router.inter_token_deadline_s) == (600.0, 30.0)
    assert {pool: settings.workers for pool, settings in cluster.pools.items()} == {Pool.PREFILL: 1, Pool.DECODE: 1}
    assert cluster.kv_transfer.mode is KvMode.PUSH


def test_everything_binds_loopback_unless_told_otherwise() -> None:
    worker = WorkerConfig(pool=Pool.DECODE)
    bound = [RouterConfig().listen, RouterConfig().metrics, worker.kv_transfer.host, *worker.routers]
    assert all(str(address).startswith("127.0.0.1") for address in bound)


def test_the_usual_slo_classes_are_there_unless_they_are_defined_anew(tmp_path: Path) -> None:
    said = load(RouterConfig, write(tmp_path, "slo_classes: {standard: {ttft_s: 2.0}, own: {tpot_s: 0.1}}")).slo_classes
    assert list(said) == ["interactive", "standard", "batch", "own"]
    assert said["interactive"] == RouterConfig().slo_classes["interactive"]
    assert said["standard"] == SloClass(ttft_s=2.0)
    replaced = parse(RouterConfig, {"slo_classes": {"interactive": {"ttft_s": 0.5}}}, "test").slo_classes
    assert replaced["interactive"] == SloClass(ttft_s=0.5), "nothing is left of what it was"


def test_a_request_that_says_no_class_has_no_objectives_unless_someone_says_so() -> None:
    assert RouterConfig().slo_classes["standard"] == SloClass()


def test_settings_survive_being_written_as_yaml() -> None:
    worker = WorkerConfig(pool=Pool.PREFILL, engine=SimSettings(total_blocks=7), metrics="127.0.0.1:9", cpu_core=1)
    assert parse(WorkerConfig, worker.model_dump(mode="json"), "test") == worker


def test_settings_never_change_after_they_are_read() -> None:
    settings = RouterConfig()
    with pytest.raises(ValueError, match="frozen"):
        settings.listen = "127.0.0.1:1"  # type: ignore[misc]


@pytest.mark.parametrize("kind", [RouterConfig, WorkerConfig, ClusterConfig, VllmSettings, SimSettings])
def test_every_duration_says_what_it_is(kind: type[Settings]) -> None:
    silent = [name for name, info in kind.model_fields.items() if name.endswith("_s") and not info.description]
    assert silent == []


@pytest.mark.parametrize(
    "said", [{"router": {"tls": {"certificate": "a.pem", "key": "a.key"}}}, {"router_tls": {"ca": "ca.pem"}}]
)
def test_a_clusters_router_and_workers_have_tls_both_or_neither(said: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="router_tls go together"):
        parse(ClusterConfig, said, "cluster.yaml")
