import json
from pathlib import Path

import numpy as np
import pytest

from splitserve.core.errors import ConfigError
from splitserve.workload.named import SPREADS, workload, workloads


@pytest.fixture
def trace(tmp_path: Path) -> str:
    rows = [
        {"timestamp": 1000 * i, "input_length": 600 + 600 * i, "output_length": 10 + i, "hash_ids": [0, i + 1, i + 50]}
        for i in range(5)
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("spread", SPREADS)
def test_sharegpt_has_the_published_means_within_opts_length(spread: float) -> None:
    found = workload(f"sharegpt:spread={spread}")
    assert found.mean_prompt_tokens == pytest.approx(755.5, rel=1e-6)
    assert found.mean_output_tokens == pytest.approx(200.3, rel=1e-6)
    drawn = found.draw(20_000, 1.0, 0)
    assert (drawn.prompt_tokens + drawn.output_tokens).max() <= 2048
    assert min(drawn.prompt_tokens.min(), drawn.output_tokens.min()) >= 1


def test_sharegpt_says_that_it_is_synthetic_and_over_which_spreads() -> None:
    (note,) = workload("sharegpt").notes
    assert note.startswith("synthetic: ")
    assert "spread 1 (say how results change from 0.8 to 1.4)" in note
    assert "2048" in note


def test_a_wider_spread_has_a_longer_p90() -> None:
    p90s = [workload(f"sharegpt:spread={spread}").describe().prompt.p90 for spread in SPREADS]
    assert p90s == sorted(p90s)
    assert p90s[-1] > p90s[0] + 100


def test_a_range_of_spreads_is_one_workload_each() -> None:
    found = workloads("sharegpt:spread=0.8..1.2,arrivals=gamma:cv=3")
    assert [each.name for each in found] == [
        f"sharegpt:spread={spread},arrivals=gamma:cv=3" for spread in ("0.8", "1", "1.2")
    ]


def test_a_range_is_an_error_where_one_workload_is_wanted() -> None:
    with pytest.raises(ConfigError, match="it is 4 workloads, where one is wanted: give one spread"):
        workload("sharegpt:spread=0.8..1.4")


@pytest.mark.parametrize(("name", "prompt", "output"), [("azure-code", 2048, 28), ("azure-conv", 1155, 211)])
def test_azures_workloads_have_the_published_means_and_limits(name: str, prompt: float, output: float) -> None:
    found = workload(name)
    assert found.mean_prompt_tokens == pytest.approx(prompt, rel=1e-6)
    assert found.mean_output_tokens == pytest.approx(output, rel=1e-6)
    assert found.notes[0].startswith("synthetic: ")
    assert found.draw(50_000, 1.0, 0).prompt_tokens.max() <= {"azure-code": 7437, "azure-conv": 14050}[name]


def test_fixed_lengths_need_no_note() -> None:
    found = workload("prompt=512,output=128")
    drawn = found.draw(10, 1.0, 0)
    assert set(drawn.prompt_tokens.tolist()) == {512}
    assert set(drawn.output_tokens.tolist()) == {128}
    assert found.notes == ()


def test_each_side_may_have_quantiles_a_mean_limits_or_one_number() -> None:
    quantiles = workload("prompt:p50=200,p90=900,p99=2000,output:p50=100,p90=300").describe()
    assert (quantiles.prompt.p50, quantiles.prompt.p90, quantiles.prompt.p99) == (200, 900, 2000)
    assert (quantiles.output.p50, quantiles.output.p90) == (100, 300)
    mixed = workload("prompt:mean=300,sigma=0.5,output:low=3,high=9").describe()
    assert mixed.prompt.mean == pytest.approx(300, rel=1e-6)
    assert (mixed.output.mean, mixed.output.longest) == pytest.approx((6, 9))
    assert workload("prompt:p50=200,p90=900,output=7").describe().output.p99 == 7


def test_a_lognormal_is_named_by_its_means() -> None:
    found = workload("lognormal:prompt=700,output=200,sigma=0.7")
    assert (found.mean_prompt_tokens, found.mean_output_tokens) == pytest.approx((700, 200))
    limited = workload("lognormal:prompt=700,output=200,sigma=0.7,limit=2048")
    assert limited.mean_prompt_tokens == pytest.approx(700)
    assert limited.describe().prompt.longest < 2048


def test_arrivals_and_sharing_go_with_every_name() -> None:
    bursty = workload("sharegpt:arrivals=gamma:cv=3,shared=0.5,groups=4,turns=10,block=32")
    assert bursty.describe().interarrival_cv == pytest.approx(3.0, abs=0.3)
    assert 0.35 < bursty.describe().prefix_hit < 0.45  # a session's first turn hits nothing
    assert workload("prompt=5,output=6,arrivals=constant").draw(3, 2.0, 0).arrival_s.tolist() == [0.0, 0.5, 1.0]
    daily = workload("prompt=5,output=6,arrivals=diurnal:peak=2,period=60").draw(2000, 20.0, 0)
    assert np.diff(daily.arrival_s).max() > 1.0  # the trough


def test_a_trace_file_is_replayed_with_its_prefixes(trace: str) -> None:
    found = workload(trace)
    drawn = found.draw(5, 1.0, 0)
    assert drawn.prompt_tokens.tolist() == [600, 1200, 1800, 2400, 3000]
    assert drawn.arrival_s == pytest.approx([0, 1, 2, 3, 4])
    assert drawn.prefixes is not None
    assert found.name == trace


def test_a_trace_files_options_follow_its_name(trace: str) -> None:
    found = workload(f"{trace}:arrivals=constant,limit=1900,first=4")
    drawn = found.draw(4, 2.0, 0)
    assert drawn.prompt_tokens.tolist() == [600, 1200, 1800, 600]
    assert drawn.arrival_s.tolist() == [0.0, 0.5, 1.0, 1.5]
    assert found.notes == ("1 of 4 requests are longer than 1900 tokens and left out",)


def test_a_file_whose_name_has_commas_is_found(trace: str) -> None:
    renamed = Path(trace).rename(Path(trace).with_name("a,b=c.jsonl"))
    assert workload(str(renamed)).mean_prompt_tokens == 1800


def test_the_models_length_leaves_out_what_is_longer_and_says_how_much(trace: str) -> None:
    found = workload("azure-conv", limit_tokens=4096)
    drawn = found.draw(20_000, 1.0, 0)
    assert (drawn.prompt_tokens + drawn.output_tokens).max() <= 4096
    assert found.notes[-1].endswith("% of the requests are longer than 4096 tokens and left out")
    assert workload("sharegpt", limit_tokens=8192).notes == workload("sharegpt").notes
    assert workload(trace, limit_tokens=2000).mean_prompt_tokens == 1200


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("humaneval", "'humaneval' is not known; known are sharegpt, azure-code, azure-conv, lognormal, prompt="),
        ("mooncake", "no lengths of mooncake are known: give its trace file, which is read as it is"),
        ("sharegpt:colour=1", "option 'colour' is not known here; known are arrivals, limit, sessions, shared, spread"),
        ("sharegpt:spread=wide", "spread=wide is not a number"),
        ("sharegpt:spread=nan", "spread=nan is not a finite number"),
        ("sharegpt:spread=9", "spread=9 is not between 0.1 and 3"),
        ("sharegpt:spread=2..3", "none of the spreads 0.8, 1, 1.2, 1.4 is within 2..3"),
        ("sharegpt:spread=1,spread=2", "spread is given twice"),
        ("sharegpt:limit=500", "limit: 500 tokens is not above the means together"),
        ("sharegpt:arrivals=sometimes", "arrivals=sometimes is not known; known are poisson, gamma, constant"),
        ("sharegpt:arrivals=replay", "arrivals=replay goes with a trace file"),
        ("sharegpt:cv=2", "cv goes with arrivals=gamma"),
        ("sharegpt:arrivals=gamma:cv=0", "cv: 0 is not between"),
        ("sharegpt:period=5,arrivals=gamma", "period goes with arrivals=diurnal"),
        ("sharegpt:shared=2", "shared: 2 is not a share"),
        ("sharegpt:turns=3", "turns goes with shared="),
        ("sharegpt:shared=0.5,turns=0", "turns: 0 is not a number of 1 or more"),
        ("sharegpt:prompt:p50=3,p90=4", "option 'prompt' is not known here"),
        ("prompt=5", "output is missing: give output=, in tokens"),
        ("prompt=5.5,output=3", "prompt=5.5 is not a whole number"),
        ("prompt=-4,output=1", "-4 tokens"),
        ("prompt=512,output=128,limit=200", "none is left within the limits"),
        ("prompt:p50=200,p90=100,output=3", "p90=100 is below p50=200"),
        ("prompt:p50=200,low=3,output=3", "prompt: give quantiles .*, mean= and sigma=, or low= and high="),
        ("prompt:p50=200,output=3", "give at least two"),
        ("lognormal:prompt=700", "output is missing"),
        ("", "prompt is missing"),
        (":", "'an empty item' is not of the form key=value"),
        ("sharegpt:spread=", "'spread' is not of the form key=value"),
    ],
)
def test_nonsense_is_one_sentence_that_names_it(spec: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as error:
        workloads(spec)
    assert str(error.value).startswith(f"workload {spec!r}: ")


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("missing.jsonl", "missing.jsonl: can't be read: No such file"),
        ("trace.txt", r"trace.txt: is none of the files that are read: \.jsonl"),
        ("some/where", "some/where: is none of the files that are read"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_sentence(spec: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        workload(spec)


def test_an_option_of_another_kind_is_refused_for_a_file(trace: str) -> None:
    with pytest.raises(
        ConfigError, match="option 'spread' is not known here; known are arrivals, first, limit, shared"
    ):
        workload(f"{trace}:spread=1")


def test_a_file_without_times_needs_arrivals(trace: str) -> None:
    rows = [{"arrival_s": 3, "prompt_tokens": 5, "output_tokens": 6}] * 4
    Path(trace).write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ConfigError, match="its requests all arrive at one time: choose arrivals"):
        workload(trace)
    assert workload(f"{trace}:arrivals=constant").draw(3, 1.0, 0).arrival_s.tolist() == [0.0, 1.0, 2.0]


def test_a_number_of_requests_below_none_is_refused(trace: str) -> None:
    with pytest.raises(ConfigError, match="first= and limit= are numbers of 1 or more"):
        workload(f"{trace}:first=-3")
