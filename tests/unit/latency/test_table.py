import pytest

from splitserve.latency.curves import Curve
from splitserve.latency.model import PrefillChunk, Step, Trust
from splitserve.latency.table import Hull, TableLatency

MODEL = TableLatency(
    base=Curve.through([0, 100], [0.01, 0.02]),
    length=Curve.through([0, 1000], [0.0, 0.001]),
    batch=Curve.through([1, 10], [0.01, 0.011]),
    read=Curve.through([0, 1], [0.0, 1e-6]),
    hull=Hull(10, 1000, 8, 64, 2048),
    source="test",
    error=0.03,
)


def test_prefill_and_decode_are_sums_of_their_curves() -> None:
    assert MODEL.step_s(Step(50, 500, 1)) == pytest.approx(0.015 + 0.0005)
    assert MODEL.step_s(Step(decodes=10, context_tokens=1000)) == pytest.approx(0.011 + 0.001)


def test_decodes_ride_as_tokens_of_a_mixed_step() -> None:
    assert MODEL.step_s(Step(50, 500, 1, 10, 1000)) == pytest.approx(0.016 + 0.0005 + 0.001)


def test_pipeline_stages_share_the_layers_and_pay_the_hops() -> None:
    staged, step = MODEL.staged(4, hop_s=1e-3, hop_token_s=1e-6), Step(100, 0, 1)
    assert staged.step_s(step) == pytest.approx(0.02 + 3 * (1e-3 + 1e-4))
    assert staged.stage_s(step) == pytest.approx(0.02 / 4 + 1e-3 + 1e-4)
    assert staged.step_s(Step()) == staged.stage_s(Step()) == 0


@pytest.mark.parametrize(
    ("step", "trust"),
    [
        (Step.of([PrefillChunk(500)]), Trust.INTERPOLATED),
        (Step.of(decodes=[2048] * 64), Trust.INTERPOLATED),
        (Step.of([PrefillChunk(5)]), Trust.EXTRAPOLATED),
        (Step.of([PrefillChunk(1001)]), Trust.EXTRAPOLATED),
        (Step.of([PrefillChunk(10)] * 9), Trust.EXTRAPOLATED),
        (Step.of(decodes=[1] * 65), Trust.EXTRAPOLATED),
        (Step.of(decodes=[2049]), Trust.EXTRAPOLATED),
        (Step.of([PrefillChunk(500)], [10]), Trust.EXTRAPOLATED),
    ],
)
def test_what_the_table_does_not_cover_is_extrapolated(step: Step, trust: Trust) -> None:
    known = MODEL.provenance(step)
    assert (known.trust, known.source, known.error) == (trust, "test", 0.03)
