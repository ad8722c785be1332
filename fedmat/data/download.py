"""Public datasets from their publishers, verified to the byte and resumed where a download broke off.

Knows: how to fetch what ``datasets`` lists, from the publisher or a mirror of it. Refuses to know: what the files mean.
A file that is there and differs is never overwritten, and nothing is kept whose digest is not the promised one.

References:
    Download manager: L. Uieda et al., "Pooch: A friend to fetch your data files", JOSS 5(45) 1943 (2020).
    Range requests: R. Fielding et al., "HTTP Semantics", RFC 9110, section 14.
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

from fedmat.data.datasets import DATASETS, Dataset, Published
from fedmat.errors import ConfigError, DataError, ServiceError
from fedmat.files import sha256, sha256_file, write_atomic, write_json

PUBLISHER = "https://raw.githubusercontent.com"
Progress = Callable[[str, int, "int | None"], None]  # file, bytes so far, bytes in all if known
_CHUNK = 1 << 16
_TIMEOUT = (10, 60)  # seconds to connect, seconds of silence
_ATTEMPTS = 4
_PAUSE = 0.5  # seconds more before every further attempt
_MOST = 1 << 28  # bytes of one file: more is not what was asked for
_PARTS = ".download"  # half-downloaded files, below the dataset's folder

__all__ = ["DATASETS", "Dataset", "Progress", "Published", "get", "present"]


def get(name: str, into: Path, *, base_url: str | None = None, progress: bool | Progress = False) -> Path:
    """Fetches every published file of a dataset that is not there yet; returns the dataset's folder ``into/name``.

    Args:
        name: a key of :data:`DATASETS`.
        into: the folder of datasets, what ``FEDMAT_DATA`` names.
        base_url: a mirror laid out like the publisher: ``<base_url>/<repository>/<commit>/<path>``.
        progress: True for a bar on the terminal, or a function that is told (file, bytes so far, bytes in all).

    Raises:
        ConfigError: there is no such dataset, or this project derived it and nobody publishes it.
        DataError: a file is there already and is not the published one.
        ServiceError: the publisher cannot be reached, has no such file, or sends other bytes than promised. What was
            fetched stays; the next call goes on from there.
    """
    dataset = _dataset(name)
    folder = into / name
    wanted = [file for file in dataset.files if not _is_there(folder, file)]
    if not wanted:
        return folder
    try:
        with _report(progress) as told, _one_at_a_time(folder):
            for file in wanted:
                _fetch(dataset, file, folder, base_url or PUBLISHER, told)
            write_json(folder / "SOURCE.json", {"schema": "fedmat/source/1", **asdict(dataset)})
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror})", fix="make room, or name another folder") from error
    return folder


def present(name: str, into: Path) -> tuple[int, int]:
    """Returns (published files of the dataset that are there and right, published files in all)."""
    files = _dataset(name).files
    right = sum((into / name / f.name).is_file() and sha256_file(into / name / f.name) == f.sha256 for f in files)
    return right, len(files)


def _dataset(name: str) -> Dataset:
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(DATASETS)}"
        raise ConfigError(f"there is no dataset '{name}'; {hint}", fix="see 'fedmat data list'")
    dataset = DATASETS[name]
    if not dataset.files:
        origin = f" from {dataset.repository}" if dataset.repository else ""
        raise ConfigError(
            f"dataset '{name}' has no publisher: {', '.join(dataset.derived)} were derived by this project{origin}",
            fix="copy the folder from a machine that has it into FEDMAT_DATA",
        )
    return dataset


def _is_there(folder: Path, file: Published) -> bool:
    path = folder / file.name
    if not path.exists():
        return False
    if path.is_file() and sha256_file(path) == file.sha256:
        return True
    raise DataError(f"{path}: is there and is not the published file", fix="move it away, then run again")


# --- one file ----------------------------------------------------------------------------------------------------


def _fetch(dataset: Dataset, file: Published, folder: Path, base: str, told: Progress) -> None:
    """Downloads one file by its first address that answers, checks it and puts it in place."""
    addresses = [(dataset.commit, file.path), *file.elsewhere]
    absent = []
    for commit, path in addresses:
        url = f"{base.rstrip('/')}/{dataset.repository}/{commit}/{quote(path)}"
        try:
            data = _retrieve(url, file, folder, told)
        except _NotFound:
            absent.append(url)
            continue
        write_atomic(folder / file.name, data)
        return
    raise ServiceError(
        f"{file.name}: the publisher has no such file (404 at {' and at '.join(absent)})",
        fix="look for the file at the publisher; one with the right digest may be put into the folder by hand",
    )


def _retrieve(url: str, file: Published, folder: Path, told: Progress) -> bytes:
    """Returns the verified bytes behind ``url``; a workbook comes back as the text table it holds."""
    import pooch

    pooch.get_logger().setLevel("ERROR")  # it would print paths and digests
    parts = folder / _PARTS
    fetched = f"{file.name}.xlsx" if file.sheet else f"{file.name}.whole"
    part = parts / f"{sha256(url.encode())[:16]}.part"
    with contextlib.suppress(FileNotFoundError):
        (parts / fetched).unlink()  # whole but never verified: killed in between
    try:
        path = pooch.retrieve(
            url,
            known_hash=None if file.sheet else f"sha256:{file.sha256}",
            fname=fetched,
            path=parts,
            downloader=_Resuming(part, file.name, None if file.sheet else file.size, told),
        )
        data = _sheet(Path(path)) if file.sheet else Path(path).read_bytes()
        if sha256(data) != file.sha256:
            raise ValueError("digest")
    except ValueError:
        raise ServiceError(
            f"{file.name}: {url} sent other bytes than were published (SHA-256 differs)",
            fix="try again; if it persists, the address or a proxy on the way serves something else",
        ) from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            (parts / fetched).unlink()
    return data


def _sheet(path: Path) -> bytes:
    """Returns a workbook's first sheet without its index column, as the CSV text its digest was taken of."""
    import pandas as pd

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            frame = pd.read_excel(path)
    except Exception:  # noqa: BLE001  zip, XML and openpyxl errors alike mean: not a workbook
        raise ValueError("not a workbook") from None
    return str(frame.drop(columns=frame.columns[0]).to_csv(index=False, lineterminator="\n")).encode()


class _NotFound(Exception):
    """The server says that there is nothing at the address."""


class _Resuming:
    """A pooch downloader that keeps what arrived in a part file and asks only for the rest (RFC 9110, section 14.2)."""

    def __init__(self, part: Path, name: str, size: int | None, told: Progress) -> None:
        self.part, self.name, self.size, self.told = part, name, size, told

    def __call__(self, url: str, output_file: str | IO[bytes], pooch: Any, check_only: bool = False) -> None:
        """Downloads ``url`` into ``output_file``, going on from the part file and trying again after a break."""
        import requests
        import urllib3

        trouble = ""
        for attempt in range(_ATTEMPTS):
            time.sleep(_PAUSE * attempt)
            try:
                if self._go_on(url):
                    os.replace(self.part, str(output_file))
                    return
                trouble = "the connection ended before the file did"
            except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
                trouble = type(error).__name__
            except _Refused as error:
                trouble = str(error)
        have = self.part.stat().st_size if self.part.is_file() else 0
        raise ServiceError(
            f"{self.name}: {url} cannot be fetched ({trouble}); {have} bytes are kept",
            fix="check the network or proxy and run again: the download goes on from there",
        )

    def _go_on(self, url: str) -> bool:
        """Appends what the server sends to the part file; returns whether the file is whole."""
        import requests

        have = self.part.stat().st_size if self.part.is_file() else 0
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
        with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as answer:
            if answer.status_code == 404:
                raise _NotFound(url)
            if answer.status_code == 416:  # nothing is left to send: whole, or not this file at all
                return self._whole(have, _total(answer.headers.get("Content-Range", "")))
            if answer.status_code not in (200, 206):
                raise _Refused(f"HTTP status {answer.status_code}")
            goes_on = answer.status_code == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
            if answer.status_code == 206 and not goes_on:
                self.part.unlink(missing_ok=True)
                raise _Refused("the server answered with another range than was asked for")
            length = answer.headers.get("Content-Length", "")
            start = have if goes_on else 0
            total = start + int(length) if length.isdigit() else self.size
            done = start
            with self.part.open("ab" if goes_on else "wb") as handle:
                while chunk := answer.raw.read1(_CHUNK):  # what has arrived, so that nothing is lost when it breaks off
                    done += len(chunk)
                    if done > _MOST:
                        raise _Refused("the file is larger than any dataset")
                    handle.write(chunk)
                    self.told(self.name, done, total)
        return self._whole(done, total)

    def _whole(self, have: int, total: int | None) -> bool:
        if total is not None and have > total:
            self.part.unlink(missing_ok=True)  # of another file
            return False
        return total is None or have == total


class _Refused(Exception):
    """The server answered, but not with the file."""


def _total(content_range: str) -> int | None:
    text = content_range.rpartition("/")[2]
    return int(text) if text.isdigit() else None


# --- around it ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Holds the dataset's lock; the operating system drops it when the process dies."""
    (folder / _PARTS).mkdir(parents=True, exist_ok=True)
    with (folder / _PARTS / "lock").open("wb") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ServiceError(f"{folder}: another process is downloading this dataset", fix="wait for it") from None
        yield
        with contextlib.suppress(OSError):  # what was cut short stays for the next call
            (folder / _PARTS / "lock").unlink()
            (folder / _PARTS).rmdir()


@contextlib.contextmanager
def _report(progress: bool | Progress) -> Iterator[Progress]:
    """Yields a function that reports bytes: the caller's own, a terminal bar, or one that says nothing."""
    if callable(progress):
        yield progress
    elif not progress:
        yield lambda _file, _done, _total: None
    else:
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        with Bars(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()) as bars:
            tasks: dict[str, Any] = {}

            def told(file: str, done: int, total: int | None) -> None:
                if file not in tasks:
                    tasks[file] = bars.add_task(file, total=total)
                bars.update(tasks[file], completed=done, total=total)

            yield told
