import io

from rich.console import Console, RenderableType

from splitserve.planner.compare import compare
from splitserve.planner.explain import explain
from splitserve.planner.question import Objective
from splitserve.planner.result import Infeasible
from splitserve.planner.tables import (
    change_view,
    comparison_view,
    explain_view,
    infeasible_view,
    nearest,
    plan_view,
    trial_view,
)
from splitserve.planner.trial import trial_of
from splitserve.planner.watch import Change
from tests.unit.planner.fixtures.results import INPUTS, nothing, outcome, plan, question


def _shown(view: RenderableType, width: int = 120) -> str:
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(view, highlight=False)
    return out.getvalue()


def test_the_answer_comes_first() -> None:
    assert _shown(plan_view(plan())).startswith("1 prefill TP4 + 1 decode TP2 PP2 on a100-80g (8 GPUs) serve 3.2")


def test_every_candidate_has_its_rows() -> None:
    shown = _shown(plan_view(plan()))
    assert "+ 1 decode TP2 PP2 on a100-80g" in shown
    assert "2 colocated TP4 chunk 512 on a100-80g" in shown
    assert "3.07 to 3.33" in shown


def test_eighty_columns_cut_no_figure() -> None:
    shown = _shown(plan_view(plan()), width=80)
    assert "…" not in shown
    assert "3.07 to 3.33" in shown


def test_the_objectives_own_figure_has_a_column() -> None:
    by_cost = plan(INPUTS.model_copy(update={"objective": Objective.PER_COST}))
    assert "$/h" in _shown(plan_view(by_cost))
    assert "$/h" not in _shown(plan_view(plan()))


def test_latencies_that_nobody_measured_are_warned_of() -> None:
    assert "decode latencies are extrapolated" in _shown(plan_view(plan()))


def test_what_to_do_next_depends_on_what_was_written() -> None:
    assert "--out plan.yaml" in _shown(plan_view(plan()))
    shown = _shown(plan_view(plan(), ["plan.yaml"]))
    assert "wrote plan.yaml" in shown
    assert "plan explain" in shown


def test_infeasible_names_what_binds_and_what_would_do() -> None:
    found = nothing().infeasible
    assert found is not None
    shown = _shown(infeasible_view(found))
    assert shown.startswith("no placement reads a prompt")
    assert "binding: ttft" in shown
    assert "TTFT 0.21 s is feasible: --ttft 0.21" in shown
    assert "--rate" not in shown


def test_each_nearest_value_is_an_option_to_give() -> None:
    lines = list(nearest(Infeasible("rate", "too fast", 2.5, 0.5, 0.12)))
    assert [line.rpartition("--")[2] for line in lines[1:]] == ["rate 2.5", "ttft 0.5", "tpot 0.12"]


def test_an_explanation_has_its_sections() -> None:
    shown = _shown(explain_view(explain(plan())))
    for title in ("Answer", "Each phase by itself", "What binds", "Why the others lost", "What the latencies rest on"):
        assert title in shown


def test_a_comparison_says_whether_the_difference_is_beyond_chance() -> None:
    other = plan(INPUTS.model_copy(update={"ttft": 0.2}))
    shown = _shown(comparison_view(("a.yaml", "b.yaml"), compare(plan(), other), False))
    assert "ttft" in shown
    assert "a.yaml" in shown
    assert "differ by less than their intervals" in shown


def test_a_trial_says_whether_the_target_holds() -> None:
    trial = trial_of([outcome(200), outcome(200, seed=1)], question().slo, "sharegpt", 3.2)
    assert "at least the 90% asked for" in _shown(trial_view(plan(), trial))
    slow = trial_of([outcome(200, queue_s=3.0)], question().slo, "sharegpt", 3.2)
    assert "below the 90% asked for" in _shown(trial_view(plan(), slow))


def test_a_change_is_shown_as_a_diff() -> None:
    assert _shown(change_view(Change(("- 1 prefill", "+ 2 prefill"), 0))) == "- 1 prefill\n+ 2 prefill\n"
