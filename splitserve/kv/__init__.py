"""The KV transfer service: who may write which block, when, and how the bytes get there.

    ticket ── transfer.py ──┬── ledger.py     life of a ticket, as a table
                            ├── control.py    messages between workers (messages.py), liveness
                            ├── layout.py     which bytes go where
                            └── transport.py  moves them: shm.py (simulated engine, tests), nixl.py (real);
                                              staging.py in front: by way of host memory

`connector` fits it into vLLM; `engine/sim` uses it as it is.
"""
