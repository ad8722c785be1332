"""Laws of fetching public data: the published bytes or nothing, no byte twice, nothing of the user's overwritten."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import MappingProxyType
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pytest

from fedmat.data import download
from fedmat.data.datasets import DATASETS, Dataset, Published
from fedmat.errors import ConfigError, DataError, ServiceError

BODY = np.random.default_rng(5).bytes(400_000)
COMMIT = "c" * 40


@dataclass
class Publisher:
    """A server on this machine with the faults of real ones."""

    files: dict[str, bytes] = field(default_factory=dict)
    breaks_after: int | None = None  # bytes sent before the connection is cut
    breaks: int = 0  # how often
    ranges: bool = True
    status: int = 0  # answer everything with this instead
    asked: list[tuple[str, str]] = field(default_factory=list)  # (path, Range)
    sent: int = 0
    url: str = ""


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    state = Publisher()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            wanted = self.headers.get("Range", "")
            state.asked.append((unquote(self.path), wanted))
            body = state.files.get(unquote(self.path))
            if state.status or body is None:
                self.send_response(state.status or 404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            start = int(re.match(r"bytes=(\d+)-", wanted)[1]) if wanted and state.ranges else 0  # type: ignore[index]
            if start >= len(body) and start:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(body)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            part = body[start:]
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            if state.breaks_after is not None and state.breaks:
                state.breaks -= 1
                part = part[: state.breaks_after]
                self.close_connection = True
            self.wfile.write(part)
            state.sent += len(part)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def _dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dataset of our own in the table, and no waiting between attempts."""
    file = Published("data.bin", hashlib.sha256(BODY).hexdigest(), len(BODY), "some where/data(1).bin")
    own = Dataset("own", "test", "lab/data", COMMIT, "CC0", "none", (file,))
    monkeypatch.setattr(download, "DATASETS", MappingProxyType({**DATASETS, "own": own}))
    monkeypatch.setattr(download, "_PAUSE", 0.0)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


PATH = f"/lab/data/{COMMIT}/some where/data(1).bin"


def rest(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix == ".part")


def test_the_published_bytes_arrive_with_their_source(publisher: Publisher, tmp_path: Path) -> None:
    publisher.files[PATH] = BODY
    told: list[tuple[str, int, int | None]] = []
    folder = download.get("own", tmp_path, base_url=publisher.url, progress=lambda *now: told.append(now))
    assert folder == tmp_path / "own"
    assert (folder / "data.bin").read_bytes() == BODY
    assert told[-1] == ("data.bin", len(BODY), len(BODY))
    source = json.loads((folder / "SOURCE.json").read_text())
    assert (source["repository"], source["commit"], source["licence"]) == ("lab/data", COMMIT, "CC0")
    assert sorted(p.name for p in folder.iterdir()) == ["SOURCE.json", "data.bin"]
    assert download.present("own", tmp_path) == (1, 1)


def test_what_is_there_is_not_fetched_again(publisher: Publisher, tmp_path: Path) -> None:
    publisher.files[PATH] = BODY
    download.get("own", tmp_path, base_url=publisher.url)
    publisher.asked.clear()
    download.get("own", tmp_path, base_url=publisher.url)
    assert publisher.asked == []


def test_a_broken_connection_is_resumed_within_one_call_and_no_byte_is_sent_twice(publisher: Publisher, tmp_path: Path) -> None:
    publisher.files[PATH] = BODY
    publisher.breaks_after, publisher.breaks = 150_000, 2
    download.get("own", tmp_path, base_url=publisher.url)
    assert (tmp_path / "own" / "data.bin").read_bytes() == BODY
    assert [r for _, r in publisher.asked] == ["", "bytes=150000-", "bytes=300000-"]
    assert publisher.sent == len(BODY)


def test_a_download_given_up_goes_on_where_it_stopped_next_time(publisher: Publisher, tmp_path: Path) -> None:
    publisher.files[PATH] = BODY
    publisher.breaks_after, publisher.breaks = 50_000, 99
    with pytest.raises(ServiceError, match="200000 bytes are kept"):
        download.get("own", tmp_path, base_url=publisher.url)
    assert not (tmp_path / "own" / "data.bin").exists()
    publisher.breaks = 0
    download.get("own", tmp_path, base_url=publisher.url)
    assert (tmp_path / "own" / "data.bin").read_bytes() == BODY
    assert publisher.sent == len(BODY)
    assert rest(tmp_path) == []


def test_a_server_without_ranges_starts_over_and_the_file_is_right(publisher: Publisher, tmp_path: Path) -> None:
    publisher.files[PATH] = BODY
    publisher.ranges, publisher.breaks_after, publisher.breaks = False, 150_000, 1
    download.get("own", tmp_path, base_url=publisher.url)
    assert (tmp_path / "own" / "data.bin").read_bytes() == BODY


@pytest.mark.parametrize("kept", [len(BODY), len(BODY) + 7])
def test_a_part_that_is_whole_or_too_long_does_no_harm(publisher: Publisher, tmp_path: Path, kept: int) -> None:
    publisher.files[PATH] = BODY
    publisher.breaks_after, publisher.breaks = 50_000, 99
    with pytest.raises(ServiceError):
        download.get("own", tmp_path, base_url=publisher.url)
    (part,) = rest(tmp_path)
    part.write_bytes((BODY + b"garbage")[:kept])
    publisher.breaks = 0
    download.get("own", tmp_path, base_url=publisher.url)
    assert (tmp_path / "own" / "data.bin").read_bytes() == BODY


def test_wrong_bytes_are_refused_and_not_kept(publisher: Publisher, tmp_path: Path) -> None:
    publisher.files[PATH] = BODY[:-1] + bytes([BODY[-1] ^ 1])
    with pytest.raises(ServiceError, match="SHA-256 differs"):
        download.get("own", tmp_path, base_url=publisher.url)
    assert [p.name for p in (tmp_path / "own").rglob("*") if p.is_file()] == ["lock"]
    publisher.files[PATH] = BODY
    download.get("own", tmp_path, base_url=publisher.url)
    assert download.present("own", tmp_path) == (1, 1)


def test_a_missing_file_is_named_with_its_address_and_asked_for_once(publisher: Publisher, tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match="404") as caught:
        download.get("own", tmp_path, base_url=publisher.url)
    assert f"{publisher.url}/lab/data/{COMMIT}/some%20where" in str(caught.value)
    assert len(publisher.asked) == 1


@pytest.mark.parametrize("status", [403, 429, 500])
def test_a_server_that_refuses_is_asked_again_and_then_named(publisher: Publisher, tmp_path: Path, status: int) -> None:
    publisher.status = status
    with pytest.raises(ServiceError, match=f"HTTP status {status}"):
        download.get("own", tmp_path, base_url=publisher.url)
    assert len(publisher.asked) == 4


def test_no_network_is_said_plainly(tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match="ConnectionError") as caught:
        download.get("own", tmp_path, base_url="http://127.0.0.1:9")
    assert "proxy" in caught.value.fix


def test_a_file_that_differs_is_never_overwritten(publisher: Publisher, tmp_path: Path) -> None:
    publisher.files[PATH] = BODY
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "data.bin").write_text("the user's own work")
    with pytest.raises(DataError, match="not the published file"):
        download.get("own", tmp_path, base_url=publisher.url)
    assert (tmp_path / "own" / "data.bin").read_text() == "the user's own work"
    assert download.present("own", tmp_path) == (0, 1)


def test_a_workbook_becomes_the_table_whose_digest_is_promised(
    publisher: Publisher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pd.DataFrame({"doi": ["a", "b"], "k": [0.5, np.nan], "salt": ["LiPF6", " LiBPFPB"], "n": [0, 1]})
    text = table.to_csv(index=False).encode()
    book = io.BytesIO()
    table.to_excel(book)
    old = "d" * 40
    file = Published(
        "t.csv", hashlib.sha256(text).hexdigest(), len(text), "data/t.xlsx", elsewhere=((old, "t.xlsx"),), sheet=True
    )
    own = replace(download.DATASETS["own"], files=(file,))
    monkeypatch.setattr(download, "DATASETS", {"own": own})
    publisher.files[f"/lab/data/{old}/t.xlsx"] = book.getvalue()
    publisher.breaks_after, publisher.breaks = 2000, 1
    download.get("own", tmp_path, base_url=publisher.url)
    assert (tmp_path / "own" / "t.csv").read_bytes() == text
    assert [p.name for p in (tmp_path / "own").iterdir() if p.suffix == ".xlsx"] == []
    for wrong in (b"not a workbook", BODY):
        (tmp_path / "own" / "t.csv").unlink(missing_ok=True)
        publisher.files[f"/lab/data/{old}/t.xlsx"] = wrong
        with pytest.raises(ServiceError, match="other bytes"):
            download.get("own", tmp_path, base_url=publisher.url)


def test_what_this_project_derived_has_no_publisher_and_says_so(tmp_path: Path) -> None:
    for name in ("consortia", "mp_elastic_structures_join", "xrd_perovskite"):
        with pytest.raises(ConfigError, match="has no publisher") as caught:
            download.get(name, tmp_path)
        assert "FEDMAT_DATA" in caught.value.fix
    with pytest.raises(ConfigError, match="did you mean 'obelix'"):
        download.get("obelx", tmp_path)


def test_a_folder_that_cannot_be_written_is_named(publisher: Publisher, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot be written"):
        download.get("own", tmp_path / "file", base_url=publisher.url)


def test_only_one_process_downloads_a_dataset(publisher: Publisher, tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "own" / ".download").mkdir(parents=True)
    with (tmp_path / "own" / ".download" / "lock").open("wb") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(ServiceError, match="another process"):
            download.get("own", tmp_path, base_url=publisher.url)


def test_every_promise_of_the_table_is_complete() -> None:
    for name, dataset in DATASETS.items():
        assert name == dataset.name
        assert dataset.files or dataset.derived
        assert dataset.licence
        assert len({f.name for f in dataset.files} | set(dataset.derived)) == len(dataset.files) + len(dataset.derived)
        for file in dataset.files:
            assert re.fullmatch(r"[0-9a-f]{64}", file.sha256)
            assert re.fullmatch(r"[0-9a-f]{40}", dataset.commit)
            assert Path(file.name).name == file.name


def test_the_table_promises_the_very_files_the_examples_are_checked_with(public_data: Path) -> None:
    for name, dataset in DATASETS.items():
        for file in dataset.files:
            path = public_data / name / file.name
            assert path.stat().st_size == file.size, path
        assert download.present(name, public_data) == (len(dataset.files),) * 2 if dataset.files else True
        known = {f.name for f in dataset.files} | set(dataset.derived)
        there = {p.name for p in (public_data / name).iterdir()}
        assert known <= there
        assert all(re.match(r"SOURCE|LICENSE|README", n) for n in there - known)
    assert download.get("obelix", public_data) == public_data / "obelix"  # complete: no network, nothing written


def test_every_commit_is_the_one_the_source_note_states(public_data: Path) -> None:
    for name, dataset in DATASETS.items():
        note = (public_data / name / "SOURCE.md").read_text()
        if dataset.files:
            assert dataset.commit in note
            assert dataset.repository in note
