"""Holds the planner's simulator against a real cluster: predicts attainment at five rates, measures it, and compares.

    python -m benchmarks.planner_accuracy [--model tiny|30m] [--requests 200] [--json]

One prefill and one decode worker, on vLLM each on a core of its own, with a router. First the engine is profiled, as
`splitserve profile` does, and a few requests that meet an idle cluster say what serving adds to a step and to a TTFT.
Then, at each rate, the simulator and the cluster serve the very same requests. Router, client and workers share the
machine's cores, of which the simulator knows nothing.

Before and after each rate a few requests alone say how fast the machine is, as in `benchmarks.goodput`. To one that has
become slower or faster requests are sent, and their times judged, as if its clock had changed by as much; a rate during
which it changes by more than a tenth is taken once more, and if that happens again, the run is invalid (exit status 1).
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.goodput import alone as one_alone
from benchmarks.goodput.alone import Alone
from benchmarks.goodput.served import Served, serving
from benchmarks.side_by_side import profiled
from splitserve.bench import open_loop
from splitserve.cli.build import DEMO_MODEL
from splitserve.core.slo import Slo, Timelines, attainment
from splitserve.latency.fit import FittedLatency
from splitserve.latency.model import PrefillChunk, Step
from splitserve.latency.profile import Profile
from splitserve.planner.deployment import Deployment, Link, Role, WorkerSpec
from splitserve.planner.simulator.simulate import simulate
from splitserve.workload.named import workload
from splitserve.workload.requests import Requests
from splitserve.workload.workload import Workload

MODELS = ("tiny", "30m", "simulated")
SHARES = (0.5, 0.75, 1.0, 1.25, 1.6)  # of the predicted goodput
WORKLOAD = "lognormal:prompt=500,output=60,sigma=0.5"
TTFT_TIMES, TPOT_TIMES = 4.0, 1.6  # the SLO, in multiples of what one request alone gets
ATTAINMENT = 0.9
OVERHEAD_REQUESTS = 10
STREAMS = (1, 16)
LINK_BYTES_PER_S = 3e9  # NIXL over shared memory on one machine: benchmarks/results/kv_transfer.txt
LONGEST_TOKENS = 2048
TRIES = 2  # of a rate during which the machine's speed changed


@dataclass(frozen=True, slots=True)
class Row:
    """One rate, requests per second. Times are seconds. `slower`: the machine before the run, in multiples of what a
    request alone took at first; `slower_after` the same after it."""

    rate_rps: float
    predicted: float
    measured: float
    ttft_p50_predicted_s: float
    ttft_p50_measured_s: float
    ttft_p90_predicted_s: float
    ttft_p90_measured_s: float
    tpot_p50_predicted_s: float
    tpot_p50_measured_s: float
    late_share: float
    slower: float
    slower_after: float

    @property
    def steady(self) -> bool:
        return abs(self.slower_after / self.slower - 1.0) <= one_alone.NORMAL

    @property
    def points(self) -> float:
        """By how much the prediction is off, in percentage points of attainment."""
        return 100 * (self.predicted - self.measured)


@dataclass(frozen=True, slots=True)
class Report:
    model: str
    held_out_error: str
    overhead_s: float
    slo: Slo
    goodput_rps: float
    rows: Sequence[Row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="tiny", help="simulated: no vLLM, times of OPT-13B on A100s")
    parser.add_argument("--requests", type=int, default=200, help="at each rate")
    parser.add_argument("--profile", type=Path, help="keep it here; one that is there is used")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="splitserve-accuracy-") as scratch:
        report = asyncio.run(_compare(args.model, args.requests, args.profile, Path(scratch)))
    print(json.dumps(asdict(report)) if args.json else _table(report))
    if not all(row.steady for row in report.rows):
        sys.exit("invalid: the machine's speed changed by more than a tenth while it was measured; run it again")


async def _compare(model: str, count: int, known: Path | None, scratch: Path) -> Report:
    directory = _model_directory(model, scratch)
    cluster = {"engine": _SIMULATED if model == "simulated" else _VLLM}
    profile = profiled({"model": str(directory), **cluster}, scratch, known or scratch / "profile.json", LONGEST_TOKENS)
    asked = workload(WORKLOAD)
    (scratch / "run").mkdir()
    async with serving(directory, cluster, scratch / "run") as served:
        await _overhead_s(served, profile.latency())  # the first requests pay for what an engine does once
        latency = await _beside_serving(served, profile)
        overhead_s = await _overhead_s(served, latency)
        unit = await one_alone.measured(served, int(asked.mean_prompt_tokens), seed=1000)
        deployment = _deployment(profile, latency)
        slo = _slo(latency, asked, overhead_s)
        goodput_rps = _goodput(deployment, asked, slo, overhead_s, count)
        _say(f"overhead {overhead_s * 1000:.1f} ms; TTFT {slo.ttft_s:.3f} s, TPOT {slo.tpot_s:.4f} s; ", goodput_rps)
        at = _At(served, unit, deployment, asked, slo, overhead_s, count)
        rows = [await at.rate(share * goodput_rps, seed=100 + number) for number, share in enumerate(SHARES)]
    errors = ", ".join(f"{kind} {held.mean:.1%}" for kind, held in latency.held_out)
    return Report(model, errors, overhead_s, slo, goodput_rps, rows)


@dataclass(frozen=True, slots=True)
class _At:
    """Predicts and measures one rate after the other, by the same deployment and objectives."""

    served: Served
    unit: Alone
    deployment: Deployment
    asked: Workload
    slo: Slo
    overhead_s: float
    count: int

    async def rate(self, rate_rps: float, seed: int) -> Row:
        for _ in range(TRIES):
            row = await self._once(rate_rps, seed)
            _say(f"{rate_rps:.2f} requests/s: predicted {row.predicted:.0%}, ", row.measured)
            if row.steady:
                break
            _say(f"the machine went from {row.slower:.2f} times as slow to ", row.slower_after)
        return row

    async def _once(self, rate_rps: float, seed: int) -> Row:
        before = await self._slower()
        factor = one_alone.factor_of(before)
        requests = self.asked.draw(self.count, rate_rps, seed)
        slowed = replace(requests, arrival_s=requests.arrival_s * factor)
        run = await open_loop.run(slowed, self.served.send(slowed, seed))
        await self.served.quiet()
        after = await self._slower()
        predicted = _late(simulate(self.deployment, requests).timelines, self.overhead_s)
        measured = one_alone.as_if(run.timelines, factor)
        return _row(rate_rps, predicted, measured, self.slo, run.share_late, (factor, after / before * factor))

    async def _slower(self) -> float:
        return await one_alone.speed(self.served, int(self.asked.mean_prompt_tokens), 2000, self.unit)


def _model_directory(name: str, scratch: Path) -> Path:
    """`tiny` and `simulated` are the demonstration model, `30m` a Llama of 28 million parameters in float32.
    Its weights are random: what a step costs does not depend on them."""
    if name != "30m":
        return DEMO_MODEL
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from benchmarks.sensitive_model import copy_tokenizer

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=int(json.loads((DEMO_MODEL / "config.json").read_text())["vocab_size"]),
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
    )
    out = scratch / name
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(out)
    copy_tokenizer(DEMO_MODEL, out)
    return out


def _say(text: str, number: float) -> None:
    print(f"{text}{number:.2f}", file=sys.stderr, flush=True)


_LIMITS = {"max_num_seqs": 64, "max_num_batched_tokens": 2048, "max_model_len": LONGEST_TOKENS}
_VLLM = {"kind": "vllm", "dtype": "float32", **_LIMITS}
_SIMULATED = {
    "kind": "sim",
    "latency": {"model": "opt-13b", "gpu": "a100-80g", "tp": 2},
    "total_blocks": 8000,
    **_LIMITS,
}


async def _overhead_s(served: Served, latency: FittedLatency) -> float:
    """What a request alone waits beyond its steps: client, router, both workers' loops."""
    lengths, gap_s = 400, 1.0
    arrivals = np.arange(OVERHEAD_REQUESTS + 3, dtype=np.float64) * gap_s
    same = np.full(len(arrivals), lengths, dtype=np.int64)
    requests = Requests(arrivals, same, np.full(len(arrivals), 4, dtype=np.int64))
    run = await open_loop.run(requests, served.send(requests, seed=9))
    return max(0.0, float(np.median(run.timelines.ttft_s[3:])) - _alone_s(latency, lengths))


def _alone_s(latency: FittedLatency, prompt_tokens: int) -> float:
    """TTFT of a request alone by the model: its prefill and one decode step."""
    prefill = Step.of([PrefillChunk(prompt_tokens)])
    return latency.step_s(prefill) + latency.step_s(Step.of(decodes=[prompt_tokens]))


async def _beside_serving(served: Served, profile: Profile) -> FittedLatency:
    """The engine's latencies with what serving adds to a step: deltas, gRPC and the router, which share its cores. Seen
    in the pace of few and of many streams that meet an idle cluster; no load decides it."""
    latency, extra_s = profile.latency(), []
    for streams in STREAMS:
        arrivals, prompts = np.zeros(streams, dtype=np.float64), np.full(streams, 100, dtype=np.int64)
        requests = Requests(arrivals, prompts, np.full(streams, 80, dtype=np.int64))
        seen = (await open_loop.run(requests, served.send(requests, seed=streams))).timelines
        said = simulate(_deployment(profile, latency), requests).timelines
        extra_s.append(float(np.median(seen.tpot_s) - np.median(said.tpot_s)))
    each_s = max(0.0, (extra_s[1] - extra_s[0]) / (STREAMS[1] - STREAMS[0]))
    fixed_s = max(0.0, extra_s[0] - each_s * STREAMS[0])
    _say(f"serving adds {fixed_s * 1000:.2f} ms to a step and, for each sequence, ms ", each_s * 1000)
    return replace(latency, fixed_s=latency.fixed_s + fixed_s, decode_s=latency.decode_s + each_s)


def _deployment(profile: Profile, latency: FittedLatency) -> Deployment:
    settings = profile.settings
    prefill = WorkerSpec(
        Role.PREFILL,
        latency,
        settings["total_blocks"],
        block_tokens=settings["block_tokens"],
        max_sequences=settings["max_sequences"],
        max_batched_tokens=settings["max_batched_tokens"],
        max_model_len=settings["max_model_len"],
    )
    link = Link(LINK_BYTES_PER_S)
    workers = (prefill, replace(prefill, role=Role.DECODE))
    return Deployment(workers, settings["kv_bytes_per_token"], settings["layers"], link, link)


def _slo(latency: FittedLatency, asked: Workload, overhead_s: float) -> Slo:
    prompt = int(asked.mean_prompt_tokens)
    step_s = latency.step_s(Step.of(decodes=[prompt]))
    return Slo(TTFT_TIMES * (_alone_s(latency, prompt) + overhead_s), TPOT_TIMES * step_s, ATTAINMENT)


def _goodput(deployment: Deployment, asked: Workload, slo: Slo, overhead_s: float, count: int) -> float:
    """The highest rate that the simulator says is served in time."""
    low, high = 0.0, 1000.0
    while high - low > 0.02 * high:
        rate = (low + high) / 2 if low else high / 2
        shares = [
            attainment(_late(simulate(deployment, asked.draw(count, rate, seed)).timelines, overhead_s), slo)
            for seed in range(3)
        ]
        low, high = (rate, high) if statistics.mean(shares) >= slo.attainment else (low, rate)
    return low


def _late(timelines: Timelines, overhead_s: float) -> Timelines:
    return replace(
        timelines, first_token=timelines.first_token + overhead_s, last_token=timelines.last_token + overhead_s
    )


def _row(
    rate_rps: float,
    predicted: Timelines,
    measured: Timelines,
    slo: Slo,
    late_share: float,
    slower: tuple[float, float],
) -> Row:
    both = (predicted, measured)
    quantiles = [float(np.quantile(each.ttft_s, share)) for share in (0.5, 0.9) for each in both]
    tpot = [float(np.median(each.tpot_s)) for each in both]
    shares = [attainment(each, slo) for each in both]
    return Row(*(rate_rps, *shares, *quantiles, *tpot, late_share, *slower))


def _table(report: Report) -> str:
    lines = [
        f"model {report.model}; profile: {report.held_out_error}; overhead {report.overhead_s * 1000:.1f} ms",
        f"workload {WORKLOAD}; SLO: TTFT {report.slo.ttft_s:.3f} s, TPOT {report.slo.tpot_s:.4f} s",
        f"predicted goodput {report.goodput_rps:.2f} requests/s",
        "",
        "rate   attainment          TTFT p50, ms        TTFT p90, ms        TPOT p50, ms",
        "req/s  said  seen  points  said  seen          said  seen          said  seen",
    ]
    for row in report.rows:
        times = (
            (row.ttft_p50_predicted_s, row.ttft_p50_measured_s),
            (row.ttft_p90_predicted_s, row.ttft_p90_measured_s),
            (row.tpot_p50_predicted_s, row.tpot_p50_measured_s),
        )
        shown = "  ".join(f"{said * 1000:7.1f} {seen * 1000:7.1f}   " for said, seen in times)
        late = f"  (sender late: {row.late_share:.0%})" if row.late_share > 0.01 else ""
        late += f"  (machine {row.slower:.2f} times as slow)" if row.slower != 1.0 else ""
        late += "" if row.steady else f"  INVALID: {row.slower_after:.2f} times as slow after it"
        lines.append(
            f"{row.rate_rps:5.2f}  {row.predicted:4.0%}  {row.measured:4.0%}  {row.points:+6.1f}  {shown}{late}"
        )
    lines.append(f"mean difference {statistics.mean(abs(row.points) for row in report.rows):.1f} points")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
