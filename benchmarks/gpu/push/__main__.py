"""Measures the push of a Llama-8B-shaped KV cache between two processes on one GPU, with torch and NIXL only.

    python -m benchmarks.gpu.push [--device cuda|cpu] [--tokens 512 2048 8192] [--quick] [--json FILE]

Each process has a paged cache in the device's memory. The first pushes a prompt's blocks into the other's, layer by
layer, over splitserve's own transport; the other compares every byte of its whole cache, on the device. For each prompt
length: GB/s (10^9 bytes) of pushing all of it at once, beside a copy of the same bytes within one process; then
prefills of that length with and without a push of each layer once its event is passed (`paced_prefill.py`
really computes them), and what is left to write when the last layer is computed. What is compared takes turns.

Needs neither vLLM nor a network: torch, NIXL, numpy and msgspec, and of splitserve kv/nixl, kv/layout and what they
import. `--device cpu` runs the same code in DRAM, on a smaller model; its times say nothing of a GPU.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.gpu.push.figures import table
from benchmarks.gpu.push.measure import measure
from benchmarks.gpu.push.paced_prefill import LLAMA_8B, SMALL, ModelShape
from splitserve.kv.transport import TransportError

SLOW_ALLOCATOR = "expandable_segments:true"  # UCX can't share such memory between processes, and says nothing
NOTES = """\
copy: the same bytes within one process's device memory.  prefill: alone, and while its layers are pushed (medians).
uncovered: last WRITE done minus last layer computed, as seen every 0.2 ms; the head and the sampling, during which a
transfer may go on, are not in it.  Every push was compared byte by byte, blocks that nobody may touch included."""


def main() -> None:
    arguments = _arguments()
    shape = LLAMA_8B if arguments.device == "cuda" else SMALL
    if why := refusal(arguments.device, torch.cuda.is_available(), arguments.tokens, shape.block_size):
        raise SystemExit(why)
    if SLOW_ALLOCATOR in os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "").lower():
        print("PYTORCH_CUDA_ALLOC_CONF makes memory that UCX moves by way of the host: unset it", file=sys.stderr)
    torch.set_num_threads(1)
    setting = setting_of(arguments.device, shape, arguments.blocks)
    print("\n".join(f"{name}: {value}" for name, value in setting.items()), file=sys.stderr)
    try:
        rows = measure(shape, arguments)
    except TransportError as error:
        raise SystemExit(f"the transport gave up: {error}") from error
    print(table(rows), NOTES, sep="\n")
    if arguments.json:
        arguments.json.write_text(json.dumps({"setting": setting, "rows": [asdict(row) for row in rows]}, indent=1))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.push", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tokens", type=int, nargs="+", help="prompt lengths; on a CPU shorter ones by default")
    parser.add_argument("--rounds", type=int, default=10, help="of each length, after one that warms up")
    parser.add_argument("--quick", action="store_true", help="two rounds of the shortest lengths")
    parser.add_argument("--blocks", choices=["shuffled", "consecutive"], default="shuffled", help="how tables lie")
    parser.add_argument("--write-mib", type=int, default=8, help="most MiB in one WRITE, as kv_transfer.write_mib")
    parser.add_argument("--in-flight-mib", type=int, default=64, help="most in flight, as link_in_flight_mib")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    arguments = parser.parse_args()
    arguments.tokens = arguments.tokens or ([512, 2048, 8192] if arguments.device == "cuda" else [128, 512, 2048])
    if arguments.quick:
        arguments.tokens, arguments.rounds = sorted(arguments.tokens)[:2], 2
    return arguments


def refusal(device: str, has_cuda: bool, tokens: Sequence[int], block_size: int) -> str:
    """Why this can't be run; empty if it can."""
    if device == "cuda" and not has_cuda:
        return "torch sees no CUDA device here; --device cpu runs the same code in DRAM, on a smaller model"
    if any(count < block_size or count % block_size for count in tokens):
        return f"--tokens must be multiples of {block_size}, the block size"
    return ""


def setting_of(device: str, shape: ModelShape, order: str) -> dict[str, object]:
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu (one thread in each process)",
        "torch": torch.__version__,
        "model": asdict(shape),
        "blocks": order,
        "UCX_TLS": os.environ.get("UCX_TLS", "not set"),
    }


if __name__ == "__main__":
    main()
