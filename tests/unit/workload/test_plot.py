import builtins
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from splitserve.core.errors import ConfigError
from splitserve.workload.named import workload
from splitserve.workload.plot import figure, save
from splitserve.workload.requests import Requests

REQUESTS = workload("sharegpt").draw(2000, 5.0, 0)


def test_a_figure_shows_lengths_and_arrivals(tmp_path: Path) -> None:
    save(REQUESTS, "sharegpt, 5 requests/s", tmp_path / "workload.svg")
    root = ElementTree.parse(tmp_path / "workload.svg").getroot()
    words = " ".join("".join(element.itertext()) for element in root.iter() if element.tag.endswith("text"))
    for expected in ("sharegpt, 5 requests/s", "prompt: mean", "output: mean", "tokens", "requests/s"):
        assert expected in words


def test_the_same_requests_make_the_same_file(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        save(REQUESTS, "same", tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_a_png_is_a_png(tmp_path: Path) -> None:
    save(REQUESTS, "png", tmp_path / "workload.PNG")
    assert (tmp_path / "workload.PNG").read_bytes().startswith(b"\x89PNG")


def test_the_curve_of_lengths_ends_at_the_longest() -> None:
    lengths, _ = figure(REQUESTS, "t").axes
    prompt, output = lengths.lines
    assert np.max(prompt.get_xdata()) == REQUESTS.prompt_tokens.max()
    assert np.max(output.get_xdata()) == REQUESTS.output_tokens.max()


def test_arrivals_per_second_add_up_to_all_requests() -> None:
    _, arrivals = figure(REQUESTS, "t").axes
    (stairs,) = arrivals.patches
    values, edges, _ = stairs.get_data()  # type: ignore[attr-defined]
    assert float((values * np.diff(edges)).sum()) == pytest.approx(len(REQUESTS))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_few_requests_at_one_moment_are_drawn_too(tmp_path: Path, count: int) -> None:
    requests = Requests(np.zeros(count), np.full(count, 5), np.full(count, 1))
    save(requests, "few", tmp_path / "few.svg")
    assert (tmp_path / "few.svg").stat().st_size > 1000


def test_another_ending_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"figures are written as \.svg or \.png"):
        save(REQUESTS, "t", tmp_path / "workload.pdf")


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be written: No such file"):
        save(REQUESTS, "t", tmp_path / "none" / "workload.svg")


def test_drawing_needs_matplotlib_only_when_it_draws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = builtins.__import__

    def without(name: str, *args: object, **kwargs: object) -> object:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match="figures need matplotlib: pip install matplotlib"):
        save(REQUESTS, "t", tmp_path / "workload.svg")
