from pathlib import Path

import pytest
import yaml

from splitserve.core.errors import ConfigError
from splitserve.planner.deployment import Role
from splitserve.planner.plan import Plan, dumped, read_plan, rounded, write_plan
from tests.unit.planner.fixtures.results import BOTH, judged, plan, pool, with_best


@pytest.fixture
def written(tmp_path: Path) -> Path:
    write_plan(plan(), tmp_path / "plan.yaml")
    return tmp_path / "plan.yaml"


def test_a_plan_that_was_written_reads_the_same(written: Path) -> None:
    assert read_plan(written) == plan()


def test_the_same_answer_is_written_in_the_same_bytes(written: Path, tmp_path: Path) -> None:
    write_plan(plan(), tmp_path / "again.yaml")
    assert (tmp_path / "again.yaml").read_bytes() == written.read_bytes()
    write_plan(read_plan(written), tmp_path / "third.yaml")
    assert (tmp_path / "third.yaml").read_bytes() == written.read_bytes()


def test_requests_that_never_end_survive_the_file(written: Path) -> None:
    endless = plan().model_copy(update={"chosen": plan().chosen.model_copy(update={"ttft_s": {"p99": float("inf")}})})
    write_plan(endless, written)
    assert read_plan(written).chosen.ttft_s["p99"] == float("inf")


@pytest.mark.parametrize("version", [0, 2, "1.0", None])
def test_an_unknown_version_is_refused(written: Path, version: object) -> None:
    said = yaml.safe_load(written.read_text())
    written.write_text(yaml.safe_dump({**said, "version": version}))
    with pytest.raises(ConfigError, match=r"plan\.yaml: version: .*writes plan files of version 1"):
        read_plan(written)


def test_a_file_without_a_version_is_no_plan(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text("model: demo\n")
    with pytest.raises(ConfigError, match=r"cluster\.yaml: version: is missing"):
        read_plan(tmp_path / "cluster.yaml")


def test_an_error_names_the_path_of_its_key(written: Path) -> None:
    said = yaml.safe_load(written.read_text())
    said["chosen"]["placement"]["pools"][1]["tp"] = 0
    written.write_text(yaml.safe_dump(said))
    with pytest.raises(ConfigError, match=r"plan\.yaml: chosen\.placement\.pools\.1\.tp: "):
        read_plan(written)


def test_a_key_that_nobody_knows_is_refused(written: Path) -> None:
    said = yaml.safe_load(written.read_text())
    said["inputs"]["tftt"] = 1
    written.write_text(yaml.safe_dump(said))
    with pytest.raises(ConfigError, match=r"inputs\.tftt: unknown key"):
        read_plan(written)


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.*can't be written: No such file"):
        write_plan(plan(), tmp_path / "nowhere" / "plan.yaml")


def test_the_file_carries_the_question_that_made_it() -> None:
    said = yaml.safe_load(dumped(plan()))
    assert said["inputs"]["model"] == "opt-66b"
    assert said["inputs"]["seed"] == 0
    assert said["seeds"] == 5


def test_nothing_in_the_file_depends_on_how_long_the_search_took() -> None:
    assert "cpu" not in dumped(plan())


def test_a_placement_names_its_gpu_once() -> None:
    assert str(plan().chosen.placement) == "1 prefill TP4 + 1 decode TP2 PP2 on a100-80g"


def test_a_placement_on_unequal_hardware_names_each_gpu() -> None:
    mixed = with_best(judged(pool(Role.PREFILL, 4, kind="h100"), pool(Role.DECODE, 4), goodput=4.0))
    assert str(plan(BOTH, mixed).chosen.placement) == "1 prefill TP4 on h100 + 1 decode TP4 on a100-80g"


def test_the_candidates_begin_with_the_chosen_one() -> None:
    made: Plan = plan()
    assert made.candidates[0] is made.chosen
    assert len(made.candidates) == 5


def test_figures_keep_four_digits() -> None:
    assert rounded(3.14159265) == 3.142
    assert rounded(123456.0) == 123500.0
