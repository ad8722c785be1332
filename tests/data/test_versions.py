"""Laws of a site's data versions: identified, restorable, never more than what was admitted, never a loss."""

from __future__ import annotations

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import pytest

from fedmat.data import versions
from fedmat.errors import ConfigError, ServiceError, StateError
from fedmat.files import canonical_json, sha256, sha256_file, write_json

NOW = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)
CANARY = "CANARY5519"


def snapshot(folder: Path, rows: int) -> str:
    """Writes what ``records.prepare`` leaves behind, with a canary in every place that must not be committed."""
    for name in ("quarantine", "features", "state"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "something.csv").write_text(CANARY)
    (folder / "notes.txt").write_text(CANARY)
    pd.DataFrame({"formula": [CANARY] * rows}).to_parquet(folder / "records.parquet", compression=None)
    manifest = {
        "schema": "fedmat/manifest/1",
        "files": {"records.parquet": {"sha256": sha256_file(folder / "records.parquet")}},
    }
    identity = sha256(canonical_json(manifest))
    write_json(folder / "manifest.json", manifest | {"sha256": identity})
    write_json(folder / "validation.json", {"success": True})
    return identity


def publish(folder: Path, **more: object) -> versions.Version:
    return versions.publish(folder, site="alpha", message="accepted records", **{"now": NOW, **more})  # type: ignore[arg-type]


def rows(folder: Path) -> int:
    return len(pd.read_parquet(folder / "records.parquet"))


def git(folder: Path, *arguments: str) -> bytes:
    return subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, check=True).stdout


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home inside another git checkout that ignores it, on a machine where nobody ever set up git."""
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    outer = tmp_path / "checkout"
    outer.mkdir()
    subprocess.run(["git", "init", "-q", str(outer)], check=True)
    (outer / ".gitignore").write_text(".fedmat/\n")
    return outer / ".fedmat"


def test_a_version_names_the_manifest_and_its_records_are_in_the_remote(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = home / "sites" / "alpha"
    identity = snapshot(folder, 3)
    monkeypatch.setenv("GIT_DIR", str(home / "elsewhere"))  # as inside a git hook
    version = publish(folder)
    monkeypatch.delenv("GIT_DIR")
    assert (version.sha256, version.tag, version.created) == (identity, "v1", "2026-03-04T05:06:07+00:00")
    assert version.remote == str((home / "remotes" / "alpha").resolve())
    assert git(folder, "rev-parse", "HEAD").decode().strip() == version.git_commit
    assert git(folder, "status", "--porcelain") == b""
    stored = [p.read_bytes() for p in (home / "remotes").rglob("*") if p.is_file()]
    assert (folder / "records.parquet").read_bytes() in stored
    assert git(home.parent, "status", "--porcelain", "--ignored") == b"?? .gitignore\n!! .fedmat/\n"


def test_git_admits_nothing_but_the_named_files(home: Path) -> None:
    folder = home / "sites" / "alpha"
    snapshot(folder, 3)
    publish(folder)
    names = git(folder, "ls-files").decode().split()
    assert sorted(names) == sorted([".dvc/.gitignore", ".dvc/config", ".dvcignore", ".gitignore", *versions.KEPT])
    everything = git(folder, "cat-file", "--batch-all-objects", "--batch")
    assert b"fedmat/manifest/1" in everything
    assert CANARY.encode() not in everything


def test_unchanged_data_make_no_new_version_and_changed_data_do(home: Path) -> None:
    folder = home / "sites" / "alpha"
    snapshot(folder, 3)
    first = publish(folder)
    later = NOW.replace(year=2027)
    assert publish(folder, now=later) == first
    snapshot(folder, 3)
    assert publish(folder, now=later) == first
    snapshot(folder, 4)
    second = publish(folder, now=later)
    assert (second.tag, second.sha256 != first.sha256) == ("v2", True)
    snapshot(folder, 3)  # back to earlier data: a new version with the earlier identity
    third = publish(folder, now=later)
    assert (third.tag, third.sha256) == ("v3", first.sha256)
    assert versions.history(folder) == (first, second, third)


def test_the_same_snapshot_at_the_same_time_is_the_same_commit(tmp_path: Path) -> None:
    commits = set()
    for name in ("one", "two"):
        folder = tmp_path / name / "sites" / "alpha"
        snapshot(folder, 3)
        commits.add(publish(folder).git_commit)
    assert len(commits) == 1


def test_every_version_can_be_restored_from_the_remote_alone(home: Path) -> None:
    folder = home / "sites" / "alpha"
    published = []
    for n in (3, 4, 5):
        snapshot(folder, n)
        published.append(publish(folder))
    for n, version in zip((3, 4, 5), published, strict=True):
        shutil.rmtree(folder / ".dvc" / "cache")
        (folder / "records.parquet").unlink()
        assert versions.checkout(folder, version.tag) == version
        assert rows(folder) == n
    assert (folder / "quarantine" / "something.csv").read_text() == CANARY


def test_the_home_can_be_moved_as_a_whole(tmp_path: Path) -> None:
    folder = tmp_path / "old" / "sites" / "alpha"
    snapshot(folder, 3)
    publish(folder)
    shutil.move(tmp_path / "old", tmp_path / "new")
    folder = tmp_path / "new" / "sites" / "alpha"
    snapshot(folder, 4)
    assert publish(folder).remote == str((tmp_path / "new" / "remotes" / "alpha").resolve())
    shutil.rmtree(folder / ".dvc" / "cache")
    versions.checkout(folder, "v1")
    assert rows(folder) == 3


def test_a_site_may_name_its_own_remote_and_it_is_remembered(tmp_path: Path) -> None:
    folder = tmp_path / "sites" / "alpha"
    snapshot(folder, 3)
    assert publish(folder, remote=tmp_path / "vault").remote == str((tmp_path / "vault").resolve())
    snapshot(folder, 4)
    assert publish(folder).remote == str((tmp_path / "vault").resolve())
    assert not (tmp_path / "remotes").exists()


def test_a_lost_remote_is_filled_again_and_a_lost_version_is_refused_without_loss(home: Path) -> None:
    folder = home / "sites" / "alpha"
    for n in (3, 4):
        snapshot(folder, n)
        publish(folder)
    shutil.rmtree(home / "remotes")
    shutil.rmtree(folder / ".dvc" / "cache")
    before = {name: (folder / name).read_bytes() for name in ("records.parquet", "manifest.json")}
    with pytest.raises(StateError, match="v1 are missing or damaged"):
        versions.checkout(folder, "v1")
    assert {name: (folder / name).read_bytes() for name in before} == before
    publish(folder)
    shutil.rmtree(folder / ".dvc" / "cache")
    versions.checkout(folder, "v2")
    assert rows(folder) == 4


def test_one_flipped_bit_in_the_storage_is_detected(home: Path) -> None:
    folder = home / "sites" / "alpha"
    for n in (3, 4):
        snapshot(folder, n)
        publish(folder)
    old = next(
        p
        for p in (folder / ".dvc" / "cache").rglob("*")
        if p.is_file() and p.read_bytes() != (folder / "records.parquet").read_bytes()
    )
    data = bytearray(old.read_bytes())
    data[len(data) // 2] ^= 1
    old.chmod(0o644)
    old.write_bytes(data)
    with pytest.raises(StateError, match="damaged"):
        versions.checkout(folder, "v1")
    assert rows(folder) == 4


def test_an_unpublished_snapshot_is_not_overwritten(home: Path) -> None:
    folder = home / "sites" / "alpha"
    snapshot(folder, 3)
    publish(folder)
    snapshot(folder, 4)
    with pytest.raises(StateError, match="never published"):
        versions.checkout(folder, "v1")
    assert rows(folder) == 4


def test_an_unknown_version_is_refused_with_the_nearest_one(home: Path) -> None:
    folder = home / "sites" / "alpha"
    assert versions.history(folder) == ()
    snapshot(folder, 3)
    publish(folder)
    with pytest.raises(ConfigError, match="did you mean 'v1'"):
        versions.checkout(folder, "V1")


def test_what_is_no_snapshot_is_not_published(tmp_path: Path) -> None:
    folder = tmp_path / "sites" / "alpha"
    folder.mkdir(parents=True)
    with pytest.raises(StateError, match="manifest.json"):
        publish(folder)
    snapshot(folder, 3)
    (folder / "records.parquet").write_bytes(b"half")
    with pytest.raises(StateError, match="vouches"):
        publish(folder)
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(StateError, match="not a manifest"):
        publish(folder)
    assert not (folder / ".git").exists()


def test_a_publication_cut_short_at_any_step_is_completed_by_the_next(home: Path) -> None:
    folder = home / "sites" / "alpha"
    snapshot(folder, 3)
    publish(folder)
    git(folder, "tag", "-d", "v1")  # killed between commit and tag
    assert publish(folder).tag == "v1"
    (folder / ".dvc" / "config").unlink()  # killed while DVC was set up
    assert publish(folder).tag == "v1"
    (folder / ".git" / "index.lock").touch()  # killed inside git
    snapshot(folder, 4)
    with pytest.raises(ServiceError, match=r"index\.lock"):
        publish(folder)
    (folder / ".git" / "index.lock").unlink()
    assert publish(folder).tag == "v2"


def test_a_remote_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "sites" / "alpha"
    snapshot(folder, 3)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ServiceError) as caught:
        publish(folder, remote=tmp_path / "file" / "remote")
    assert caught.value.fix
    assert publish(folder, remote=tmp_path / "vault").tag == "v1"


def test_several_sites_may_be_published_at_once(tmp_path: Path) -> None:
    folders = [tmp_path / "sites" / name for name in ("a1", "b2", "c3")]
    for n, folder in enumerate(folders, start=2):
        snapshot(folder, n)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda f: versions.publish(f, site=f.name, message="m", now=NOW), folders))
    assert [v.tag for v in found] == ["v1"] * 3
    assert len({v.sha256 for v in found}) == 3
