import json
from pathlib import Path

import pytest

from splitserve.core.errors import ConfigError
from splitserve.engine.vllm.loras import ON_DEVICE, lora_arguments

RANKS = (1, 8, 16)


def an_adapter(directory: Path, said: object) -> str:
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps(said))
    return str(directory)


def test_there_is_room_for_the_largest_rank_and_for_all_in_host_memory(tmp_path: Path) -> None:
    loras = {f"a{rank}": an_adapter(tmp_path / f"a{rank}", {"r": rank}) for rank in range(1, 12)}
    said = lora_arguments(loras, RANKS)
    assert said == {"enable_lora": True, "max_loras": ON_DEVICE, "max_cpu_loras": 11, "max_lora_rank": 16}


@pytest.mark.parametrize(
    ("said", "words"),
    [({"r": 17}, "rank 17; this vLLM takes up to 16"), ({}, "says no rank r"), ([], "says no rank r")],
)
def test_an_adapter_that_can_not_be_served_is_named(tmp_path: Path, said: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        lora_arguments({"mine": an_adapter(tmp_path / "mine", said)}, RANKS)


def test_a_directory_without_an_adapter_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"engine\.loras\.mine: .* has no adapter_config\.json"):
        lora_arguments({"mine": str(tmp_path)}, RANKS)
