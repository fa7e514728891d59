"""HTML reports: one file for light and dark that loads nothing. `page.html` is what all of them look like."""

from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any


def page(package: str | None, values: Mapping[str, Any], filters: Mapping[str, Callable[..., Any]]) -> str:
    """A complete HTML document from the package's `template.html`, which extends `page.html`. The same values give the
    same bytes; a name that the template misspells raises jinja2's UndefinedError."""
    from jinja2 import DictLoader, Environment, StrictUndefined

    assert package is not None
    texts = {
        "page.html": files(__package__).joinpath("page.html").read_text(encoding="utf-8"),
        "report": files(package).joinpath("template.html").read_text(encoding="utf-8"),
    }
    environment = Environment(
        loader=DictLoader(texts), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(filters)
    return environment.get_template("report").render(values)
