"""A model's shape by its name or its directory: where the values of `sizes` come from.

`shape("opt-66b")` knows the models of data/models; `shape("/models/mine")` reads that Hugging Face directory's
config.json.
"""

from splitserve.latency import huggingface
from splitserve.latency.sizes import Experts, ModelShape

__all__ = ["Experts", "ModelShape", "known_models", "shape"]

known_models = huggingface.known_models


def shape(
    name: str, dtype: str | None = None, quantization: str | None = None, kv_dtype: str | None = None
) -> ModelShape:
    """A model by its name in data/models or its Hugging Face directory.

    `dtype`: float32, float16, bfloat16 (default: the config's). `quantization` of the weights: fp8, int8, int4, awq,
    gptq, mxfp4 or none (default: the config's). `kv_dtype`: auto, fp8, int8 or a dtype (default: the activations').
    Raises ConfigError naming the option, or the file and its field.
    """
    return huggingface.read(name, dtype, quantization, kv_dtype)
