"""The real engine keeps the engine contract, in both KV modes."""

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

import pytest

from benchmarks.remote_engine import RemoteEngine
from splitserve.core.config import KvTransferSettings, VllmSettings
from splitserve.core.request import FinishReason, StructuredOutput, ToolChoice
from splitserve.core.worker import KvMode
from tests.contract.engine_contract import EngineContract
from tests.contract.engines import Bench, Listener, a_prompt, started
from tests.contract.request_contract import ADAPTER, a_chat, before, calls_of, resumed_at
from tests.vllm.adapters import make_adapter
from tests.vllm.conftest import VOCAB_SIZE

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

NO_PULL = "the pull connector of this vLLM can't read"  # vLLM 0.25 on a CPU

SETTINGS = VllmSettings(
    dtype="float32",
    max_model_len=1024,
    max_num_batched_tokens=256,
    kv_cache_gib=0.125,
    enable_prefix_caching=False,
    tool_parser="hermes",
    extra={
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True}
    },  # a random model would write it for ever
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
def bench(
    request: pytest.FixtureRequest,
    sensitive_model: Path,
    cores: tuple[int, int],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Bench]:
    adapter = make_adapter(tmp_path_factory.mktemp("adapters") / ADAPTER)
    settings = SETTINGS.model_copy(update={"loras": {ADAPTER: str(adapter)}})
    engines = [
        RemoteEngine(
            sensitive_model, settings, KvTransferSettings(mode=request.param, lease_s=lease_s), uuid4().hex, core
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


CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "celsius": true}}\n</tool_call>'


class TestVllmEngine(EngineContract):
    """All of it."""

    def test_a_call_in_the_text_is_told_apart_from_it_also_after_a_break(self, bench: Bench) -> None:
        job = a_chat(a_prompt(bench.vocabulary, 20, 480), ToolChoice())
        structured = StructuredOutput(choice=(f"Let me look. {CALL}",))
        job = replace(job, sampling=replace(job.sampling, structured_output=structured))
        whole = bench.alone.submit(job).wait()
        assert whole.text == "Let me look. "
        ((name, arguments),) = calls_of(whole)
        assert (name, json.loads(arguments)) == ("weather", {"city": "Rome", "celsius": True})
        assert whole.outcome.finish_reason is FinishReason.TOOL_CALLS
        for sent in range(1, len(whole.tokens)):
            rest = resumed_at(bench.destination, whole, sent)
            assert whole.text_before(sent) + rest.text == whole.text
            assert calls_of(before(whole, sent), rest) == [(name, arguments)], f"resumed after {sent}"
            assert rest.outcome.finish_reason is FinishReason.TOOL_CALLS

    def test_damaged_kv_gives_other_tokens(self, bench: Bench) -> None:
        if bench.source.info.kv.mode is KvMode.PULL:
            pytest.skip("the stock connector's reads can't be damaged from outside")
        super().test_damaged_kv_gives_other_tokens(bench)
