"""The model that the engines serve here: nothing is downloaded."""

import json
from pathlib import Path

from splitserve.cli.build import DEMO_MODEL


def make_model(out: Path) -> Path:
    """11 million random weights in float32, whose output depends on every block of its KV."""
    from benchmarks.sensitive_model import make_larger_sensitive_model  # imports torch

    return make_larger_sensitive_model(DEMO_MODEL, out, vocabulary(DEMO_MODEL))


def vocabulary(model: Path) -> int:
    return int(json.loads((model / "config.json").read_text())["vocab_size"])
