"""splitserve: disaggregated prefill/decode serving of one large language model."""

__version__ = "0.1.0"
