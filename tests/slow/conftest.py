"""Fixtures that the slow tests share with the parts that they prolong."""

from tests.cluster.conftest import colocated, expected
from tests.vllm.conftest import cores, sensitive_model

__all__ = ["colocated", "cores", "expected", "sensitive_model"]
