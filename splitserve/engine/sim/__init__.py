"""The simulated engine: everything a worker and a router can see of a real one, in seconds and without torch.

Tokens are deterministic and depend on what the KV blocks hold; time is a latency model's; KV moves by the real transfer
service between real worker processes.
"""

from splitserve.engine.sim.adapter import SimEngine

__all__ = ["SimEngine"]
