import pytest

from splitserve.core.config import SimSettings
from splitserve.latency.linear import LinearLatency
from splitserve.latency.model import PrefillChunk, Step

MODEL = LinearLatency(fixed_s=1.0, prefill_token_s=0.01, decode_token_s=0.1, context_token_s=0.001)


def test_a_step_costs_its_fixed_part_and_a_share_for_each_kind_of_token() -> None:
    step = Step.of(prefills=[PrefillChunk(50), PrefillChunk(30, context=100)], decodes=[10, 20])
    assert MODEL.step_s(step) == pytest.approx(1.0 + 0.01 * 80 + 0.1 * 2 + 0.001 * 30)


def test_an_empty_step_costs_nothing() -> None:
    assert MODEL.step_s(Step()) == 0.0


def test_a_prompt_costs_more_in_chunks_only_by_the_fixed_part() -> None:
    whole = MODEL.step_s(Step.of([PrefillChunk(100)]))
    halves = MODEL.step_s(Step.of([PrefillChunk(50)])) + MODEL.step_s(Step.of([PrefillChunk(50, context=50)]))
    assert halves == pytest.approx(whole + MODEL.fixed_s)


def test_the_simulated_engines_settings_name_the_coefficients() -> None:
    settings = SimSettings(step_s=1, prefill_token_s=2, decode_token_s=3, context_token_s=4)
    assert LinearLatency.of(settings) == LinearLatency(1, 2, 3, 4)
