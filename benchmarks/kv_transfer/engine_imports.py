"""Imported by the fork server that a benchmark's engines are forked from: vLLM's import (11 s of a core) is paid once.

CPU only: a process that has touched CUDA can't be forked. What the server and the engines print goes to a file, so that
it doesn't run through the benchmark's progress and tables.
"""

import os

from splitserve.engine.vllm.arguments import prepare_environment

ENGINE_LOG = "BENCHMARK_ENGINE_LOG"  # environment: that file

if ENGINE_LOG in os.environ:
    log = os.open(os.environ[ENGINE_LOG], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    prepare_environment("127.0.0.1", ranks=1)
    del os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"]  # each engine takes its own
    import vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector
    import vllm.model_executor.models.llama
    import vllm.v1.engine.llm_engine
    import vllm.v1.worker.cpu_worker  # noqa: F401
