"""Measures the hand-over: from the prefill worker's first token to the decode worker's, push and pull in one run.

    python -m benchmarks.handover [--json]

Starts one prefill and one decode engine per mode (four vLLM processes), then alternates the modes prompt by prompt, so
that drift of the machine's speed meets both. Negative: the decode worker's token is out before the prefill worker's.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.remote_engine import Collector, RemoteEngine
from benchmarks.sensitive_model import make_sensitive_model
from splitserve.core.config import KvTransferSettings, VllmSettings
from splitserve.core.request import SamplingParams
from splitserve.core.worker import DecodeJob, KvMode, KvPeer, PrefillJob, Ticket

DEMO_MODEL = Path(__file__).parents[1] / "splitserve" / "demo" / "model"
VOCAB_SIZE = 2048
MAX_MODEL_LEN = 8192
DEADLINE_S = 120.0
TWO_TOKENS = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)


@dataclass
class Pair:
    """A prefill and a decode engine of one mode."""

    mode: KvMode
    prefill: RemoteEngine
    decode: RemoteEngine

    def spawn(self) -> None:
        self.prefill.spawn()
        self.decode.spawn()

    def start(self) -> None:
        self.prefilled, self.decoded = Collector(), Collector()
        self.source: KvPeer = self.prefill.start(self.prefilled).kv_peer
        self.destination: KvPeer = self.decode.start(self.decoded).kv_peer
        self.prefill.connect([self.destination])
        self.decode.connect([self.source])

    def hand_over(self, name: str, prompt: tuple[int, ...]) -> tuple[float, float]:
        """Seconds from the prefill worker's first token to the decode worker's, and from the start to the latter."""
        started = time.monotonic()
        ticket = Ticket(name, 1, self.source, self.destination)
        prefill = PrefillJob(f"{name}/prefill", name, prompt, ticket, DEADLINE_S)
        if self.mode is KvMode.PULL:
            self.prefill.submit(prefill)
            handover = self.prefilled.outcome(prefill.job_id).handover
            ticket = Ticket(name, 1, self.source, self.destination, handover)
        self.decode.submit(DecodeJob(f"{name}/decode", name, prompt, TWO_TOKENS, DEADLINE_S, ticket=ticket))
        if self.mode is KvMode.PUSH:
            self.prefill.submit(prefill)
        for collector, job in ((self.prefilled, f"{name}/prefill"), (self.decoded, f"{name}/decode")):
            outcome = collector.outcome(job)
            if outcome.failure is not None:
                raise SystemExit(f"{job} failed: {outcome.message}")
        first = self.decoded.first_at(f"{name}/decode")
        return first - self.prefilled.first_at(f"{name}/prefill"), first - started

    def close(self) -> None:
        self.prefill.close()
        self.decode.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1000, 4000], help="prompt tokens")
    parser.add_argument("--repeats", type=int, default=15, help="prompts per length and mode")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = make_sensitive_model(DEMO_MODEL, Path(directory), VOCAB_SIZE)
        pairs = [_pair(mode, model) for mode in KvMode]
        for pair in pairs:
            pair.spawn()
        print("starting four vLLM engines ...", file=sys.stderr)
        for pair in pairs:
            pair.start()
        rows = _measure(pairs, arguments.lengths, arguments.repeats)
        for pair in pairs:
            pair.close()
    print(json.dumps(rows) if arguments.json else _table(rows))


def _pair(mode: KvMode, model: Path) -> Pair:
    cores = sorted(os.sched_getaffinity(0))
    settings = VllmSettings(dtype="float32", max_model_len=MAX_MODEL_LEN, kv_cache_gib=0.5, enable_prefix_caching=False)
    kv = KvTransferSettings(mode=mode)
    return Pair(
        mode,
        RemoteEngine(model, settings, kv, f"{mode}-prefill", cores[0]),
        RemoteEngine(model, settings, kv, f"{mode}-decode", cores[-1]),
    )


def _measure(pairs: list[Pair], lengths: list[int], repeats: int) -> list[dict[str, float | str]]:
    rows: list[dict[str, float | str]] = []
    for length in lengths:
        times: dict[KvMode, list[tuple[float, float]]] = {pair.mode: [] for pair in pairs}
        for number in range(repeats + 1):
            prompt = tuple(random.Random(f"{length}-{number}").choices(range(300, VOCAB_SIZE), k=length))
            for pair in pairs:
                measured = pair.hand_over(f"{length}-{number}", prompt)
                if number:  # the first of each length warms up
                    times[pair.mode].append(measured)
        print(f"{length} tokens: done", file=sys.stderr)
        rows += [_row(mode, length, measured) for mode, measured in times.items()]
    return rows


def _row(mode: KvMode, length: int, measured: list[tuple[float, float]]) -> dict[str, float | str]:
    handovers = [handover * 1000 for handover, _ in measured]
    return {
        "mode": str(mode),
        "prompt_tokens": length,
        "handover_ms_median": round(statistics.median(handovers), 1),
        "handover_ms_max": round(max(handovers), 1),
        "ttft_ms_median": round(statistics.median(ttft * 1000 for _, ttft in measured), 1),
    }


def _table(rows: list[dict[str, float | str]]) -> str:
    header = list(rows[0])
    lines = [header, *([str(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


if __name__ == "__main__":
    main()
