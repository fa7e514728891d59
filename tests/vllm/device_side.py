"""What `tests/vllm/test_device_side.py` runs in a child: importing the connector imports vLLM. Each function answers
plain values, which the test judges."""

from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any
from unittest.mock import patch

KEYS = ("one", "two")


class Event:
    """Of a device that computes when the test says so, in the order of its launches."""

    recorded: "list[Event]"

    def __init__(self) -> None:
        self.passed = False

    def record(self) -> None:
        self.recorded.append(self)

    def query(self) -> bool:
        return self.passed


class Service:
    """Writes down what it is told, and the event behind each fence."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        def tell(*arguments: Any) -> None:
            plain = [Event.recorded.index(each.__self__) if callable(each) else each for each in arguments]
            self.told.append((name, *plain))

        return tell


def step_on_a_device(hooks: list[str]) -> list[tuple[Any, ...]]:
    """One step of two layers, in which vLLM calls these layers' hooks. A fence is told as its event's number."""
    import torch

    from splitserve.core.config import KvTransferSettings
    from splitserve.kv.connector import worker
    from splitserve.kv.connector.scheduler import StepMetadata
    from splitserve.kv.ticket import TransferKey

    service = Service()
    with patch.object(worker, "ConnectorEnd"), patch.object(worker, "TransferService", lambda **_: service):
        half = worker.WorkerHalf(KvTransferSettings(), "w", "f", 16, worker.Rank(0, 0, 1, 1, 2), lambda _: 0, "")
        half.register({f"model.layers.{layer}.attn": torch.zeros(8, 1, 16, 8) for layer in range(2)})
    key = TransferKey("one", 1)
    step = StepMetadata(tables=[(key, [[4, 5]], 16)], ready=[(key, 32)], ended=[key])
    Event.recorded = []
    half._on_device = True
    with patch("torch.cuda.Event", Event):
        half.begin(step)
        for name in hooks:
            half.save(step, name)
        half.settle(step)
    return service.told[1:]  # after `start`


def piecewise_graphs() -> dict[str, bool]:
    """What the connector requires, by the setting."""
    from splitserve.kv.connector import PushConnector

    settings: dict[str, dict[str, object]] = {
        "not said": {},
        "full_decode": {"settings": {"cuda_graphs": "full_decode"}},
        "piecewise": {"settings": {"cuda_graphs": "piecewise"}},
    }
    return {name: PushConnector.requires_piecewise_for_cudagraph(extra) for name, extra in settings.items()}


def mirrored(contiguous: bool) -> dict[str, Any]:
    """Copies some blocks of layer 1 of one rank's tensors to host memory and from there to another's."""
    import torch

    from splitserve.kv.connector.mirror import TorchMirror, runs_of

    with torch.inference_mode():  # as vLLM does
        source, destination = ([*_cache(fill, contiguous)] for fill in (True, False))
    one, other = TorchMirror(source), TorchMirror(destination)
    copied = one.to_host(1, [0, 3, 4, 6])
    other._host[1].copy_(one._host[1])
    landed = other.to_device(1, [0, 3, 4])
    expected = torch.zeros_like(destination[1])
    expected[[0, 3, 4]] = source[1][[0, 3, 4]]
    region = one.regions[1]
    return {
        "fences": copied() and landed(),
        "exact": torch.equal(destination[1], expected),
        "other layer": bool(destination[0].any()),
        "region": (region.stride, region.block_bytes, region.blocks),
        "runs": [*runs_of([0, 3, 4, 6], contiguous)],
        "none": [*runs_of([], contiguous)],
    }


def _cache(filled: bool, contiguous: bool) -> "list[Any]":
    """Two layers of 8 blocks: (block, head, token, element), which share blocks' memory if not contiguous."""
    import torch

    shape = (2, 8, 2, 4, 6) if contiguous else (8, 2, 2, 4, 6)
    cache = torch.randn(shape).to(torch.bfloat16) if filled else torch.zeros(shape, dtype=torch.bfloat16)
    return [cache[layer] if contiguous else cache[:, layer] for layer in range(2)]


def buffers() -> dict[str, str]:
    """The transport on a CPU's tensors, by the setting."""
    import torch

    from splitserve.core.config import KvBuffer
    from splitserve.kv.connector.buffers import transport_on

    made = {}
    for buffer in KvBuffer:
        transport = transport_on([torch.zeros(4, 2, 4, 8) for _ in range(2)], f"rank-{buffer}", buffer)
        made[str(buffer)] = type(transport).__name__
        transport.close()
    return made


def answer(pipe: Connection) -> None:
    """The child: everything, in one go."""
    pipe.send(
        {
            "every hook": step_on_a_device(["model.layers.0.attn", "model.layers.1.attn"]),
            "one hook": step_on_a_device(["model.layers.0.attn"]),
            "piecewise": piecewise_graphs(),
            "mirrored": [mirrored(contiguous) for contiguous in (True, False)],
            "buffers": buffers(),
        }
    )
