from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitserve.core.errors import ConfigError
from splitserve.planner.inputs import (
    Inputs,
    assumptions,
    inputs_of,
    link_bytes_per_s,
    machines_of,
    node_groups,
    read_inputs,
    resolve,
    seconds,
    share,
)

ASKED = {"model": "opt-66b", "gpus": "a100-80g:1x8"}


@pytest.mark.parametrize(
    ("said", "bytes_per_s"),
    [
        ("200Gbps", 25e9),
        ("200 Gbit/s", 25e9),
        ("200Gb/s", 25e9),
        ("25GB/s", 25e9),
        ("25GBps", 25e9),
        ("1GiB/s", 2**30),
        ("1Gibit/s", 2**30 / 8),
        ("nic:4x400Gbps", 200e9),
        ("4x400Gbps", 200e9),
        ("0.5TB/s", 5e11),
        ("10kB/s", 1e4),
    ],
)
def test_bits_and_bytes_of_a_link_are_told_apart(said: str, bytes_per_s: float) -> None:
    assert link_bytes_per_s(said) == pytest.approx(bytes_per_s)


@pytest.mark.parametrize("said", ["200", "200Gb", "25gb/s", "fast", "0Gbps", "-1GB/s", "1.2.3GB/s", ".GB/s", "4xGbps"])
def test_a_link_that_could_be_bits_or_bytes_is_refused(said: str) -> None:
    with pytest.raises(ConfigError, match=r"link: .*200Gbps"):
        inputs_of({**ASKED, "link": said}, "options")


def test_nodes_are_counted_by_kind() -> None:
    assert node_groups("h100:2x8, a100-80g:4") == (("h100", 2, 8), ("a100-80g", 1, 4))


@pytest.mark.parametrize(("said", "piece"), [("h100:2x8,a100", "a100"), ("h100:0x8", "h100:0x8"), ("8xh100", "8xh100")])
def test_a_piece_of_gpus_that_cannot_be_read_is_named(said: str, piece: str) -> None:
    with pytest.raises(ConfigError, match=f"gpus: '{piece}' is not KIND:NODESxGPUS"):
        inputs_of({**ASKED, "gpus": said}, "options")


@pytest.mark.parametrize(("said", "value"), [(0.4, 0.4), ("0.4", 0.4), ("400ms", 0.4), ("0.4 s", 0.4), ("50us", 5e-5)])
def test_times_are_seconds_unless_they_say_otherwise(said: object, value: float) -> None:
    assert seconds(said) == pytest.approx(value)


@pytest.mark.parametrize("said", [0, -1, "fast", "", "1h", "nan", "inf", "e", None])
@pytest.mark.parametrize("objective", ["ttft", "tpot"])
def test_a_nonsense_objective_is_one_sentence_that_names_it(objective: str, said: object) -> None:
    with pytest.raises(ConfigError, match=rf"^options: {objective}: .* is no time above 0; write seconds") as refused:
        inputs_of({**ASKED, objective: said}, "options")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("said", [0, 1, 90, "0%", "100%", "most"])
def test_attainment_lies_between_0_and_1(said: object) -> None:
    with pytest.raises(ConfigError, match=r"attainment: .* is no share between 0 and 1"):
        inputs_of({**ASKED, "attainment": said}, "options")


@given(st.floats(0.001, 0.999))
def test_a_share_may_be_written_in_percent(value: float) -> None:
    assert share(f"{value * 100!r}%") == pytest.approx(share(value))


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        ({"model": "opt-66b"}, r"options: gpus: is missing; say which, such as a100-80g:1x8"),
        ({"gpus": "h100:8"}, r"options: model: is missing"),
        ({**ASKED, "tftt": 0.4}, r"options: tftt: unknown key"),
        ({**ASKED, "rate": 0}, r"options: rate"),
        ({**ASKED, "objective": "speed"}, r"options: objective: .*goodput-per-gpu"),
        ({**ASKED, "effort": "some"}, r"options: effort: .*quick"),
        ({**ASKED, "prices": {"h100": -1}}, r"options: prices\.h100"),
        ({**ASKED, "seeds": 1}, r"options: seeds"),
    ],
)
def test_what_is_wrong_is_named(said: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        inputs_of(said, "options")


def test_options_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "question.yaml"
    file.write_text("model: opt-13b\ngpus: h100:8\nttft: 250ms\n")
    inputs = read_inputs(file, {"model": "opt-66b", "tpot": None, "prices": {}})
    assert (inputs.model, inputs.gpus, inputs.ttft, inputs.tpot) == ("opt-66b", "h100:8", 0.25, 0.1)


def test_an_unknown_key_of_the_file_is_named_with_the_file(tmp_path: Path) -> None:
    file = tmp_path / "question.yaml"
    file.write_text("model: opt-13b\ngpus: h100:8\nslo: 1\n")
    with pytest.raises(ConfigError, match=r"question\.yaml: slo: unknown key"):
        read_inputs(file, {})


def test_what_nobody_said_is_listed_as_assumed() -> None:
    said = " ".join(assumptions(Inputs(model="m", gpus="h100:2x8", tpot=0.1)))
    assert "25GB/s per node and direction is assumed" in said
    assert "0.4 s is assumed (--ttft)" in said
    assert "sharegpt is assumed" in said
    assert "TPOT" not in said


def test_one_node_needs_no_link() -> None:
    assert not any("link" in each for each in assumptions(Inputs(model="m", gpus="h100:8")))


def test_a_price_replaces_the_datasheets() -> None:
    machines = machines_of(Inputs(model="m", gpus="h100:1x8,a100-80g:1x8", prices={"h100": 9.5}))
    assert machines.nodes[0].gpu.price_per_hour == 9.5
    assert machines.nodes[1].gpu.price_per_hour != 9.5


def test_a_price_may_use_a_gpus_other_name() -> None:
    inputs = Inputs(model="m", gpus="a100:1x8", prices={"a100": 3})
    assert machines_of(inputs).nodes[0].gpu.price_per_hour == 3


def test_a_price_of_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"prices: h200 is not among the GPUs: h100"):
        machines_of(Inputs(model="m", gpus="h100:8", prices={"h200": 3}))


def test_nodes_stay_in_the_order_said() -> None:
    machines = machines_of(Inputs(model="m", gpus="h100:1x8,a100-80g:2x4", link="100Gbps"))
    assert [(node.gpu.name, node.gpus) for node in machines.nodes] == [("h100", 8), ("a100-80g", 4), ("a100-80g", 4)]
    assert machines.between.bytes_per_s == 12.5e9


def test_an_unknown_gpu_lists_those_that_are_known() -> None:
    with pytest.raises(ConfigError, match=r"'h900'.*h100"):
        resolve(Inputs(model="opt-66b", gpus="h900:8"))


def test_an_unknown_model_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match="opt-67b") as refused:
        resolve(Inputs(model="opt-67b", gpus="h100:8"))
    assert "\n" not in str(refused.value)


def test_machines_too_small_for_the_weights_say_what_would_do() -> None:
    with pytest.raises(ConfigError, match=r"gpus: a100-80g:1x1 can't hold opt-66b: .* needs at least 2 a100-80g"):
        resolve(Inputs(model="opt-66b", gpus="a100-80g:1"))


def test_a_length_beyond_the_models_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"max_model_len: 4096 is beyond opt-66b's 2048"):
        resolve(Inputs(model="opt-66b", gpus="a100-80g:8", max_model_len=4096))


def test_the_engines_length_is_what_the_workload_needs() -> None:
    question = resolve(Inputs(model="opt-66b", gpus="a100-80g:8", workload="prompt=900,output=100"))
    assert question.max_model_len == 1000


def test_effort_and_seeds_reach_the_search() -> None:
    question = resolve(Inputs(**ASKED, effort="quick", seeds=7))
    assert (question.effort.seeds, question.effort.finalists) == (7, 2)


def test_costs_are_of_the_gpu_and_parallelism_asked_for() -> None:
    question = resolve(Inputs(**ASKED))
    from splitserve.planner.deployment import Parallelism

    gpu = question.machines.kinds[0]
    assert isinstance(question.costs(gpu, Parallelism(1)), str)
    fits = question.costs(gpu, Parallelism(4))
    assert not isinstance(fits, str)
    assert fits.kv_tokens > 0
    assert question.costs(gpu, Parallelism(4)) is fits


@pytest.mark.parametrize("kind", ["expert_parallel", "data_parallel"])
def test_what_a_worker_can_not_do_yet_is_refused_by_name(kind: str) -> None:
    asked = inputs_of({"model": "mixtral-8x7b", "gpus": "h100:1x8", kind: 2}, "options")
    with pytest.raises(ConfigError, match="not supported") as refused:
        resolve(asked)
    assert kind in str(refused.value)
