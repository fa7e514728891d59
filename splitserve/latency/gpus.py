"""The GPU datasheet: what one GPU can hold, read, compute and send, and what it costs. Pure; facts in data/gpus.yaml.

It states peaks. What share of a peak a kernel reaches is `roofline`'s affair.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from splitserve.core.errors import ConfigError

_GIB = 2**30


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. `flops` is (number type, dense flop/s) for each type its matrix units take."""

    name: str
    memory_bytes: int
    memory_bytes_per_s: float
    flops: tuple[tuple[str, float], ...]
    link_bytes_per_s: float  # to its node's other GPUs, one direction
    price_per_hour: float | None  # USD; None where nobody said
    watts: float
    source: str
    link: str = ""  # what `link_bytes_per_s` is: "NVLink 4", "PCIe 4.0 x16"

    def multiplies(self, dtype: str) -> bool:
        """Whether its matrix units take this type."""
        return any(kind == dtype for kind, _ in self.flops)

    def flops_per_s(self, dtype: str) -> float:
        """Dense peak for a number type of `shape`; a type that it can't multiply is widened to 16 bits."""
        peaks = dict(self.flops)
        return peaks.get(dtype) or peaks["fp16"]

    def priced(self, price_per_hour: float) -> "Gpu":
        """The same GPU at another price."""
        return replace(self, price_per_hour=price_per_hour)


def gpus() -> dict[str, Gpu]:
    """The datasheet by name."""
    return {name: _gpu(name, entry) for name, entry in _datasheet().items()}


def gpu(name: str) -> Gpu:
    """By name or alias, in any case. Raises ConfigError listing the known names."""
    wanted = name.strip().lower()
    for known, entry in _datasheet().items():
        if wanted == known or wanted in entry["aliases"]:
            return _gpu(known, entry)
    raise ConfigError("gpu", f"{name!r} is not in the datasheet; known: {', '.join(sorted(gpus()))}")


@cache
def _datasheet() -> dict[str, Any]:
    text = files("splitserve.latency").joinpath("data/gpus.yaml").read_text(encoding="utf-8")
    entries: dict[str, Any] = yaml.safe_load(text)["gpus"]
    return entries


def _gpu(name: str, entry: Mapping[str, Any]) -> Gpu:
    return Gpu(
        name=name,
        memory_bytes=int(entry["memory_gib"] * _GIB),
        memory_bytes_per_s=entry["memory_gb_per_s"] * 1e9,
        flops=_flops(entry["tflops"]),
        link_bytes_per_s=entry["link_gb_per_s"] * 1e9,
        price_per_hour=entry["usd_per_hour"],
        watts=float(entry["watts"]),
        source=entry["source"],
        link=entry["link"],
    )


def _flops(tflops: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    peaks = {"bf16": tflops["fp16"], **tflops}
    return tuple((kind, peak * 1e12) for kind, peak in sorted(peaks.items()))
