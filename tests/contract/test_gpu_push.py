"""The GPU benchmark runs as it would on a GPU, in DRAM: two processes, real WRITEs, every byte compared."""

import json
import subprocess
import sys
from collections import deque
from pathlib import Path

import pytest

from splitserve.kv.transport import Fence

pytestmark = pytest.mark.nixl

ROOT = Path(__file__).parents[2]
RUN = """
import sys
from benchmarks.gpu.push.__main__ import main
sys.argv = ["push", "--device", "cpu", "--tokens", "64", "128", "--quick", "--json", sys.argv[1]]
main()
print("imported:", *sorted({"vllm", "grpc", "zmq", "pydantic"}.intersection(sys.modules)))
"""


def test_a_quick_run_prints_a_row_for_each_length_and_needs_torch_and_nixl_only(tmp_path: Path) -> None:
    pytest.importorskip("nixl")
    out = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(out)], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "imported:"
    figures = json.loads(out.read_text())
    assert [row["tokens"] for row in figures["rows"]] == [64, 128]
    assert all(min(row["push_gbps"], row["copy_gbps"], row["writes"]) > 0 for row in figures["rows"])


def test_bytes_in_other_blocks_than_the_tables_are_found() -> None:
    pytest.importorskip("nixl")
    from benchmarks.gpu.push.paced_prefill import SMALL, content
    from benchmarks.gpu.push.pair import Limits, Source, destination

    with destination(SMALL, 8, "cpu") as peer:
        source = Source(SMALL, 8, "cpu", Limits(write_bytes=2 * SMALL.block_bytes, in_flight_bytes=SMALL.block_bytes))
        source.connect(peer.address)
        for layer in range(SMALL.layers):
            source.cache[layer, [3, 1, 5]] = content(SMALL, layer, 3, "cpu")
        assert peer.wrong_bytes([7, 0, 2]) > 0, "nothing has been written"
        ready: deque[tuple[int, Fence]] = deque((layer, lambda: True) for layer in range(SMALL.layers))
        pushed = source.push(ready, [3, 1, 5], [7, 0, 2])
        assert pushed.writes == 2 * SMALL.layers
        assert peer.wrong_bytes([7, 0, 2]) == 0
        assert peer.wrong_bytes([7, 2, 0]) > 0
        assert peer.wrong_bytes([7, 0]) > 0
        source.close()
