"""vLLM's own serving benchmark against `splitserve gateway`, both of its OpenAI backends: a client nobody here wrote.

It runs in a process of its own, like all that imports vLLM; the workers are simulated.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from splitserve.gateway.config import GatewayConfig
from tests.cluster.processes import Process, cluster_of

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

MODEL = Path(__file__).parents[2] / "splitserve" / "demo" / "model"
# What `vllm bench serve` runs; the command itself asks for the version of a distribution called `vllm`, which the build
# for CPUs is not.
BENCH_SERVE = (
    "from vllm.benchmarks.serve import add_cli_args, main; "
    "from vllm.utils.argparse_utils import FlexibleArgumentParser; "
    "parser = FlexibleArgumentParser(); add_cli_args(parser); main(parser.parse_args())"
)
PROMPTS, INPUT_TOKENS, OUTPUT_TOKENS = 24, 64, 16
WITHIN_S = 300


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("bench")
    with cluster_of(directory) as cluster:
        config = GatewayConfig(router=cluster.address, listen="127.0.0.1:0")
        process = Process("gateway", config, directory, "gateway")
        try:
            yield str(process.ready()["address"])
        finally:
            process.close()


@pytest.mark.parametrize(
    ("backend", "endpoint"), [("openai", "/v1/completions"), ("openai-chat", "/v1/chat/completions")]
)
def test_vllms_benchmark_completes_every_request(gateway: str, backend: str, endpoint: str, tmp_path: Path) -> None:
    ran = subprocess.run(
        [
            *(sys.executable, "-c", BENCH_SERVE),
            *("--backend", backend, "--base-url", f"http://{gateway}", "--endpoint", endpoint),
            *("--model", "demo", "--tokenizer", str(MODEL), "--dataset-name", "random", "--ignore-eos"),
            *("--random-input-len", str(INPUT_TOKENS), "--random-output-len", str(OUTPUT_TOKENS)),
            *("--num-prompts", str(PROMPTS), "--max-concurrency", "8", "--disable-tqdm"),
            *("--save-result", "--result-dir", str(tmp_path), "--result-filename", "result.json"),
        ],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=WITHIN_S,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]
    result: dict[str, Any] = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result.get("failed", 0)) == (PROMPTS, 0)
    assert result["total_output_tokens"] == PROMPTS * OUTPUT_TOKENS
    assert result["mean_ttft_ms"] > 0
