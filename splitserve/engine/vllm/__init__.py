"""The real engine. Importing this package does not import vLLM; starting a `VllmEngine` does."""

from splitserve.engine.vllm.adapter import VllmEngine

__all__ = ["VllmEngine"]
