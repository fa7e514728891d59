"""The chart is loaded once, and every variant rendered once, for all tests.

Without Helm, which is not in .venv, there is nothing to collect here: `make test-chart` installs it and runs them.
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.chart.tools import Chart, Document

MISSING = [name for name in ("helm_python", "kubernetes_validate") if find_spec(name) is None]
collect_ignore_glob = ["test_*.py"] if MISSING else []


def pytest_report_header() -> str:
    return f"tests/chart: not run without {' and '.join(MISSING)}; use make test-chart" if MISSING else ""


@pytest.fixture(scope="session")
def chart() -> "Chart":
    from tests.chart.tools import Chart

    return Chart()


@pytest.fixture(scope="session")
def rendered(chart: "Chart") -> "dict[str, list[Document]]":
    """Every variant's documents."""
    from tests.chart.variants import VARIANTS

    return {name: chart.documents(values) for name, values in VARIANTS.items()}
