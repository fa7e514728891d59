"""Programs that these tests run and pip does not have: prometheus and promtool, from Debian's package.

One on PATH is taken; else the package is fetched and unpacked below .run/, once. Nothing is installed. Where neither
goes the tests are skipped with the reason, but under CI they fail.
"""

import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).parents[2]
UNPACKED = ROOT / ".run" / "debian"
_FETCH_S = 300
_PROMTOOL_S = 240


def program(name: str, package: str) -> str:
    """Its path."""
    there = shutil.which(name) or _unpacked(name)
    if there is None:
        with _alone():
            there = _unpacked(name) or _fetched(package, name)
    if there is None:
        _without(f"{name} is not in Debian's package {package}")
    return there


def promtool(*arguments: str, directory: Path) -> subprocess.CompletedProcess[str]:
    command = [program("promtool", "prometheus"), *arguments]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=_PROMTOOL_S, check=False)


def missing(distribution: str) -> NoReturn:
    """What requirements/dev.txt pins, and this environment lacks."""
    _without(f"{distribution} is not installed; requirements/dev.txt has it: make install")


def _unpacked(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join(str(UNPACKED / folder) for folder in ("usr/bin", "bin", "usr/sbin")))


@contextmanager
def _alone() -> Iterator[None]:
    """Of all test processes."""
    UNPACKED.mkdir(parents=True, exist_ok=True)
    with (UNPACKED / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fetched(package: str, name: str) -> str | None:
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        _without(f"{package} is not installed, and there is no apt-get to fetch it with")
    downloads = UNPACKED / "downloads"
    shutil.rmtree(downloads, ignore_errors=True)
    downloads.mkdir()
    download = ["apt-get", "-o", "APT::Sandbox::User=root", "download", package]
    got = _run(download, downloads)
    if got.returncode:  # the lists may be old, or not there yet
        _run(["apt-get", "update"], downloads)
        got = _run(download, downloads)
    if got.returncode:
        _without(f"apt-get download {package} failed; install it: {got.stderr.strip()}")
    for archive in downloads.glob("*.deb"):
        _run(["dpkg", "-x", str(archive), str(UNPACKED)], downloads).check_returncode()
    return _unpacked(name)


def _run(command: list[str], directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=_FETCH_S, check=False)


def _without(reason: str) -> NoReturn:
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
