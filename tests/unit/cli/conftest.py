import sys

import pytest

from splitserve.cli.main import main
from tests.unit.cli.console import Done, Run


@pytest.fixture
def splitserve(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The console script, within this process."""

    def run(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["splitserve", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return Done(ended.value.code, *capsys.readouterr())

    return run
