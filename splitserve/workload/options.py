"""A workload's text on the command line, taken apart: `name:key=value,key=value`. Colons and commas both separate, so
`sharegpt:spread=1,arrivals=gamma:cv=2` reads as it looks. A bare `prompt` or `output` says whose the quantiles are
that follow: `prompt:p50=200,p90=900,output:p50=100,p90=300`.
"""

import math
import re
from pathlib import Path

from splitserve.core.errors import ConfigError
from splitserve.workload.arrivals import Arrivals, Constant, Diurnal, Gamma, Poisson
from splitserve.workload.prefixes import Sharing
from splitserve.workload.sessions import Dialogue

SIDES = ("prompt", "output")
ARRIVALS = ("poisson", "gamma", "constant", "diurnal", "replay")
_OF_ARRIVALS = {"gamma": ("cv",), "diurnal": ("peak", "period")}


class Options:
    """Each is taken once; what is left over in the end was not known."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.replayed = False  # arrivals=replay
        self.name, items = _named(text)
        self.sides: dict[str, dict[str, str]] = {}
        self._values: dict[str, str] = {}
        self._known: list[str] = []
        held = self._values
        for item in items:
            key, equals, value = (part.strip() for part in item.partition("="))
            if key in SIDES and not equals:
                held = self.sides.setdefault(key, {})
                continue
            self._put(held if _is_of_a_side(key) else self._values, key, value)

    def fail(self, sentence: str) -> ConfigError:
        """To be raised: it names the whole text."""
        return ConfigError(f"workload {self.text!r}", sentence)

    def about(self, error: ConfigError) -> ConfigError:
        """The same error, naming the whole text."""
        return error if error.path.startswith("workload ") else self.fail(str(error))

    def take(self, key: str) -> str | None:
        self._known.append(key)
        return self._values.pop(key, None)

    def number(self, key: str, default: float) -> float:
        value = self.take(key)
        return default if value is None else self.finite(key, value)

    def whole(self, key: str, default: int) -> int:
        value = float(self.number(key, default))
        if not value.is_integer():
            raise self.fail(f"{key}={value:g} is not a whole number")
        return int(value)

    def finite(self, key: str, value: str) -> float:
        """As a float; raises ConfigError for what is not a number."""
        try:
            number = float(value)
        except ValueError:
            raise self.fail(f"{key}={value} is not a number") from None
        if not math.isfinite(number):
            raise self.fail(f"{key}={value} is not a finite number")
        return number

    def has(self, key: str) -> bool:
        return key in self._values

    def done(self) -> None:
        """Raises ConfigError if something is left, listing what could be."""
        left = [*self._values, *self.sides]
        if left:
            raise self.fail(f"option {left[0]!r} is not known here; known are {', '.join(sorted(set(self._known)))}")

    def _put(self, held: dict[str, str], key: str, value: str) -> None:
        if not key or not value:
            raise self.fail(f"{key or value or 'an empty item'!r} is not of the form key=value")
        if key in held:
            raise self.fail(f"{key} is given twice")
        held[key] = value


def arrivals(options: Options) -> Arrivals | None:
    """As `arrivals=` says; None for a trace's own. Raises ConfigError for one that is not known."""
    kind = options.take("arrivals")
    options.replayed = kind == "replay"
    if kind is not None and kind not in ARRIVALS:
        raise options.fail(f"arrivals={kind} is not known; known are {', '.join(ARRIVALS)}")
    for owner, keys in _OF_ARRIVALS.items():
        for key in keys:
            if options.has(key) and kind != owner:
                raise options.fail(f"{key} goes with arrivals={owner}")
    if kind == "gamma":
        return Gamma(options.number("cv", 2.0))
    if kind == "diurnal":
        usual = Diurnal()
        return Diurnal(options.number("peak", usual.peak), options.number("period", usual.period_s))
    if kind == "constant":
        return Constant()
    return Poisson() if kind == "poisson" else None


def sharing(options: Options) -> Sharing | None:
    """As `shared=` says; None where nothing is, or a trace has its own."""
    share = options.number("shared", 0.0)
    if share == 0.0:
        for key in ("groups", "turns", "block"):
            if options.has(key):
                raise options.fail(f"{key} goes with shared=, the share of a prompt that others have too")
        return None
    usual = Sharing(share)
    turns = options.whole("turns", 0) if options.has("turns") else None
    return Sharing(share, options.whole("groups", usual.groups), turns, options.whole("block", usual.block_tokens))


def dialogue(options: Options) -> Dialogue | None:
    """As `sessions=` and `pause=` say; None for single requests."""
    if not options.has("sessions"):
        if options.has("pause"):
            raise options.fail("pause goes with sessions=, a session's turns in the mean")
        options.take("sessions")
        return None
    if options.has("turns"):
        raise options.fail("turns goes with single requests; how many turns a session has, sessions= says")
    turns = options.number("sessions", 1.0)
    return Dialogue(turns, options.number("pause", Dialogue(turns).pause_s))


def is_file(name: str) -> bool:
    """By its looks: a separator or an ending."""
    return "/" in name or bool(Path(name).suffix) or Path(name).is_file()


def _named(text: str) -> tuple[str, list[str]]:
    """The name (empty without one) and the rest. A file's name may have colons and commas if the file is there."""
    if Path(text).is_file():
        return text, []
    first, *rest = re.split("[:,]", text)
    head = first.strip()
    return ("", [first, *rest]) if "=" in head or head in SIDES else (head, rest)


def _is_of_a_side(key: str) -> bool:
    return key in ("mean", "sigma", "low", "high") or bool(re.fullmatch(r"p\d+(\.\d+)?", key))
