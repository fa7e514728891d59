import pytest

from splitserve.kv.job_params import GrammarStart, grammar_of, grammar_params, job_params


@pytest.mark.parametrize("start", [GrammarStart(True, 7), GrammarStart(False, 0), None])
def test_a_grammars_start_is_read_as_it_was_written_beside_other_things(start: GrammarStart | None) -> None:
    said = {"kv_transfer_params": job_params("job"), **grammar_params(start)}
    assert grammar_of(said) == start


def test_a_request_of_nobodys_has_none() -> None:
    assert grammar_of(None) is None
    assert grammar_of({}) is None
