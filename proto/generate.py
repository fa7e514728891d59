"""Generates splitserve/rpc/gen from proto/. `--check` writes nothing and fails if the committed code differs."""

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("splitserve.v1", "inference")
TARGET = ROOT / "splitserve" / "rpc" / "gen"


def generate(out: Path) -> dict[str, str]:
    """Returns file name -> text, with imports rewritten to the package that the code lives in."""
    import google.rpc.status_pb2
    from grpc_tools import protoc

    protos = sorted(str(file) for file in (ROOT / "proto").rglob("*.proto"))
    include = Path(protoc.__file__).parent / "_proto"
    arguments = [
        "protoc",
        f"-I{ROOT / 'proto'}",
        f"-I{include}",
        f"-I{Path(google.rpc.status_pb2.__file__).parents[2]}",
        f"--python_out={out}",
        f"--pyi_out={out}",
        f"--grpc_python_out={out}",
    ]
    if protoc.main(arguments + protos) != 0:
        raise SystemExit("protoc failed; see above")
    generated = {"__init__.py": '"""Generated from proto/ by `make proto`. Not to be edited."""\n'}
    for file in sorted(out.rglob("*.py*")):
        generated[file.name] = _in_package(file.read_text())
    return generated


def _in_package(code: str) -> str:
    for package in PACKAGES:
        code = code.replace(f"from {package} import", "from splitserve.rpc.gen import")
    return code


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as out:
        generated = generate(Path(out))
    if check:
        committed = {file.name: file.read_text() for file in TARGET.glob("*.py*")}
        stale = sorted(
            name for name in generated.keys() | committed.keys() if generated.get(name) != committed.get(name)
        )
        if stale:
            print(f"splitserve/rpc/gen is not what proto/ generates: {', '.join(stale)}; run `make proto`")
        return bool(stale)
    TARGET.mkdir(parents=True, exist_ok=True)
    for name, text in generated.items():
        (TARGET / name).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
