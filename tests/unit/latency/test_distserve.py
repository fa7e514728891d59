import json
from importlib.resources import files
from typing import Any

import pytest

from splitserve.latency.distserve import DistServeLatency, distserve, max_num_tokens, measured_tps
from splitserve.latency.model import PrefillChunk, Step, Trust


def _row(model: str, tp: int, engine: str = "distserve") -> dict[str, Any]:
    table = json.loads(files("splitserve.latency").joinpath("data/distserve_profile.json").read_text())
    rows: list[dict[str, Any]] = table["coefficients"]
    return next(r for r in rows if (r["model"], r["tp"], r["engine"]) == (f"facebook/{model}", tp, engine))


def _model(name: str, tp: int, pp: int = 1, engine: str = "distserve") -> DistServeLatency:
    model = distserve(name, tp, pp, engine)
    assert model is not None
    return model


def _decodes(batch: int, context: int) -> Step:
    return Step.of(decodes=[context] * batch)


@pytest.mark.parametrize(("name", "tp"), [("opt-13b", 1), ("opt-13b", 4), ("opt-66b", 2), ("opt-66b", 8)])
def test_whole_prompts_cost_what_the_published_formula_says(name: str, tp: int) -> None:
    lengths, p = [300, 755, 1024], _row(name, tp)["prefill"]
    total = sum(lengths)
    fitted_ms = p["a_ms"] + p["b_ms_per_token"] * total + p["c_ms_per_token_sq"] * sum(n * n for n in lengths)
    seconds = _model(name, tp).step_s(Step.of(PrefillChunk(n) for n in lengths))
    assert seconds * 1e3 == pytest.approx(fitted_ms + 1 + 2 + 1e-4 * total)


@pytest.mark.parametrize(("batch", "which"), [(1, "decode_small_batch"), (94, "decode_small_batch")])
def test_small_batches_cost_what_the_published_formula_says(batch: int, which: str) -> None:
    d = _row("opt-66b", 4)[which]
    fitted_ms = d["a_ms"] + d["b_ms_per_context_token"] * batch * 401 + d["c_ms_per_request"] * batch
    assert _model("opt-66b", 4).step_s(_decodes(batch, 400)) * 1e3 == pytest.approx(fitted_ms + 2 + 1e-4 * batch * 400)


def test_large_batches_cost_what_the_published_formula_says_where_it_does_not_fall() -> None:
    d = _row("opt-13b", 4)["decode_large_batch"]
    fitted_ms = d["a_ms"] + d["b_ms_per_context_token"] * 150 * 101 + d["c_ms_per_request"] * 150
    step = _decodes(150, 100)
    model = _model("opt-13b", 4)
    assert model.step_s(step) * 1e3 == pytest.approx(fitted_ms + 2 + 1e-4 * 150 * 100)
    assert model.provenance(step).trust is Trust.INTERPOLATED


def test_chunks_of_a_prompt_pay_its_attention_once() -> None:
    model = _model("opt-66b", 4)
    whole = model.step_s(Step.of([PrefillChunk(2000)]))
    chunks = [model.step_s(Step.of([PrefillChunk(500, 500 * i)])) for i in range(4)]
    constants = 3 * (model.prefill[0] + 3e-3)
    assert sum(chunks) == pytest.approx(whole + constants)


def test_a_stage_takes_its_share_and_the_overheads_of_the_first() -> None:
    one, two = _model("opt-66b", 2), _model("opt-66b", 2, pp=2)
    step = Step.of([PrefillChunk(1000)])
    work_ms = one.step_s(step) * 1e3 - 1 - 2 - 0.1
    assert two.stage_s(step) * 1e3 == pytest.approx(work_ms / 2 + 2 + 2 + 0.1)
    assert two.step_s(step) * 1e3 == pytest.approx(work_ms + 2 * 2 + 2 + 0.1)


def test_the_fall_between_batch_94_and_95_is_found_and_bridged() -> None:
    model = _model("opt-66b", 2)
    assert any("falls from 131.2 to 93.0 ms between decode batch 94 and 95" in f.sentence for f in model.findings)
    assert model.step_s(_decodes(95, 800)) >= model.step_s(_decodes(94, 800))
    assert model.provenance(_decodes(95, 800)).trust is Trust.EXTRAPOLATED
    assert model.provenance(_decodes(94, 800)).trust is Trust.INTERPOLATED


def test_a_negative_coefficient_is_found_and_read_as_zero() -> None:
    model = _model("opt-66b", 2, engine="vllm")
    assert model.prefill[2] == 0
    assert any("below 0" in finding.sentence for finding in model.findings)


def test_a_set_without_faults_has_no_findings() -> None:
    assert _model("opt-66b", 4).findings == ()


def test_a_jump_between_the_sets_is_found() -> None:
    (finding,) = _model("opt-66b", 8).findings
    assert finding.sentence == "time jumps from 44.8 to 58.8 ms between decode batch 94 and 95; kept as measured"


def test_decodes_ride_as_tokens_in_a_mixed_step() -> None:
    model = _model("opt-66b", 4)
    prefill, decode = Step.of([PrefillChunk(512)]), _decodes(20, 700)
    mixed = Step.of([PrefillChunk(512)], [700] * 20)
    assert model.step_s(prefill) < model.step_s(mixed) < model.step_s(prefill) + model.step_s(decode)
    assert model.provenance(mixed).trust is Trust.EXTRAPOLATED


def test_longer_than_opts_positions_is_extrapolated() -> None:
    assert _model("opt-13b", 1).provenance(Step.of([PrefillChunk(4096)])).trust is Trust.EXTRAPOLATED
    assert _model("opt-13b", 1).provenance(Step.of([PrefillChunk(2048)])).trust is Trust.INTERPOLATED


def test_only_what_was_measured_is_known() -> None:
    assert measured_tps("opt-13b") == (1, 2, 4)
    assert measured_tps("opt-66b") == (2, 3, 4, 8)
    assert measured_tps("opt-175b") == ()
    assert distserve("opt-13b", 8, 1) is None
    assert max_num_tokens("opt-66b", 2, 1) == 11600
    assert max_num_tokens("opt-66b", 5, 1) is None
