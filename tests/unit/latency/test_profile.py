import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from splitserve.core.errors import ConfigError
from splitserve.latency import profile
from splitserve.latency.fit import Sample
from splitserve.latency.model import PrefillChunk, Step
from splitserve.latency.profile import Profile

_SAMPLES = tuple(
    Sample(step, 0.01 + 1e-4 * (step.prompt_tokens + step.decodes))
    for step in (
        *(Step.of([PrefillChunk(n)]) for n in (8, 16, 32, 64, 128, 256)),
        *(Step.of(decodes=[50] * n) for n in (1, 2, 4, 8, 16, 32)),
    )
)
_PROFILE = Profile("opt-13b", "a100-80g", "sim", tp=2, kv_tokens=1000, settings={"chunk": 512}, samples=_SAMPLES)


def _written(tmp_path: Path, **changes: Any) -> Path:
    file = tmp_path / "profile.json"
    _PROFILE.write(file)
    document = json.loads(file.read_text())
    document.update(changes)
    file.write_text(json.dumps(document))
    return file


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    _PROFILE.write(file)
    assert profile.read(file) == _PROFILE
    assert [entry.name for entry in tmp_path.iterdir()] == ["profile.json"], "no draft is left"


def test_yaml_is_read_as_well(tmp_path: Path) -> None:
    file = tmp_path / "profile.yaml"
    file.write_text(yaml.safe_dump(json.loads(_written(tmp_path).read_text())))
    assert profile.read(file) == _PROFILE


def test_half_a_profile_is_read_and_continued(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    Profile("m", "g", "w", samples=_SAMPLES[:3]).write(file)
    profile.read(file).with_samples(*_SAMPLES[3:]).write(file)
    assert profile.read(file).samples == _SAMPLES


def test_a_profile_becomes_a_latency_model_that_says_where_it_is_from() -> None:
    model = _PROFILE.latency()
    assert model.step_s(Step.of([PrefillChunk(100)])) == pytest.approx(0.02)
    assert model.provenance(Step.of([PrefillChunk(100)])).source == "profile of opt-13b on a100-80g, TP 2 PP 1"


def test_too_few_samples_say_so() -> None:
    with pytest.raises(ConfigError, match=r"^samples: 3 different steps are too few to fit; at least 8 are needed"):
        Profile("m", "g", "w", samples=_SAMPLES[:3]).latency()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"schema": "splitserve.profile/9"}, "schema is 'splitserve.profile/9', must be 'splitserve.profile/1'"),
        ({"model": ""}, "model: missing"),
        ({"tp": 0}, "tp: must be a whole number of at least 1, is 0"),
        ({"samples": {}}, "samples: must be a list"),
        ({"samples": [7]}, "sample 1: must be an object"),
        ({"samples": [{"decodes": 1, "seconds": -1}]}, "sample 1: seconds: must be a number above 0, is -1"),
        ({"samples": [{"decodes": 1, "seconds": 1}, {"decodes": -1, "seconds": 1}]}, "sample 2: decodes: must be"),
        ({"samples": [{"prompt_tokens": 5, "seconds": 1}]}, "sample 1: prompt_tokens go with prefills"),
    ],
)
def test_a_broken_profile_names_the_file_and_the_field(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    file = _written(tmp_path, **changes)
    with pytest.raises(ConfigError) as refusal:
        profile.read(file)
    assert str(refusal.value).startswith(f"{file}: ")
    assert sentence in str(refusal.value)


def test_a_file_that_is_missing_or_no_document_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read: No such file"):
        profile.read(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ConfigError, match="neither JSON nor YAML"):
        profile.read(tmp_path / "bad.json")
