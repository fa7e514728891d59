"""Runs on disk: one file each, and a directory of them that a sweep goes on from."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from splitserve.bench import archive
from splitserve.bench.facts import Facts, facts_of
from splitserve.bench.findings import Saved
from splitserve.cli.bench.asked import RUN_ENDINGS
from splitserve.core.errors import ConfigError

_SAME = {  # of runs that make one sweep
    "workload": "--workload",
    "amount": "--requests",
    "warm_up_s": "--warm-up",
}


def keep(saved: Saved, path: Path) -> None:
    """Raises ConfigError if the file can't be written."""
    archive.save(saved.run, saved.facts.as_dict(), path)


def load(path: Path) -> Saved:
    """Raises ConfigError if it is no saved run."""
    run, said = archive.load(path)
    facts = facts_of(said)
    return Saved(facts if facts.name else replace(facts, name=path.stem), run)


def load_all(paths: Iterable[Path]) -> list[Saved]:
    """Of files, and of directories all of them. Raises ConfigError if there is none, or one is no saved run."""
    files = [file for path in paths for file in (_runs_in(path) if path.is_dir() else [path])]
    if not files:
        raise ConfigError("FILES", "there is no saved run; `splitserve bench run --out run.jsonl` saves one")
    return [load(file) for file in files]


def _runs_in(directory: Path) -> Sequence[Path]:
    files = sorted(file for file in directory.iterdir() if file.suffix in RUN_ENDINGS and file.name[0] != ".")
    if not files:
        raise ConfigError(str(directory), f"has no runs, which are {' and '.join(RUN_ENDINGS)} files")
    return files


class Kept:
    """Every run of a sweep or comparison by system, rate and seed; in a directory, if there is one."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._runs: dict[tuple[str, float, int], Saved] = {}

    def read(self) -> None:
        """Takes up what is in the directory, and makes one where there is none."""
        if self._directory is None:
            return
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError("--out", f"{self._directory} can't be made: {error.strerror or error}") from error
        for file in sorted(self._directory.glob("*.jsonl")):
            self._take(load(file))

    def check(self, wanted: Facts) -> None:
        """Raises ConfigError if there are runs of this system that were not made as these will be."""
        for saved in self.of(wanted.name):
            for field, option in _SAME.items():
                was, now = getattr(saved.facts, field), getattr(wanted, field)
                if was != now:
                    raise ConfigError(
                        "--out",
                        f"{self._directory} has runs of {wanted.name} with {option} {was}, not {now}: say it so, or "
                        "choose another directory",
                    )

    def add(self, saved: Saved) -> None:
        self._take(saved)
        if self._directory is not None:
            facts = saved.facts
            name = re.sub(r"[^\w.-]+", "-", facts.name)
            keep(saved, self._directory / f"{name}-{facts.rate_rps:g}-{facts.seed}.jsonl")

    def of(self, name: str) -> list[Saved]:
        return [saved for (whose, _, _), saved in self._runs.items() if whose == name]

    def _take(self, saved: Saved) -> None:
        facts = saved.facts
        self._runs[facts.name, facts.rate_rps, facts.seed] = saved
