"""DistServe's published fit: OPT-13B and OPT-66B on A100-80G, FP16, for each tensor parallelism that they measured.

Source: DistServe (OSDI'24) at 82831f1, simdistserve/estimators; data and licence in data/NOTICE.md. In ms,

    prefill stage = (a + b * sum(l) + c * sum(l^2)) / pp + pp
    decode stage  = (a + b * sum(ctx + 1) + c * batch) / pp        one set for batch < 95, another from 95 on
    first stage   + 2 + 1e-4 * (tokens read)

What it does that their simulator does not:

- a chunk of t tokens after c counts (c + t)^2 - c^2 instead of l^2, which is 2 * pairs - tokens of a `Step`;
- a step of prefill and decode together (their engine has none): decodes ride as tokens in the linear layers, their
  attention is added, and it costs at least what its decodes alone do. Nobody has measured it: extrapolated;
- time never falls as work grows. From batch 95 on a step costs at least what the small set says of 94 sequences with
  the same tokens to read, up to the 2,048 that each may have; a negative coefficient is read as 0. Both are `findings`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from splitserve.latency.checks import Finding, falls, jumps
from splitserve.latency.model import Provenance, Step, Trust

GPU = "a100-80g"
_LONGEST = 2048  # OPT's positions
_EACH = 800  # tokens of a sequence where the sets are compared: about ShareGPT's prompt and half of its answer
_OVERHEAD_S, _OVERHEAD_TOKEN_S = 2e-3, 1e-7


@dataclass(frozen=True, slots=True)
class DistServeLatency:
    """One worker. Coefficients in seconds, of one pass through all `stages` without the constant overheads."""

    prefill: tuple[float, float, float]  # fixed, per token, per squared token
    small: tuple[float, float, float]  # decode: fixed, per context token, per sequence
    large: tuple[float, float, float]
    border: int  # the first batch of the large set
    stages: int
    source: str
    findings: tuple[Finding, ...] = ()

    def step_s(self, step: Step) -> float:
        return self._seconds(step, 1, self.stages)

    def stage_s(self, step: Step) -> float:
        return self._seconds(step, self.stages, 1)

    def _seconds(self, step: Step, share: int, visits: int) -> float:
        """`share`: how many parts the linear work is cut into; `visits`: how many stages' prefill constant is paid."""
        tokens, pairs, _, decodes, context = step
        if not tokens:
            if not decodes:
                return 0.0
            read = context + decodes
            return self._decode_s(decodes, read) / share + _OVERHEAD_S + _OVERHEAD_TOKEN_S * context
        fixed, per_token, per_square = self.prefill
        squared = 2 * pairs - tokens
        work = fixed + per_token * (tokens + decodes) + per_square * (squared if squared > 0 else 0)
        if decodes:
            read = context + decodes
            work += self.small[1] * read
            alone = self._decode_s(decodes, read)
            work = work if work > alone else alone
        return work / share + visits * self.stages * 1e-3 + _OVERHEAD_S + _OVERHEAD_TOKEN_S * (tokens + context)

    def _decode_s(self, decodes: int, read: int) -> float:
        fixed, per_token, per_sequence = self.small
        border = self.border
        if decodes < border:
            return fixed + per_token * read + per_sequence * decodes
        most = (border - 1) * _LONGEST
        floor = fixed + per_token * (read if read < most else most) + per_sequence * (border - 1)
        fixed, per_token, per_sequence = self.large
        above = fixed + per_token * read + per_sequence * decodes
        return above if above > floor else floor

    def provenance(self, step: Step) -> Provenance:
        """Interpolated for what they fitted: prefill or decode alone, within OPT's 2,048 tokens a sequence."""
        mixed = step.decodes and step.prompt_tokens
        long = step.prompt_tokens > _LONGEST * step.prefills or step.context_tokens > _LONGEST * step.decodes
        trust = Trust.EXTRAPOLATED if mixed or long or self._bridged(step) else Trust.INTERPOLATED
        return Provenance(trust, self.source)

    def _bridged(self, step: Step) -> bool:
        fixed, per_token, per_sequence = self.large
        read = step.context_tokens + step.decodes
        above = fixed + per_token * read + per_sequence * step.decodes
        return step.decodes >= self.border and self._decode_s(step.decodes, read) > above


def distserve(model: str, tp: int, pp: int, engine: str = "distserve") -> DistServeLatency | None:
    """What `opt-13b` or `opt-66b` cost `engine` ("distserve", "vllm"); None for what they didn't measure."""
    for row in _table()["coefficients"]:
        if row["engine"] == engine and row["model"] == f"facebook/{model}" and row["tp"] == tp:
            return _latency(row, pp)
    return None


def measured_tps(model: str, engine: str = "distserve") -> tuple[int, ...]:
    """Tensor parallelisms with a set of coefficients; none for a model that isn't in the table."""
    rows = _table()["coefficients"]
    return tuple(row["tp"] for row in rows if row["engine"] == engine and row["model"] == f"facebook/{model}")


def max_num_tokens(model: str, tp: int, pp: int) -> int | None:
    """How many tokens' KV fit beside the weights, as they computed it; None for a shape that isn't in the table."""
    for row in _table()["max_num_tokens"]:
        if (row["model"], row["tp"], row["pp"]) == (f"facebook/{model}", tp, pp):
            return int(row["max_num_tokens"])
    return None


@cache
def _table() -> Mapping[str, Any]:
    text = files("splitserve.latency").joinpath("data/distserve_profile.json").read_text(encoding="utf-8")
    table: Mapping[str, Any] = json.loads(text)
    return table


def _latency(row: Mapping[str, Any], pp: int) -> DistServeLatency:
    name, engine, tp = row["model"].removeprefix("facebook/"), row["engine"], row["tp"]
    source = f"DistServe's fit, engine {engine}, {name} on {GPU}, TP {tp}" + (f" PP {pp}" if pp > 1 else "")
    prefill = tuple(row["prefill"][key] / 1e3 for key in ("a_ms", "b_ms_per_token", "c_ms_per_token_sq"))
    small, large, border = _decode_set(row["decode_small_batch"]), _decode_set(row["decode_large_batch"]), _border(row)
    return DistServeLatency(
        prefill=(prefill[0], prefill[1], max(prefill[2], 0.0)),
        small=small,
        large=large,
        border=border,
        stages=pp,
        source=source,
        findings=(*_negatives(source, prefill), *_seam(source, small, large, border)),
    )


def _border(row: Mapping[str, Any]) -> int:
    return int(row["small_batch_if_batch_lt"])


def _negatives(source: str, prefill: tuple[float, ...]) -> tuple[Finding, ...]:
    if prefill[2] >= 0:
        return ()
    return (Finding(source, f"prefill costs {prefill[2] * 1e3:.1e} ms per squared token: below 0, read as 0"),)


def _seam(
    source: str, small: tuple[float, float, float], large: tuple[float, float, float], border: int
) -> tuple[Finding, ...]:
    """Where the two decode sets meet, at `_EACH` tokens a sequence."""
    seconds = [_linear(small, border - 1), _linear(large, border)]
    remedy = f"from {border} on a step costs at least what {border - 1} cost with its tokens (here {_EACH} each)"
    found = falls(source, "decode batch", [border - 1, border], seconds, remedy)
    return (*found, *jumps(source, "decode batch", [border - 1, border], seconds))


def _decode_set(row: Mapping[str, float]) -> tuple[float, float, float]:
    return row["a_ms"] / 1e3, row["b_ms_per_context_token"] / 1e3, row["c_ms_per_request"] / 1e3


def _linear(decode: tuple[float, float, float], batch: int) -> float:
    return decode[0] + decode[1] * batch * (_EACH + 1) + decode[2] * batch
