"""A party that comes to the stage's server for one test, by the whole way of files that people carry.

It is the auditor: the plan of the stage needs none, so no order of another test waits for it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from flare_scene import Scene, wait_for

from fedmat import credentials, files, provision
from flows import parties
from flows.services import Child

NAME, OWNER = "auditor", "Office"
STARTUP = Path("flare/startup")


@dataclass
class Visitor:
    """A party with a folder of its own, and its FLARE client."""

    scene: Scene
    home: Path
    child: Child | None = None
    since: float = 0.0

    @property
    def project(self) -> Path:
        return self.scene.stage.project

    def join(self) -> None:
        """Is invited, makes a key and gets a certificate: the whole way, through the files that people carry."""
        now = datetime.now(UTC)
        kit = provision.read_kit(provision.invite(self.project, NAME, now, organisation=OWNER), now)
        request = provision.join(kit, self.home)
        self.install(request)

    def install(self, request: Path) -> None:
        """The operator signs a request, the party installs what comes back."""
        now = datetime.now(UTC)
        made = provision.admit(self.project, request.read_bytes(), now, replace_key=True)
        provision.install(self.home, made.certificate.read_bytes(), now)

    def certify(self, begins: timedelta, days: int) -> None:
        """Puts a certificate of the consortium's own root in force that counts for other days."""
        key = credentials.read_key(self.home / STARTUP / "client.key")
        root = provision.read_project(self.project).root
        pem = credentials.issue(
            root, key.public_key(), name=NAME, organisation=OWNER, purpose="party", now=datetime.now(UTC) + begins, days=days
        )
        files.write_atomic(self.home / STARTUP / "client.crt", pem, private=True)

    def start(self) -> None:
        """Starts its FLARE client, past every check that fedmat does before."""
        self.child, self.since = parties.client_child(self.home), time.time()

    def stop(self) -> None:
        if self.child is not None:
            self.child.stop(2.0)
            self.child = None

    def trouble(self) -> str:
        """What its log complains about, as soon as it does."""
        assert self.child is not None
        log = self.child.log
        wait_for(lambda: parties.trouble(log), 60.0, "a complaint in its log")
        return str(parties.trouble(log))

    def connected(self) -> bool:
        """Whether the server has heard of it since it was started."""
        with self.scene.session() as session:
            return session.system().parties.get(NAME, 0.0) > self.since
