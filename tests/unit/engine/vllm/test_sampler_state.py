"""How vLLM's sampler is brought into a state, without vLLM. With it: tests/vllm."""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from splitserve.core.request import SamplingParams
from splitserve.core.sampler_state import GRAMMAR, STATEFUL, SamplerState
from splitserve.engine.vllm.sampler_state import (
    CPU_WORKER,
    SamplerStates,
    advance,
    extra_args,
    refuse_lost_penalties,
    restorable,
    with_earlier,
)

PENALISED = SamplingParams(presence_penalty=1.0)


def one_integer(generator: Any) -> None:
    torch.randint(0, 2**31, (1,), generator=generator, dtype=torch.long)


def one_number_per_token(generator: Any) -> None:
    torch.empty(50).exponential_(generator=generator)


@dataclass
class OffsetGenerator:
    """As on a GPU: a counter."""

    offset: int = 20
    device: torch.device = field(default_factory=lambda: torch.device("cuda"))

    def get_offset(self) -> int:
        return self.offset

    def set_offset(self, offset: int) -> None:
        self.offset = offset


@pytest.mark.parametrize("draw", [one_integer, one_number_per_token])
@pytest.mark.parametrize("draws", [1, 2, 1000])
def test_a_cpu_generator_is_where_as_many_draws_would_have_brought_it(draw: Callable[[Any], None], draws: int) -> None:
    drawn, advanced = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    for _ in range(draws):
        draw(drawn)
    advance(advanced, draws, draw)
    assert torch.equal(advanced.get_state(), drawn.get_state())


def test_a_gpu_generator_is_moved_by_as_many_of_what_one_draw_takes() -> None:
    generator = OffsetGenerator()

    def draw(drawing: Any) -> None:
        drawing.offset += 12

    advance(generator, 5, draw)
    assert generator.offset == 20 + 5 * 12


def test_output_made_elsewhere_goes_in_front() -> None:
    assert with_earlier([[1], [2, 3], []], {1: [7, 8], 2: [9]}) == [[1], [7, 8, 2, 3], [9]]


def test_a_request_without_state_tells_vllm_nothing() -> None:
    assert extra_args(SamplerState.of(SamplingParams(), (5, 6))) == {}
    assert list(extra_args(SamplerState.of(PENALISED, (5, 6))).values()) == [2]


def config(v2: bool = False, drafts: bool = False, worker_cls: str = CPU_WORKER) -> SimpleNamespace:
    return SimpleNamespace(
        use_v2_model_runner=v2,
        speculative_config=object() if drafts else None,
        parallel_config=SimpleNamespace(worker_cls=worker_cls),
    )


def test_what_an_engine_takes_up_depends_on_how_it_samples() -> None:
    assert restorable(config()) == STATEFUL
    assert restorable(config(v2=True)) == {"seed", GRAMMAR}
    assert restorable(config(drafts=True)) == {GRAMMAR}
    assert restorable(config(worker_cls="vllm.v1.worker.cpu_worker.CPUWorker")) == {GRAMMAR}


def test_penalties_that_would_count_anew_are_refused_by_name_and_draws_are_not() -> None:
    with pytest.raises(ValueError, match=r"presence_penalty: .* after 2 tokens"):
        refuse_lost_penalties(SamplerState.of(PENALISED, (5, 6)), {"seed"})
    refuse_lost_penalties(SamplerState.of(PENALISED, ()), ())
    refuse_lost_penalties(SamplerState.of(SamplingParams(seed=1), (5, 6)), ())


class FakeWorker:
    """vLLM's worker as far as it matters: samples draw for every row, and a dropped token's draw can't be undone."""

    use_v2_model_runner = False

    def __init__(self, generators: dict[int, torch.Generator], dropped: list[bool]) -> None:
        self.model_runner = SimpleNamespace(
            input_batch=SimpleNamespace(generators=generators, num_reqs=len(dropped)),
            discard_request_mask=SimpleNamespace(np=np.array([*dropped, True])),
        )

    def sample_tokens(self, grammar_output: object) -> list[int]:
        for row, generator in self.model_runner.input_batch.generators.items():
            one_integer(generator)
            if self.model_runner.discard_request_mask.np[row]:
                generator.set_offset(generator.get_offset() - 4)  # raises on a CPU
        return list(self.model_runner.input_batch.generators)


class Worker(SamplerStates, FakeWorker):
    """As ours are made."""


def test_a_prompt_not_read_to_its_end_makes_no_draw() -> None:
    partial, whole = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    before = partial.get_state()
    generators = {0: partial, 2: whole}
    worker = Worker(generators, dropped=[True, True, False])
    assert worker.sample_tokens(None) == [2]
    assert torch.equal(partial.get_state(), before)
    assert not torch.equal(whole.get_state(), before)
    assert generators == {0: partial, 2: whole}


def test_vllm_alone_would_break_on_such_a_prompt() -> None:
    """The negative twin."""
    with pytest.raises(RuntimeError, match="offset"):
        FakeWorker({0: torch.Generator()}, dropped=[True]).sample_tokens(None)
