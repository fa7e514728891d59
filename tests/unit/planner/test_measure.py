"""Measuring an engine's steps: what is said to have run in one did run in one."""

from collections.abc import Iterator
from uuid import uuid4

import pytest

from splitserve.cli.build import read_model
from splitserve.core.config import KvTransferSettings, SimSettings
from splitserve.core.errors import EngineError
from splitserve.engine.sim import SimEngine
from splitserve.latency.model import PrefillChunk, Provenance, Step, Trust
from splitserve.planner.measure import Instrument, Point, grid

MODEL = read_model("demo", "")
SETTINGS = SimSettings(total_blocks=256, block_size=16, max_model_len=1024, max_num_batched_tokens=256, max_num_seqs=17)


class Recorded:
    """A latency model that takes a moment for each step and remembers it."""

    stages = 1

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def step_s(self, step: Step) -> float:
        self.steps.append(step)
        return 0.0005 if step.decodes or step.prefills else 0.0

    def stage_s(self, step: Step) -> float:
        return self.step_s(step)

    def provenance(self, step: Step) -> Provenance:
        return Provenance(Trust.ANALYTIC, "a test's")


@pytest.fixture
def recorded() -> Recorded:
    return Recorded()


@pytest.fixture
def instrument(recorded: Recorded) -> Iterator[Instrument]:
    with Instrument(
        SimEngine(MODEL, SETTINGS, KvTransferSettings(), uuid4().hex, recorded), MODEL.vocab_size
    ) as instrument:
        yield instrument


@pytest.mark.parametrize("prompts", [1, 2, 4])
def test_prompts_that_are_measured_together_are_computed_in_one_step(
    instrument: Instrument, recorded: Recorded, prompts: int
) -> None:
    (measured,) = instrument.measure(Point(prompts, 60), repeats=1)
    assert measured.step == Step.of([PrefillChunk(60)] * prompts)
    assert measured.step in recorded.steps
    assert measured.seconds > 0


def test_a_prompt_longer_than_a_step_is_measured_chunk_by_chunk(instrument: Instrument, recorded: Recorded) -> None:
    measured = [each.step for each in instrument.measure(Point(1, 600, 1, 64), repeats=2)]
    chunks = [Step.of([PrefillChunk(tokens, at)]) for tokens, at in ((255, 0), (255, 255), (90, 510))]
    assert [step[:3] for step in measured] == [chunk[:3] for chunk in chunks]
    assert set(measured) <= set(recorded.steps)


@pytest.mark.parametrize(("decodes", "context"), [(1, 64), (4, 100), (16, 200), (3, 1009)])
def test_a_decode_batch_is_measured_as_a_whole(
    instrument: Instrument, recorded: Recorded, decodes: int, context: int
) -> None:
    (measured,) = instrument.measure(Point(0, 0, decodes, context), repeats=1)
    assert measured.step.decodes == decodes
    assert measured.step in recorded.steps
    assert measured.step.context_tokens == pytest.approx(decodes * context, rel=0.3)


def test_a_prompt_beside_a_running_batch_is_in_the_step_that_is_measured(
    instrument: Instrument, recorded: Recorded
) -> None:
    (measured,) = instrument.measure(Point(1, 100, 4, 64), repeats=1)
    assert (measured.step.prefills, measured.step.prompt_tokens, measured.step.decodes) == (1, 100, 4)
    assert measured.step in recorded.steps


def test_the_grid_holds_what_the_engine_can_do_and_no_more(instrument: Instrument) -> None:
    points = grid(instrument.info)
    assert {point.kind for point in points} == {"prefill", "decode", "mixed"}
    assert len(set(points)) == len(points)
    assert min(point.prompt_tokens for point in points if point.kind == "mixed") == 16
    for point in points:
        assert point.prompt_tokens < instrument.info.max_model_len
        assert point.decodes < SETTINGS.max_num_seqs
        assert point.decodes * point.context <= 256 * 16
    assert grid(instrument.info, longest=300) != points


def test_a_job_that_fails_ends_the_measurement_with_its_reason(instrument: Instrument) -> None:
    with pytest.raises(EngineError, match="2000"):
        instrument.measure(Point(1, 2000), repeats=1)
