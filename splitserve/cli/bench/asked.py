"""What the bench commands are asked, as options say it: what is sent to whom, what judges it, where findings go.

Reads options and nothing else; an error names the option at fault.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from splitserve.bench.search import Options as Search
from splitserve.bench.targets.address import Form, Target, parse
from splitserve.bench.targets.address import Options as Access
from splitserve.cli.talk import client_tls
from splitserve.core.errors import ConfigError
from splitserve.core.slo import Slo
from splitserve.planner.inputs import seconds, share
from splitserve.workload.named import workload
from splitserve.workload.requests import Requests
from splitserve.workload.workload import Workload

ValueT = TypeVar("ValueT")
SLO = Slo(0.4, 0.1, 0.9)  # those of `splitserve plan`
RUN_ENDINGS = (".jsonl", ".parquet")
_OPTIONS = {  # of what others name otherwise
    "start_rps": "--start",
    "step": "--step",
    "seeds": "--seeds",
    "rates_rps": "--rates",
    "warm_up_s": "--warm-up",
    "vocabulary": "--vocabulary",
}


@dataclass(frozen=True, slots=True)
class Asked:
    """What is sent, and what it is judged by. `wait_s`: what has not ended that long after the last request was due is
    cut off, and counts as failed. `late_s`: what the load generator itself may be late."""

    workload: Workload
    slo: Slo
    requests: int | None
    duration_s: float | None
    warm_up_s: float
    wait_s: float
    late_s: float

    @property
    def amount(self) -> str:
        return f"{self.requests} requests" if self.requests is not None else f"{self.duration_s:g} s"

    def drawn(self, rate_rps: float, seed: int) -> Requests:
        """The warm-up's requests come on top. Raises ConfigError if they are all there is."""
        judged = self.requests if self.requests is not None else math.ceil((self.duration_s or 0.0) * rate_rps)
        drawn = self.workload.draw(max(1, judged) + math.ceil(self.warm_up_s * rate_rps), rate_rps, seed)
        if drawn.arrival_s.max() < self.warm_up_s:
            raise ConfigError(
                "--warm-up",
                f"at {rate_rps:g} requests/s all {len(drawn)} requests are due within the {self.warm_up_s:g} s of "
                "warm-up: ask for more --requests, or warm up for less",
            )
        return drawn


@dataclass(frozen=True, slots=True)
class Outputs:
    """`out` is a file for one run, a directory for several."""

    out: Path | None = None
    plot: Path | None = None
    report: Path | None = None
    as_json: bool = False


@dataclass(frozen=True, slots=True)
class Named:
    """A target with the name that its figures are shown under."""

    name: str
    target: Target


def asked_of(said: Mapping[str, Any], requests: int) -> Asked:
    """`said` as typer has it, by parameter; `requests` where neither --requests nor --duration is given."""
    if said["requests"] is not None and said["duration"] is not None:
        raise ConfigError("--duration", "says how many requests there are, as --requests does; give one of them")
    duration_s = None if said["duration"] is None else _said("--duration", said["duration"], seconds)
    return Asked(
        workload=workload(said["workload"]),
        slo=slo_of(said, SLO),
        requests=(said["requests"] or requests) if duration_s is None else None,
        duration_s=duration_s,
        warm_up_s=_from_zero("--warm-up", said["warm_up"]),
        wait_s=_said("--wait", said["wait"], seconds),
        late_s=_said("--late", said["late"], seconds),
    )


def slo_of(said: Mapping[str, Any], otherwise: Slo) -> Slo:
    """The objectives that were said over those there are otherwise."""
    named: dict[str, tuple[str, Callable[[object], float]]] = {
        "ttft_s": ("ttft", seconds),
        "tpot_s": ("tpot", seconds),
        "itl_p99_s": ("itl_p99", seconds),
        "ttft_per_token_s": ("ttft_per_token", seconds),
        "attainment": ("attainment", share),
    }
    given = {
        field: _said(f"--{option.replace('_', '-')}", said[option], read)
        for field, (option, read) in named.items()
        if said[option] is not None
    }
    return replace(otherwise, **given)


def search_of(said: Mapping[str, Any], warm_up_s: float) -> Search:
    """How a sweep looks for goodput."""
    rates = tuple(rate_of("--rates", rate) for rate in said["rates"].split(",")) if said["rates"] else ()
    start = rate_of("--start", said["start"])
    with renamed():
        return Search(
            start_rps=start,
            step=_said("--step", said["step"], share),
            seeds=tuple(range(said["seed"], said["seed"] + said["seeds"])),
            lowest_rps=min(Search().lowest_rps, start),
            highest_rps=max(Search().highest_rps, start),
            rates_rps=rates,
            warm_up_s=warm_up_s,
        )


def access_of(said: Mapping[str, Any], say: Callable[[str], None]) -> Access:
    """How targets are called."""
    try:
        form = Form(said["form"])
    except ValueError:
        raise ConfigError("--form", f"{said['form']!r} is none of {', '.join(Form)}") from None
    return Access(
        vocabulary=said["vocabulary"],
        api_key=said["api_key"] or None,
        tls=client_tls(said["ca"], said["cert"], said["key"]),
        model=said["model"],
        form=form,
        insecure=said["insecure"],
        say=say,
    )


def named_targets(texts: Sequence[str]) -> list[Named]:
    """`grpc://host:port`, or `pd=grpc://host:port` to show it as pd. Raises ConfigError for two of one name."""
    found = [_named(text) for text in texts]
    names = [each.name for each in found]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError("targets", f"two are called {name}; name them, such as a={found[0].target.name}")
    return found


def _named(text: str) -> Named:
    label = re.fullmatch(r"([A-Za-z][\w.-]*)=(.+)", text)
    target = parse(label[2] if label else text)
    return Named(label[1] if label else target.name.rpartition("://")[2], target)


def rate_of(option: str, said: object) -> float:
    """Requests per second. Raises ConfigError naming the option."""
    try:
        rate = float(str(said))
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise ConfigError(option, f"{said!r} is no rate above 0; give requests per second")
    return rate


def outputs_of(said: Mapping[str, Any], one: bool) -> Outputs:
    """`one`: there is one run, which a file holds. Raises ConfigError, before anything is measured, for what could not
    be written."""
    from splitserve.bench.plots import ENDINGS

    outputs = Outputs(said.get("out"), said["plot"], said["report_file"], said["as_json"])
    if one:
        _check("--out", outputs.out, RUN_ENDINGS)
    elif outputs.out is not None and outputs.out.exists() and not outputs.out.is_dir():
        raise ConfigError("--out", f"{outputs.out} is a file; runs are saved into a directory")
    _check("--plot", outputs.plot, ENDINGS)
    _check("--report", outputs.report, (".html", ".htm"))
    return outputs


def _check(option: str, path: Path | None, endings: Sequence[str]) -> None:
    if path is None:
        return
    if path.suffix.lower() not in endings:
        raise ConfigError(option, f"{path} must end in {' or '.join(endings)}")
    if not path.parent.is_dir():
        raise ConfigError(option, f"{path.parent} is not a directory; make it first")


def _from_zero(option: str, said: object) -> float:
    return 0.0 if str(said).strip() in ("0", "0s", "0ms") else _said(option, said, seconds)


def _said(option: str, said: object, read: Callable[[object], ValueT]) -> ValueT:
    try:
        return read(said)
    except ValueError as error:
        raise ConfigError(option, str(error)) from error


@contextmanager
def renamed() -> Iterator[None]:
    """What is wrong with an option is said under the option's name."""
    try:
        yield
    except ConfigError as error:
        if error.path not in _OPTIONS:
            raise
        raise ConfigError(_OPTIONS[error.path], error.message) from error
