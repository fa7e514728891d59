import json

from splitserve.bench.facts import Facts, Machine, facts_of, in_ms, milliseconds, objectives
from splitserve.core.slo import Slo
from tests.unit.bench.saved_runs import facts


def test_facts_come_back_from_json() -> None:
    said = facts(2.5, "pd", seed=3, warm_up_s=1.0)
    assert facts_of(json.loads(json.dumps(said.as_dict()))) == said


def test_objectives_that_are_not_set_are_not_written() -> None:
    slo = facts(1.0, "pd").as_dict()["slo"]
    assert set(slo) == {"ttft_s", "tpot_s", "attainment"}
    whole = Facts(slo=Slo(0.1, 0.2, 0.5, ttft_per_token_s=0.001, itl_p99_s=0.3))
    assert facts_of(whole.as_dict()) == whole


def test_another_programs_facts_may_say_less_and_more() -> None:
    assert facts_of({"rate_rps": 2.0, "weather": "fine", "slo": None}) == Facts(rate_rps=2.0)


def test_objectives_read_as_in_a_sentence() -> None:
    assert objectives(Slo(0.4, 0.05)) == "TTFT 400 ms and TPOT 50 ms"
    full = Slo(0.4, 0.05, ttft_per_token_s=0.001, itl_p99_s=0.2)
    assert objectives(full) == "TTFT 400 ms + 1 ms per prompt token, TPOT 50 ms and ITL p99 200 ms"


def test_times_have_three_digits_and_what_never_came_a_dash() -> None:
    assert [milliseconds(value) for value in (0.0123456, 1.5, float("inf"))] == ["12.3 ms", "1,500 ms", "-"]
    assert [in_ms(value) for value in (-1e-12, 1e-9, 0.00213)] == ["0", "0", "2.13"]


def test_the_machine_has_cores() -> None:
    assert Machine.here().cores >= 1
    assert Machine.here().cpu
