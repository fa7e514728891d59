"""Our router beside `vllm-router` and `smg`; see `__main__.py`."""
