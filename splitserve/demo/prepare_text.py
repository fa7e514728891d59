"""Turn Debian's ``r-cran-janeaustenr`` package into clean, plain English text.

This module owns everything that happens before a token exists: opening the
``.deb``, decoding R's lazy-load database, and undoing the line wrapping of the
novels.  It needs nothing beyond the standard library; R is not required.

The novels come out as one string each, with one paragraph per line.
"""

from __future__ import annotations

import argparse
import gzip
import io
import re
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

DATA_FOLDER = "usr/lib/R/site-library/janeaustenr/data"

# Type codes of R's serialisation format, as far as these files use them.
_NIL, _REF, _SYMBOL, _PAIRLIST = 254, 255, 1, 2
_CHAR, _BOOL, _INT, _STR, _LIST = 9, 10, 13, 16, 19
_HAS_ATTRIBUTES, _HAS_TAG = 0x200, 0x400


class _XdrReader:
    """Decode one R object in XDR serialisation, ignoring most attributes."""

    def __init__(self, data: bytes) -> None:
        if data[:2] != b"X\n":
            raise ValueError("not an XDR serialisation of an R object")
        self._data = data
        self._at = 2
        self._symbols: list[Any] = []
        version, _writer, _min_reader = (self._int() for _ in range(3))
        if version == 3:
            self._bytes(self._int())  # the writer's native encoding

    def _bytes(self, count: int) -> bytes:
        self._at += count
        return self._data[self._at - count : self._at]

    def _int(self) -> int:
        return int(struct.unpack(">i", self._bytes(4))[0])

    def item(self) -> Any:
        """The next object: str, None, or a list/dict of such (named lists)."""
        flags = self._int()
        kind = flags & 0xFF
        if kind == _NIL:
            return None
        if kind == _REF:
            return self._symbols[((flags >> 8) or self._int()) - 1]
        if kind == _SYMBOL:
            self._symbols.append(self.item())
            return self._symbols[-1]
        if kind == _CHAR:
            length = self._int()
            return None if length < 0 else self._bytes(length).decode("utf-8")
        if kind == _PAIRLIST:
            return self._pairlist(flags)
        return self._vector(kind, flags)

    def _pairlist(self, flags: int) -> dict[Any, Any]:
        if flags & _HAS_ATTRIBUTES:
            self.item()
        tag = self.item() if flags & _HAS_TAG else None
        pairs = {tag: self.item()}
        pairs.update(self.item() or {})
        return pairs

    def _vector(self, kind: int, flags: int) -> Any:
        if kind not in (_BOOL, _INT, _STR, _LIST):
            raise ValueError(f"unsupported R type {kind}")
        read = self._int if kind in (_BOOL, _INT) else self.item
        values = [read() for _ in range(self._int())]
        attributes = self.item() if flags & _HAS_ATTRIBUTES else None
        names = (attributes or {}).get("names")
        return dict(zip(names, values, strict=True)) if names else values


def decode_database(index: bytes, blocks: bytes) -> dict[str, list[str]]:
    """Character vectors of a lazy-load database, by name, in name order.

    ``index`` is the ``.rdx`` file, which gives each object's offset and length
    in ``blocks``, the ``.rdb`` file.  A block is a 4-byte length and zlib data.
    """
    spans = _XdrReader(gzip.decompress(index)).item()["variables"]
    found: dict[str, list[str]] = {}
    for name, (offset, length) in sorted(spans.items()):
        raw = zlib.decompress(blocks[offset + 4 : offset + length])
        found[name] = [line or "" for line in _XdrReader(raw).item()]
    return found


def _data_archive(deb: bytes) -> bytes:
    """The ``data.tar.*`` member of a ``.deb``, which is an ``ar`` archive."""
    if deb[:8] != b"!<arch>\n":
        raise ValueError("not a Debian package")
    at = 8
    while at + 60 <= len(deb):
        name = deb[at : at + 16].decode("ascii").strip().rstrip("/")
        size = int(deb[at + 48 : at + 58])
        if name.startswith("data.tar"):
            return deb[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    raise ValueError("the Debian package holds no data archive")


def _database_files(source: Path) -> tuple[bytes, bytes]:
    """Bytes of ``Rdata.rdx`` and ``Rdata.rdb`` from a ``.deb`` or a folder."""
    if source.is_dir():
        folders = [source, source / DATA_FOLDER]
        folder = next((f for f in folders if (f / "Rdata.rdx").is_file()), None)
        if folder is None:
            raise FileNotFoundError(f"no Rdata.rdx in {source}")
        return (folder / "Rdata.rdx").read_bytes(), (folder / "Rdata.rdb").read_bytes()
    with tarfile.open(fileobj=io.BytesIO(_data_archive(source.read_bytes()))) as tar:
        files = (tar.extractfile(f"./{DATA_FOLDER}/Rdata.{end}") for end in ("rdx", "rdb"))
        index, blocks = (file.read() for file in files if file is not None)
    return index, blocks


def clean_novel(lines: list[str]) -> str:
    """Join wrapped lines into paragraphs, one a line, and normalise marks."""
    text = "\n".join(line.strip() for line in lines)
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n{2,}", text))
    joined = "\n".join(part for part in paragraphs if part)
    for old, new in (("“", '"'), ("”", '"'), ("‘", "'"), ("’", "'"), ("—", "--"), ("_", "")):
        joined = joined.replace(old, new)
    return joined


def read_documents(source: Path) -> list[str]:
    """Clean documents from a text file, a ``.deb``, or its unpacked folder."""
    if source.is_file() and source.suffix != ".deb":
        return [clean_novel(source.read_text(encoding="utf-8").splitlines())]
    return [clean_novel(lines) for lines in decode_database(*_database_files(source)).values()]


def main() -> None:
    """Write the clean text to a file, novels separated by a blank line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("source", type=Path, help="the .deb, its unpacked folder, or a text file")
    parser.add_argument("output", type=Path, help="text file to write")
    arguments = parser.parse_args()
    documents = read_documents(arguments.source)
    arguments.output.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    print(f"{len(documents)} documents, {sum(map(len, documents))} characters")


if __name__ == "__main__":
    main()
