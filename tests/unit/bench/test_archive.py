"""What is saved comes back; what can't have been saved is refused, with the line."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from splitserve.bench import archive
from splitserve.bench.run import Chunks, Ending, Run
from splitserve.core.errors import ConfigError
from splitserve.core.slo import Slo

FORMS = ("run.jsonl", "run.parquet")
TIMES = st.integers(0, 10**10).map(lambda microseconds: round(microseconds / 1e6, 6))
ERRORS = ("Unavailable: no worker\nis left", 'Overloaded: "full"', "ünïcode \u2028")


@st.composite
def runs(draw: st.DrawFn) -> Run:
    """As the generator leaves them, times being whole microseconds."""
    count = draw(st.integers(0, 6))
    chunks = (
        draw(st.lists(st.tuples(TIMES, st.integers(0, count - 1), st.integers(1, 9)), max_size=20)) if count else []
    )
    chunks.sort(key=lambda chunk: chunk[:2])
    times, owners, tokens = (list(column) for column in zip(*chunks, strict=True)) if chunks else ([], [], [])

    def column(values: st.SearchStrategy[Any], dtype: type) -> Any:
        return np.array(draw(st.lists(values, min_size=count, max_size=count)), dtype=dtype)

    errors = [draw(st.sampled_from((None, *ERRORS))) for _ in range(count)]
    known = list(dict.fromkeys(error for error in errors if error is not None))
    return Run(
        scheduled_s=column(TIMES, float),
        sent_s=column(TIMES | st.just(np.nan), float),
        first_token_s=column(TIMES | st.just(np.inf), float),
        last_token_s=column(TIMES | st.just(np.inf), float),
        ended_s=column(TIMES | st.just(np.nan), float),
        prompt_tokens=column(st.integers(0, 2**40), int),
        tokens=column(st.integers(0, 2**40), int),
        asked_tokens=column(st.integers(1, 2**40), int),
        ending=column(st.sampled_from(list(Ending)), np.int8),
        error=np.array([-1 if error is None else known.index(error) for error in errors], dtype=np.int32),
        errors=tuple(known),
        chunks=Chunks(np.array(times, float), np.array(owners, int), np.array(tokens, int), draw(st.integers(0, 5))),
        late_s=draw(TIMES),
        late_share=0.02,
        lag_p99_s=draw(TIMES),
        cpu_s=draw(TIMES),
    )


FACTS = st.dictionaries(
    st.text(max_size=8),
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
        max_leaves=6,
    ),
    max_size=4,
)


def assert_same(found: Run, wanted: Run) -> None:
    for name in Run.__slots__:
        one, other = getattr(found, name), getattr(wanted, name)
        if name == "chunks":
            for part in ("time_s", "request", "tokens"):
                np.testing.assert_array_equal(getattr(one, part), getattr(other, part))
                assert getattr(one, part).dtype == getattr(other, part).dtype
            assert one.dropped == other.dropped
        elif isinstance(other, np.ndarray):
            np.testing.assert_array_equal(one, other)
            assert one.dtype == other.dtype
        else:
            assert one == other


def some_run() -> Run:
    """Two requests: one whole, one that failed."""
    return Run(
        scheduled_s=np.array([0.0, 0.25]),
        sent_s=np.array([0.0001, np.nan]),
        first_token_s=np.array([0.1234567, np.inf]),
        last_token_s=np.array([0.5, np.inf]),
        ended_s=np.array([0.6, np.nan]),
        prompt_tokens=np.array([10, 20]),
        tokens=np.array([3, 0]),
        asked_tokens=np.array([3, 5]),
        ending=np.array([Ending.DONE, Ending.NOT_SENT], dtype=np.int8),
        error=np.array([-1, 0], dtype=np.int32),
        errors=("not sent: 5 requests were in flight",),
        chunks=Chunks(np.array([0.1234567, 0.5]), np.array([0, 0]), np.array([1, 2])),
    )


@pytest.mark.parametrize("name", FORMS)
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(run=runs(), facts=FACTS)
def test_a_saved_run_comes_back_as_it_was(name: str, run: Run, facts: dict[str, Any], tmp_path: Path) -> None:
    archive.save(run, facts, tmp_path / name)
    found, said = archive.load(tmp_path / name)
    assert_same(found, run)
    assert said == facts


@pytest.mark.parametrize("name", FORMS)
def test_times_are_kept_to_a_microsecond_and_judged_alike(name: str, tmp_path: Path) -> None:
    archive.save(some_run(), {}, tmp_path / name)
    found, _ = archive.load(tmp_path / name)
    assert found.first_token_s.tolist() == [0.123457, np.inf]
    assert found.chunks.time_s.tolist() == [0.123457, 0.5]
    assert found.record(1).error == "not sent: 5 requests were in flight"
    slo = Slo(0.2, 0.2, itl_p99_s=0.4)
    assert found.timelines.met(slo).tolist() == some_run().timelines.met(slo).tolist() == [True, False]


def test_lines_say_what_they_mean(tmp_path: Path) -> None:
    archive.save(some_run(), {"rate_rps": 2.5}, tmp_path / "run.jsonl")
    head, *rows = (json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines())
    assert (head["format"], head["requests"], head["facts"]) == ("splitserve run", 2, {"rate_rps": 2.5})
    assert rows[0]["chunk_s"] == [0.123457, 0.5]
    assert rows[0]["chunk_tokens"] == [1, 2]
    assert (rows[0]["ending"], rows[0]["error"]) == ("done", None)
    assert (rows[1]["ending"], rows[1]["sent_s"], rows[1]["first_token_s"]) == ("not_sent", None, None)


def test_parquet_is_read_by_other_programs_as_columns(tmp_path: Path) -> None:
    archive.save(some_run(), {}, tmp_path / "run.parquet")
    table = pyarrow.parquet.read_table(tmp_path / "run.parquet")
    assert table["scheduled_s"].to_pylist() == [0.0, 0.25]
    assert table["chunk_tokens"].to_pylist() == [[1, 2], []]


def test_what_fails_half_way_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    archive.save(some_run(), {"first": True}, path)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        archive.save(some_run(), {"not": object()}, path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.jsonl"]


def test_parquet_without_pyarrow_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"pip install 'splitserve\[parquet\]'"):
        archive.save(some_run(), {}, tmp_path / "run.parquet")
    assert not list(tmp_path.iterdir())


def test_a_place_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere/run.jsonl: can't be written: No such file"):
        archive.save(some_run(), {}, tmp_path / "nowhere" / "run.jsonl")


def lines_of(path: Path) -> list[str]:
    archive.save(some_run(), {}, path)
    return path.read_text().splitlines(keepends=True)


def edited(line: str, **values: Any) -> str:
    return json.dumps({**json.loads(line), **values}) + "\n"


BROKEN: dict[str, tuple[Callable[[list[str]], list[str]], str]] = {
    "cut off between lines": (lambda lines: lines[:-1], r"says that it has 2 requests, and has 1: it was cut off"),
    "cut off within a line": (lambda lines: [*lines[:-1], lines[-1][:20]], r"line 3: is not a request of a run"),
    "without its first line": (lambda lines: lines[1:], r'line 1: does not say "format": "splitserve run"'),
    "of another program": (lambda lines: ["hello\n"], r"line 1: does not say"),
    "empty": (lambda lines: [], r"line 1: does not say"),
    "of a later version": (
        lambda lines: [edited(lines[0], version=2), *lines[1:]],
        r"is of version 2 of the format, and this splitserve reads version 1",
    ),
    "with a first line that lacks something": (
        lambda lines: ['{"format": "splitserve run", "version": 1}\n', *lines[1:]],
        r"line 1: is not what a saved run begins with: .*requests",
    ),
    "with an unknown ending": (
        lambda lines: [*lines[:2], edited(lines[2], ending="vanished")],
        r"line 3: ending: 'vanished' is none of done, failed, cut_off, not_sent",
    ),
    "with a text for a number": (
        lambda lines: [lines[0], edited(lines[1], sent_s="soon"), lines[2]],
        r"line 2: is not a request of a run: .*sent_s",
    ),
    "with chunks that have no time": (
        lambda lines: [lines[0], edited(lines[1], chunk_s=[0.5]), lines[2]],
        r"line 2: chunk_s and chunk_tokens are not as many: 1 and 2",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_file_that_is_not_whole_is_refused_with_its_line(how: str, tmp_path: Path) -> None:
    broken, sentence = BROKEN[how]
    path = tmp_path / "run.jsonl"
    path.write_text("".join(broken(lines_of(path))))
    with pytest.raises(ConfigError, match=sentence) as refused:
        archive.load(path)
    assert str(path) in str(refused.value)


def test_parquet_that_is_not_whole_or_not_ours_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.parquet"
    archive.save(some_run(), {}, path)
    table = pyarrow.parquet.read_table(path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ConfigError, match="is not parquet, or not all of it"):
        archive.load(path)
    pyarrow.parquet.write_table(table.replace_schema_metadata({}), path)
    with pytest.raises(ConfigError, match="metadata: does not say"):
        archive.load(path)
    pyarrow.parquet.write_table(table.slice(1), path)
    with pytest.raises(ConfigError, match="says that it has 2 requests, and has 1"):
        archive.load(path)
    pyarrow.parquet.write_table(table.drop_columns(["tokens"]), path)
    with pytest.raises(ConfigError, match=r"row 1: is not a request of a run: .*tokens"):
        archive.load(path)


@pytest.mark.parametrize(("name", "sentence"), [("run.csv", "kept in .jsonl and .parquet"), ("no.jsonl", "No such")])
def test_a_file_of_another_kind_or_none_is_refused(name: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=sentence):
        archive.load(tmp_path / name)
