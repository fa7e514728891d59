from pathlib import Path

import pytest

from splitserve.core.errors import ConfigError
from splitserve.latency import catalog, configurator
from splitserve.latency.catalog import Known, costs, kv_capacity, unsupported
from splitserve.latency.distserve import max_num_tokens
from splitserve.latency.fit import Sample
from splitserve.latency.gpus import gpu
from splitserve.latency.model import PrefillChunk, Step, Trust
from splitserve.latency.profile import Profile
from splitserve.latency.shape import shape

_SAMPLES = tuple(Sample(Step.of([PrefillChunk(n)]), 0.01 + 1e-4 * n) for n in (8, 16, 32, 64, 128, 256, 512, 1024))


def _known(model: str, gpu_name: str, tp: int, pp: int = 1, source: str = "auto", **types: str) -> Known:
    found = costs(shape(model, **types), gpu(gpu_name), tp, pp, source=source)
    assert isinstance(found, Known), found
    return found


@pytest.mark.parametrize(
    ("model", "gpu_name", "tp", "source"),
    [
        ("opt-13b", "a100-80g", 2, "distserve"),
        ("opt-66b", "a100-80g", 4, "distserve"),
        ("llama2-70b", "h100", 8, "splitwise"),
        ("bloom-176b", "a100-80g", 8, "splitwise"),
        ("opt-13b", "h100", 2, "roofline"),
        ("gemma-3-27b", "mi300x", 1, "roofline"),
    ],
)
def test_a_published_table_of_that_model_and_gpu_goes_before_the_roofline(
    model: str, gpu_name: str, tp: int, source: str
) -> None:
    assert _known(model, gpu_name, tp).source == source


def test_a_table_in_16_bits_says_nothing_of_quantised_weights() -> None:
    assert _known("opt-13b", "a100-80g", 2, quantization="int8").source == "roofline"
    assert _known("opt-13b", "a100-80g", 2, kv_dtype="int8").source == "roofline"


def test_a_source_can_be_asked_for() -> None:
    assert _known("opt-13b", "a100-80g", 8, source="roofline").source == "roofline"
    vllm = _known("opt-13b", "a100-80g", 1, source="distserve-vllm").latency
    assert "engine vllm" in vllm.provenance(Step(decodes=1)).source


def test_a_table_is_not_filled_up_where_it_lacks_a_parallelism() -> None:
    said = costs(shape("opt-13b"), gpu("a100"), 8, 1)
    assert said == "DistServe's table has opt-13b at TP 1, 2, 4 only; --source roofline estimates TP 8"
    said = costs(shape("llama2-70b"), gpu("h100"), 8, 2)
    assert said == (
        "Splitwise's table has llama2-70b on h100 at TP 2, 4, 8, PP 1 only; --source roofline estimates others"
    )


def test_a_profile_goes_before_all(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    Profile("opt-13b", "a100-80g", "sim", tp=2, kv_tokens=777, samples=_SAMPLES).write(file)
    found = costs(shape("opt-13b"), gpu("a100"), 2, 1, profile=file)
    assert isinstance(found, Known)
    assert (found.source, found.kv_tokens) == ("profile", 777)
    assert found.latency.provenance(Step.of([PrefillChunk(100)])).trust is Trust.INTERPOLATED
    assert costs(shape("opt-13b"), gpu("a100"), 4, 1, profile=file) == ("the profile is of TP 2 PP 1, not of TP 4 PP 1")
    with pytest.raises(ConfigError, match="is of opt-13b on a100-80g, not of opt-13b on h100"):
        costs(shape("opt-13b"), gpu("h100"), 2, 1, profile=file)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("magic", "'magic' is not a source of latencies; one of auto, profile"),
        ("profile", "no file is given"),
        ("distserve", r"distserve has no llama-3.1-8b \(bf16 weights, bf16 KV\) on h100; it has opt-13b and opt-66b"),
        ("splitwise", "splitwise has no llama-3.1-8b"),
    ],
)
def test_a_source_that_cannot_answer_is_refused(source: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        costs(shape("llama-3.1-8b"), gpu("h100"), 1, 1, source=source)


def test_an_extra_that_is_not_installed_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configurator, "installed", lambda: False)
    with pytest.raises(ConfigError, match=r"not installed: pip install 'splitserve\[aiconfigurator\]'"):
        costs(shape("llama-3.1-8b"), gpu("h100"), 1, 1, source="aiconfigurator")


@pytest.mark.parametrize(
    ("model", "gpu_name", "tp", "pp", "sentence"),
    [
        ("opt-66b", "a100-80g", 1, 1, "opt-66b in fp16 is 122 GiB of weights; 1 x a100-80g of 80 GiB (TP 1 PP 1) "),
        ("llama-3.1-405b", "h100", 8, 1, "leave no room for KV; 16 (TP 16 PP 1) would do"),
        ("llama-3.1-405b", "t4", 8, 1, "would do"),
        ("opt-13b", "h100", 3, 1, "TP 3 does not divide the 40 attention heads of opt-13b"),
        ("qwen3-235b-a22b", "h200", 0, 1, "TP 0 PP 1 is no worker"),
        ("opt-13b", "h100", 1, 41, "PP 41 is more than the 40 layers of opt-13b"),
    ],
)
def test_a_worker_that_cannot_be_is_answered_with_why(
    model: str, gpu_name: str, tp: int, pp: int, sentence: str
) -> None:
    said = costs(shape(model), gpu(gpu_name), tp, pp)
    assert isinstance(said, str)
    assert sentence in said


def test_what_would_do_does() -> None:
    said = costs(shape("opt-175b"), gpu("a100"), 1, 1)
    assert isinstance(said, str)
    assert said.endswith("8 (TP 8 PP 1) would do")
    assert isinstance(costs(shape("opt-175b"), gpu("a100"), 8, 1), Known)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 1), (2, 2), (8, 4)])
def test_capacity_is_within_a_tenth_of_what_distserve_counted(tp: int, pp: int) -> None:
    counted = max_num_tokens("opt-13b", tp, pp)
    assert counted is not None
    assert kv_capacity(shape("opt-13b"), gpu("a100"), tp, pp) == pytest.approx(counted, rel=0.1)


def test_where_distserve_counted_the_count_is_taken() -> None:
    assert _known("opt-66b", "a100-80g", 2).kv_tokens == 11600


def test_smaller_kv_and_weights_leave_room_for_more_tokens() -> None:
    a100 = gpu("a100")
    wide = kv_capacity(shape("llama-3.1-8b"), a100, 1, 1)
    assert kv_capacity(shape("llama-3.1-8b", kv_dtype="fp8"), a100, 1, 1) == pytest.approx(2 * wide, abs=2)
    assert kv_capacity(shape("llama-3.1-8b", quantization="int4"), a100, 1, 1) > wide


def test_expert_and_data_parallelism_are_named_unsupported() -> None:
    assert unsupported() is None
    assert "expert parallelism is not supported" in str(unsupported(expert=8))
    assert "data parallelism within a worker is not supported" in str(unsupported(data=2))


def test_every_source_is_listed() -> None:
    assert set(catalog.SOURCES) == {"auto", "profile", *catalog._SOURCES}
