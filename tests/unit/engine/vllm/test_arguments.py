from typing import Any

import pytest

from splitserve.core.errors import ConfigError
from splitserve.engine.vllm.arguments import refuse_drafters_with_kv, with_reasoning


@pytest.mark.parametrize(
    ("extra", "field"),
    [
        ({"speculative_config": {"method": "eagle3", "model": "x"}}, "speculative_config"),
        ({"speculative_config": {"model": "x"}}, "speculative_config"),
        ({"speculative_config": "a string"}, "speculative_config"),
        ({"spec_method": "mtp"}, "spec_method"),
        ({"spec_model": "x"}, "spec_model"),
    ],
)
def test_a_drafter_whose_kv_push_would_leave_behind_is_refused_by_the_options_name(
    extra: dict[str, Any], field: str
) -> None:
    with pytest.raises(ConfigError, match="does not move a drafter's own KV") as refusal:
        refuse_drafters_with_kv(extra)
    assert refusal.value.path == f"engine.extra.{field}"


@pytest.mark.parametrize("extra", [{}, {"speculative_config": None}, {"speculative_config": {"method": "ngram"}}])
def test_drafts_from_the_tokens_alone_have_no_kv_to_move(extra: dict[str, Any]) -> None:
    refuse_drafters_with_kv(extra)


def test_a_reasoning_parser_goes_where_vllm_looks_for_it() -> None:
    beside = {"reasoning_parser": "r1", "structured_outputs_config": {"backend": "xgrammar"}}
    assert with_reasoning(beside) == {"structured_outputs_config": {"backend": "xgrammar", "reasoning_parser": "r1"}}
    for alone in ({"reasoning_parser": "r1"}, {"structured_outputs_config": {"backend": "auto"}}):
        assert with_reasoning(dict(alone)) == alone
