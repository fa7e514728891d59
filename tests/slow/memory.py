"""How much memory a process has."""

from pathlib import Path

from tests.cluster.processes import Process


def resident_kib(process: Process) -> int:
    """What the kernel counts as the process's memory, KiB."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))
