import pytest

from splitserve.latency import configurator
from splitserve.latency.gpus import gpu
from splitserve.latency.model import PrefillChunk, Step, Trust
from splitserve.latency.shape import shape


class _Engine:
    """Answers in ms as a machine would whose time is a plain sum."""

    def __init__(self, dent_at: int = 0) -> None:
        self.asked = 0
        self._dent_at = dent_at

    def predict_prefill_latency(self, bs: int, isl: int, prefix: int = 0) -> float:
        self.asked += 1
        tokens = isl - prefix
        pairs = bs * (tokens * prefix + tokens * (tokens + 1) / 2)
        return 5 + 0.02 * bs * tokens + 1e-7 * pairs - (30 if self._dent_at == bs * isl else 0)

    def predict_decode_latency(self, bs: int, isl: int) -> float:
        self.asked += 1
        return 5 + 0.01 * bs + 1e-5 * bs * isl


def test_curves_through_its_grid_meet_its_answers_between() -> None:
    engine = _Engine()
    model = configurator.table(engine, "test")
    asked = engine.asked
    assert model.step_s(Step.of([PrefillChunk(900)])) * 1e3 == pytest.approx(5 + 18 + 0.0405, rel=0.01)
    assert model.step_s(Step.of([PrefillChunk(512, 512)] * 2)) * 1e3 == pytest.approx(25.5 + 0.08, rel=0.01)
    assert model.step_s(Step.of(decodes=[1000] * 40)) * 1e3 == pytest.approx(5 + 0.4 + 0.4, rel=0.01)
    assert engine.asked == asked, "a step's cost asks the engine no more"


def test_the_curves_own_error_is_stated() -> None:
    known = configurator.table(_Engine(), "test").provenance(Step.of([PrefillChunk(900)]))
    assert known.trust is Trust.INTERPOLATED
    assert known.error is not None
    assert known.error < 0.01


def test_an_answer_that_falls_is_found_and_does_not_make_the_model_fall() -> None:
    model = configurator.table(_Engine(dent_at=2048), "test")
    assert any("between prompt tokens 1024 and 2048" in finding.sentence for finding in model.findings)
    times = [model.step_s(Step.of([PrefillChunk(tokens)])) for tokens in (512, 1024, 2048, 4096)]
    assert times == sorted(times)


def test_what_it_does_not_carry_is_answered_with_a_sentence() -> None:
    said = configurator.configurator(shape("opt-13b"), gpu("a100"), 1)
    assert "doesn't carry opt-13b; it carries deepseek-v3, gpt-oss-120b" in str(said)
    assert "no tables of t4" in str(configurator.configurator(shape("qwen3-8b"), gpu("t4"), 1))
    assert "int4 weights" in str(configurator.configurator(shape("qwen3-8b", quantization="awq"), gpu("h100"), 1))
    assert "int8 KV" in str(configurator.configurator(shape("qwen3-8b", kv_dtype="int8"), gpu("h100"), 1))


@pytest.mark.skipif(not configurator.installed(), reason="needs the extra aiconfigurator")
def test_the_real_tables_give_a_model_within_a_twentieth_of_their_own_answers() -> None:
    model = configurator.configurator(shape("llama-3.1-8b"), gpu("h100"), 1)
    assert not isinstance(model, str), model
    assert model.error is not None
    assert model.error < 0.05
    assert 0.004 < model.step_s(Step.of(decodes=[576])) < 0.010
