"""Pods without Kubernetes: containers as processes, each pod in a network and a mount namespace of its own.

A container gets what its manifest says and no more: command and arguments with $(VARIABLE) put in, its environment,
the files of its ConfigMaps and Secrets, its emptyDirs, user and group, no capabilities, a read-only root. /etc is the
pod's own, so names are those of its hosts file. Pods are joined by a bridge, on which this process has an address too,
as a kubelet has. Needs root and iproute2.
"""

import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from tests.chart.tools import NAMESPACE, ROOT, Document

_FROM_HOST = ("ld.so.cache", "ld.so.conf", "localtime", "alternatives", "nsswitch.conf")
_KILL_S = 10.0
_BRIDGES = count()
# What an image would hold: this checkout, the packages, the interpreter.
_IMAGE = tuple(dict.fromkeys((ROOT, (ROOT / ".venv").resolve(), Path(sys.base_prefix))))
_MOUNTED = ("/tmp", "/dev/shm")


def why_not() -> str:
    """Why there can be no pods here; "" if there can."""
    if os.geteuid() != 0:
        return "pods need root, for network namespaces"
    missing = [tool for tool in ("ip", "setpriv", "mount") if shutil.which(tool) is None]
    if missing:
        return f"pods need {' and '.join(missing)} (iproute2, util-linux)"
    probe = f"why{os.getpid() % 100_000}"
    for make, unmake in (
        (("netns", "add", probe), ("netns", "del", probe)),
        (("link", "add", probe, "type", "bridge"), ("link", "del", probe)),
    ):
        made = subprocess.run(["ip", *make], capture_output=True, text=True, check=False)
        if made.returncode:
            return f"pods need `ip {' '.join(make)}`, which says: {made.stderr.strip()}"
        _ip(*unmake)
    return ""


Files = Mapping[str, str]  # by name
Names = tuple[tuple[str, str], ...]  # a name and one of its addresses


@dataclass(frozen=True, slots=True)
class Content:
    """What volumes and variables take from elsewhere: ConfigMaps and Secrets by name."""

    configs: Mapping[str, Files]
    secrets: Mapping[str, Files]


class Bridge:
    """What joins the pods. Its name and its addresses are by process and by bridge, so that several may run at once."""

    def __init__(self) -> None:
        number = next(_BRIDGES)
        self._subnet = f"10.{200 + number % 50}.{os.getpid() % 250}"
        self.name = f"pods{os.getpid() % 10_000}-{number}"
        self._given = 1

    def address(self) -> str:
        self._given += 1
        return f"{self._subnet}.{self._given}"

    def __enter__(self) -> "Bridge":
        _ip("link", "add", self.name, "type", "bridge")
        _ip("address", "add", f"{self._subnet}.1/24", "dev", self.name)
        _ip("link", "set", self.name, "up")
        return self

    def __exit__(self, *_: object) -> None:
        _ip("link", "del", self.name)


class Pod:
    """One pod with one container. It keeps its namespace and its address while its container is started anew."""

    def __init__(self, name: str, manifest: Document, content: Content, bridge: Bridge) -> None:
        self.name = name
        self.manifest = manifest
        self.labels: dict[str, str] = manifest["metadata"]["labels"]
        self.container: Document = manifest["spec"]["containers"][0]
        self.address = bridge.address()
        self.restarts = 0
        self.ready = False
        self._content = content
        self._bridge = bridge
        self._namespace = f"{bridge.name}-{self.address.rpartition('.')[2]}"
        self._process: subprocess.Popen[bytes] | None = None

    @contextmanager
    def made(self, directory: Path) -> Iterator["Pod"]:
        """Its namespace and its files are there; nothing runs yet."""
        self.directory = directory / self.name
        self.log = self.directory / "log"
        self._make_files()
        host = f"v{self._namespace}"[-15:]
        _ip("netns", "add", self._namespace)
        try:
            _ip("link", "add", host, "type", "veth", "peer", "name", "eth0", "netns", self._namespace)
            _ip("link", "set", host, "master", self._bridge.name, "up")
            _ip("-n", self._namespace, "address", "add", f"{self.address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", self._namespace, "link", "set", device, "up")
            yield self
        finally:
            self.kill()
            _ip("netns", "del", self._namespace)

    # Its container ---------------------------------------------------------------------------------------------------
    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        assert self._process is not None
        return self._process.poll()

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def start(self) -> None:
        self.ready = False
        with self.log.open("ab") as log:
            self._process = self._run(self._command(), log, log)

    def exec(self, *command: str, **options: Any) -> "subprocess.Popen[bytes]":
        """Another process in the pod, such as a hook's."""
        return self._run([self._expanded(part) for part in command], **options)

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def ended(self, within_s: float) -> int:
        assert self._process is not None
        return self._process.wait(within_s)

    def kill(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.signal(signal.SIGKILL)
            self._process.wait(_KILL_S)

    def _command(self) -> list[str]:
        return [self._expanded(part) for part in (*self.container["command"], *self.container.get("args", []))]

    def _run(self, command: list[str], stdout: Any = None, stderr: Any = None) -> "subprocess.Popen[bytes]":
        settings = [f"{name}={value}" for name, value in self._environment().items()]
        return subprocess.Popen(
            [
                *("ip", "netns", "exec", self._namespace, "unshare", "--mount"),
                *("sh", "-c", "\n".join(self._entrance()), "enter", *settings, *command),
            ],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
        )

    def _entrance(self) -> Iterator[str]:
        """The lines that mount what the pod has, make the rest read-only and become the container."""
        security = self.manifest["spec"]["securityContext"]
        yield "set -eu; mount --make-rprivate /"
        for name in ("etc", "home"):
            yield f"mount --bind {shlex.quote(str(self.directory / name))} /{name}"
        yield from _image_in_place()
        yield "mount -t tmpfs -o mode=1777 tmpfs /dev/shm; mount -o remount,ro,bind /; cd /"
        yield (
            f"exec setpriv --reuid={security['runAsUser']} --regid={security['runAsGroup']} --clear-groups "
            '--no-new-privs --inh-caps=-all --bounding-set=-all env -i "$@"'
        )

    def _environment(self) -> dict[str, str]:
        """What the image has (PATH, and where splitserve is), then what the manifest says, in order."""
        path = f"{Path(sys.executable).parent}:{ROOT / '.venv/bin'}:{os.environ['PATH']}"
        said = {"PATH": path, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
        facts = {"metadata.name": self.name, "status.podIP": self.address}
        for variable in self.container.get("env", []):
            match variable.get("valueFrom"):
                case None:
                    said[variable["name"]] = _put_in(variable.get("value", ""), said)
                case {"fieldRef": {"fieldPath": path}}:
                    said[variable["name"]] = facts[path]
                case {"secretKeyRef": {"name": secret, "key": key}}:
                    said[variable["name"]] = self._content.secrets[secret][key]
        return said

    def _expanded(self, text: str) -> str:
        return _put_in(text, self._environment())

    # Its files -------------------------------------------------------------------------------------------------------
    def say_names(self, names: Names) -> None:
        """What its resolver knows. Replaced at once."""
        lines = ["127.0.0.1 localhost", f"{self.address} {self.name}"]
        lines += [f"{address} {name}" for name, address in names]
        new = self.directory / "etc/hosts.new"
        new.write_text("\n".join(lines) + "\n")
        new.rename(self.directory / "etc/hosts")

    def _make_files(self) -> None:
        etc = self.directory / "etc"
        etc.mkdir(parents=True)
        security = self.manifest["spec"]["securityContext"]
        user, group = security["runAsUser"], security["runAsGroup"]
        for name in _FROM_HOST:
            source = Path("/etc", name)
            if source.is_dir():
                shutil.copytree(source, etc / name, symlinks=True)
            elif source.exists():
                shutil.copy(source, etc / name)
        (etc / "passwd").write_text(f"splitserve:x:{user}:{group}::/home/splitserve:/usr/sbin/nologin\n")
        (etc / "group").write_text(f"splitserve:x:{group}:\n")
        (etc / "resolv.conf").write_text("")
        (etc / "hosts").write_text("127.0.0.1 localhost\n")
        (etc / "host.conf").write_text("multi on\n")  # a name may have several addresses there, as in DNS
        volumes = {volume["name"]: volume for volume in self.manifest["spec"]["volumes"]}
        for mount in self.container["volumeMounts"]:
            if mount["mountPath"] not in _MOUNTED:
                self._fill(volumes[mount["name"]], mount["mountPath"], user, group)
        (self.directory / "home").mkdir(exist_ok=True)

    def _fill(self, volume: Document, path: str, user: int, group: int) -> None:
        top = path.split("/")[1]
        assert top in ("etc", "home"), f"no volume can be mounted at {path} here"
        target = self.directory / path.lstrip("/")
        target.mkdir(parents=True)
        match volume:
            case {"configMap": {"name": config}}:
                _write(target, self._content.configs[config])
            case {"secret": {"secretName": secret, "items": items}}:
                _write(target, {item["path"]: self._content.secrets[secret][item["key"]] for item in items})
            case {"secret": {"secretName": secret}}:
                _write(target, self._content.secrets[secret])
            case {"emptyDir": _}:
                os.chown(target, user, group)
            case _:
                raise AssertionError(f"{volume['name']} is no kind of volume that there is here")


def _image_in_place() -> Iterator[str]:
    """/tmp becomes the pod's own, and directories that nobody but root may enter are emptied; what of them belongs to
    the image is put back where it was."""
    hidden = {Path("/tmp"): "1777"}
    for path in _IMAGE:
        closed = [parent for parent in path.parents if not parent.stat().st_mode & stat.S_IXOTH]
        hidden |= dict.fromkeys(closed[-1:], "755")
    kept = {path: f"/mnt/{at}" for at, path in enumerate(_IMAGE) if any(path.is_relative_to(each) for each in hidden)}
    yield "mount -t tmpfs tmpfs /mnt"
    for path, aside in kept.items():
        yield f"mkdir {aside}; mount --bind {shlex.quote(str(path))} {aside}"
    for path, mode in hidden.items():
        yield f"mount -t tmpfs -o mode={mode} tmpfs {shlex.quote(str(path))}"
    for path, aside in kept.items():
        yield f"mkdir -p {shlex.quote(str(path))}; mount --bind {aside} {shlex.quote(str(path))}"
    yield "umount -R /mnt"


def service_name(name: str) -> str:
    return f"{name}.{NAMESPACE}.svc"


def _write(directory: Path, files: Files) -> None:
    for name, text in files.items():
        (directory / name).write_text(text)


def _put_in(text: str, said: Mapping[str, str]) -> str:
    """As Kubernetes does: $(NAME), where there is one."""
    return re.sub(r"\$\((\w+)\)", lambda match: said.get(match[1], match[0]), text)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
