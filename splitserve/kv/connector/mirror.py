"""A rank's KV tensors and their copies in pinned host memory: the `Mirror` that staging needs, in torch.

Used by the transfer thread only. Copies run on a stream of their own beside the engine's. They need not wait for it:
a layer is written only after its event has passed, and a claim's blocks are read only after they have landed. On a CPU,
where a copy is over when it returns, the same code serves tests and `buffer: host`.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import torch

from splitserve.kv.transport import Fence, Region, TransportError


class TorchMirror:
    """`tensors[l]` is layer l, block first, each block contiguous; they must outlive the mirror."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        """Raises TransportError when the host has no room."""
        self._device = [_bytes_of(tensor) for tensor in tensors]
        self._stream = torch.cuda.Stream(tensors[0].device) if tensors[0].is_cuda else None
        self._pinned: list[torch.Tensor] = []
        try:
            self._host = [torch.empty(layer.shape, dtype=torch.uint8) for layer in self._device]
            if self._stream is not None:
                self._pin()
        except RuntimeError as error:
            self.close()
            size = sum(layer.numel() for layer in self._device)
            raise TransportError(f"no {size / 1024**3:.1f} GiB of pinned host memory: {error}") from error

    @property
    def regions(self) -> list[Region]:
        """The copies."""
        return [Region(layer.data_ptr(), layer.stride(0), layer.shape[1], layer.shape[0]) for layer in self._host]

    @property
    def memory(self) -> list[tuple[int, int]]:
        """(address, bytes) of each layer's copies."""
        return [(layer.data_ptr(), layer.numel()) for layer in self._host]

    def to_host(self, layer: int, blocks: Sequence[int]) -> Fence:
        return self._copy(self._device[layer], self._host[layer], blocks)

    def to_device(self, layer: int, blocks: Sequence[int]) -> Fence:
        return self._copy(self._host[layer], self._device[layer], blocks)

    def close(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()
        for layer in self._pinned:
            torch.cuda.cudart().cudaHostUnregister(layer.data_ptr())
        self._pinned.clear()

    def _copy(self, source: torch.Tensor, destination: torch.Tensor, blocks: Sequence[int]) -> Fence:
        try:
            with ExitStack() as stack:
                stack.enter_context(torch.inference_mode())  # vLLM makes its tensors in it, and only it may write them
                if self._stream is not None:
                    stack.enter_context(torch.cuda.stream(self._stream))
                for begin, end in runs_of(blocks, together=source.is_contiguous() and destination.is_contiguous()):
                    destination[begin:end].copy_(source[begin:end], non_blocking=True)
                return self._fence()
        except RuntimeError as error:
            raise TransportError(f"the device can't copy KV blocks: {error}") from error

    def _fence(self) -> Fence:
        if self._stream is None:
            return lambda: True
        event = torch.cuda.Event()
        event.record(self._stream)
        passed: Fence = event.query
        return passed

    def _pin(self) -> None:
        """In place: torch's own pinned memory comes in powers of two, up to twice what is needed."""
        for layer in self._host:
            fault = torch.cuda.cudart().cudaHostRegister(layer.data_ptr(), layer.numel(), 0)
            if fault.value:
                raise RuntimeError(f"cudaHostRegister answered {fault}")
            self._pinned.append(layer)


def runs_of(blocks: Sequence[int], together: bool) -> Iterator[tuple[int, int]]:
    """Half-open ranges of consecutive blocks, in order, for one copy each; of one block if blocks do not lie
    `together` in memory."""
    begin = 0
    for index in range(1, len(blocks) + 1):
        if index == len(blocks) or not together or blocks[index] != blocks[index - 1] + 1:
            yield blocks[begin], blocks[index - 1] + 1
            begin = index


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """A view of (block, byte). Raises RuntimeError if a block's bytes are not contiguous."""
    return tensor.view(tensor.shape[0], -1).view(torch.uint8)
