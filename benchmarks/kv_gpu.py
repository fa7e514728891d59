"""Measures the push of a Llama-8B-shaped KV cache between two processes on one GPU, with torch and NIXL only.

    python -m benchmarks.kv_gpu [--device cuda|cpu] [--tokens 512 2048 8192] [--quick] [--json FILE]

Each process has a paged cache in the device's memory. The first pushes a prompt's blocks into the other's, layer by
layer, over splitserve's own transport; the other compares every byte of its whole cache, on the device. For each prompt
length: GB/s (10^9 bytes) of pushing all of it at once, beside a copy of the same bytes within one process; then
prefills of that length with and without a push of each layer once its event is passed (`benchmarks/paced_prefill.py`
really computes them), and what is left to write when the last layer is computed. What is compared takes turns.

Needs neither vLLM nor a network: torch, NIXL, numpy and msgspec, and of splitserve kv/nixl, kv/layout and what they
import. `--device cpu` runs the same code in DRAM, on a smaller model; its times say nothing of a GPU.
"""

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from benchmarks.gpu_pair import Destination, Limits, Pushed, Source, destination
from benchmarks.paced_prefill import LLAMA_8B, SMALL, ModelShape, Prefill, content
from splitserve.kv.transport import Fence, TransportError

GB = 1e9
PREFILL_TIMEOUT_S = 300.0
SLOW_ALLOCATOR = "expandable_segments:true"  # UCX can't share such memory between processes, and says nothing
NOTES = """\
copy: the same bytes within one process's device memory.  prefill: alone, and while its layers are pushed (medians).
uncovered: last WRITE done minus last layer computed, as seen every 0.2 ms; the head and the sampling, during which a
transfer may go on, are not in it.  Every push was compared byte by byte, blocks that nobody may touch included."""


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


@dataclass(slots=True)
class Times:
    """Seconds, one of each per round."""

    push: list[float] = field(default_factory=list)
    copy: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)
    pushing: list[float] = field(default_factory=list)
    uncovered: list[float] = field(default_factory=list)
    writes: int = 0


class Bench:
    """One prompt length between a source and a destination."""

    def __init__(
        self, shape: ModelShape, tokens: int, pool: int, source: Source, peer: Destination, shuffled: bool
    ) -> None:
        """`pool`: blocks of each cache that may be used."""
        self._shape = shape
        self._source = source
        self._peer = peer
        blocks = tokens // shape.block_size
        self._here, self._there = tables(pool, blocks, shuffled)
        self._prefill = Prefill(shape, tokens, source.cache, self._here)
        self._kv = torch.empty_like(source.cache[:, :blocks])
        self._copy = torch.empty_like(self._kv)

    def measure(self, rounds: int) -> Times:
        """The first round warms up."""
        times = Times()
        for number in range(rounds + 1):
            if number == 1:
                times = Times()
            times.push.append(self._push_at_once())
            times.copy.append(self._copied())
            times.alone.append(self._prefilled())
            self._prefilled_pushing(times)
        return times

    def _push_at_once(self) -> float:
        """Everything is computed already."""
        self._clear()
        for layer in range(self._shape.layers):
            kv = content(self._shape, layer, len(self._here), str(self._source.cache.device))
            self._source.cache[layer, torch.tensor(self._here, device=self._source.cache.device)] = kv
        self._synchronise()
        ready: deque[tuple[int, Fence]] = deque((layer, lambda: True) for layer in range(self._shape.layers))
        started = time.monotonic()
        return self._push(ready).written_at - started

    def _copied(self) -> float:
        self._synchronise()
        started = time.monotonic()
        self._copy.copy_(self._kv)
        self._synchronise()
        return time.monotonic() - started

    def _prefilled(self) -> float:
        started = time.monotonic()
        self._prefill.start().join(PREFILL_TIMEOUT_S)
        self._synchronise()
        return time.monotonic() - started

    def _prefilled_pushing(self, times: Times) -> None:
        self._clear()
        started = time.monotonic()
        thread = self._prefill.start()
        pushed = self._push(self._prefill.computed)
        thread.join(PREFILL_TIMEOUT_S)
        times.pushing.append(pushed.computed_at - started)
        times.uncovered.append(pushed.written_at - pushed.computed_at)
        times.writes = pushed.writes

    def _push(self, computed: "deque[tuple[int, Fence]]") -> Pushed:
        pushed = self._source.push(computed, self._here, self._there)
        if wrong := self._peer.wrong_bytes(self._there):
            raise SystemExit(f"{wrong} bytes are wrong at the destination: nothing was measured")
        return pushed

    def _clear(self) -> None:
        """So that what an earlier round has left can't pass for this one's."""
        self._source.cache.zero_()
        self._synchronise()
        self._peer.clear()

    def _synchronise(self) -> None:
        if self._source.cache.is_cuda:
            torch.cuda.synchronize(self._source.cache.device)


def tables(pool: int, blocks: int, shuffled: bool) -> tuple[list[int], list[int]]:
    """Block tables at the source and the destination. Shuffled as in a pool that has been in use; else the best case,
    in which neighbours travel together."""
    if not shuffled:
        return list(range(blocks)), list(range(blocks))
    dice = random.Random(blocks)
    return dice.sample(range(pool), blocks), dice.sample(range(pool), blocks)


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


def refusal(device: str, has_cuda: bool, tokens: Sequence[int], block_size: int) -> str:
    """Why this can't be run; empty if it can."""
    if device == "cuda" and not has_cuda:
        return "torch sees no CUDA device here; --device cpu runs the same code in DRAM, on a smaller model"
    if any(count < block_size or count % block_size for count in tokens):
        return f"--tokens must be multiples of {block_size}, the block size"
    return ""


def setting_of(device: str, shape: ModelShape, order: str) -> dict[str, object]:
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu (one thread in each process)",
        "torch": torch.__version__,
        "model": asdict(shape),
        "blocks": order,
        "UCX_TLS": os.environ.get("UCX_TLS", "not set"),
    }


def measure(shape: ModelShape, arguments: argparse.Namespace) -> list[Row]:
    blocks = max(arguments.tokens) // shape.block_size
    rows: list[Row] = []
    limits = Limits(arguments.write_mib * 1024**2, arguments.in_flight_mib * 1024**2)
    with destination(shape, blocks, arguments.device) as peer:
        source = Source(shape, blocks, arguments.device, limits)
        source.connect(peer.address)
        for tokens in arguments.tokens:
            bench = Bench(shape, tokens, blocks, source, peer, arguments.blocks == "shuffled")
            rows.append(row_of(shape, tokens, bench.measure(arguments.rounds)))
            print(f"{tokens:,} tokens: done", file=sys.stderr)
        source.close()
    return rows


def main() -> None:
    arguments = _arguments()
    shape = LLAMA_8B if arguments.device == "cuda" else SMALL
    if why := refusal(arguments.device, torch.cuda.is_available(), arguments.tokens, shape.block_size):
        raise SystemExit(why)
    if SLOW_ALLOCATOR in os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "").lower():
        print("PYTORCH_CUDA_ALLOC_CONF makes memory that UCX moves by way of the host: unset it", file=sys.stderr)
    torch.set_num_threads(1)
    setting = setting_of(arguments.device, shape, arguments.blocks)
    print("\n".join(f"{name}: {value}" for name, value in setting.items()), file=sys.stderr)
    try:
        rows = measure(shape, arguments)
    except TransportError as error:
        raise SystemExit(f"the transport gave up: {error}") from error
    print(table(rows), NOTES, sep="\n")
    if arguments.json:
        arguments.json.write_text(json.dumps({"setting": setting, "rows": [asdict(row) for row in rows]}, indent=1))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tokens", type=int, nargs="+", help="prompt lengths; on a CPU shorter ones by default")
    parser.add_argument("--rounds", type=int, default=10, help="of each length, after one that warms up")
    parser.add_argument("--quick", action="store_true", help="two rounds of the shortest lengths")
    parser.add_argument("--blocks", choices=["shuffled", "consecutive"], default="shuffled", help="how tables lie")
    parser.add_argument("--write-mib", type=int, default=8, help="most MiB in one WRITE, as kv_transfer.write_mib")
    parser.add_argument("--in-flight-mib", type=int, default=64, help="most in flight, as link_in_flight_mib")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    arguments = parser.parse_args()
    arguments.tokens = arguments.tokens or ([512, 2048, 8192] if arguments.device == "cuda" else [128, 512, 2048])
    if arguments.quick:
        arguments.tokens, arguments.rounds = sorted(arguments.tokens)[:2], 2
    return arguments


if __name__ == "__main__":
    main()
