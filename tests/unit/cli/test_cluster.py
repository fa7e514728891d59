"""The order in which a local cluster starts, with real processes that only say that they are ready."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from splitserve.cli import cluster as module
from splitserve.cli.cluster import running
from splitserve.cli.local import Machine
from splitserve.cli.supervisor import Event, Ready, Started, Supervisor
from splitserve.core.config import ClusterConfig

PLAYER = """
import json, os, signal, sys
with os.fdopen(int(sys.argv[sys.argv.index("--ready-fd") + 1]), "w") as pipe:
    print(json.dumps({"address": "127.0.0.1:50051"}), file=pipe)
signal.pause()
"""


async def order(gpus: tuple[str, ...], directory: Path, patch: pytest.MonkeyPatch) -> list[str]:
    """What happened until the cluster was ready."""
    script = directory / "player.py"
    script.write_text(PLAYER)
    machine = Machine((0,), gpus, lambda port: True)
    patch.setattr(module, "this_machine", lambda: machine)
    patch.setattr(module, "Supervisor", partial(Supervisor, program=(sys.executable, str(script))))
    events: list[Event] = []
    said: dict[str, Any] = {"engine": {"kind": "vllm"}, "restart": False}
    async with running(ClusterConfig.model_validate(said), "test", directory, events.append, drain_s=5.0) as up:
        assert [member.plan.name for member in up.members] == ["router", "prefill-0", "decode-0"]
        assert [member.ready.name for member in up.members] == ["router", "prefill-0", "decode-0"]
        return [f"{type(event).__name__} {event.name}" for event in events if isinstance(event, Started | Ready)]


async def test_the_router_is_ready_before_any_worker_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    happened = await order((), tmp_path, monkeypatch)
    assert happened[:2] == ["Started router", "Ready router"]
    assert len(happened) == 6


async def test_a_worker_that_shares_a_gpu_starts_once_the_other_is_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened = await order(("0",), tmp_path, monkeypatch)
    assert happened[2:] == ["Started prefill-0", "Ready prefill-0", "Started decode-0", "Ready decode-0"]
