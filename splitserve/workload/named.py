"""Workloads by name, as the command line and plan files write them.

    sharegpt                       ShareGPT's published means, lengths made up; spread=0.8 to 1.4
    azure-code, azure-conv         the Azure traces' published means, deviations and limits, lengths made up
    prompt=512,output=128          always the same
    lognormal:prompt=700,output=200,sigma=1
    prompt:p50=200,p90=900,p99=2000,output:p50=100,p90=300      through quantiles; also mean=,sigma= or low=,high=
    trace.jsonl                    a file: JSONL, CSV or parquet (see `trace`); first=100000 reads no more than that

Each takes `arrivals=` (poisson, gamma:cv=2, constant, diurnal:peak=1.5,period=86400; replay, a file's own),
`shared=0.4` (groups=16, turns=, block=16) and `limit=` (tokens of prompt and output together). Each but a file also
takes `sessions=4` (turns of a session in the mean) and `pause=5` (seconds in the mean between an answer and the next
turn): lengths are then of what a turn adds, and a session ends at the limit.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from splitserve.core.errors import ConfigError
from splitserve.workload.arrivals import Poisson
from splitserve.workload.lengths import Lengths, fixed, from_quantiles, lognormal, spread_lognormal, uniform
from splitserve.workload.options import SIDES, Options, arrivals, dialogue, is_file, sharing
from splitserve.workload.pairs import Pair, lognormal_pair
from splitserve.workload.replay import Replay
from splitserve.workload.sessions import Sessions
from splitserve.workload.synthetic import Synthetic
from splitserve.workload.trace import read_trace, within
from splitserve.workload.workload import Workload

_ONLY_AS_FILES = ("mooncake", "mooncake-conversation", "mooncake-toolagent")

SPREADS = (0.8, 1.0, 1.2, 1.4)  # of sharegpt's range: what results are shown over

# DistServe, OSDI'24 (arXiv:2401.09670), Fig. 7.
_SHAREGPT_PROMPT, _SHAREGPT_OUTPUT, _OPT_TOKENS = 755.5, 200.3, 2048

# Mean, deviation, least and most tokens of the traces of Splitwise, ISCA'24 (arXiv:2311.18677), as the docstrings of
# Mutinifni/splitwise-sim generate_trace.py state them.
_AZURE = {
    "azure-code": ((2048, 1973, 3, 7437), (28, 60, 6, 1899)),
    "azure-conv": ((1155, 1109, 2, 14050), (211, 163, 7, 1000)),
}


def workload(spec: str, limit_tokens: int | None = None) -> Workload:
    """What `spec` names. `limit_tokens`: requests longer than that, prompt and output together, are left out, as the
    model's length says; the notes say how many. Raises ConfigError for what is not known, wrong or can't be read."""
    found = workloads(spec, limit_tokens)
    if len(found) > 1:
        raise Options(spec).fail(
            f"it is {len(found)} workloads, where one is wanted: give one spread, such as spread=1"
        )
    return found[0]


def workloads(spec: str, limit_tokens: int | None = None) -> tuple[Workload, ...]:
    """Like `workload`, but a range of spreads (`sharegpt:spread=0.8..1.4`) is one workload for each of `SPREADS` within
    it."""
    head, found, spreads = spec.partition("spread=")
    low, dots, rest = spreads.partition("..")
    if not (found and dots):
        return (_one(spec, limit_tokens),)
    high = rest.split(",")[0].split(":")[0]
    options = Options(spec)
    lowest, highest = options.finite("spread", low), options.finite("spread", high)
    chosen = [spread for spread in SPREADS if lowest <= spread <= highest]
    if not chosen:
        known = ", ".join(f"{spread:g}" for spread in SPREADS)
        raise options.fail(f"none of the spreads {known} is within {low}..{high}")
    return tuple(_one(f"{head}spread={spread:g}{rest[len(high) :]}", limit_tokens) for spread in chosen)


def _one(spec: str, limit_tokens: int | None) -> Workload:
    options = Options(spec)
    if is_file(options.name):
        return _file(options, limit_tokens)
    try:
        return _synthetic(options, limit_tokens)
    except ConfigError as error:
        raise options.about(error) from None


def _synthetic(options: Options, limit_tokens: int | None) -> Workload:
    made_by = _MADE_BY.get(options.name)
    if options.name in _ONLY_AS_FILES:
        raise options.fail(f"no lengths of {options.name} are known: give its trace file, which is read as it is")
    if made_by is None:
        known = ", ".join(name for name in _MADE_BY if name)
        raise options.fail(f"{options.name!r} is not known; known are {known}, prompt=..,output=.. and trace files")
    lengths, notes = made_by(options)
    when, talk, shared = arrivals(options) or Poisson(), dialogue(options), sharing(options)
    if options.replayed:
        raise options.fail("arrivals=replay goes with a trace file")
    options.done()
    lengths, cut = _limited(lengths, limit_tokens)
    lengths.outputs()  # raises if nothing fits
    if talk is not None:
        return Sessions(options.text, lengths, when, talk, shared, (*notes, *cut, talk.note))
    return Synthetic(options.text, lengths, when, shared, notes + cut)


def _file(options: Options, limit_tokens: int | None) -> Replay:
    when, shared = arrivals(options), sharing(options)
    most, limit = options.whole("first", 0), options.whole("limit", 0)
    options.done()
    if most < 0 or limit < 0:
        raise options.fail("first= and limit= are numbers of 1 or more")
    trace = read_trace(Path(options.name), most or None)
    limits = [tokens for tokens in (limit, limit_tokens) if tokens]
    if limits:
        trace = within(trace, min(limits), options.name)
    if when is None and len(trace.requests) > 1 and not trace.requests.arrival_s.any():
        raise options.fail("its requests all arrive at one time: choose arrivals, such as arrivals=poisson")
    return Replay(options.text, trace.requests, when, shared, trace.notes)


def _sharegpt(options: Options) -> tuple[Pair, tuple[str, ...]]:
    spread, limit = options.number("spread", 1.0), options.whole("limit", _OPT_TOKENS)
    if not 0.1 <= spread <= 3.0:
        raise options.fail(f"spread={spread:g} is not between 0.1 and 3 (deviation of the lengths' logarithm)")
    note = (
        f"synthetic: ShareGPT's published means, {_SHAREGPT_PROMPT} prompt and {_SHAREGPT_OUTPUT} output tokens, with "
        f"lognormal lengths of spread {spread:g} (say how results change from {SPREADS[0]:g} to {SPREADS[-1]:g}), "
        f"independent of each other and cut at {limit} tokens in total; ShareGPT's own quantiles differ"
    )
    return lognormal_pair(_SHAREGPT_PROMPT, _SHAREGPT_OUTPUT, spread, limit), (note,)


def _azure(options: Options) -> tuple[Pair, tuple[str, ...]]:
    prompt, output = (spread_lognormal(*published) for published in _AZURE[options.name])
    published = _AZURE[options.name]
    note = (
        f"synthetic: the Azure trace's published means ({published[0][0]} prompt, {published[1][0]} output tokens), "
        f"limits and deviations ({published[0][1]}, {published[1][1]}; here {prompt.deviation:.0f}, "
        f"{output.deviation:.0f}) with lognormal lengths, independent of each other; give the trace's file for its own"
    )
    return Pair(prompt, output, options.whole("limit", 0) or None), (note,)


def _lognormal(options: Options) -> tuple[Pair, tuple[str, ...]]:
    prompt, output = _needed(options, "prompt"), _needed(options, "output")
    sigma, limit = options.number("sigma", 1.0), options.whole("limit", 0)
    pair = (
        lognormal_pair(prompt, output, sigma, limit)
        if limit
        else Pair(lognormal(prompt, sigma), lognormal(output, sigma))
    )
    return pair, (f"synthetic: lognormal lengths of spread {sigma:g}, prompt and output independent of each other",)


def _by_side(options: Options) -> tuple[Pair, tuple[str, ...]]:
    prompt, output = (_side(options, side) for side in SIDES)
    note = "synthetic: prompt and output lengths are independent of each other"
    notes = () if options.text.startswith("prompt=") else (note,)
    return Pair(prompt, output, options.whole("limit", 0) or None), notes


def _side(options: Options, side: str) -> Lengths:
    """One number, quantiles, mean and sigma, or low and high."""
    given = {key: options.finite(key, value) for key, value in options.sides.pop(side, {}).items()}
    if not given:
        return fixed(_whole(options, side, _needed(options, side)))
    if given.keys() <= {"mean", "sigma"} and "mean" in given:
        return lognormal(given["mean"], given.get("sigma", 1.0))
    if given.keys() == {"low", "high"}:
        return uniform(_whole(options, "low", given["low"]), _whole(options, "high", given["high"]))
    if any(not key.startswith("p") for key in given):
        raise options.fail(f"{side}: give quantiles (p50=200,p90=900), mean= and sigma=, or low= and high=")
    return from_quantiles({float(key[1:]) / 100.0: tokens for key, tokens in given.items()})


def _needed(options: Options, side: str) -> float:
    if not options.has(side):
        raise options.fail(f"{side} is missing: give {side}=, in tokens")
    return options.number(side, 0.0)


def _whole(options: Options, key: str, value: float) -> int:
    if not value.is_integer():
        raise options.fail(f"{key}={value:g} is not a whole number of tokens")
    return int(value)


def _limited(lengths: Pair, limit_tokens: int | None) -> tuple[Pair, tuple[str, ...]]:
    """Cut, not calibrated anew: these are the same requests without the longest."""
    if limit_tokens is None or (lengths.limit_tokens is not None and lengths.limit_tokens <= limit_tokens):
        return lengths, ()
    cut = replace(lengths, limit_tokens=limit_tokens)
    left_out = 1.0 - cut.kept() / max(lengths.kept(), 1e-300)
    if left_out <= 0.0:
        return cut, ()
    return cut, (f"{left_out:.2%} of the requests are longer than {limit_tokens} tokens and left out",)


_MADE_BY: dict[str, Callable[[Options], tuple[Pair, tuple[str, ...]]]] = {
    "sharegpt": _sharegpt,
    "azure-code": _azure,
    "azure-conv": _azure,
    "lognormal": _lognormal,
    "": _by_side,
}
