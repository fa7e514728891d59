"""Runs in files, whole: what was sent when, and when each token came back, so that any SLO can judge them later.

| | `.jsonl` | `.parquet` |
|---|---|---|
| facts, format, what is not per request | the first line | the schema's metadata, key `splitserve` |
| requests, in order | a line each | a row each |
| chunks of a request | two lists, `chunk_s` and `chunk_tokens` | two list columns |

Times are seconds from the run's start, rounded to a microsecond; null where something never happened. A file appears
under its name when it is whole: a crash leaves none, or the one that was there. Which facts are kept is the caller's.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from splitserve.bench.run import Chunks, Counts, Ending, Run, Seconds
from splitserve.core.errors import ConfigError

FORMAT, VERSION = "splitserve run", 1
_DECIMALS = 6  # of seconds
_METADATA = b"splitserve"


class Head(msgspec.Struct, frozen=True):
    """What a file says of the run as a whole."""

    format: str
    version: int
    requests: int
    late_s: float
    late_share: float
    lag_p99_s: float
    cpu_s: float
    chunks_dropped: int
    facts: dict[str, Any]


class Row(msgspec.Struct, frozen=True):
    """One request."""

    scheduled_s: float | None
    sent_s: float | None
    first_token_s: float | None
    last_token_s: float | None
    ended_s: float | None
    prompt_tokens: int
    asked_tokens: int
    tokens: int
    ending: str
    error: str | None
    chunk_s: list[float]
    chunk_tokens: list[int]


def save(run: Run, facts: Mapping[str, Any], path: Path) -> None:
    """In the form that the name's ending says. Facts must be what JSON can say: tuples come back as lists, NaN and inf
    as None. Raises ConfigError for another ending, a file that can't be written and parquet without pyarrow; TypeError
    for facts of other types."""
    write = _form(path)[0]
    sender = (run.late_s, run.late_share, run.lag_p99_s, run.cpu_s)
    head = Head(FORMAT, VERSION, len(run), *sender, run.chunks.dropped, dict(facts))
    with _whole(path) as part:
        write(part, head, run)


def load(path: Path) -> tuple[Run, dict[str, Any]]:
    """The run and its facts. Chunks that came in the same microsecond are in the order of their requests, and errors in
    the order of the requests they befell. Raises ConfigError, with the line (of parquet: the row), for what `save`
    would not have written, or not wholly."""
    read = _form(path)[1]
    try:
        head, rows = read(path)
    except OSError as error:
        raise ConfigError(str(path), f"can't be read: {error.strerror or error}") from error
    return _run(path, head, rows), head.facts


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A name to write under, that becomes the real one when all is on the disk."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        with part.open("rb") as written:
            os.fsync(written.fileno())
        part.replace(path)
    except OSError as error:
        raise ConfigError(str(path), f"can't be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            part.unlink()


# JSONL ----------------------------------------------------------------------------------------------------------------
def _write_lines(path: Path, head: Head, run: Run) -> None:
    encode = msgspec.json.Encoder().encode
    with path.open("wb") as lines:
        lines.write(encode(head) + b"\n")
        for row in _rows(run):
            lines.write(encode(row) + b"\n")


def _read_lines(path: Path) -> tuple[Head, list[Row]]:
    decode = msgspec.json.Decoder(Row).decode
    with path.open("rb") as lines:
        head = _head(path, "line 1", lines.readline())
        rows = []
        for number, line in enumerate(lines, 2):
            try:
                rows.append(decode(line))
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise ConfigError(f"{path}: line {number}", f"is not a request of a run: {error}") from error
    return head, rows


# Parquet --------------------------------------------------------------------------------------------------------------
def _write_parquet(path: Path, head: Head, run: Run) -> None:
    arrow = _pyarrow(path)
    rows = [msgspec.to_builtins(row) for row in _rows(run)]
    table = arrow.Table.from_pylist(rows, _schema(arrow).with_metadata({_METADATA: msgspec.json.encode(head)}))
    arrow.parquet.write_table(table, path, compression="zstd")


def _read_parquet(path: Path) -> tuple[Head, list[Row]]:
    arrow = _pyarrow(path)
    try:
        # As one file that is open: given a name, pyarrow would look for a data set, and its partitions in the name.
        with path.open("rb") as file:
            table = arrow.parquet.read_table(file)
    except arrow.ArrowInvalid as error:
        raise ConfigError(str(path), f"is not parquet, or not all of it: {error}") from error
    head = _head(path, "metadata", (table.schema.metadata or {}).get(_METADATA, b""))
    rows = []
    for number, said in enumerate(table.to_pylist(), 1):
        try:
            rows.append(msgspec.convert(said, Row))
        except msgspec.ValidationError as error:
            raise ConfigError(f"{path}: row {number}", f"is not a request of a run: {error}") from error
    return head, rows


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            str(path), "parquet needs pyarrow: pip install 'splitserve[parquet]', or name the file .jsonl"
        ) from error
    return pyarrow


def _schema(arrow: Any) -> Any:
    time, count, text = arrow.float64(), arrow.int64(), arrow.string()
    return arrow.schema(
        [
            *((name, time) for name in _TIMES),
            *((name, count) for name in _COUNTS),
            ("ending", text),
            ("error", text),
            ("chunk_s", arrow.list_(time)),
            ("chunk_tokens", arrow.list_(count)),
        ]
    )


# Both -----------------------------------------------------------------------------------------------------------------
_Write = Callable[[Path, Head, Run], None]
_Read = Callable[[Path], tuple[Head, list[Row]]]

_FORMS: dict[str, tuple[_Write, _Read]] = {
    ".jsonl": (_write_lines, _read_lines),
    ".parquet": (_write_parquet, _read_parquet),
}

# A time that is null was never: NaN for what was not done, inf for what was waited for.
_TIMES = {
    "scheduled_s": math.nan,
    "sent_s": math.nan,
    "first_token_s": math.inf,
    "last_token_s": math.inf,
    "ended_s": math.nan,
}
_COUNTS = ("prompt_tokens", "asked_tokens", "tokens")


def _form(path: Path) -> tuple[_Write, _Read]:
    form = _FORMS.get(path.suffix.lower())
    if form is None:
        raise ConfigError(str(path), f"runs are kept in {' and '.join(_FORMS)} files")
    return form


def _head(path: Path, where: str, said: bytes) -> Head:
    try:
        about = msgspec.json.decode(said)
    except (msgspec.DecodeError, UnicodeDecodeError):
        about = None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise ConfigError(f"{path}: {where}", f'does not say "format": "{FORMAT}", so this is no saved run')
    if about.get("version") != VERSION:
        raise ConfigError(
            f"{path}: {where}",
            f"is of version {about.get('version')} of the format, and this splitserve reads version {VERSION}",
        )
    try:
        return msgspec.convert(about, Head)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {where}", f"is not what a saved run begins with: {error}") from error


def _rows(run: Run) -> Iterator[Row]:
    times = {name: np.round(getattr(run, name), _DECIMALS) for name in _TIMES}
    order = np.argsort(run.chunks.request, kind="stable")
    chunk_s, chunk_tokens = np.round(run.chunks.time_s[order], _DECIMALS), run.chunks.tokens[order]
    bounds = np.searchsorted(run.chunks.request[order], np.arange(len(run) + 1))
    for index in range(len(run)):
        chunks = slice(bounds[index], bounds[index + 1])
        error = int(run.error[index])
        columns: dict[str, Any] = {name: _finite(column[index]) for name, column in times.items()}
        columns |= {name: int(getattr(run, name)[index]) for name in _COUNTS}
        yield Row(
            **columns,
            ending=Ending(int(run.ending[index])).name.lower(),
            error=run.errors[error] if error >= 0 else None,
            chunk_s=chunk_s[chunks].tolist(),
            chunk_tokens=chunk_tokens[chunks].tolist(),
        )


def _finite(time_s: np.float64) -> float | None:
    return float(time_s) if np.isfinite(time_s) else None


def _run(path: Path, head: Head, rows: Sequence[Row]) -> Run:
    if len(rows) != head.requests:
        raise ConfigError(
            str(path), f"says that it has {head.requests} requests, and has {len(rows)}: it was cut off or edited"
        )
    errors: dict[str, int] = {}
    columns: dict[str, Any] = {name: _times([getattr(row, name) for row in rows], _TIMES[name]) for name in _TIMES}
    columns |= {name: _counts([getattr(row, name) for row in rows]) for name in _COUNTS}
    return Run(
        **columns,
        ending=np.array([_ending(path, number, row) for number, row in enumerate(rows, 1)], dtype=np.int8),
        error=np.array([_error(row, errors) for row in rows], dtype=np.int32),
        errors=tuple(errors),
        chunks=_chunks(path, head, rows),
        late_s=head.late_s,
        late_share=head.late_share,
        lag_p99_s=head.lag_p99_s,
        cpu_s=head.cpu_s,
    )


def _times(values: Sequence[float | None], never: float) -> Seconds:
    return np.array([never if value is None else value for value in values], dtype=np.float64)


def _counts(values: Sequence[int]) -> Counts:
    return np.array(values, dtype=np.int64)


def _ending(path: Path, number: int, row: Row) -> Ending:
    try:
        return Ending[row.ending.upper()]
    except KeyError:
        known = ", ".join(ending.name.lower() for ending in Ending)
        raise ConfigError(_where(path, number), f"ending: {row.ending!r} is none of {known}") from None


def _error(row: Row, errors: dict[str, int]) -> int:
    return -1 if row.error is None else errors.setdefault(row.error, len(errors))


def _chunks(path: Path, head: Head, rows: Sequence[Row]) -> Chunks:
    for number, row in enumerate(rows, 1):
        if len(row.chunk_s) != len(row.chunk_tokens):
            counts = f"{len(row.chunk_s)} and {len(row.chunk_tokens)}"
            raise ConfigError(_where(path, number), f"chunk_s and chunk_tokens are not as many: {counts}")
    time_s: npt.NDArray[np.float64] = np.array([time for row in rows for time in row.chunk_s], dtype=np.float64)
    tokens = _counts([count for row in rows for count in row.chunk_tokens])
    request = np.repeat(np.arange(len(rows)), [len(row.chunk_s) for row in rows]).astype(np.int64)
    order = np.argsort(time_s, kind="stable")
    return Chunks(time_s[order], request[order], tokens[order], head.chunks_dropped)


def _where(path: Path, number: int) -> str:
    """Of the so-many-th request."""
    return f"{path}: line {number + 1}" if path.suffix.lower() == ".jsonl" else f"{path}: row {number}"
