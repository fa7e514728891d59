"""What is computed from the times of a push, and the table of it: values and plain functions, no device, no clock."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.gpu.push.paced_prefill import ModelShape

GB = 1e9


@dataclass(slots=True)
class Times:
    """Seconds, one of each per round."""

    push: list[float] = field(default_factory=list)
    copy: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)
    pushing: list[float] = field(default_factory=list)
    uncovered: list[float] = field(default_factory=list)
    writes: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt length. Milliseconds are medians but `uncovered_ms_worst`."""

    tokens: int
    mib: float
    writes: int
    push_gbps: float
    copy_gbps: float
    prefill_ms: float
    prefill_pushing_ms: float
    prefill_tflops: float
    uncovered_ms: float
    uncovered_ms_worst: float


def row_of(shape: ModelShape, tokens: int, times: Times) -> Row:
    size = shape.kv_bytes(tokens)
    alone = statistics.median(times.alone)
    return Row(
        tokens=tokens,
        mib=size / 1024**2,
        writes=times.writes,
        push_gbps=size / statistics.median(times.push) / GB,
        copy_gbps=size / statistics.median(times.copy) / GB,
        prefill_ms=alone * 1e3,
        prefill_pushing_ms=statistics.median(times.pushing) * 1e3,
        prefill_tflops=shape.layer_flop(tokens) * shape.layers / alone / 1e12,
        uncovered_ms=statistics.median(times.uncovered) * 1e3,
        uncovered_ms_worst=max(times.uncovered) * 1e3,
    )


def table(rows: Sequence[Row]) -> str:
    header = ["tokens", "MiB", "WRITEs", "push GB/s", "copy GB/s", "prefill ms", "pushing ms", "TFLOP/s"]
    lines = [[*header, "uncovered ms", "worst"]]
    for row in rows:
        timed = (row.push_gbps, row.copy_gbps, row.prefill_ms, row.prefill_pushing_ms, row.prefill_tflops)
        numbers = [f"{value:.2f}" for value in (*timed, row.uncovered_ms, row.uncovered_ms_worst)]
        lines.append([f"{row.tokens:,}", f"{row.mib:,.1f}", str(row.writes), *numbers])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
