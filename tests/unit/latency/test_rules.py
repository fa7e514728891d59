"""What every latency model must keep: more work never costs less, nothing costs nothing, stages add up."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitserve.latency.distserve import distserve, measured_tps
from splitserve.latency.fit import Sample, fit
from splitserve.latency.gpus import gpu
from splitserve.latency.linear import LinearLatency
from splitserve.latency.model import LatencyModel, PrefillChunk, Step
from splitserve.latency.roofline import roofline
from splitserve.latency.shape import known_models, shape
from splitserve.latency.splitwise import measured_tps as splitwise_tps
from splitserve.latency.splitwise import splitwise


def _fitted() -> LatencyModel:
    steps = [Step.of([PrefillChunk(n)] * b) for n in (16, 64, 256, 1024) for b in (1, 3)]
    steps += [Step.of(decodes=[c] * b) for b in (1, 4, 16, 64) for c in (64, 512)]
    return fit([Sample(s, 0.01 + 1e-5 * s.prompt_tokens**0.9 + 1e-4 * s.decodes**1.3) for s in steps], "test", stages=2)


def _models() -> dict[str, LatencyModel | None]:
    models: dict[str, LatencyModel | None] = {"linear": LinearLatency(0.01, 1e-5, 1e-4, 1e-8, 1e-9, stages=2)}
    models["fitted"] = _fitted()
    for name in ("opt-13b", "opt-66b"):
        for engine in ("distserve", "vllm"):
            for tp in measured_tps(name, engine):
                for pp in (1, 2, 4):
                    models[f"{engine} {name} TP {tp} PP {pp}"] = distserve(name, tp, pp, engine)
    for name in ("llama2-70b", "bloom-176b"):
        for kind in ("a100-80g", "h100"):
            for tp in splitwise_tps(name, kind):
                models[f"splitwise {name} {kind} TP {tp}"] = splitwise(name, kind, tp)
    staged = splitwise("llama2-70b", "h100", 8)
    assert staged is not None
    models["staged table"] = staged.staged(4, 1e-5, 1e-7)
    for name in known_models():
        models[f"roofline {name}"] = roofline(shape(name), gpu("h100"), 1, 1)
        models[f"roofline {name} TP 4 PP 3"] = roofline(shape(name), gpu("l40s"), 4, 3)
    return models


_MODELS = {name: model for name, model in _models().items() if model is not None}
_PREFILLS = st.lists(st.builds(PrefillChunk, st.integers(1, 8192), st.integers(0, 8192)), max_size=6)
_DECODES = st.lists(st.integers(1, 8192), max_size=200)
_TOKENS, _SEQUENCES, _TOTALS = st.integers(0, 100_000), st.integers(0, 1000), st.integers(0, 10**9)
_ROUNDING = 1e-9


@settings(max_examples=200, deadline=None)
@given(
    step=st.builds(Step, _TOKENS, _TOTALS, _SEQUENCES, _SEQUENCES, _TOTALS),
    field=st.integers(0, 4),
    more=st.integers(1, 10_000),
)
def test_more_of_anything_never_costs_less(step: Step, field: int, more: int) -> None:
    for name, model in _MODELS.items():
        assert not _cheaper(model, step, field, more), name


def test_the_rule_would_catch_a_model_that_falls() -> None:
    assert _cheaper(LinearLatency(0.01, -1e-5, 1e-4), Step(10, 55, 1), field=0, more=1)


def _cheaper(model: LatencyModel, step: Step, field: int, more: int) -> bool:
    """Whether more of one field costs less."""
    larger = step._replace(**{Step._fields[field]: step[field] + more})
    in_all, in_stage = model.step_s(larger) / (1 - _ROUNDING), model.stage_s(larger) / (1 - _ROUNDING)
    return in_all < model.step_s(step) or in_stage < model.stage_s(step)


@pytest.mark.parametrize("name", _MODELS)
def test_an_empty_step_costs_nothing(name: str) -> None:
    assert _MODELS[name].step_s(Step()) == _MODELS[name].stage_s(Step()) == 0


@settings(max_examples=100, deadline=None)
@given(prefills=_PREFILLS, decodes=_DECODES)
def test_a_mixed_step_costs_at_least_each_part(prefills: list[PrefillChunk], decodes: list[int]) -> None:
    mixed, prefill, decode = Step.of(prefills, decodes), Step.of(prefills), Step.of(decodes=decodes)
    for name, model in _MODELS.items():
        assert model.step_s(mixed) >= model.step_s(prefill) * (1 - _ROUNDING), name
        assert model.step_s(mixed) >= model.step_s(decode) * (1 - _ROUNDING), name


@settings(max_examples=100, deadline=None)
@given(prefills=_PREFILLS, decodes=_DECODES)
def test_all_stages_take_at_least_the_pass_and_one_at_most(prefills: list[PrefillChunk], decodes: list[int]) -> None:
    step = Step.of(prefills, decodes)
    for name, model in _MODELS.items():
        assert model.stages * model.stage_s(step) >= model.step_s(step) * (1 - _ROUNDING), name
        assert model.stage_s(step) <= model.step_s(step) * (1 + _ROUNDING), name


@pytest.mark.parametrize("name", _MODELS)
def test_every_answer_says_where_it_is_from(name: str) -> None:
    for step in (Step.of([PrefillChunk(100)]), Step.of(decodes=[100]), Step.of([PrefillChunk(100)], [100])):
        assert _MODELS[name].provenance(step).source
