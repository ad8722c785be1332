"""The store in PostgreSQL: the laws of every store, against a real server that these tests start and stop themselves."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from ledger_suite import ORIGIN, LedgerContract, some

from fedmat.ledger.log import Log

pytestmark = pytest.mark.postgres

_NUMBERS = count()


def programs() -> Path | None:
    """The folder of the server's programs: that of the newest version installed, or where PATH leads."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: int(p.parts[-3].split(".")[0]))
    on_path = shutil.which("initdb")
    if found:
        return found[-1].parent
    return Path(on_path).resolve().parent if on_path else None


def unprivileged() -> list[str]:
    """What to put before a command so that it runs as somebody else than root, whom the server refuses."""
    if os.getuid() != 0:
        return []
    if not shutil.which("setpriv"):
        pytest.skip("PostgreSQL does not run as root, and there is no setpriv to become somebody else")
    user = server_user()
    return ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups", "--"]


def server_user() -> pwd.struct_passwd:
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    pytest.skip("PostgreSQL does not run as root, and there is no user postgres or nobody")


@pytest.fixture(scope="module")
def server() -> Iterator[Path]:
    """A server on a socket in a folder of its own; nothing listens on the network."""
    bin_ = programs()
    if bin_ is None or not (bin_ / "pg_ctl").exists():
        pytest.skip("no PostgreSQL server here (initdb and pg_ctl are neither on PATH nor in /usr/lib/postgresql)")
    become = unprivileged()
    folder = Path(tempfile.mkdtemp(prefix="fedmat-pg-"))  # not pytest's: only root may enter that, and its name is too long
    try:
        if become:
            os.chown(folder, server_user().pw_uid, server_user().pw_gid)
        data = folder / "data"
        # initdb itself need not be fast about the disk; the server keeps fsync on, as a ledger's must
        make = [bin_ / "initdb", "-D", data, "-U", "ledger", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"]
        quiet(become, make, folder)
        options = f"-k {folder} -c listen_addresses='' -c shared_buffers=16MB"
        quiet(become, [bin_ / "pg_ctl", "-D", data, "-l", folder / "log", "-w", "-t", "60", "-o", options, "start"], folder)
        try:
            yield folder
        finally:
            quiet(become, [bin_ / "pg_ctl", "-D", data, "-m", "immediate", "-w", "stop"], folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def quiet(become: list[str], command: list[object], folder: Path) -> None:
    done = subprocess.run(
        [*become, *map(str, command)], cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, timeout=120, check=False
    )
    assert done.returncode == 0, f"{command[0]} failed"


def url(folder: Path, database: str) -> str:
    return f"postgresql://ledger@/{database}?unix_sock={folder}/.s.PGSQL.5432"


def statement(folder: Path, text: str, database: str = "postgres") -> None:
    bin_ = programs()
    assert bin_ is not None
    command = [bin_ / "psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", "-h", folder, "-U", "ledger", "-d", database, "-c", text]
    subprocess.run([str(c) for c in command], check=True, cwd=folder, stdout=subprocess.DEVNULL)


class TestPostgresLog(LedgerContract):
    KILLS = 3

    @pytest.fixture
    def where(self, server: Path) -> str:
        name = f"ledger_{next(_NUMBERS)}"
        statement(server, f"CREATE DATABASE {name}")
        return url(server, name)

    def _tamper(self, log: Log, text: str) -> None:
        database = log._engine.url.database
        assert database is not None
        folder = Path(str(log._engine.url.query["unix_sock"])).parent
        statement(folder, f"SET session_replication_role = replica; {text}", database)  # no trigger is asked

    def test_no_table_can_be_emptied(self, log: Log) -> None:
        log.append(some(2))
        for table in ("entry", "node", "checkpoint", "cosignature", "meta"):
            with pytest.raises(Exception, match="append-only"), log._engine.begin() as db:
                db.exec_driver_sql(f"TRUNCATE {table}")
        assert log.check() == ()

    def test_a_server_that_would_not_wait_for_the_disk_is_made_to(self, log: Log, server: Path) -> None:
        database = log._engine.url.database
        statement(server, f"ALTER DATABASE {database} SET synchronous_commit = off")
        with Log.open(url(server, str(database))) as again:
            with again._reading() as db:
                assert db.exec_driver_sql("SHOW synchronous_commit").scalar() == "off"
            with again._writing() as db:
                assert db.exec_driver_sql("SHOW synchronous_commit").scalar() == "on"

    def test_the_url_may_name_its_driver(self, where: str, log: Log) -> None:
        log.append(some(1))
        with Log.open(where.replace("postgresql://", "postgresql+pg8000://"), ORIGIN) as again:
            assert again.size == 1
