"""Versions of a site's accepted data: the site's own git repository, DVC repository and remote, all on the site's machine.

Knows: the snapshot ``records`` wrote (manifest, validation, records) and how to keep, list and restore its versions. The
records themselves go into DVC's storage, their manifest into git; git admits nothing but the few named files, so that
neither the quarantine nor anything later put into the workspace is ever committed.
Refuses to know: what a record is, other sites, and any network but the remote the site names.

References:
    DVC: R. Kuprieiev et al., "DVC: Data Version Control", https://dvc.org. Git: S. Chacon, B. Straub, "Pro Git", 2014.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
import os
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from fedmat.errors import ConfigError, DataError, ServiceError, StateError
from fedmat.files import read_json, sha256, sha256_file, write_atomic

DATA = "records.parquet"
POINTER = f"{DATA}.dvc"
KEPT = ("manifest.json", "validation.json", POINTER)  # what a version consists of, as git sees it
_ADMITTED = (".gitignore", ".dvcignore", ".dvc/config", ".dvc/.gitignore", *KEPT)
_IGNORE = "\n".join(["/*", "!/.dvc", *(f"!/{name}" for name in _ADMITTED if "/" not in name), ""])
_DVC_IGNORE = "\n".join(["/quarantine", "/features", "/state", ""])
_STORAGE = "storage"
_DVC_LOCK = threading.Lock()  # DVC keeps caches and loggers per process; sites are published one after the other


@dataclass(frozen=True)
class Version:
    """One published state of a site's data.

    Attributes:
        sha256: the manifest's own digest: the identity that the consortium sees.
        git_commit: commit of the site's repository that holds the manifest.
        tag: name of the version in that repository: v1, v2, ...
        remote: folder or URL that holds the records of all versions.
        created: when it was published (ISO 8601, UTC).
        message: what the publisher said.
    """

    sha256: str
    git_commit: str
    tag: str
    remote: str
    created: str = ""
    message: str = ""


def publish(folder: Path, *, site: str, message: str, now: datetime, remote: Path | str | None = None) -> Version:
    """Records the snapshot in ``folder`` as a version and copies its records to the remote; unchanged data make no new one.

    Args:
        folder: the site's workspace, as ``records.prepare`` leaves it.
        message: subject of the commit.
        now: the one clock reading of the run; with equal data it gives the equal commit.
        remote: folder or URL of the DVC remote; by default what it was before, else ``<folder>/../../remotes/<site>``.

    Raises:
        StateError: there is no snapshot, or its records do not match its manifest.
        ServiceError: git or DVC failed.
    """
    identity = _identity(folder)
    _start_git(folder)
    where = _start_dvc(folder, site, remote)
    head = _head(folder)
    known = head is not None and _manifest_at(folder, head) == (folder / "manifest.json").read_bytes()
    _store(folder, add=not known)
    if not known:
        _git(folder, "add", "--", *(name for name in _ADMITTED if (folder / name).is_file()))
        gone = [name for name in KEPT if not (folder / name).is_file()]
        _git(folder, "rm", "-q", "--cached", "--ignore-unmatch", "--", *gone) if gone else None
        _git(folder, "commit", "-q", "--allow-empty", "-m", message, "-m", f"site: {site}\nsha256: {identity}", now=now)
        head = _head(folder)
    if head is None:
        raise ServiceError(f"{folder}: git made no commit", fix=f"run 'git -C {folder} status' and mend what it names")
    tags = _git(folder, "tag", "--points-at", head, "--list", "v*").split()
    if not tags:  # also when the process was killed between commit and tag
        _git(folder, "tag", "-a", _next_tag(folder), "-m", f"sha256: {identity}", head, now=now)
    return next(v for v in reversed(history(folder)) if v.git_commit == head and v.remote == where)


def history(folder: Path) -> tuple[Version, ...]:
    """Returns the published versions of a workspace, oldest first; empty when nothing was published yet."""
    if not (folder / ".git").exists() or _head(folder) is None:
        return ()
    fields = "%(refname:short)%09%(*objectname)%09%(*committerdate:iso-strict)%09%(*subject)%09%(contents:subject)"
    where = _remote_of(folder)
    versions = []
    for line in _git(folder, "for-each-ref", "--sort=version:refname", f"--format={fields}", "refs/tags/v*").splitlines():
        tag, commit, created, message, subject = line.split("\t")
        if subject.startswith("sha256: "):
            stamp = datetime.fromisoformat(created).astimezone(UTC).isoformat()
            versions.append(Version(subject.removeprefix("sha256: "), commit, tag, where, stamp, message))
    return tuple(versions)


def checkout(folder: Path, tag: str) -> Version:
    """Restores the records, manifest and validation of one version into the workspace.

    Raises:
        ConfigError: there is no such version.
        StateError: the workspace holds a snapshot that was never published, or the version's records are gone.
        ServiceError: git or DVC failed.
    """
    versions = history(folder)
    version = next((v for v in versions if v.tag == tag), None)
    if version is None:
        tags = [v.tag for v in versions]
        near = difflib.get_close_matches(tag, tags, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"it has {', '.join(tags[-8:]) or 'none'}"
        raise ConfigError(f"{folder}: no version '{tag}'; {hint}", fix="name a version that history lists")
    if (folder / "manifest.json").is_file() and read_json(folder / "manifest.json").get("sha256") not in {
        v.sha256 for v in versions
    }:
        raise StateError(f"{folder}: its present snapshot was never published and would be lost", fix="publish it first")
    data = _fetch(folder, version)  # whole and verified before anything in the workspace changes
    present = _git(folder, "ls-tree", "--name-only", version.git_commit, "--", *KEPT).split()
    _git(folder, "checkout", "-q", "-f", version.git_commit, "--", *present)
    for name in set(KEPT) - set(present):
        (folder / name).unlink(missing_ok=True)
    _git(folder, "reset", "-q")  # the next publication stages what it commits
    write_atomic(folder / DATA, data)
    _identity(folder)
    return version


# --- the snapshot ------------------------------------------------------------------------------------------------


def _identity(folder: Path) -> str:
    """Returns the manifest's digest after checking that the records are the ones it vouches for."""
    manifest = read_json(folder / "manifest.json")
    try:
        identity, promised = str(manifest["sha256"]), str(manifest["files"][DATA]["sha256"])
    except (KeyError, TypeError):
        raise StateError(f"{folder / 'manifest.json'}: not a manifest", fix="prepare the site again") from None
    if not (folder / DATA).is_file() or sha256_file(folder / DATA) != promised:
        raise StateError(f"{folder / DATA}: missing, or not the file its manifest vouches for", fix="prepare the site again")
    return identity


def _manifest_at(folder: Path, commit: str) -> bytes:
    done = _run_git(folder, "show", f"{commit}:manifest.json")
    return done.stdout if done.returncode == 0 else b""


def _next_tag(folder: Path) -> str:
    taken = [int(t[1:]) for t in _git(folder, "tag", "--list", "v*").split() if t[1:].isdigit()]
    return f"v{max(taken, default=0) + 1}"


# --- git ---------------------------------------------------------------------------------------------------------


def _start_git(folder: Path) -> None:
    if not (folder / ".git").exists():  # of its own, even inside another checkout
        _git(folder, "init", "-q", "-b", "main", "--template=")
    for name, text in ((".gitignore", _IGNORE), (".dvcignore", _DVC_IGNORE)):
        if not (folder / name).is_file() or (folder / name).read_text(encoding="utf-8") != text:
            write_atomic(folder / name, text.encode())


def _head(folder: Path) -> str | None:
    done = _run_git(folder, "rev-parse", "--verify", "-q", "HEAD^{commit}")
    return done.stdout.decode().strip() if done.returncode == 0 else None


def _git(folder: Path, *arguments: str, now: datetime | None = None) -> str:
    done = _run_git(folder, *arguments, now=now)
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise ServiceError(
            f"{folder}: git {arguments[0]} failed: {said[-1] if said else f'exit status {done.returncode}'}",
            fix="mend what git names (a file .git/index.lock without a running git may be removed) and run again",
        )
    return done.stdout.decode()


def _run_git(folder: Path, *arguments: str, now: datetime | None = None) -> subprocess.CompletedProcess[bytes]:
    """Runs git for this repository alone: no inherited repository, identity, signature, hook or editor."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    environment |= {"GIT_TERMINAL_PROMPT": "0", "GIT_EDITOR": "true", "LC_ALL": "C"}
    if now is not None:
        stamp = f"{int(now.timestamp())} +0000"
        environment |= {"GIT_AUTHOR_DATE": stamp, "GIT_COMMITTER_DATE": stamp}
    settings = {
        "user.name": "fedmat",
        "user.email": "fedmat@localhost",
        "commit.gpgsign": "false",
        "tag.gpgsign": "false",
        "tag.forceSignAnnotated": "false",
        "core.hooksPath": os.devnull,
        "core.autocrlf": "false",
        "core.excludesFile": os.devnull,
        "safe.directory": str(folder.resolve()),
        "gc.auto": "0",
    }
    options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
    root = folder.resolve()
    command = ["git", *options, f"--git-dir={root / '.git'}", f"--work-tree={root}", *arguments]
    try:
        return subprocess.run(command, cwd=root, env=environment, capture_output=True, check=False, stdin=subprocess.DEVNULL)
    except FileNotFoundError as error:
        raise ServiceError("git is not installed, or not on the PATH", fix="install git") from error


# --- DVC ---------------------------------------------------------------------------------------------------------


def _start_dvc(folder: Path, site: str, remote: Path | str | None) -> str:
    """Makes ``folder`` a DVC repository with one remote; returns where that is."""
    config = folder / ".dvc" / "config"
    if not config.is_file():
        with _translated(folder, "init"), _DVC_LOCK:
            _dvc_module().Repo.init(str(folder), force=(folder / ".dvc").is_dir()).close()
    url = _configured_url(folder)
    if remote is not None or not url:
        url = str(remote) if remote is not None else str(folder.resolve().parent.parent / "remotes" / site)
        if "://" not in url:  # relative, so that the home folder can be moved as a whole
            url = Path(os.path.relpath(Path(url).resolve(), config.parent.resolve())).as_posix()
    text = (
        "[core]\n    analytics = false\n    check_update = false\n    autostage = false\n"
        f"    remote = {_STORAGE}\n['remote \"{_STORAGE}\"']\n    url = {url}\n"
    )
    if not config.is_file() or config.read_text(encoding="utf-8") != text:
        write_atomic(config, text.encode())
    return _remote_of(folder)


def _configured_url(folder: Path) -> str:
    """Returns the remote's URL as written in .dvc/config, "" when there is none."""
    config = folder / ".dvc" / "config"
    lines = config.read_text(encoding="utf-8").splitlines() if config.is_file() else []
    return next((line.partition("=")[2].strip() for line in lines if line.strip().startswith("url")), "")


def _remote_of(folder: Path) -> str:
    url = _configured_url(folder)
    return url if "://" in url else str((folder / ".dvc" / url).resolve())


def _store(folder: Path, *, add: bool) -> None:
    """Puts the records into DVC's storage and into the remote, whatever DVC's index remembers of either."""
    with _dvc(folder) as repo:
        if add or not (folder / POINTER).is_file() or not _cached(repo, _pointer(folder)).is_file():
            repo.add([str(folder / DATA)])
        _transferred(repo.cloud.push([_hash(_pointer(folder))], remote=_STORAGE), folder)


def _fetch(folder: Path, version: Version) -> bytes:
    """Returns the records of a version from the cache or the remote, checked against that version's manifest."""
    pointer = _git(folder, "show", f"{version.git_commit}:{POINTER}")
    manifest = json.loads(_manifest_at(folder, version.git_commit))
    with _dvc(folder) as repo:
        cached = _cached(repo, pointer)
        if not cached.is_file():
            with contextlib.suppress(Exception):  # any of DVC's and its file systems' errors: the next lines judge the result
                repo.cloud.pull([_hash(pointer)], remote=_STORAGE)
        data = cached.read_bytes() if cached.is_file() else b""
    if sha256(data) != manifest["files"][DATA]["sha256"]:
        raise StateError(
            f"{folder}: the records of version {version.tag} are missing or damaged, in the workspace's cache and in {version.remote}",
            fix="restore the remote from a backup, remove .dvc/cache of the workspace, then run again",
        )
    return data


def _pointer(folder: Path) -> str:
    return (folder / POINTER).read_text(encoding="utf-8")


def _hash(pointer: str) -> Any:
    from dvc_data.hashfile.hash_info import HashInfo

    return HashInfo("md5", str(yaml.safe_load(pointer)["outs"][0]["md5"]))


def _cached(repo: Any, pointer: str) -> Path:
    return Path(repo.cache.local.oid_to_path(_hash(pointer).value))


def _transferred(result: Any, folder: Path) -> None:
    if result.failed:
        raise ServiceError(
            f"{folder}: the records could not be copied to the remote", fix="check that the remote can be written"
        )


def _dvc_module() -> Any:
    import fedmat.telemetry  # noqa: F401  before DVC: no analytics, no update check

    os.environ.setdefault("DVC_NO_ANALYTICS", "1")
    import dvc.repo

    logging.getLogger("dvc").setLevel(logging.CRITICAL)  # also silences its progress bars
    return dvc.repo


@contextlib.contextmanager
def _dvc(folder: Path) -> Iterator[Any]:
    """Yields the open DVC repository of ``folder``; its index stays in the workspace, not in a folder all users share."""
    with _translated(folder, "repository"), _DVC_LOCK:
        cache = folder.resolve() / ".dvc" / "tmp" / "site_cache"
        repo = _dvc_module().Repo(str(folder.resolve()), config={"core": {"site_cache_dir": str(cache)}})
        try:
            yield repo
        finally:
            repo.close()


@contextlib.contextmanager
def _translated(folder: Path, doing: str) -> Iterator[None]:
    try:
        yield
    except (ServiceError, StateError, ConfigError, DataError):
        raise
    except Exception as error:
        if type(error).__name__ == "LockError":
            raise ServiceError(
                f"{folder}: another process is publishing this site", fix="wait for it, then run again"
            ) from error
        raise ServiceError(
            f"{folder}: DVC {doing} failed ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})",
            fix="check that the disk has room and the remote can be written, then run again",
        ) from error
