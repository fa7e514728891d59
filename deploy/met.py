"""`met.py FIRST OTHER ...`: has FIRST all that it declares to need, in the versions that it asks for, and are OTHERs
there? For an image whose base brings packages of its own, where `pip check` would judge the base too."""

import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement


def unmet(distribution: str) -> Iterator[str]:
    try:
        declared = requires(distribution) or []
    except PackageNotFoundError:
        yield f"{distribution} is not installed"
        return
    for requirement in map(Requirement, declared):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            there = version(requirement.name)
        except PackageNotFoundError:
            yield f"{distribution} needs {requirement}, which is not installed"
            continue
        if not requirement.specifier.contains(there, prereleases=True):
            yield f"{distribution} needs {requirement}, but {there} is installed"


if __name__ == "__main__":
    first, *others = sys.argv[1:]
    faults = list(unmet(first))
    for other in others:
        try:
            version(other)
        except PackageNotFoundError:
            faults.append(f"{other} is not installed")
    sys.exit("\n".join(faults) or None)
