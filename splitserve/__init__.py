"""Disaggregated prefill/decode serving of large language models, planned for goodput.

What a user's program needs is here: `splitserve.Client`, `AsyncClient` and the values that they take. It is imported
when it is first asked for: the command line and the planner do without gRPC.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOMES = {
    "AsyncClient": "splitserve.client",
    "Client": "splitserve.client",
    "Retries": "splitserve.client",
    "Chat": "splitserve.core.request",
    "ChatMessage": "splitserve.core.request",
    "Chunk": "splitserve.core.request",
    "GenerateRequest": "splitserve.core.request",
    "SamplingParams": "splitserve.core.request",
    "StructuredOutput": "splitserve.core.request",
    "Tool": "splitserve.core.request",
    "ToolChoice": "splitserve.core.request",
    "SplitserveError": "splitserve.core.errors",
}

__all__ = [
    "AsyncClient",
    "Chat",
    "ChatMessage",
    "Chunk",
    "Client",
    "GenerateRequest",
    "Retries",
    "SamplingParams",
    "SplitserveError",
    "StructuredOutput",
    "Tool",
    "ToolChoice",
]

if TYPE_CHECKING:
    from splitserve.client import AsyncClient, Client, Retries
    from splitserve.core.errors import SplitserveError
    from splitserve.core.request import (
        Chat,
        ChatMessage,
        Chunk,
        GenerateRequest,
        SamplingParams,
        StructuredOutput,
        Tool,
        ToolChoice,
    )


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
