"""Reads recorded requests: JSONL, CSV and parquet files, row by row, in one of three sets of columns.

| format | arrival | prompt | output | |
|---|---|---|---|---|
| plain | `arrival_s` | `prompt_tokens` | `output_tokens` | |
| Azure LLM inference trace | `TIMESTAMP` (date and time) | `ContextTokens` | `GeneratedTokens` | |
| Mooncake | `timestamp` (ms) | `input_length` | `output_length` | `hash_ids`, optional: of blocks of 512 tokens |
"""

import csv
import math
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from splitserve.core.errors import ConfigError
from splitserve.workload.lengths import LONGEST_TOKENS
from splitserve.workload.prefixes import chosen, offsets_of
from splitserve.workload.requests import Prefixes, Requests

Row = Mapping[str, Any]

BLOCK_TOKENS = 512  # of Mooncake's hash_ids


@dataclass(frozen=True, slots=True)
class Trace:
    """`notes` say what was left out."""

    requests: Requests
    notes: tuple[str, ...] = ()


def read_trace(path: Path, most: int | None = None) -> Trace:
    """The file's requests, at most the first `most`, from 0 s on. Memory: 24 bytes a request, and 8 a block hash.

    Raises ConfigError, with the line (of parquet: the row), for a field that is missing, negative or not a number and
    for time that goes backwards; and for a file that is empty, can't be read or has columns of no format."""
    columns = _Columns(path)
    for line, row in _rows(path):
        columns.add(line, row)
        if most is not None and len(columns.arrival_s) >= most:
            break
    return columns.trace()


def within(trace: Trace, limit_tokens: int, name: str) -> Trace:
    """Without the requests whose prompt and output are longer than that together. Raises ConfigError if none is
    left."""
    held = trace.requests
    kept = np.flatnonzero(held.prompt_tokens + held.output_tokens <= limit_tokens)
    if len(kept) == len(held):
        return trace
    if not len(kept):
        raise ConfigError(name, f"every request is longer than {limit_tokens} tokens: raise the limit")
    prefixes = chosen(held.prefixes, kept) if held.prefixes is not None else None
    requests = Requests(held.arrival_s[kept], held.prompt_tokens[kept], held.output_tokens[kept], prefixes)
    left_out = len(held) - len(kept)
    note = f"{left_out} of {len(held)} requests are longer than {limit_tokens} tokens and left out"
    return replace(trace, requests=requests, notes=(*trace.notes, note))


@dataclass(frozen=True, slots=True)
class _Format:
    name: str
    arrival: str
    prompt: str
    output: str
    seconds: Callable[[Any], float]  # raises ValueError or TypeError
    hashes: str = ""

    @property
    def needed(self) -> tuple[str, str, str]:
        return self.arrival, self.prompt, self.output


def _moment(value: Any) -> float:
    moment = value if isinstance(value, datetime) else datetime.fromisoformat(value)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _seconds(value: Any) -> float:
    if isinstance(value, bool):
        raise ValueError("a truth value")
    return float(value)


_FORMATS = (
    _Format("plain", "arrival_s", "prompt_tokens", "output_tokens", _seconds),
    _Format("Azure", "TIMESTAMP", "ContextTokens", "GeneratedTokens", _moment),
    _Format("Mooncake", "timestamp", "input_length", "output_length", lambda ms: _seconds(ms) / 1e3, "hash_ids"),
)


class _Columns:
    """Grows row by row."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._format: _Format | None = None
        self._last_s = -math.inf
        self._without_tokens = 0
        self.arrival_s = array("d")
        self._prompt_tokens, self._output_tokens = array("q"), array("q")
        self._hashes, self._blocks = array("q"), array("q")

    def add(self, line: str, row: Row) -> None:
        where = f"{self._path}: {line}"
        self._format = form = self._format or _format_of(where, row)
        arrival_s = _arrival(where, form, row)
        prompt, output = _tokens(where, form.prompt, row), _tokens(where, form.output, row)
        if arrival_s < self._last_s:
            late_s = self._last_s - arrival_s
            raise ConfigError(
                where, f"arrives {late_s:g} s before the request above it: sort the file by {form.arrival}"
            )
        self._last_s = arrival_s
        if not prompt or not output:
            self._without_tokens += 1
            return
        self.arrival_s.append(arrival_s)
        self._prompt_tokens.append(prompt)
        self._output_tokens.append(output)
        self._add_hashes(where, row.get(form.hashes) if form.hashes else None, prompt)

    def trace(self) -> Trace:
        if not self.arrival_s:
            raise ConfigError(str(self._path), "has no requests")
        arrival_s = np.array(self.arrival_s)
        requests = Requests(
            arrival_s=arrival_s - arrival_s[0],
            prompt_tokens=np.array(self._prompt_tokens),
            output_tokens=np.array(self._output_tokens),
            prefixes=self._prefixes(),
        )
        dropped = self._without_tokens
        note = f"{dropped} of {dropped + len(requests)} requests have no prompt or no output tokens and are left out"
        return Trace(requests, (note,) if dropped else ())

    def _add_hashes(self, where: str, hashes: Any, prompt_tokens: int) -> None:
        """Without the last block's if the prompt does not fill it."""
        if isinstance(hashes, str):
            hashes = _listed(where, hashes)
        whole = list(hashes or ())[: prompt_tokens // BLOCK_TOKENS]
        try:
            self._hashes.extend(whole)
        except (TypeError, OverflowError):
            raise ConfigError(where, "hash_ids is not a list of whole numbers of 64 bits") from None
        self._blocks.append(len(whole))

    def _prefixes(self) -> Prefixes | None:
        if not self._hashes:
            return None
        _, ids = np.unique(np.array(self._hashes), return_inverse=True)  # small numbers, for hashes may be large
        return Prefixes(ids.astype(np.int64), offsets_of(np.array(self._blocks)), BLOCK_TOKENS)


def _format_of(where: str, row: Row) -> _Format:
    for form in _FORMATS:
        if all(column in row for column in form.needed):
            return form
    looked_for = "; ".join(f"{', '.join(form.needed)} ({form.name})" for form in _FORMATS)
    near = next((form for form in _FORMATS if any(column in row for column in form.needed)), None)
    if near is not None:
        missing = next(column for column in near.needed if column not in row)
        raise ConfigError(where, f"{missing} is missing; looked for {looked_for}")
    raise ConfigError(where, f"columns {', '.join(map(str, row)) or 'none'} are of no known format: {looked_for}")


def _arrival(where: str, form: _Format, row: Row) -> float:
    value = _present(where, form.arrival, row)
    try:
        arrival_s = form.seconds(value)
    except (ValueError, TypeError):
        wanted = "a date and time" if form.seconds is _moment else "a number"
        raise ConfigError(where, f"{form.arrival} is {value!r}, not {wanted}") from None
    if not math.isfinite(arrival_s) or arrival_s < 0.0:
        raise ConfigError(where, f"{form.arrival} is {value!r}: give a number of 0 or more")
    return arrival_s


def _tokens(where: str, column: str, row: Row) -> int:
    value = _present(where, column, row)
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (ValueError, TypeError):
        number = math.nan
    if not number.is_integer():
        raise ConfigError(where, f"{column} is {value!r}, not a whole number")
    if not 0 <= number <= LONGEST_TOKENS:
        raise ConfigError(where, f"{column} is {value}: give 0 to {LONGEST_TOKENS} tokens")
    return int(number)


def _present(where: str, column: str, row: Row) -> Any:
    value = row.get(column)
    if value is None or value == "":
        raise ConfigError(where, f"{column} is missing")
    return value


def _listed(where: str, text: str) -> Any:
    """A CSV file's list is JSON in a field."""
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        raise ConfigError(where, "hash_ids is not a list of whole numbers, such as [1, 2]") from None


def _rows(path: Path) -> Iterator[tuple[str, Row]]:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ConfigError(str(path), f"is none of the files that are read: {', '.join(_READERS)}")
    try:
        yield from reader(path)
    except OSError as error:
        raise ConfigError(str(path), f"can't be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), "is not text in UTF-8") from error


def _json_lines(path: Path) -> Iterator[tuple[str, Row]]:
    decode = msgspec.json.Decoder(dict[str, Any]).decode
    with path.open("rb") as lines:
        for number, text in enumerate(lines, 1):
            if text.isspace():
                continue
            try:
                yield f"line {number}", decode(text)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise ConfigError(f"{path}: line {number}", f"is not a JSON object: {error}") from None


def _csv(path: Path) -> Iterator[tuple[str, Row]]:
    with path.open(newline="", encoding="utf-8-sig") as text:
        reader = csv.DictReader(text)
        try:
            for row in reader:
                yield f"line {reader.line_num}", row
        except csv.Error as error:
            raise ConfigError(f"{path}: line {reader.line_num}", f"is not CSV: {error}") from error


def _parquet(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(str(path), "parquet needs pyarrow: pip install 'splitserve[parquet]'") from error
    known = {column for form in _FORMATS for column in (*form.needed, form.hashes)}
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            columns = [name for name in names if name in known] or names
            number = 0
            for batch in file.iter_batches(batch_size=8192, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except pyarrow.ArrowInvalid as error:
        raise ConfigError(str(path), f"is not parquet: {error}") from error


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, Row]]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_lines,
    ".csv": _csv,
    ".parquet": _parquet,
}
