"""The real engine keeps the engine contract, in both KV modes."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import pytest

from benchmarks.remote_engine import RemoteEngine
from splitserve.core.config import KvTransferSettings, VllmSettings
from splitserve.core.worker import KvMode
from tests.contract.engine_contract import EngineContract
from tests.contract.engines import Bench, Listener, started
from tests.vllm.conftest import VOCAB_SIZE

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

NO_PULL = "the pull connector of this vLLM can't read"  # vLLM 0.25 on a CPU

SETTINGS = VllmSettings(
    dtype="float32", max_model_len=1024, max_num_batched_tokens=256, kv_cache_gib=0.125, enable_prefix_caching=False
)


@dataclass
class VllmBench:
    source: Listener
    destination: Listener
    alone: Listener
    vocabulary: range

    def corrupting(self) -> AbstractContextManager[object]:
        assert isinstance(self.source.engine, RemoteEngine)
        return self.source.engine.misreading()


@pytest.fixture(scope="module", params=list(KvMode))
def bench(request: pytest.FixtureRequest, sensitive_model: Path, cores: tuple[int, int]) -> Iterator[Bench]:
    engines = [
        RemoteEngine(
            sensitive_model, SETTINGS, KvTransferSettings(mode=request.param, lease_s=lease_s), uuid4().hex, core
        )
        for core, lease_s in ((cores[0], 30), (cores[1], 30), (cores[1], 1))
    ]
    for engine in engines:
        engine.spawn()
    with ExitStack() as stack:
        try:
            source, destination, alone = [stack.enter_context(started(engine)) for engine in engines]
        except RuntimeError as refusal:
            if NO_PULL not in str(refusal):
                raise
            pytest.skip(str(refusal))
        yield VllmBench(source, destination, alone, range(300, VOCAB_SIZE))


class TestVllmEngine(EngineContract):
    """All of it."""

    def test_damaged_kv_gives_other_tokens(self, bench: Bench) -> None:
        if bench.source.info.kv.mode is KvMode.PULL:
            pytest.skip("the stock connector's reads can't be damaged from outside")
        super().test_damaged_kv_gives_other_tokens(bench)
