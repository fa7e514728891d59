import builtins
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from splitserve.core.errors import ConfigError
from splitserve.workload.trace import read_trace, within

PLAIN = [
    {"arrival_s": 1.5, "prompt_tokens": 100, "output_tokens": 10},
    {"arrival_s": 1.5, "prompt_tokens": 200, "output_tokens": 20},
    {"arrival_s": 4.0, "prompt_tokens": 300, "output_tokens": 30},
]

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:16:46.6805900,879,55
"""

MOONCAKE = [
    {"timestamp": 27482, "input_length": 1300, "output_length": 52, "hash_ids": [46, 47, 2353]},
    {"timestamp": 27482, "input_length": 1024, "output_length": 26, "hash_ids": [46, 47]},
    {"timestamp": 30535, "input_length": 1500, "output_length": 3, "hash_ids": [46, 9, 2366]},
]


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def text(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


def test_a_plain_trace_starts_at_its_first_request(tmp_path: Path) -> None:
    requests = read_trace(lines(tmp_path / "trace.jsonl", PLAIN)).requests
    assert requests.arrival_s.tolist() == [0.0, 0.0, 2.5]
    assert requests.prompt_tokens.tolist() == [100, 200, 300]
    assert requests.output_tokens.tolist() == [10, 20, 30]
    assert requests.prefixes is None


def test_azures_trace_is_read_as_it_is(tmp_path: Path) -> None:
    requests = read_trace(text(tmp_path / "AzureLLMInferenceTrace_conv.csv", AZURE)).requests
    assert requests.arrival_s == pytest.approx([0.0, 4.314579, 60.0], abs=1e-5)
    assert requests.prompt_tokens.tolist() == [374, 396, 879]
    assert requests.output_tokens.tolist() == [44, 109, 55]


def test_azures_newer_trace_has_time_zones(tmp_path: Path) -> None:
    content = "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.009930+00:00,2162,5\n"
    content += "2024-05-10 02:00:01.009930+02:00,2399,6\n"
    assert read_trace(text(tmp_path / "trace.csv", content)).requests.arrival_s == pytest.approx([0.0, 1.0])


def test_mooncakes_trace_is_read_as_it_is(tmp_path: Path) -> None:
    requests = read_trace(lines(tmp_path / "trace.jsonl", MOONCAKE)).requests
    assert requests.arrival_s == pytest.approx([0.0, 0.0, 3.053])
    assert requests.prompt_tokens.tolist() == [1300, 1024, 1500]
    assert requests.prefixes is not None
    assert requests.prefixes.block_tokens == 512


def test_a_hash_of_a_block_that_the_prompt_does_not_fill_is_no_shared_block(tmp_path: Path) -> None:
    prefixes = read_trace(lines(tmp_path / "trace.jsonl", MOONCAKE)).requests.prefixes
    assert prefixes is not None
    runs = [prefixes.of(request).tolist() for request in range(3)]
    assert [len(run) for run in runs] == [2, 2, 2]
    assert runs[0] == runs[1]
    assert (runs[2][0], runs[2][1] in runs[0]) == (runs[0][0], False)


def test_large_hashes_become_small_ids(tmp_path: Path) -> None:
    rows = [{**MOONCAKE[0], "hash_ids": [2**63 - 1, -(2**63)]}, MOONCAKE[1]]
    prefixes = read_trace(lines(tmp_path / "trace.jsonl", rows)).requests.prefixes
    assert prefixes is not None
    assert sorted(set(prefixes.ids.tolist())) == [0, 1, 2, 3]


def test_a_csv_may_have_mooncakes_hashes_as_json(tmp_path: Path) -> None:
    content = 'timestamp,input_length,output_length,hash_ids\n0,1300,5,"[4, 5, 6]"\n'
    prefixes = read_trace(text(tmp_path / "trace.csv", content)).requests.prefixes
    assert prefixes is not None
    assert len(prefixes.ids) == 2


@pytest.mark.parametrize("rows", [PLAIN, MOONCAKE], ids=["plain", "mooncake"])
def test_parquet_holds_the_same_as_jsonl(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "trace.parquet")
    ours = read_trace(tmp_path / "trace.parquet").requests
    theirs = read_trace(lines(tmp_path / "trace.jsonl", rows)).requests
    assert np.array_equal(ours.arrival_s, theirs.arrival_s)
    assert np.array_equal(ours.output_tokens, theirs.output_tokens)
    assert (ours.prefixes is None) == (theirs.prefixes is None)


def test_parquets_own_timestamps_are_read(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    moments = [datetime(2024, 5, 10, 0, 0, second, tzinfo=UTC) for second in (1, 3)]
    rows = [{"TIMESTAMP": moment, "ContextTokens": 5, "GeneratedTokens": 6} for moment in moments]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "trace.parquet")
    assert read_trace(tmp_path / "trace.parquet").requests.arrival_s.tolist() == [0.0, 2.0]


def test_parquet_names_the_row_that_is_wrong(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [*PLAIN, {"arrival_s": 9.0, "prompt_tokens": -1, "output_tokens": 1}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "trace.parquet")
    with pytest.raises(ConfigError, match=r"trace\.parquet: row 4: prompt_tokens is -1"):
        read_trace(tmp_path / "trace.parquet")


def test_a_file_that_is_not_parquet_is_an_error(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    with pytest.raises(ConfigError, match="is not parquet"):
        read_trace(text(tmp_path / "trace.parquet", "no"))


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install 'splitserve\[parquet\]'"):
        read_trace(text(tmp_path / "trace.parquet", ""))


def test_only_the_first_requests_are_read_if_no_more_are_wanted(tmp_path: Path) -> None:
    rows = [*PLAIN, {"broken": True}]
    assert len(read_trace(lines(tmp_path / "trace.jsonl", rows), most=2).requests) == 2


def test_requests_without_tokens_are_left_out_and_noted(tmp_path: Path) -> None:
    rows = [{**PLAIN[0], "output_tokens": 0}, *PLAIN]
    trace = read_trace(lines(tmp_path / "trace.jsonl", rows))
    assert len(trace.requests) == 3
    assert trace.notes == ("1 of 4 requests have no prompt or no output tokens and are left out",)


def test_blank_lines_and_columns_of_no_use_are_passed_over(tmp_path: Path) -> None:
    content = "\n".join(json.dumps({**row, "user": "x"}) + "\n" for row in PLAIN)
    assert len(read_trace(text(tmp_path / "trace.jsonl", content)).requests) == 3


def test_requests_over_a_limit_are_left_out_and_noted(tmp_path: Path) -> None:
    trace = within(read_trace(lines(tmp_path / "trace.jsonl", MOONCAKE)), 1400, "trace.jsonl")
    assert trace.requests.prompt_tokens.tolist() == [1300, 1024]
    assert trace.requests.prefixes is not None
    assert len(trace.requests.prefixes.offsets) == 3
    assert trace.notes == ("1 of 3 requests are longer than 1400 tokens and left out",)


def test_a_limit_that_no_request_is_within_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trace\.jsonl: every request is longer than 50 tokens"):
        within(read_trace(lines(tmp_path / "trace.jsonl", PLAIN)), 50, "trace.jsonl")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"prompt_tokens": -5}, "prompt_tokens is -5: give 0 to 1048576 tokens"),
        ({"output_tokens": None}, "output_tokens is missing"),
        ({"output_tokens": "many"}, "output_tokens is 'many', not a whole number"),
        ({"output_tokens": 1.5}, "output_tokens is 1.5, not a whole number"),
        ({"output_tokens": True}, "output_tokens is True, not a whole number"),
        ({"output_tokens": [1]}, r"output_tokens is \[1\], not a whole number"),
        ({"prompt_tokens": 10**12}, "prompt_tokens is 1000000000000: give 0 to"),
        ({"arrival_s": "noon"}, "arrival_s is 'noon', not a number"),
        ({"arrival_s": -1}, "arrival_s is -1: give a number of 0 or more"),
        ({"arrival_s": False}, "arrival_s is False, not a number"),
        ({"arrival_s": 1.0}, "arrives 3 s before the request above it: sort the file by arrival_s"),
    ],
)
def test_a_trace_names_the_line_that_is_wrong(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    rows = [*PLAIN, {"arrival_s": 5.0, "prompt_tokens": 1, "output_tokens": 1, **change}]
    with pytest.raises(ConfigError, match=r"trace\.jsonl: line 4: " + sentence):
        read_trace(lines(tmp_path / "trace.jsonl", rows))


def test_a_field_missing_from_a_later_line_names_that_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="line 4: prompt_tokens is missing"):
        read_trace(lines(tmp_path / "trace.jsonl", [*PLAIN, {"arrival_s": 9.0, "output_tokens": 1}]))


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("trace.csv", AZURE.replace("396", ""), "line 3: ContextTokens is missing"),
        ("trace.csv", AZURE.replace("2023-11-16 18:15:50.9951690", "noon"), "line 3: TIMESTAMP is 'noon', not a date"),
        (
            "trace.csv",
            AZURE.replace("18:16:46", "18:14:46"),
            "line 4: arrives 64.* s before .* sort the file by TIMESTAMP",
        ),
        ("trace.csv", "TIMESTAMP,ContextTokens\nx,1\n", "line 2: GeneratedTokens is missing; looked for arrival_s"),
        (
            "trace.csv",
            "a,b\n1,2\n",
            r"line 2: columns a, b are of no known format: arrival_s, prompt_tokens, output_tok",
        ),
        ("trace.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n", "has no requests"),
        ("trace.csv", "", "has no requests"),
        ("trace.jsonl", "", "has no requests"),
        ("trace.jsonl", "[1, 2]\n", "line 1: is not a JSON object"),
        ("trace.jsonl", '{"arrival_s": 1', "line 1: is not a JSON object"),
        ("trace.txt", "1 2 3\n", r"is none of the files that are read: \.jsonl, \.ndjson, \.json, \.csv, \.parquet"),
    ],
)
def test_a_file_that_is_wrong_is_one_sentence(tmp_path: Path, name: str, content: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as error:
        read_trace(text(tmp_path / name, content))
    assert str(tmp_path / name) in str(error.value)


def test_hashes_that_are_not_whole_numbers_are_an_error(tmp_path: Path) -> None:
    for hashes in (["a", "b"], [2**64, 1], [1.5, 2]):
        with pytest.raises(ConfigError, match="line 1: hash_ids is not a list of whole numbers"):
            read_trace(lines(tmp_path / "trace.jsonl", [{**MOONCAKE[0], "hash_ids": hashes}]))


def test_a_file_that_is_not_there_or_not_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read: No such file"):
        read_trace(tmp_path / "none.jsonl")
    (tmp_path / "trace.csv").write_bytes(b"arrival_s,prompt_tokens,output_tokens\n\xff\xfe,1,2\n")
    with pytest.raises(ConfigError, match="is not text in UTF-8"):
        read_trace(tmp_path / "trace.csv")
