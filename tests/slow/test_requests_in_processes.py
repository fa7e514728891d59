"""The request contract where the decode worker's vLLM runs in processes of its own, two ranks and a scheduler: what an
in-process engine does with a grammar, a parser or an adapter has to cross between them."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from uuid import uuid4

import pytest

from benchmarks.remote_engine import RemoteEngine
from splitserve.core.config import KvTransferSettings
from tests.contract.engines import Bench, started
from tests.contract.request_contract import ADAPTER, RequestContract
from tests.vllm.adapters import make_adapter
from tests.vllm.conftest import VOCAB_SIZE
from tests.vllm.test_engine_contract import SETTINGS, VllmBench

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def bench(sensitive_model: Path, cores: tuple[int, int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    adapter = make_adapter(tmp_path_factory.mktemp("adapters") / ADAPTER)
    one = SETTINGS.model_copy(update={"loras": {ADAPTER: str(adapter)}})
    two = one.model_copy(update={"tensor_parallel_size": 2})
    engines = [
        RemoteEngine(sensitive_model, settings, KvTransferSettings(), uuid4().hex, core)
        for settings, core in ((one, cores[0]), (two, cores[1]), (one, cores[1]))
    ]
    for engine in engines:
        engine.spawn()
    with ExitStack() as stack:
        source, destination, alone = [stack.enter_context(started(engine)) for engine in engines]
        yield VllmBench(source, destination, alone, range(300, VOCAB_SIZE))


class TestRequestsInProcesses(RequestContract):
    @pytest.fixture(autouse=True)
    def _all_blocks_come_back(self, bench: Bench) -> Iterator[None]:
        yield
        for engine in (bench.source, bench.destination, bench.alone):
            engine.wait_at_rest()
