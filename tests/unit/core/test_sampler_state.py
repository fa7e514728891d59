"""What a sampler carries."""

import pytest

from splitserve.core.request import SamplingParams, StructuredOutput
from splitserve.core.sampler_state import STATEFUL, SamplerState


@pytest.mark.parametrize(
    ("sampling", "fields"),
    [
        (SamplingParams(), ()),
        (SamplingParams(seed=0), ("seed",)),
        (SamplingParams(seed=3, temperature=0), ()),
        (SamplingParams(presence_penalty=-0.5), ("presence_penalty",)),
        (SamplingParams(seed=3, frequency_penalty=0.1), ("seed", "frequency_penalty")),
        (SamplingParams(structured_output=StructuredOutput(regex="a+")), ("structured_output",)),
        (SamplingParams(logit_bias={5: 1.0}, include_stop=True, prompt_logprobs=1), ()),
        (SamplingParams(repetition_penalty=1.5, top_p=0.5, top_k=3, min_p=0.1, min_tokens=3, stop=("x",)), ()),
    ],
)
def test_only_what_depends_on_the_output_so_far_is_state(sampling: SamplingParams, fields: tuple[str, ...]) -> None:
    assert SamplerState.of(sampling, (5, 6)) == SamplerState(2, fields)
    assert SamplerState.of(sampling, ()) == SamplerState(0, ()), "before the first token there is no state"


def test_what_an_engine_does_not_take_up_is_lost_there() -> None:
    state = SamplerState.of(SamplingParams(seed=3, presence_penalty=1.0), (5,))
    assert state.lost_on(STATEFUL) == ()
    assert state.lost_on({"seed"}) == ("presence_penalty",)
    assert state.lost_on(()) == ("seed", "presence_penalty")
