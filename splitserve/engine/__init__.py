"""Engines compute tokens: `vllm` for real, `sim` deterministically without torch. `protocol.py` is what a worker needs
of either; one contract test suite runs against both."""
