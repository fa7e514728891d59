"""A measured profile: what `splitserve profile` writes, and the latency model that comes of it.

One JSON (or YAML) file of one worker: what ran (model, hardware, engine, parallelism, settings) and samples, each a
`Step` and the seconds that it took. It can be read back half done and continued. Driving a worker is no part of this.

    {"schema": "splitserve.profile/1", "model": "opt-13b", "hardware": "a100-80g", "worker": "vllm 0.25",
     "tp": 1, "pp": 1, "kv_tokens": 66144, "settings": {...},
     "samples": [{"prompt_tokens": 512, ..., "seconds": 0.071}, ...]}
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from splitserve.core.errors import ConfigError
from splitserve.latency.fit import FittedLatency, Sample, fit
from splitserve.latency.model import Step

SCHEMA = "splitserve.profile/1"


@dataclass(frozen=True, slots=True)
class Profile:
    """`kv_tokens`: how many tokens' KV the worker said it can hold; None if it didn't. `settings` are the engine's, as
    it names them."""

    model: str
    hardware: str
    worker: str
    tp: int = 1
    pp: int = 1
    kv_tokens: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    samples: tuple[Sample, ...] = ()

    def with_samples(self, *more: Sample) -> "Profile":
        return replace(self, samples=(*self.samples, *more))

    def latency(self) -> FittedLatency:
        """Fitted to the samples. Raises ConfigError if they are too few."""
        of = f"profile of {self.model} on {self.hardware}, TP {self.tp} PP {self.pp}"
        try:
            return fit(self.samples, of, self.pp)
        except ValueError as error:
            raise ConfigError("samples", f"{error}; {of}") from error

    def write(self, file: str | Path) -> None:
        """Replaces the file in one move, so that a reader never finds half of it."""
        target = Path(file)
        draft = target.with_name(f".{target.name}.draft")
        draft.write_text(json.dumps(_document(self), indent=1) + "\n", encoding="utf-8")
        draft.replace(target)


def read(file: str | Path) -> Profile:
    """Raises ConfigError naming the file, and the sample at fault by its number (the first is 1)."""
    path = Path(file)
    try:
        text = path.read_text(encoding="utf-8")
        document = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(str(path), f"can't be read: {error.strerror}") from error
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(str(path), f"neither JSON nor YAML: {error}") from error
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        said = document.get("schema") if isinstance(document, dict) else None
        raise ConfigError(str(path), f"not a profile of this version: schema is {said!r}, must be {SCHEMA!r}")
    return _profile(str(path), document)


def _document(profile: Profile) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "model": profile.model,
        "hardware": profile.hardware,
        "worker": profile.worker,
        "tp": profile.tp,
        "pp": profile.pp,
        "kv_tokens": profile.kv_tokens,
        "settings": dict(profile.settings),
        "samples": [{**step._asdict(), "seconds": seconds} for step, seconds in profile.samples],
    }


def _profile(where: str, document: Mapping[str, Any]) -> Profile:
    samples = document.get("samples", [])
    if not isinstance(samples, list):
        raise ConfigError(where, "samples: must be a list")
    kv_tokens = document.get("kv_tokens")
    return Profile(
        model=_text(where, document, "model"),
        hardware=_text(where, document, "hardware"),
        worker=_text(where, document, "worker"),
        tp=_count(where, "tp", document.get("tp", 1), 1),
        pp=_count(where, "pp", document.get("pp", 1), 1),
        kv_tokens=None if kv_tokens is None else _count(where, "kv_tokens", kv_tokens, 1),
        settings=dict(document.get("settings") or {}),
        samples=tuple(_sample(where, number, entry) for number, entry in enumerate(samples, 1)),
    )


def _sample(where: str, number: int, entry: Any) -> Sample:
    if not isinstance(entry, dict):
        raise ConfigError(where, f"sample {number}: must be an object")
    counts = {name: _count(where, f"sample {number}: {name}", entry.get(name, 0), 0) for name in Step._fields}
    seconds = entry.get("seconds")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < math.inf:
        raise ConfigError(where, f"sample {number}: seconds: must be a number above 0, is {seconds!r}")
    step = Step(**counts)
    if (step.prompt_tokens > 0) != (step.prefills > 0) or (step.context_tokens and not step.decodes):
        raise ConfigError(where, f"sample {number}: prompt_tokens go with prefills, context_tokens with decodes")
    return Sample(step, float(seconds))


def _text(where: str, document: Mapping[str, Any], name: str) -> str:
    value = document.get(name)
    if not isinstance(value, str) or not value:
        raise ConfigError(where, f"{name}: missing; must be a text")
    return value


def _count(where: str, name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(where, f"{name}: must be a whole number of at least {least}, is {value!r}")
    return value
