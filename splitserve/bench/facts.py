"""What was run, on what, and when: saved beside a run, so that every figure leads back to the command that made it.

Nothing here is measured.
"""

import os
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from splitserve import __version__
from splitserve.core.slo import Slo


@dataclass(frozen=True, slots=True)
class Machine:
    """Where the load generator ran."""

    cores: int
    cpu: str

    @classmethod
    def here(cls) -> "Machine":
        return cls(len(os.sched_getaffinity(0)), _cpu(_CPUINFO.read_text() if _CPUINFO.exists() else ""))


_CPUINFO = Path("/proc/cpuinfo")


def _cpu(cpuinfo: str) -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return found[1].strip() if found else platform.machine()


@dataclass(frozen=True, slots=True)
class Facts:
    """`name` is the system's, the same for each of its runs; `target` is its address, `about` what it said of itself.
    `workload_notes` are what a reader must know of the workload, `amount` how much of it was sent at each rate, such as
    `200 requests`. `warm_up_s`: what was due in these first seconds is not judged. `slo` is the one it was run for;
    another may judge it."""

    name: str = ""
    target: str = ""
    workload: str = ""
    workload_notes: tuple[str, ...] = ()
    amount: str = ""
    rate_rps: float = 0.0
    seed: int = 0
    warm_up_s: float = 0.0
    slo: Slo | None = None
    command: str = ""
    started: str = ""
    splitserve: str = ""
    python: str = ""
    machine: Machine | None = None
    about: Mapping[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: objectives that are not set are left out."""
        said = asdict(self)
        if self.slo is not None:
            said["slo"] = slo_as_dict(self.slo)
        return said


def here_and_now() -> dict[str, Any]:
    """The facts that nobody has to say, as `Facts` names them."""
    started = datetime.now().astimezone().isoformat(timespec="seconds")
    return {
        "started": started,
        "splitserve": __version__,
        "python": platform.python_version(),
        "machine": Machine.here(),
    }


def facts_of(said: Mapping[str, Any]) -> Facts:
    """From what `Facts.as_dict` said. Files of other programs may leave out anything, and say more."""
    known = {each.name: said[each.name] for each in fields(Facts) if said.get(each.name) is not None}
    if "slo" in known:
        known["slo"] = Slo(**known["slo"])
    if "machine" in known:
        known["machine"] = Machine(**known["machine"])
    if "workload_notes" in known:
        known["workload_notes"] = tuple(known["workload_notes"])
    return Facts(**known)


def slo_as_dict(slo: Slo) -> dict[str, float]:
    unset = {"ttft_per_token_s": 0.0, "itl_p99_s": float("inf")}
    return {key: value for key, value in asdict(slo).items() if value != unset.get(key)}


def objectives(slo: Slo) -> str:
    """As in a sentence: `TTFT 400 ms and TPOT 100 ms`."""
    each = f" + {milliseconds(slo.ttft_per_token_s)} per prompt token" if slo.ttft_per_token_s else ""
    said = [f"TTFT {milliseconds(slo.ttft_s)}{each}", f"TPOT {milliseconds(slo.tpot_s)}"]
    if slo.itl_p99_s < float("inf"):
        said.append(f"ITL p99 {milliseconds(slo.itl_p99_s)}")
    return f"{', '.join(said[:-1])} and {said[-1]}"


def milliseconds(seconds: float) -> str:
    """Three digits; `-` for what never came."""
    return f"{in_ms(seconds)} ms" if seconds < float("inf") else "-"


def in_ms(seconds: float) -> str:
    """Like `milliseconds`, for where the unit is said already. Below a microsecond is nothing."""
    value = seconds * 1e3
    if not value < float("inf"):
        return "-"
    return "0" if value < 1e-3 else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
