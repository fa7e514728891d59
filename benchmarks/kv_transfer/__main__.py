"""Compares ways to hand a prompt's KV over: splitserve's layer-wise push, vLLM's stock pull and stock push.

    python -m benchmarks.kv_transfer [--quick] [--json FILE] [--without-cma]

One run, one machine, one load: seven vLLM engines on a small model, each pinned to a core, prefill on one and decode on
another. Systems take turns prompt batch by prompt batch, so that drift of the machine meets all; those that burn CPU
while idle are stopped in between. A quarter of the rounds run beside a decode stream and measure its disturbance
instead of latency.
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.kv_transfer.engine_imports import ENGINE_LOG
from benchmarks.kv_transfer.figures import Case, Record, Row, Spent, beside_a_stream, covered_s, next_case, row
from benchmarks.kv_transfer.systems import KINDS, TWO_TOKENS, Prompt, System
from benchmarks.kv_transfer.tables import Report, print_report
from splitserve.core.config import VllmSettings
from splitserve.kv.layout import blocks_for

DEMO_MODEL = Path(__file__).parents[2] / "splitserve" / "demo" / "model"
VOCAB_SIZE = 2048
FIRST_WORD = 300  # below are special tokens
MAX_MODEL_LEN = 8320  # the longest prompt and a block for its output
KV_CACHE_GIB = 0.65  # 16 prompts of 8,000 tokens and a stream
LENGTHS, CONCURRENT, MINUTES = (250, 500, 1000, 2000, 4000, 8000), (1, 4, 16), 20.0
QUICK_LENGTHS, QUICK_CONCURRENT, QUICK_MINUTES = (1000, 4000), (1, 4), 1.5
IDLE_SAMPLE_S = 2.0
RESTLESS_SHARE = 0.2  # of a core while idle
MEMCPY_REPEATS = 99
ENGINE_LOG_LINES = 40
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    "TQDM_DISABLE": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),  # else glibc hands large blocks back to the kernel all the time
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "MALLOC_TOP_PAD_": str(1 << 26),
}


@dataclass
class Bench:
    """Started systems and what was seen of them."""

    systems: Sequence[System]
    spent: dict[Case, Spent]
    show: Progress
    records: dict[tuple[Case, str], Record] = field(default_factory=dict)
    trouble: str = ""

    def run(self, minutes: float) -> None:
        """Rounds of all cases, until the time is up; each case gets one at least."""
        began, total_s = time.monotonic(), minutes * 60
        task = self.show.add_task("measuring", total=total_s)
        while (case := next_case(self.spent)) is not None:
            now, spent = time.monotonic(), self.spent[case]
            if now > began + total_s and spent.rounds:
                break
            self.show.update(task, completed=now - began, description=_label(case, spent.rounds))
            try:
                self._round(case, spent.rounds)
            except (RuntimeError, TimeoutError) as error:
                self.trouble = str(error)  # what was measured until now still counts
                break
            spent.rounds += 1
            spent.seconds += time.monotonic() - now
        self.show.update(task, completed=total_s, description="measured")

    def first_contact(self, prompt_tokens: int) -> dict[str, float]:
        """The hand-over of each system's first request, ms. Its engines have computed before, but not met."""
        handovers = {}
        longest = max(case.prompt_tokens for case in self.spent)
        for system in self.systems:
            with system.awake():
                for worker in system.workers:
                    worker.warm_up(_prompt("warm", longest))
                first = system.serve("first", [_prompt("first", prompt_tokens)])[0]
                system.settle()
                system.moved()
            if first.handover_s is not None:
                handovers[system.name] = first.handover_s * 1000
        return handovers

    def _round(self, case: Case, number: int) -> None:
        """Each system serves the same prompts; who begins changes from round to round. Counts for all or for none."""
        prompts = [_prompt(f"{case} {number} {each}", case.prompt_tokens) for each in range(case.concurrent)]
        shift = number % len(self.systems)
        fresh = {system.name: Record() for system in self.systems}
        for system in [*self.systems[shift:], *self.systems[:shift]]:
            record = fresh[system.name]
            name = f"{case.prompt_tokens}x{case.concurrent}.{number}"
            with system.awake():
                if beside_a_stream(number):
                    _disturb(system, name, prompts, record)
                else:
                    _serve(system, name, prompts, record)
                system.settle()
        for name, record in fresh.items():
            self.records.setdefault((case, name), Record()).add(record)


def main() -> None:
    arguments = _arguments()
    os.environ.update(ENVIRONMENT)
    if arguments.without_cma:
        os.environ["UCX_TLS"] = "tcp,self"
    cases = [Case(length, at_once) for length in arguments.lengths for at_once in arguments.concurrent]
    with _progress() as show, _started(arguments.systems, show) as systems:
        report = _measure(systems, cases, arguments.minutes, show)
        show.stop()
        print_report(report, Console())
        if arguments.json:
            arguments.json.write_text(json.dumps(asdict(report), indent=1) + "\n")
        if report.trouble:
            raise SystemExit(f"ended early: {report.trouble}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kv_transfer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [kind.name for kind in KINDS]
    parser.add_argument("--quick", action="store_true", help="two lengths, 1 and 4 at once, about 3 minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--without-cma", action="store_true", help="UCX_TLS=tcp,self: as in a container without ptrace")
    parser.add_argument("--lengths", type=int, nargs="+", metavar="TOKENS", help=f"prompt tokens; default {LENGTHS}")
    parser.add_argument("--concurrent", type=int, nargs="+", metavar="N", help=f"at once; default {CONCURRENT}")
    parser.add_argument("--minutes", type=float, help=f"measuring time after the start; default {MINUTES:g}")
    parser.add_argument(
        "--systems", nargs="+", choices=names, default=names, help="default: all; colocated always runs"
    )
    parsed = parser.parse_args()
    quick = parsed.quick
    parsed.lengths = parsed.lengths or (QUICK_LENGTHS if quick else LENGTHS)
    parsed.concurrent = parsed.concurrent or (QUICK_CONCURRENT if quick else CONCURRENT)
    parsed.minutes = parsed.minutes or (QUICK_MINUTES if quick else MINUTES)
    longest = MAX_MODEL_LEN - (TWO_TOKENS.max_tokens or 0)
    if not all(0 < length <= longest for length in parsed.lengths):
        parser.error(f"--lengths must be 1 to {longest}")
    return parsed


@contextmanager
def _started(names: Sequence[str], show: Progress) -> Iterator[list[System]]:
    """All engines, started side by side and joined; ended afterwards, however the run went."""
    from benchmarks.sensitive_model import make_sensitive_model  # imports torch, which --help needn't wait for

    with tempfile.TemporaryDirectory() as directory, ExitStack() as closing:
        model = make_sensitive_model(DEMO_MODEL, Path(directory), VOCAB_SIZE)
        systems = _systems(model, (*names, "colocated"))
        os.environ[ENGINE_LOG] = str(Path(directory, "engines.log"))
        os.environ["TMPDIR"] = directory  # the stock connectors end their process before it has tidied up
        multiprocessing.set_forkserver_preload(["benchmarks.kv_transfer.engine_imports"])
        workers = [worker for system in systems for worker in system.workers]
        for worker in workers:
            worker.engine.spawn()
            closing.callback(worker.engine.kill)
        closing.push(_tell_engine_log)
        task = show.add_task(f"starting {len(workers)} engines", total=len(workers))
        for worker in workers:
            worker.start()
            show.advance(task)
        for system in systems:
            system.join()
        yield systems
        for system in systems:
            system.close()


def _systems(model: Path, names: Sequence[str]) -> list[System]:
    """Prefill on the first core, decode on the last."""
    cores = sorted(os.sched_getaffinity(0))
    settings = VllmSettings(
        dtype="float32",
        max_model_len=MAX_MODEL_LEN,
        kv_cache_gib=KV_CACHE_GIB,
        enable_prefix_caching=False,
        extra={"hf_overrides": {"max_position_embeddings": MAX_MODEL_LEN}},
    )
    return [kind(model, settings, (cores[0], cores[-1])) for kind in KINDS if kind.name in names]


def _tell_engine_log(kind: type[BaseException] | None, *_: object) -> None:
    """What went wrong is often said by an engine."""
    if kind is not None:
        lines = Path(os.environ[ENGINE_LOG]).read_text().splitlines()
        print(*lines[-ENGINE_LOG_LINES:], sep="\n", file=sys.stderr)


def _measure(systems: list[System], cases: list[Case], minutes: float, show: Progress) -> Report:
    lengths = {case.prompt_tokens for case in cases}
    bench = Bench(systems, {case: Spent() for case in cases}, show)
    idle = _idle_shares(systems)
    for system in systems:
        system.restless = idle[system.name] > RESTLESS_SHARE
        system.rest()
    first_contact = bench.first_contact(min(lengths))
    copies = {length: _memcpy_gbps(_kv_bytes(systems[0], length)) for length in lengths}
    bench.run(minutes)
    return Report(_setting(systems), first_contact, idle, _rows(bench, copies), bench.trouble)


def _rows(bench: Bench, copies: dict[int, float]) -> list[Row]:
    return [
        row(case, system.name, bench.records[case, system.name], bench.records[case, "colocated"], gbps)
        for case in sorted(bench.spent)
        if bench.spent[case].rounds
        for gbps in [copies[case.prompt_tokens]]
        for system in bench.systems
    ]


def _serve(system: System, name: str, prompts: Sequence[Prompt], record: Record) -> None:
    record.timings += system.serve(name, prompts)
    _note_moves(system, prompts, record)


def _disturb(system: System, name: str, prompts: Sequence[Prompt], record: Record) -> None:
    """Serves beside a stream on the decode worker, and keeps the stream's gaps."""
    stream = f"{name}.stream"
    with system.decode.streaming(stream):
        timings = system.serve(name, prompts)
    served = (timings[0].asked_at, max(timing.second_at for timing in timings))
    record.add_gaps(system.decode.deltas.token_times(stream), served, _note_moves(system, prompts, record))


def _note_moves(system: System, prompts: Sequence[Prompt], record: Record) -> list[tuple[float, float]]:
    moves = system.moved()
    if moves:
        record.moved_bytes += sum(_kv_bytes(system, len(prompt)) for prompt in prompts)
        record.moving_s += covered_s(moves)
    return moves


def _kv_bytes(system: System, tokens: int) -> int:
    kv = system.decode.info.kv
    return blocks_for(tokens, kv.block_size) * kv.block_bytes * kv.layers


def _memcpy_gbps(size: int) -> float:
    """Median of copies of so many bytes by one core, each of other memory, as large as a KV cache: not from caches."""
    source, destination = np.ones((2, int(KV_CACHE_GIB * 2**30) // size, size), np.uint8)
    taken = []
    for number in range(min(MEMCPY_REPEATS, len(source))):
        began = time.perf_counter()
        np.copyto(destination[number], source[number])
        taken.append(time.perf_counter() - began)
    return size / statistics.median(taken) / 1e9


def _idle_shares(systems: Sequence[System]) -> dict[str, float]:
    """Of a core, which each system's processes burn with nothing to do."""
    before = {system.name: _cpu_s(system) for system in systems}
    time.sleep(IDLE_SAMPLE_S)
    return {system.name: (_cpu_s(system) - before[system.name]) / IDLE_SAMPLE_S for system in systems}


def _cpu_s(system: System) -> float:
    """CPU time of its processes so far."""
    ticks = 0
    for worker in system.workers:
        after_name = Path(f"/proc/{worker.engine.process.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(after_name[11]) + int(after_name[12])  # utime, stime
    return ticks / os.sysconf("SC_CLK_TCK")


def _setting(systems: Sequence[System]) -> dict[str, Any]:
    kv = systems[0].decode.info.kv
    return {
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "ucx_tls": os.environ.get("UCX_TLS", "default"),
        "versions": _versions("vllm", "nixl", "torch"),
        "model": f"Llama, {kv.layers} layers, {kv.kv_heads} KV heads of {kv.head_dim}, {kv.dtype}",
        "kv_bytes_per_token": kv.block_bytes * kv.layers // kv.block_size,
        "prefill_chunk_tokens": systems[0].decode.info.max_batched_tokens,
    }


def _versions(*packages: str) -> dict[str, str]:
    distributions = packages_distributions()
    return {package: version(distributions[package][0]) for package in packages}


def _prompt(seed: str, length: int) -> Prompt:
    return tuple(random.Random(seed).choices(range(FIRST_WORD, VOCAB_SIZE), k=length))


def _label(case: Case, number: int) -> str:
    return f"{case.prompt_tokens:,} tokens x {case.concurrent}, round {number + 1}"


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(file=sys.stderr))


if __name__ == "__main__":
    main()
