"""What is compared, as `splitserve up` would start it: on each side two workers, one core or one GPU each."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks.goodput.alone import Alone
from benchmarks.goodput.cases import CELLS, DIAGONAL, LONGEST_TOKENS, TPOT_CELLS, Cell
from splitserve.cli.local import merged
from splitserve.core.config import read
from splitserve.core.slo import Slo

CHUNKS = (128, 512, 32, 1024, 64, 256)  # of colocated systems, in the order that they take turns in
LARGER_CHUNKS = (2048, 4096, 8192)  # worth trying where a step computes so many tokens in no time
SEPARATED_CHUNK = 1024  # a prompt or so: several in one step would all wait for the last
MOST_SEQUENCES = 64
LEAST_TTFT_S = 1e-6
_TWO_POOLS = {"prefill": {"workers": 1}, "decode": {"workers": 1}}


@dataclass(frozen=True, slots=True)
class System:
    """`kind` is what the tables compare: the best `chunk` of the colocated systems counts as one. `settings` is as in
    cluster.yaml. `cells`: those it is measured for. `idles`: nothing of it runs beside a request that is alone, so
    that its steps are then those of every system that idles. `told`: the objectives that its requests come with."""

    name: str
    kind: str
    settings: Mapping[str, Any]
    chunk: int = 0
    cells: tuple[Cell, ...] = field(default=CELLS)
    idles: bool = True
    told: Cell | None = None

    @property
    def alone_as(self) -> str:
        """Which system's figures for a request alone are its own: without objectives an adaptive one is `push`."""
        return self.name if self.told is None else "push"


def colocated(chunk: int) -> System:
    """A decode pool alone reads its own prompts, in chunks beside its decodes; the router picks the least loaded."""
    engine = {"max_num_batched_tokens": chunk, "max_num_seqs": min(MOST_SEQUENCES, chunk)}
    return System(f"colocated-{chunk}", "colocated", {"engine": engine, "pools": {"decode": {"workers": 2}}}, chunk)


def _separated(name: str, mode: str, cells: tuple[Cell, ...] = CELLS, idles: bool = True) -> System:
    engine = {"max_num_batched_tokens": SEPARATED_CHUNK, "max_num_seqs": MOST_SEQUENCES}
    settings = {"engine": engine, "pools": _TWO_POOLS, "kv_transfer": {"mode": mode}}
    return System(name, name, settings, cells=cells, idles=idles)


def adaptive(cell: Cell) -> System:
    """The same workers as push; the router knows the objectives and decides by them, request by request."""
    base = _separated("adaptive", "push")
    return replace(base, name=f"adaptive-{cell.ttft_times}-{cell.tpot_times:g}", cells=(cell,), told=cell)


KINDS = {
    "colocated": "(a) two colocated engines with chunked prefill, least loaded first, the best chunk of each cell",
    "push": "(b) a prefill and a decode worker, KV pushed layer by layer",
    "pull": "(c) the same two, KV pulled after the prefill by vLLM's stock connector: its own thread spins on a core",
    "adaptive": "(d) the same two as (b), and a router that is told the objectives of the cell: any may do anything",
}

SYSTEMS = {
    system.name: system
    for system in (
        _separated("push", "push"),
        *(colocated(chunk) for chunk in CHUNKS),
        _separated("pull", "pull", DIAGONAL, idles=False),
        *(adaptive(cell) for cell in TPOT_CELLS),
        *(colocated(chunk) for chunk in LARGER_CHUNKS),
    )
}

USUAL = tuple(
    name for name, system in SYSTEMS.items() if system.chunk not in LARGER_CHUNKS and system.told in (None, *DIAGONAL)
)

UNIT = "colocated-1024"  # reads most prompts in one step


def unit_of(alone: Mapping[str, Alone]) -> Alone:
    """What objectives are multiples of: TTFT as `UNIT` gives it, TPOT as the median system that idles, since the steps
    of one request are the same on all of those, and one measurement of them is good to a few percent only."""
    return replace(
        alone[UNIT], tpot_s=statistics.median(one.tpot_s for name, one in alone.items() if SYSTEMS[name].idles)
    )


_VLLM = {"kind": "vllm", "dtype": "float32", "max_model_len": LONGEST_TOKENS, "enable_prefix_caching": False}
_SIMULATED = {
    "kind": "sim",
    "max_model_len": LONGEST_TOKENS,
    "total_blocks": 20_000,
    "step_s": 0.006,
    "prefill_token_s": 0.00025,
    "decode_token_s": 0.0008,
}


def engine(kind: str) -> Mapping[str, Any]:
    """Engine settings of every worker. `sim` takes about the times that `vllm` takes on one core."""
    return {"vllm": _VLLM, "sim": _SIMULATED}[kind]


def cluster(
    system: System,
    engine_kind: str,
    machine: Path | None,
    classes: Mapping[str, Slo] = MappingProxyType({}),
    profile: Path | None = None,
) -> dict[str, Any]:
    """As in cluster.yaml. `machine`: a YAML file of the same form that says where workers run and what their engines
    need there; of a pool that a system has not, nothing is taken. `classes`: what the router is told of each class of
    requests, for which the workers need the engine's `profile`. Raises ConfigError if a file can't be read."""
    base: dict[str, Any] = {"engine": engine(engine_kind)}
    if classes:
        base = merged(base, {"router": {"slo_classes": {name: _class(slo) for name, slo in classes.items()}}})
        if engine_kind == "vllm":
            base = merged(base, {"engine": {"profile": str(profile)}})
    if machine is None:
        return merged(base, system.settings)
    said = read(machine)
    pools = {name: pool for name, pool in said.get("pools", {}).items() if name in system.settings["pools"]}
    there = {**said, "pools": pools}
    under, over = (base, there) if engine_kind == "vllm" else (there, base)
    return merged(merged(under, over), system.settings)


def _class(slo: Slo) -> dict[str, float]:
    """An objective that grows with the prompt alone still has a beginning, as settings have it."""
    names = ("ttft_s", "ttft_per_token_s", "tpot_s", "itl_p99_s")
    said = {name: value for name in names if isfinite(value := getattr(slo, name))}
    return said | {"ttft_s": max(said["ttft_s"], LEAST_TTFT_S)}
