"""The peers: where they come from and how each is told to serve one prefill and one decode worker of vLLM's kind.

They get a virtual environment of their own, next to ours, on the first run; nothing of them is imported here.
"""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

ENVIRONMENT = Path(__file__).parents[2] / ".venv-routers"
_MOST_STREAMS = "8192"  # above what is held open, so that none waits for another's end


@dataclass(frozen=True, slots=True)
class Peer:
    """`text_prompt`: it takes no token ids in /v1/completions."""

    name: str
    package: str
    version: str
    text_prompt: bool

    @property
    def label(self) -> str:
        return f"{self.name} {self.version}"

    def command(self, prefill: str, decode: str, port: int, metrics_port: int) -> Sequence[str]:
        """For workers at these URLs."""
        begin = {
            "vllm-router": (
                *("vllm-router", "--vllm-pd-disaggregation", "--worker-startup-check-interval", "1"),
                *("--max-concurrent-requests", _MOST_STREAMS, "--log-level", "error"),
            ),
            "smg": (
                *("smg", "launch", "--pd-disaggregation", "--backend", "vllm"),
                *("--max-concurrent-requests", _MOST_STREAMS, "--log-level", "error"),
            ),
        }[self.name]
        return (
            *(str(ENVIRONMENT / "bin" / begin[0]), *begin[1:]),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics_port)),
            *("--prefill", prefill, "--decode", decode),
        )


PEERS = (
    Peer("vllm-router", "vllm-router", "0.1.17", text_prompt=False),
    Peer("smg", "smg", "1.13.0", text_prompt=True),
)


def install(console: Console) -> None:
    """Once; pip's own progress tells how far it is. Raises CalledProcessError."""
    wanted = [f"{peer.package}=={peer.version}" for peer in PEERS]
    done = ENVIRONMENT / "installed.txt"
    if done.exists() and done.read_text().split() == wanted:
        return
    console.print(f"installing {' and '.join(wanted)} into {ENVIRONMENT.name}, once")
    subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
    pip = (str(ENVIRONMENT / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check")
    subprocess.run([*pip, *wanted], check=True, stdout=sys.stderr)
    done.write_text("\n".join(wanted) + "\n")
