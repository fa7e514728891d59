"""Real engines are started once per module: importing vLLM takes 10 to 100 s on two busy cores."""

import os
from pathlib import Path

import pytest

from benchmarks.sensitive_model import make_sensitive_model

DEMO_MODEL = Path(__file__).parents[2] / "splitserve" / "demo" / "model"
VOCAB_SIZE = 2048


@pytest.fixture(scope="session")
def sensitive_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sensitive_model(DEMO_MODEL, tmp_path_factory.mktemp("sensitive"), VOCAB_SIZE)


@pytest.fixture(scope="session")
def cores() -> tuple[int, int]:
    """One for sources and one for destinations, if there are two."""
    available = sorted(os.sched_getaffinity(0))
    return available[0], available[-1]
