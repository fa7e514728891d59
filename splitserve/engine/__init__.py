"""Engines compute tokens: `vllm.py` for real, `sim.py` deterministically without torch. `protocol.py` is what a worker
needs of either; one contract test suite runs against both."""
