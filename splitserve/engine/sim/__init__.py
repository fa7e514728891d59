"""The simulated engine: everything a worker and a router can see of a real one, in seconds and without torch.

Tokens are deterministic and depend on what the KV blocks hold; time is a latency model's; KV moves by the real transfer
service between real worker processes. What requests ask for is kept to or refused by name. An adapter's name goes into
the first block, so that KV computed with another one gives other tokens. Structured output, tool calls and reasoning
are spelt out in tokens (`script.py`). No prefix is cached, so that a cache salt has nothing to keep apart.
"""

from splitserve.engine.sim.adapter import SimEngine

__all__ = ["SimEngine"]
