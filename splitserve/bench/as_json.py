"""Findings as one JSON object: all that the tables show, and what was run. What never came is null."""

import math
from dataclasses import asdict
from typing import Any

from splitserve.bench.compare import Pair
from splitserve.bench.facts import slo_as_dict
from splitserve.bench.findings import Figures, Findings, Saved, System


def as_json(findings: Findings) -> dict[str, Any]:
    """Times are seconds, rates per second."""
    told: dict[str, Any] = _finite(
        {
            "kind": findings.kind,
            "valid": findings.valid,
            "slo": slo_as_dict(findings.slo),
            "systems": [_system(system) for system in findings.systems],
            "pairs": [_pair(pair) for pair in findings.pairs],
        }
    )
    return told


def _system(system: System) -> dict[str, Any]:
    return {
        "name": system.name,
        "goodput": asdict(system.goodput) if system.goodput else None,
        "runs": [_run(saved, figures) for saved, figures in zip(system.saved, system.figures, strict=True)],
    }


def _pair(pair: Pair) -> dict[str, Any]:
    ratio = pair.ratios[0]
    rates = [
        {
            "rate_rps": rate.rate_rps,
            "seeds": rate.seeds,
            "attainment_difference": asdict(rate.differences[0]),
            "quotients": [asdict(quotient) for quotient in rate.quotients],
        }
        for rate in pair.rates
    ]
    return {"a": pair.a, "b": pair.b, "goodput_ratio": asdict(ratio) if ratio else None, "rates": rates}


def _run(saved: Saved, figures: Figures) -> dict[str, Any]:
    errors = [{"error": error, "requests": count} for error, count in figures.errors]
    return {**asdict(figures), "errors": errors, "valid": figures.valid, "facts": saved.facts.as_dict()}


def _finite(said: Any) -> Any:
    if isinstance(said, dict):
        return {key: _finite(value) for key, value in said.items()}
    if isinstance(said, list | tuple):
        return [_finite(value) for value in said]
    return None if isinstance(said, float) and not math.isfinite(said) else said
