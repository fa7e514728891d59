"""Splitwise's published measurements: Llama2-70B and BLOOM-176B on A100-80G and H100, 16 bits, TP 2, 4 and 8.

Source: splitwise-sim (ISCA'24 paper's artefact) at 8f99e7d; data and licence in data/NOTICE.md. The table is two lines
through (tokens, batch), five repeats a point: one prompt of 128 to 8,192 tokens, and 1 to 64 prompts of 512. Nothing
is between the lines, so time is a sum of what they say (`TableLatency`), straight between points and never falling.
`base` is the cheaper line, `crowd` and `length` what the batch and the single prompt cost beyond it. Decode is looked
up by how many sequences make a token (64 of them on H100, TP 8: 50.2 ms), never by prompts' batch or tokens.

Left out, and said in `findings`: rows "h100-80gb-pcap", which are the H100 rows with prompt time x 1.3 (derived, not
measured); the largest batch where its prompt time falls (Llama2-70B, TP 2: 64 prompts an eighth of 32's). Values that
fall otherwise are averaged with their neighbours (`checks.pooled`). Only one pipeline stage was measured.
"""

import csv
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files

from splitserve.latency.checks import Finding, falls, jumps, pooled
from splitserve.latency.curves import Curve
from splitserve.latency.model import Step, pairs
from splitserve.latency.table import Hull, TableLatency

_GPUS = {"a100-80g": "a100-80gb", "h100": "h100-80gb"}
_PROMPT, _OUTPUT = 512, 128  # tokens, where the other axis varies
_OUTLIER = 0.5  # a larger batch that takes less than this share of the smaller one's time was not that batch

_Line = dict[int, float]  # tokens or batch -> seconds


@cache
def splitwise(model: str, gpu: str, tp: int) -> TableLatency | None:
    """The model of `llama2-70b` or `bloom-176b` on `a100-80g` or `h100`; None for what they didn't measure."""
    rows = _medians().get((model, _GPUS.get(gpu, ""), tp))
    if rows is None:
        return None
    source = f"Splitwise's table, {model} on {gpu}, TP {tp}"
    lines = _lines(rows)
    return replace(_built(lines, source), error=_left_out_error(lines, source), findings=_findings(rows, lines, source))


def measured_tps(model: str, gpu: str) -> tuple[int, ...]:
    """Tensor parallelisms in the table; none for a model or GPU that isn't."""
    return tuple(sorted(tp for kind, hardware, tp in _medians() if (kind, hardware) == (model, _GPUS.get(gpu))))


# reading

_Worker = tuple[str, str, int]  # model, hardware, tensor parallelism
_Point = tuple[int, int, int]  # prompt tokens, batch, output tokens


@cache
def _medians() -> Mapping[_Worker, Mapping[_Point, tuple[float, float]]]:
    """Median seconds (of a prefill, of a decode step) of each point."""
    samples: dict[_Worker, dict[_Point, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    with files("splitserve.latency").joinpath("data/splitwise_perf.csv").open(encoding="utf-8") as table:
        for row in csv.DictReader(table):
            if not row["hardware"].endswith("-pcap"):
                worker = row["model"], row["hardware"], int(row["tensor_parallel"])
                point = int(row["prompt_size"]), int(row["batch_size"]), int(row["token_size"])
                samples[worker][point].append((float(row["prompt_time"]) / 1e3, float(row["token_time"]) / 1e3))
    return {worker: {point: _median(times) for point, times in rows.items()} for worker, rows in samples.items()}


def _median(times: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return statistics.median(prefill for prefill, _ in times), statistics.median(decode for _, decode in times)


@dataclass(frozen=True, slots=True)
class _Lines:
    """The table's two lines, seconds: by prompt tokens at batch 1, by batch at 512 tokens."""

    prefill_by_tokens: _Line
    prefill_by_batch: _Line
    decode_by_tokens: _Line
    decode_by_batch: _Line


def _lines(rows: Mapping[_Point, tuple[float, float]]) -> _Lines:
    points = sorted(rows.items())
    single = {prompt: times for (prompt, batch, output), times in points if (batch, output) == (1, _OUTPUT)}
    batched = {batch: times for (prompt, batch, output), times in points if (prompt, output) == (_PROMPT, _OUTPUT)}
    for batch in [b for b in batched if b > 1 and batched[b][0] < _OUTLIER * batched[b // 2][0]]:
        del batched[batch]
    return _Lines(
        {tokens: times[0] for tokens, times in single.items()},
        {batch: times[0] for batch, times in batched.items()},
        {tokens: times[1] for tokens, times in single.items()},
        {batch: times[1] for batch, times in batched.items()},
    )


# building


def _built(lines: _Lines, source: str) -> TableLatency:
    single, batched = _curve(lines.prefill_by_tokens), _curve(lines.prefill_by_batch)
    read_s = _per_token_read(lines.decode_by_tokens)
    by_batch = {b: s - read_s * b * (_PROMPT + _OUTPUT / 2) for b, s in lines.decode_by_batch.items()}
    base = _base(lines, single, batched, by_batch[1])
    crowd = {b: max(batched.of(b) - base.of(b * _PROMPT), 0.0) for b in lines.prefill_by_batch}
    long = [tokens for tokens in lines.prefill_by_tokens if tokens >= _PROMPT]
    length = {pairs(tokens, 0): max(single.of(tokens) - base.of(tokens), 0.0) for tokens in long}
    return TableLatency(
        base=base,
        crowd=_curve(crowd),
        crowd_tokens=_PROMPT,
        length=_curve(length),
        batch=_curve(by_batch),
        read=Curve.through([0, 1], [0, read_s]),
        hull=_hull(lines),
        source=source,
    )


def _hull(lines: _Lines) -> Hull:
    tokens, batches = lines.prefill_by_tokens, lines.prefill_by_batch
    most = max(batches)
    return Hull(min(tokens), max(most * _PROMPT, *tokens), most, max(lines.decode_by_batch), max(tokens) + _OUTPUT)


def _base(lines: _Lines, single: Curve, batched: Curve, one_token_s: float) -> Curve:
    """The cheaper line at each number of tokens that either has; one token costs what a decode step does. Beyond the
    longest single prompt, the batch's line less what the crowd costs there."""
    longest = max(lines.prefill_by_tokens)
    crowd_s = max(batched.of(longest / _PROMPT) - single.of(longest), 0.0)
    points = {1: min(one_token_s, *lines.prefill_by_tokens.values())}
    for tokens in {*lines.prefill_by_tokens, *(_PROMPT * batch for batch in lines.prefill_by_batch)}:
        alone = single.of(tokens) if tokens <= longest else float("inf")
        together = batched.of(tokens / _PROMPT) if tokens >= _PROMPT else float("inf")
        points[tokens] = min(alone, together - (crowd_s if tokens > longest else 0.0))
    return _curve(points)


def _per_token_read(decode_by_tokens: _Line) -> float:
    """Least-squares slope over the contexts of one sequence, seconds per token; at least 0."""
    contexts = [tokens + _OUTPUT / 2 for tokens in decode_by_tokens]
    slope, _ = statistics.linear_regression(contexts, list(decode_by_tokens.values()))
    return max(slope, 0.0)


def _curve(line: Mapping[int, float]) -> Curve:
    xs = sorted(line)
    return Curve.through(xs, pooled([line[x] for x in xs]).tolist())


# judging


def _left_out_error(lines: _Lines, source: str) -> float:
    """Mean relative error at each inner point of the two lines, predicted without it."""
    errors = []
    for tokens in list(lines.prefill_by_tokens)[1:-1]:
        without = _built(_without(lines, tokens, None), source) if tokens != _PROMPT else None
        if without:
            step = Step(tokens, pairs(tokens, 0), 1)
            errors.append(abs(without.step_s(step) / lines.prefill_by_tokens[tokens] - 1))
    for batch in list(lines.prefill_by_batch)[1:-1]:
        without = _built(_without(lines, None, batch), source)
        prefill = Step(batch * _PROMPT, batch * pairs(_PROMPT, 0), batch)
        decode = Step(decodes=batch, context_tokens=batch * (_PROMPT + _OUTPUT // 2))
        errors.append(abs(without.step_s(prefill) / lines.prefill_by_batch[batch] - 1))
        errors.append(abs(without.step_s(decode) / lines.decode_by_batch[batch] - 1))
    return statistics.fmean(errors)


def _without(lines: _Lines, tokens: int | None, batch: int | None) -> _Lines:
    return _Lines(
        {t: s for t, s in lines.prefill_by_tokens.items() if t != tokens},
        {b: s for b, s in lines.prefill_by_batch.items() if b != batch},
        {t: s for t, s in lines.decode_by_tokens.items() if t != tokens},
        {b: s for b, s in lines.decode_by_batch.items() if b != batch},
    )


def _findings(rows: Mapping[_Point, tuple[float, float]], lines: _Lines, source: str) -> tuple[Finding, ...]:
    dropped = sorted({batch for prompt, batch, output in rows} - set(lines.prefill_by_batch))
    found = [Finding(source, "rows h100-80gb-pcap are the H100's with prompt time x 1.3, not measured; left out")]
    found += [
        Finding(
            source,
            f"{batch} prompts of {_PROMPT} take {rows[_PROMPT, batch, _OUTPUT][0] * 1e3:.0f} ms where "
            f"{batch // 2} take {rows[_PROMPT, batch // 2, _OUTPUT][0] * 1e3:.0f}; left out",
        )
        for batch in dropped
    ]
    for axis, line in (
        ("prompt tokens", lines.prefill_by_tokens),
        ("prompts of 512", lines.prefill_by_batch),
        ("context of one decode", lines.decode_by_tokens),
        ("decode batch", lines.decode_by_batch),
    ):
        found += falls(source, axis, list(line), list(line.values()), "averaged with its neighbours")
        found += jumps(source, axis, list(line), list(line.values()))
    return tuple(found)
