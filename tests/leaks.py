"""Everything a file holds, however a tool wrapped it: what leak tests search."""

from __future__ import annotations

import base64
import io
import re
import sqlite3
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd


def contents(path: Path) -> Iterator[bytes]:
    """A file's bytes, and what they hold when it is a database, an archive, a table, compressed, or has base64 in it."""
    raw = path.read_bytes()
    yield raw
    texts = [raw]
    if raw.startswith(b"SQLite format 3\0"):
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as database:
            dump = list(database.iterdump())
        texts = ["\n".join(dump).encode()]
        texts += [bytes.fromhex(blob) for line in dump for blob in re.findall(r"X'([0-9A-Fa-f]+)'", line)]  # a ledger's entries
        yield from texts
    elif raw.startswith(b"PK\3\4"):
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            texts = [name.encode() + archive.read(name) for name in archive.namelist()]
        yield from texts
    elif raw.startswith(b"PAR1"):
        frame = pd.read_parquet(path)
        yield frame.to_csv().encode()
        for column in frame.select_dtypes("number"):
            yield frame[column].to_numpy(np.float64).tobytes()
    elif raw.startswith((b"\x1f\x8b", b"\x78\x01", b"\x78\x9c", b"\x78\xda")):
        try:
            yield zlib.decompressobj(47).decompress(raw)  # gzip or zlib, as git keeps its objects
        except zlib.error:
            pass  # a safetensors file whose header is 0x178 bytes long begins like one
    # Pictures in a page; pickles in Prefect's result storage, in lines of 76 characters, also escaped inside JSON.
    for text in texts:
        for coded in re.findall(rb"[A-Za-z0-9+/]{24,}={0,2}", re.sub(rb"(?:\\n|\n)", b"", text)):
            yield base64.b64decode(coded[: len(coded) // 4 * 4])


def unwrapped(paths: Iterator[Path]) -> bytes:
    """The contents of many files in one piece."""
    return b"\0".join(content for path in paths if path.is_file() for content in contents(path))
