import pytest

from splitserve.core.errors import ConfigError
from splitserve.latency.gpus import gpu, gpus


def test_a_gpu_is_found_by_alias_in_any_case() -> None:
    assert gpu("A100") == gpu("a100-80g") == gpus()["a100-80g"]


def test_an_unknown_gpu_is_refused_with_the_known_names() -> None:
    with pytest.raises(ConfigError, match=r"'h999' is not in the datasheet; known: a10, a100-40g"):
        gpu("h999")


def test_no_two_gpus_share_a_name() -> None:
    from splitserve.latency.gpus import _datasheet

    names = [name for known, entry in _datasheet().items() for name in (known, *entry["aliases"])]
    assert len(names) == len(set(names))
    assert all(gpu(name).name in gpus() for name in names)


@pytest.mark.parametrize("name", sorted(gpus()))
def test_every_entry_is_a_plausible_gpu_and_says_its_source(name: str) -> None:
    entry = gpu(name)
    assert 10 * 2**30 < entry.memory_bytes < 300 * 2**30
    assert 2e11 < entry.memory_bytes_per_s < 1e13
    assert 5e13 < entry.flops_per_s("fp16") < 3e15
    assert 1e10 < entry.link_bytes_per_s < 1e12
    assert 50 < entry.watts < 1500
    assert entry.price_per_hour is not None
    assert 0.1 < entry.price_per_hour < 20
    assert entry.source
    hash(entry)


def test_a_type_that_a_gpu_cannot_multiply_is_widened_to_16_bits() -> None:
    a100, h100 = gpu("a100"), gpu("h100")
    assert not a100.multiplies("fp8")
    assert a100.flops_per_s("fp8") == a100.flops_per_s("bf16") == 312e12
    assert h100.flops_per_s("fp8") == 1979e12


def test_a_price_is_overridden_without_touching_the_datasheet() -> None:
    assert gpu("l4").priced(0.5).price_per_hour == 0.5
    assert gpu("l4").price_per_hour != 0.5
