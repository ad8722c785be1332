"""A party on its own machine: its folder, and the desk that answers for it.

Knows: the layout of a party's folder (``docs/operator-guide.md``), the party's policy, and how a consortium file and a request become
an answer of the same worker that the in-process engine calls. Refuses to know: how requests arrive (FLARE, a file that a person
carries), other parties, Prefect.

The desk decides; the process it keeps does the work, so that a hang, a crash or the kernel's out-of-memory killer costs one answer.
"""

from __future__ import annotations

import dataclasses
import re
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmat import files, pipeline, policy, wire
from fedmat._version import __version__
from fedmat.config import ConsortiumConfig, load_consortium
from fedmat.domain import Dropout, Rejection
from fedmat.egress import Door
from fedmat.envelopes import ROLES
from fedmat.errors import ConfigError, FedmatError, PolicyRefused, StateError
from fedmat.federation.engine import Failure, ProcessEngine
from fedmat.pipeline import REFERENCE, Run

PARTY, CONSORTIUM, CHARTER, POLICY = "party.json", "consortium.yaml", "charter.json", "policy.yaml"
_FIRST = ("MatchRequest", "AttestRequest")  # what a site is asked first in a run
_FOLDERS = re.compile(r"(?<![\w.])/(?:[^\s/:'\"]+/)+")  # of absolute paths; the file's own name stays
Around = Callable[[str, Callable[[], bytes | Failure]], bytes | Failure]


@dataclass(frozen=True)
class Party:
    """Who a party is, as its folder says.

    Attributes:
        kind: ``site``, or the name of a role.
        site_file: a site's site.yaml; None for a role.
    """

    home: Path
    name: str
    kind: str
    organisation: str
    consortium: str
    host: str
    port: int
    site_file: Path | None

    @classmethod
    def load(cls, home: Path) -> Party:
        """Reads ``party.json``.

        Raises:
            StateError: there is none, or it is damaged.
        """
        path = home / PARTY
        if not path.exists():
            raise StateError(
                f"{home}: is not a party's folder ({PARTY} is missing)", fix="make it with fedmat site join KIT --home"
            )
        try:
            found = files.read_json(path)
            return cls(
                home=home.resolve(),
                name=str(found["party"]),
                kind=str(found["kind"]),
                organisation=str(found["organisation"]),
                consortium=str(found["consortium"]),
                host=str(found["host"]),
                port=int(found["port"]),
                site_file=Path(found["site_file"]) if found["site_file"] else None,
            )
        except (KeyError, TypeError, ValueError):
            raise StateError(f"{path}: damaged", fix="restore it, or join again with the kit") from None

    def run(self, consortium: bytes | None = None) -> Run:
        """Returns the run of a consortium file's bytes on this machine; None: of the file the party joined with."""
        path = self.home / CONSORTIUM
        if consortium is not None and not (path.exists() and path.read_bytes() == consortium):
            path = self.home / "plans" / files.sha256(consortium)[:16] / CONSORTIUM
            if not path.exists():
                files.write_atomic(path, consortium)
        charter = self.home / CHARTER
        return Run(path, self.home, None, None, self.site_file, charter if charter.exists() else None)


class Desk:
    """Answers requests for one party.

    Args:
        around: wraps the work of each request, e.g. in a flow that people can watch; gets the request's kind.
    """

    def __init__(self, home: Path, *, around: Around | None = None) -> None:
        self.party = Party.load(home)
        self._around = around or (lambda _, work: work())
        self._lock = threading.Lock()
        self._known: dict[str, ConsortiumConfig] = {}
        self._charters: dict[str, str] = {}
        self._engine: ProcessEngine | None = None
        self._door: Door | None = None  # of a site: where its answers pass
        self._digest = ""
        self._stamp: tuple[str, ...] = ()

    def answer(self, consortium: bytes, request: bytes, stated: Mapping[str, str] | None = None) -> bytes | Failure:
        """Returns the encoded answer to an encoded request, or why there is none.

        Args:
            consortium: the consortium file the coordinator runs.
            stated: versions the coordinator runs: ``fedmat`` and ``contract``.
        """
        return _without_paths(self._answer(consortium, request, stated or {}))

    def _answer(self, consortium: bytes, request: bytes, stated: Mapping[str, str]) -> bytes | Failure:
        name = self.party.name
        with self._lock:
            try:
                _same_versions(name, stated)
                config = self._admit(consortium)
                kind = wire.kind_of(request)
            except PolicyRefused as error:
                return Rejection(name, "policy", error.what)
            except FedmatError as error:
                return Dropout(name, "refused", error.what)
            engine = self._worker(consortium, anew=kind in _FIRST)

            def work() -> bytes | Failure:
                return engine.exchange({name: request}, config.plan.deadline_s)[0][0]

            reply = self._around(kind, work)
            if isinstance(reply, Dropout) and reply.reason in ("crashed", "late"):  # before the next request, not within it
                threading.Thread(target=self._again, args=(engine,), daemon=True).start()
            return self._released(reply, request)

    def warm(self, *, forked: bool = False) -> None:
        """Starts the process that does the work, for the consortium file the party joined with, so that no round waits for it.

        Args:
            forked: as in :meth:`fedmat.federation.engine.ProcessEngine.start`.
        """
        with self._lock, suppress(FedmatError):
            consortium = (self.party.home / CONSORTIUM).read_bytes()
            self._admit(consortium)
            self._worker(consortium).start(self.party.name, forked=forked)

    def _again(self, engine: ProcessEngine) -> None:
        with self._lock:
            if engine is self._engine:
                engine.start(self.party.name)

    def close(self) -> None:
        """Ends the process that does the work."""
        with self._lock:
            if self._engine:
                self._engine.close()
                self._engine = None

    def _admit(self, consortium: bytes) -> ConsortiumConfig:
        """Returns the consortium file's settings if this party agrees to them; what it agreed to is in its folder."""
        digest = files.sha256(consortium)
        if digest not in self._known:
            run = self.party.run(consortium)
            config = load_consortium(run.consortium_file)
            if config.name != self.party.consortium:
                raise ConfigError(
                    f"{self.party.name}: asked to work for {config.name}, but joined {self.party.consortium}",
                    fix="join that consortium in another folder",
                )
            if self.party.name not in (*config.roster, *ROLES, REFERENCE):
                raise ConfigError(
                    f"{self.party.name} is no member in the consortium file that was sent", fix="ask the operator"
                )
            charter = pipeline.read_charter(run) if run.charter_file else None
            self._charters[digest] = charter.sha256 if charter else ""
            self._known[digest] = config
        config = self._known[digest]
        if self.party.kind == "site":  # every time: a policy that was tightened counts at once
            policy.load(self.party.home / POLICY).admit(config, self._charters[digest])
        return config

    def _released(self, reply: bytes | Failure, request: bytes) -> bytes | Failure:
        """Lets an answer go if the site's policy permits its kind and size, and writes it down first."""
        if self._door is None or not isinstance(reply, bytes):
            return reply
        path = self.party.home / POLICY
        try:
            policy.load(path).release(wire.kind_of(reply), len(reply))
            self._door.note(reply, request, clause="outbound.kinds", policy_sha256=files.sha256_file(path))
        except PolicyRefused as error:
            return Rejection(self.party.name, "policy", error.what)
        except FedmatError as error:  # a policy that cannot be read permits nothing, and nothing leaves unwritten
            return Dropout(self.party.name, "refused", error.what)
        return reply

    def _worker(self, consortium: bytes, *, anew: bool = False) -> ProcessEngine:
        """Returns the process that does the work; at the start of a run one that knows the data as they now are."""
        digest = files.sha256(consortium)
        if self._engine is None or self._digest != digest or (anew and self._stamp != self._inputs()):
            if self._engine:
                self._engine.close()
            run, site = self.party.run(consortium), self.party.kind == "site"
            build: Any = pipeline.build_handler if site else pipeline.build_role
            self._engine = ProcessEngine({self.party.name: (build, (run, self.party.name))})
            self._door = pipeline.door(run, self.party.name) if site else None
            self._digest, self._stamp = digest, self._inputs()
        return self._engine

    def _inputs(self) -> tuple[str, ...]:
        """Digests of what the working process reads once: the data's manifest, whether they were refused, secret, charter."""
        home = self.party.home
        folder = self.party.run().party_folder(self.party.name)
        read = (folder / "manifest.json", folder / pipeline.REFUSED, home / pipeline.SECRET, home / CHARTER)
        return tuple(files.sha256_file(p) if p.exists() else "" for p in read)


def _without_paths(reply: bytes | Failure) -> bytes | Failure:
    """Returns a failure with folders cut from the paths in its text: where things lie at a party is nobody else's business."""
    if isinstance(reply, bytes):
        return reply
    return dataclasses.replace(reply, detail=_FOLDERS.sub("", reply.detail))


def _same_versions(party: str, stated: Mapping[str, str]) -> None:
    from fedmat.data.contract import CONTRACT_VERSION

    for what, ours in (("contract", CONTRACT_VERSION), ("fedmat", __version__)):
        theirs = stated.get(what, ours)
        if theirs.split(".")[:2] != ours.split(".")[:2]:
            raise ConfigError(
                f"{party}: version of {what} here is {ours}, at the coordinator {theirs}",
                fix="install the same release of fedmat on both sides, then prepare the site's data again",
            )
