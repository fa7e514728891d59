"""The transport on a rank's KV tensors: their own memory registered with NIXL, or that of a mirror in host memory.

Called on the transfer thread. Decides nothing: `kv_transfer.buffer` says which, `kv/staging.py` what it means.
"""

from collections.abc import Sequence

import torch

from splitserve.core.config import KvBuffer
from splitserve.kv.connector.mirror import TorchMirror
from splitserve.kv.nixl import NixlTransport
from splitserve.kv.staging import StagedTransport, in_buffer
from splitserve.kv.transport import Region, Transport, TransportError


def transport_on(tensors: Sequence[torch.Tensor], uuid: str, buffer: KvBuffer) -> Transport:
    """`tensors[l]` is layer l. Raises ConfigError, or TransportError where a CPU's memory can't be registered."""
    if not tensors[0].is_cuda and buffer is not KvBuffer.HOST:
        return _direct(tensors, uuid)
    return in_buffer(buffer, lambda: _direct(tensors, uuid), lambda: _staged(tensors, uuid))


def _direct(tensors: Sequence[torch.Tensor], uuid: str) -> NixlTransport:
    memory_type, device = ("VRAM", tensors[0].get_device()) if tensors[0].is_cuda else ("DRAM", 0)
    return NixlTransport(uuid, _regions(tensors), _storages(tensors), memory_type, device)


def _staged(tensors: Sequence[torch.Tensor], uuid: str) -> StagedTransport:
    mirror = TorchMirror(tensors)
    try:
        return StagedTransport(NixlTransport(uuid, mirror.regions, mirror.memory), mirror)
    except TransportError:
        mirror.close()
        raise


def _regions(tensors: Sequence[torch.Tensor]) -> list[Region]:
    return [
        Region(
            base=tensor.data_ptr(),
            stride=tensor.stride(0) * tensor.element_size(),
            block_bytes=tensor[0].numel() * tensor.element_size(),
            blocks=tensor.shape[0],
        )
        for tensor in tensors
    ]


def _storages(tensors: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    """(address, bytes) of each distinct allocation: layers often share one."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sorted({(storage.data_ptr(), storage.nbytes()) for storage in storages})
