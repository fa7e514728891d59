"""What `import splitserve` gives."""

import subprocess
import sys

import pytest

import splitserve


def test_a_users_program_finds_everything_at_the_top() -> None:
    for name in splitserve.__all__:
        assert getattr(splitserve, name).__name__ == name


def test_what_is_not_there_is_said_as_ever() -> None:
    with pytest.raises(AttributeError, match="'splitserve' has no attribute 'Nothing'"):
        _ = splitserve.Nothing


def test_the_import_itself_is_light() -> None:
    code = "import sys, splitserve; print([m for m in ('grpc', 'pydantic', 'torch', 'vllm') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
