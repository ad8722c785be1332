"""Setting up a consortium between organisations: invitations, keys made where they are used, certificates, and their end.

Knows: the operator's project folder, a party's folder, the kit between them, and the settings under which the transport is safe
to run. Refuses to know: the transport itself (fedmat.federation.flare alone does), records, rounds, the clock (``now`` is an
argument). Nothing here is sent by itself: people carry the files, and compare two fingerprints by telephone.

Who does what (docs/provisioning.md):

    operator   :func:`init` once, :func:`invite` a party      -> PARTY.kit, which holds no private key
    party      :func:`join`: checks the kit, makes its key    -> PARTY.request
    operator   :func:`admit`                                  -> PARTY.certificate
    party      :func:`install`, and before each start :func:`check_home`

References:
    RFC 2986 and RFC 4211, section 4 (a request proves that its maker has the key). NVIDIA FLARE 2.9's startup kits, whose file
    names and keys the JSON follows; what differs from FLARE's own defaults, and why, is said where it is written.
"""

from __future__ import annotations

import fcntl
import io
import ipaddress
import json
import os
import re
import secrets
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedmat import credentials, files, kit_settings
from fedmat._version import __version__
from fedmat.config import SLUG, ConsortiumConfig, load_consortium, load_site
from fedmat.credentials import Credential
from fedmat.envelopes import ROLES
from fedmat.errors import ConfigError, ProtocolError, StateError
from fedmat.kit_settings import LOCAL, OPERATOR, OPERATOR_ROLE, REVOKED, ROOT, STARTUP

State = Literal["invited", "admitted", "revoked"]
REFERENCE = "reference"
PARTY_ROLES = (*ROLES, REFERENCE)
RESERVED = ("server", "operator", "admin", "all", "client")  # words of the transport's own, or of its commands
PORT = 8002
ROOT_DAYS, DAYS = 3650, 365
SOON = timedelta(days=30)

CONSORTIUM, CHARTER, KIT, PARTY, POLICY = "consortium.yaml", "charter.json", "kit.json", "party.json", "policy.yaml"
PROJECT, MEMBERS = "project.json", "members.json"
REQUEST, CERTIFICATE, KIT_FILE = "{}.request", "{}.certificate", "{}.kit"
_ROOT_KEY, _ROOT_CERTIFICATE = "ca/ca.key", "ca/ca.crt"
_RENEWAL = "renewal"
_PRIVACY = f"{LOCAL}/privacy.json"
_KIT_LABEL, _REQUEST_LABEL = b"fedmat/kit/v1|", b"fedmat/request/v1|"

# A kit is opened before anything in it is trusted: nothing else may be in it, and nothing larger.
_KIT_LIMITS = {
    KIT: 64 << 10,
    CONSORTIUM: 1 << 20,
    CHARTER: 8 << 20,
    f"{STARTUP}/fed_client.json": 64 << 10,
    f"{STARTUP}/{ROOT}": 64 << 10,
    f"{LOCAL}/resources.json": 64 << 10,
    f"{LOCAL}/authorization.json": 64 << 10,
    f"{LOCAL}/log_config.json": 64 << 10,
}
_MESSAGE_LIMIT = 256 << 10
_ASK_PARTY = "ask the party for the request that its kit made, unchanged"


@dataclass(frozen=True)
class Member:
    """Where one party stands, as the operator's ``members.json`` says.

    Attributes:
        serial: of its certificate, hex.
        fingerprint: hex SHA-256 of its public key; what is compared by telephone, and what stays when a certificate is renewed
            without a new key.
        not_after: ISO time at which its certificate ends.
    """

    organisation: str
    state: State
    serial: str | None = None
    fingerprint: str | None = None
    not_after: str | None = None


@dataclass(frozen=True)
class Project:
    """The operator's folder, read and ready to use.

    Attributes:
        host, port: where the server is reached; parties know it by this name only.
        members: every party that was invited.
        warnings: what will be wrong soon, in words.
    """

    folder: Path
    consortium: str
    host: str
    port: int
    members: Mapping[str, Member]
    revoked: tuple[str, ...]
    warnings: tuple[str, ...] = ()

    @cached_property
    def config(self) -> ConsortiumConfig:
        """The consortium file's settings."""
        return load_consortium(self.folder / CONSORTIUM)

    @cached_property
    def root(self) -> Credential:
        """The consortium's root with its key: whoever holds it decides who takes part. It may be kept elsewhere in between.

        Raises:
            StateError: its key is not here, or as in :func:`fedmat.credentials.load`.
        """
        if not (self.folder / _ROOT_KEY).exists():
            raise StateError(
                f"{self.folder / _ROOT_KEY}: the root's key is not here",
                fix="put it there for as long as you invite, admit or renew",
            )
        return credentials.load(self.folder / _ROOT_CERTIFICATE, self.folder / _ROOT_KEY)

    @property
    def server(self) -> Path:
        """The server's workspace."""
        return self.folder / "server"

    @property
    def admin(self) -> Path:
        """The operator's own kit, which submits jobs."""
        return self.folder / "admin"

    @property
    def operator(self) -> Credential:
        """The operator's own key and certificate."""
        return credentials.load(self.admin / "startup/client.crt", self.admin / "startup/client.key")


@dataclass(frozen=True)
class PartyHome:
    """A party's folder, checked.

    Attributes:
        kind: ``site``, or the role's name.
        not_after: when its certificate ends.
        warnings: what will be wrong soon, in words.
    """

    folder: Path
    party: str
    kind: str
    organisation: str
    consortium: str
    host: str
    port: int
    site_file: Path | None
    not_after: datetime
    warnings: tuple[str, ...] = ()

    @property
    def flare(self) -> Path:
        """The transport's workspace."""
        return self.folder / "flare"

    @property
    def root(self) -> bytes:
        """The consortium's root certificate, PEM."""
        return (self.folder / STARTUP / ROOT).read_bytes()

    @property
    def credential(self) -> Credential:
        """The party's key and certificate."""
        return _credential(self.folder)


@dataclass(frozen=True)
class Kit:
    """An invitation, verified: it is whole, and the root certificate in it signed its list of files.

    Attributes:
        files: name relative to the party's folder -> bytes, ``kit.json`` included.
        root: the root's fingerprint, hex; the operator tells it by telephone.
        warnings: in words.
    """

    consortium: str
    party: str
    kind: str
    organisation: str
    host: str
    port: int
    root: str
    files: Mapping[str, bytes]
    warnings: tuple[str, ...] = ()


# --- the operator ------------------------------------------------------------------------------------------------


def init(
    consortium_file: Path, project: Path, *, host: str, now: datetime, port: int = PORT, days: int = DAYS,
    charter: bytes | None = None,
) -> Project:  # fmt: skip
    """Makes the operator's project folder: a root, the server's kit and the operator's own.

    Args:
        host: name or IPv4 address at which parties reach the server.
        days: how long the server's and the operator's certificates count; the root counts for ten years.
        charter: bytes of the charter; None: of the one that the consortium file names, if it names one.

    Raises:
        ConfigError: the consortium file, host or port is wrong.
        StateError: the folder is there and not empty; nothing was written.
    """
    project = project.resolve()
    config, contents = _consortium_files(consortium_file, charter)
    _check_address(host, port)
    root = credentials.new_root(config.name, now, ROOT_DAYS)
    found = Project(project, config.name, host, port, {}, ())
    contents |= {
        PROJECT: files.json_bytes(
            {
                "schema": "fedmat/project/1",
                "consortium": config.name,
                "host": host,
                "port": port,
                "created": now.date().isoformat(),
            }
        ),
        MEMBERS: files.json_bytes({}),
        REVOKED: files.json_bytes({"serials": []}),
        _ROOT_CERTIFICATE: root.certificate,
        _ROOT_KEY: root.key,
        **_operator_settings(found),
        **_operator_credentials(found, root, now, days),
    }
    _write_tree(project, contents, folders=("kits", "server/transfer", "admin/transfer"))
    return found


def update(consortium_file: Path, project: Path) -> tuple[str, ...]:
    """Takes a changed consortium file, and the charter it names, into the project.

    Returns:
        Members that are new in it and can be invited. Parties that joined get a new kit if they are to hold the new file.

    Raises:
        ConfigError: it is of another consortium, or a party that was invited is missing or of another organisation.
    """
    found = read_project(project)
    config, contents = _consortium_files(consortium_file, None)
    if config.name != found.consortium:
        raise ConfigError(
            f"{consortium_file}: is {config.name}, and {project} is the project of {found.consortium}",
            fix="set up another project for another consortium",
        )
    now = {m.site: m.organisation for m in config.members}
    held = {n: m for n, m in found.members.items() if n not in PARTY_ROLES and m.state != "revoked"}
    wrong = sorted(n for n, m in held.items() if now.get(n) != m.organisation)
    if wrong:
        raise ConfigError(
            f"{consortium_file}: {', '.join(wrong)} was invited, and is not there or belongs to another organisation",
            fix="keep it as it was, or revoke it first: fedmat consortium revoke",
        )
    for name, data in contents.items():
        files.write_atomic(project / name, data, private=True)
    if CHARTER not in contents:
        (project / CHARTER).unlink(missing_ok=True)
    return tuple(sorted(set(now) - set(found.members)))


def invite(project: Path, party: str, now: datetime, *, organisation: str | None = None) -> Path:
    """Writes the kit of a party: what it needs to join, without any private key.

    Args:
        organisation: who runs a role; a site's, and a role's that is in the charter, are known.

    Returns:
        Path of ``PARTY.kit``, which goes to the party.

    Raises:
        ConfigError: the consortium has no such party, its organisation is missing or another one, or it was admitted for
            another one.
        ProtocolError: expired_certificate or not_yet_valid, of the root.
    """
    with _locked(project) as found:
        credentials.check_root(found.root.certificate, now)
        if party == found.host:  # parties know the server by this name alone
            raise ConfigError(f"{party} is the server's own name", fix="give the party or the host another name")
        owner, present = _owner(found, party, organisation), found.members.get(party)
        if present is not None and present.state == "admitted" and present.organisation != owner:
            raise ConfigError(
                f"{party} was admitted for '{present.organisation}', and now '{owner}' is to run it",
                fix="revoke it first: fedmat consortium revoke",
            )
        path = project / "kits" / KIT_FILE.format(party)
        files.write_atomic(path, _zip(_kit_files(found, party, owner, _charter_bytes(project))), private=True)
        if present is None or present.state != "admitted":
            spent = present.fingerprint if present is not None else None  # a revoked key never comes back
            _write_members(project, {**found.members, party: Member(owner, "invited", fingerprint=spent)})
        return path


@dataclass(frozen=True)
class Admitted:
    """What :func:`admit` did.

    Attributes:
        certificate: path of ``PARTY.certificate``, which goes to the party.
        fingerprint: of the party's public key; to be compared by telephone, unless ``vouched``.
        vouched: the party's present key, which was certified before, signed this request for a new one.
        replaced: serial number that was revoked for it.
    """

    party: str
    certificate: Path
    fingerprint: str
    vouched: bool
    replaced: str | None
    not_after: datetime


def admit(
    project: Path,
    request: bytes,
    now: datetime,
    *,
    days: int = DAYS,
    replace_key: bool = False,
    fingerprint: str | None = None,
) -> Admitted:
    """Signs the certificate a party asks for.

    Asking again with the same key gives the same certificate.

    Args:
        replace_key: the party was admitted with another key: revoke that one.
        fingerprint: of the key, as the party told it.

    Raises:
        ProtocolError: bad_request, wrong_consortium, uninvited, wrong_name, no_possession, bad_signature, already_admitted
            (with another key), reused_key (another party's), revoked, wrong_key
            (another fingerprint than the one told).
        StateError: the project is damaged, or its root has ended.
    """
    told = _read_message(request, "fedmat/request/1", "bad_request", "a certificate request")
    with _locked(project) as found:
        party, member = _invited(told, found)
        key = credentials.check_request(_text(told, "request", "bad_request").encode(), party, member.organisation)
        vouched = _check_request_signatures(told, key, found, party, now)
        asked = key_fingerprint(key)
        if fingerprint is not None and _bare(fingerprint) != asked:
            raise ProtocolError(
                "wrong_key", f"the request of {party} is for another key than the one told", fix="somebody else made it, or telephone again"
            )  # fmt: skip
        path = project / "kits" / CERTIFICATE.format(party)
        _check_key_is_new(found, party, member, asked)
        if member.state == "admitted":
            if member.fingerprint == asked and path.is_file() and str(member.not_after) > _iso(now):
                return Admitted(party, path, asked, vouched, None, datetime.fromisoformat(str(member.not_after)))
            if not replace_key:
                raise ProtocolError(
                    "already_admitted",
                    f"{party} was admitted {'with another key' if member.fingerprint != asked else 'with this key before'} "
                    f"(its certificate has serial {member.serial})",
                    fix="telephone the party; if the request is its own, admit it with --replace, which revokes the old certificate",
                )
        certificate = credentials.issue(
            found.root, key, name=party, organisation=member.organisation, purpose="party", now=now, days=days
        )
        replaced = member.serial if member.state == "admitted" else None
        if replaced:  # first: a crash in between leaves two certificates that do not count rather than two that do
            _write_revoked(project, (*found.revoked, replaced))
        files.write_atomic(path, _certificate_message(found, party, certificate), private=True)
        _write_members(project, {**found.members, party: _admitted(member, certificate, asked)})
        return Admitted(party, path, asked, vouched, replaced, credentials.facts(certificate).not_after)


def _invited(told: Mapping[str, Any], project: Project) -> tuple[str, Member]:
    """The member that a request is of."""
    party = _text(told, "party", "bad_request")
    if not re.fullmatch(SLUG, party):
        raise ProtocolError("bad_request", "the name in the request is no party's", fix=_ASK_PARTY)
    root = credentials.facts(project.root.certificate).fingerprint
    if (told.get("consortium"), told.get("root")) != (project.consortium, root):
        raise ProtocolError(
            "wrong_consortium",
            f"the request of {party} is for another consortium than {project.consortium}, or for another root of it",
            fix="give it to the operator whose kit it was made with",
        )
    member = project.members.get(party)
    if member is None:
        raise ProtocolError(
            "uninvited", f"{party} was not invited to {project.consortium}", fix="if it should be: fedmat consortium invite"
        )
    if member.state == "revoked":
        raise ProtocolError(
            "revoked", f"{party} was revoked", fix="if it may come back, with a new key: fedmat consortium invite"
        )
    if told.get("organisation") != member.organisation:
        raise ProtocolError(
            "wrong_name", f"the request of {party} names another organisation than its invitation", fix=_ASK_PARTY
        )
    return party, member


def _check_key_is_new(project: Project, party: str, member: Member, fingerprint: str) -> None:
    if member.state == "invited" and member.fingerprint == fingerprint:
        raise ProtocolError(
            "revoked", f"the key of {party} was revoked", fix=f"at {party}: join with the kit in a new folder, which makes a new key"
        )  # fmt: skip
    if fingerprint in {m.fingerprint for name, m in project.members.items() if name != party}:
        raise ProtocolError("reused_key", f"{party} gives another party's key as its own", fix=_ASK_PARTY)


def revoke(project: Path, party: str) -> str | None:
    """Ends a party's membership: its certificate counts no more, from its next connection on.

    Returns:
        The serial number that was revoked; None if it had no certificate yet.

    Raises:
        ConfigError: the party was never invited.
    """
    with _locked(project) as found:
        member = found.members.get(party)
        if member is None:
            raise ConfigError(f"{party} was not invited to {found.consortium}", fix="fedmat consortium members names all")
        if member.serial and member.serial not in found.revoked:
            _write_revoked(project, (*found.revoked, member.serial))
        _write_members(project, {**found.members, party: replace(member, state="revoked")})
        for name in (KIT_FILE, CERTIFICATE):
            (project / "kits" / name.format(party)).unlink(missing_ok=True)
        return member.serial


def renew_project(project: Path, now: datetime, *, days: int = DAYS) -> datetime:
    """Gives the server and the operator new keys and certificates, and writes their settings anew (e.g. after a move).

    Parties notice nothing: they know the root and the host's name. The server has to be started again.

    Returns:
        When the new certificates end.
    """
    with _locked(project) as found:
        fresh = {**_operator_settings(found), **_operator_credentials(found, found.root, now, days)}
        old = [credentials.facts((project / p).read_bytes()).serial for p in _OPERATOR_CERTIFICATES if (project / p).is_file()]
        for path, data in fresh.items():
            files.write_atomic(project / path, data, private=True)
        _write_revoked(project, (*found.revoked, *(s for s in old if s not in found.revoked)))
        return min(credentials.facts(fresh[p]).not_after for p in _OPERATOR_CERTIFICATES)


def read_project(project: Path) -> Project:
    """Reads the operator's folder; nothing is verified but that it is whole.

    Raises:
        StateError: it is no project, or a file of it is damaged.
    """
    if not (project / PROJECT).is_file():
        raise StateError(f"{project}: no project of a consortium", fix="fedmat consortium init makes one")
    told = files.read_json(project / PROJECT)
    held = files.read_json(project / MEMBERS)
    serials = files.read_json(project / REVOKED)
    try:
        members = {str(name): Member(**entry) for name, entry in held.items()}
        revoked = tuple(str(s) for s in serials["serials"])
        return Project(project.resolve(), told["consortium"], told["host"], told["port"], members, revoked)
    except (KeyError, TypeError, AttributeError):
        raise StateError(f"{project}: {PROJECT}, {MEMBERS} or {REVOKED} is damaged", fix="restore it from a backup") from None


def check_project(project: Path, now: datetime) -> Project:
    """Checks the operator's folder before a start.

    Returns:
        The project, with warnings about certificates that end soon.

    Raises:
        StateError: somebody else may read a private key, a key does not fit its certificate, a file is missing or was edited.
        ProtocolError: expired_certificate, not_yet_valid, bad_certificate.
    """
    found = read_project(project)
    credentials.check_private(project)
    if not (project / _ROOT_CERTIFICATE).is_file():
        raise StateError(f"{project / _ROOT_CERTIFICATE}: no such file", fix=f"copy it from server/startup/{ROOT}")
    root = (project / _ROOT_CERTIFICATE).read_bytes()
    if (project / _ROOT_KEY).exists():  # a server can run without it
        root = found.root.certificate
    credentials.check_root(root, now)
    for path, expected in _operator_settings(found).items():
        _check_equal(project / path, expected, f"fedmat consortium renew --project {project} writes it anew")
    ends = {"the root": credentials.facts(root).not_after}
    for certificate, key, name, what in (
        ("server/startup/server.crt", "server/startup/server.key", found.host, "the server's certificate"),
        ("admin/startup/client.crt", "admin/startup/client.key", OPERATOR, "the operator's certificate"),
    ):
        own = credentials.load(project / certificate, project / key)
        told = credentials.check_certificate(
            own.certificate, root, name=name, now=now, revoked=found.revoked
        )  # fmt: skip
        _check_equal((project / certificate).parent / ROOT, root, "copy it from ca/ca.crt")
        ends[what] = told.not_after
    warnings = [f"{what} ends on {_date(end)}" + _FIX_PROJECT.get(what, "") for what, end in ends.items() if end < now + SOON]
    for name, member in sorted(found.members.items()):
        if member.state == "admitted" and str(member.not_after) < _iso(now + SOON):
            warnings.append(f"the certificate of {name} ends on {str(member.not_after)[:10]}: fedmat site renew at {name}")
    return replace(found, warnings=tuple(warnings))


_OPERATOR_CERTIFICATES = ("server/startup/server.crt", "admin/startup/client.crt")
_FIX_PROJECT = {
    "the root": ": the consortium has to be set up anew",
    "the server's certificate": ": fedmat consortium renew",
    "the operator's certificate": ": fedmat consortium renew",
}


def needed_roles(config: ConsortiumConfig) -> tuple[str, ...]:
    """Returns the roles that a consortium's plan needs somebody to run."""
    plan = config.plan
    roles: tuple[str, ...] = {"trigram": ROLES, "ckks": ("auditor",)}.get(plan.security.mode, ())
    return roles + ((REFERENCE,) if plan.contribution.method != "none" else ())


# --- a party -----------------------------------------------------------------------------------------------------


def read_kit(path: Path, now: datetime) -> Kit:
    """Opens a kit and verifies all of it; nothing is written.

    Raises:
        ConfigError: there is no such file.
        ProtocolError: bad_kit (damaged, edited, or with something in it that does not belong there), bad_signature,
            bad_certificate, expired_certificate, not_yet_valid.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such kit", fix="name the PARTY.kit that the operator sent")
    return _verified(_unzip(path), path.name, now)


def join(
    kit: Kit, home: Path, *, site_file: Path | None = None, fingerprint: str | None = None, policy: str | None = None
) -> Path:  # fmt: skip
    """Makes a party's folder, its private key in it, and the request for a certificate.

    Joining again with a newer kit of the same party writes the kit's files anew and keeps key, certificate and policy.

    Args:
        home: a folder that is empty or not there, or this party's own.
        site_file: a site's site.yaml; a role has none, but for ``reference``.
        fingerprint: the root's, as the operator told it.
        policy: text of policy.yaml, where it is at hand already; a site that has none gets a draft.

    Returns:
        Path of ``PARTY.request``, which goes to the operator.

    Raises:
        ProtocolError: wrong_root (another fingerprint than the one told).
        ConfigError: a site without its site file, a role with one, or the file is another site's.
        StateError: the folder is another party's or consortium's, or not empty; nothing was written.
    """
    home = home.resolve()
    if fingerprint is not None and _bare(fingerprint) != kit.root:
        raise ProtocolError(
            "wrong_root", f"the root of {kit.consortium} in this kit has another fingerprint than the one told",
            fix="do not use this kit; telephone the operator, by a number you know from elsewhere",
        )  # fmt: skip
    site_file = _own_site_file(kit, site_file)
    if _is_own(home, kit):
        _join_again(kit, home, site_file, policy)
    else:
        key = credentials.new_key()
        contents = _home_files(kit, home, site_file, credentials.pem(key), policy)
        _write_tree(home, contents | {REQUEST.format(kit.party): _request(kit, key)})
    return home / REQUEST.format(kit.party)


def install(home: Path, certificate: bytes, now: datetime) -> datetime:
    """Puts a party's certificate in force; after a renewal, the new key with it.

    Returns:
        When it ends.

    Raises:
        ProtocolError: bad_certificate, wrong_consortium (another consortium, party or root), wrong_name, wrong_key (it is of a
            key that is not here), expired_certificate, not_yet_valid.
        StateError: the folder is damaged.
    """
    told = _read_message(certificate, "fedmat/certificate/1", "bad_certificate", "a certificate")
    party = _party(home)
    root = _own_root(home)
    name = party["party"]
    if (told.get("consortium"), told.get("party")) != (party["consortium"], name) or str(told.get("root")).encode() != root:
        raise ProtocolError(
            "wrong_consortium", f"{home} is {name} of {party['consortium']}, and this certificate is for another party, consortium or root",
            fix="install it in the folder it was asked for from",
        )  # fmt: skip
    pem = _text(told, "certificate", "bad_certificate").encode()
    found = credentials.check_certificate(pem, root, name=name, now=now)
    if found.organisation != party["organisation"]:
        raise ProtocolError("wrong_name", f"a certificate for {name} of another organisation", fix="ask the operator")
    startup, fresh = home / STARTUP, home / _RENEWAL / "client.key"
    for key in (fresh, startup / "client.key"):
        if key.is_file() and credentials.matches(pem, credentials.read_key(key)):
            break
    else:
        raise ProtocolError(
            "wrong_key", f"this certificate is not for the key of {name} in {home}", fix=f"send {REQUEST.format(name)} to the operator"
        )  # fmt: skip
    # The renewed key stays in its place until the pair is complete: after a crash the same command mends it.
    files.write_together(startup, {"client.key": key.read_bytes(), "client.crt": pem}, private=True)
    if key == fresh:
        shutil.rmtree(fresh.parent)
    (home / REQUEST.format(name)).unlink(missing_ok=True)
    return found.not_after


def renew(home: Path, now: datetime) -> Path:
    """Makes a new key beside the one in force, and the request for its certificate, which the old key signs too.

    The old pair is used until the new certificate is installed. Asking again gives a request of the same new key.

    Returns:
        Path of ``PARTY.request``, which goes to the operator.

    Raises:
        StateError: the folder is damaged.
    """
    kit = _own_kit(home)
    pending = home / _RENEWAL / "client.key"
    if not pending.is_file():
        pending.parent.mkdir(mode=0o700, exist_ok=True)
        files.write_atomic(pending, credentials.pem(credentials.new_key()), private=True)
    fresh = credentials.read_key(pending)
    old: Credential | None = _credential(home)
    if old is not None and not old.parsed.not_valid_before_utc <= now <= old.parsed.not_valid_after_utc:
        old = None  # an ended key vouches for nothing: the operator has to telephone
    path = home / REQUEST.format(kit.party)
    files.write_atomic(path, _request(kit, fresh, old), private=True)
    return path


def check_home(home: Path, now: datetime) -> PartyHome:
    """Checks a party's folder before a start.

    Returns:
        The party, with warnings about a certificate that ends soon or a renewal that is not finished.

    Raises:
        StateError: somebody else may read the folder or the key, the key does not fit the certificate, a file is missing or was
            edited since the kit was signed, or the folder was moved.
        ProtocolError: expired_certificate, not_yet_valid, bad_certificate, wrong_name.
    """
    home = home.resolve()
    party = _party(home)
    name = party["party"]
    if not (home / STARTUP / "client.crt").is_file():
        raise StateError(
            f"{home}: {name} has no certificate yet",
            fix=f"send {REQUEST.format(name)} to the operator, then: fedmat site certificate FILE --home {home}",
        )
    for folder in (home, home / STARTUP):
        credentials.check_private(folder)
    kit = _own_kit(home)
    known = (kit.party, kit.kind, kit.organisation, kit.consortium, kit.host, kit.port)
    if tuple(party[k] for k in ("party", "kind", "organisation", "consortium", "host", "port")) != known:
        raise StateError(
            f"{home / PARTY}: does not agree with the kit", fix=f"join again: fedmat site join {KIT_FILE.format(name)} --home {home}"
        )  # fmt: skip
    _check_equal(
        home / _PRIVACY, kit_settings.party_privacy(kit.kind, home),
        f"it is written for one place and may not be changed: fedmat site join {KIT_FILE.format(name)} --home {home}",
    )  # fmt: skip
    own = _credential(home)
    told = credentials.check_certificate(own.certificate, _own_root(home), name=name, now=now)
    if told.organisation != kit.organisation:
        raise ProtocolError(
            "wrong_name", f"the certificate of {name} is for another organisation than its kit", fix="ask the operator for both"
        )  # fmt: skip
    if kit.kind == "site" and not (home / POLICY).is_file():
        raise StateError(f"{home / POLICY}: the site's policy is missing", fix="restore it, or join again for a new draft")
    warnings = []
    if told.not_after < now + SOON:
        warnings.append(f"the certificate of {name} ends on {_date(told.not_after)}: fedmat site renew --home {home}")
    if (home / _RENEWAL).is_dir():
        warnings.append(f"a renewal is not finished: send {REQUEST.format(name)} to the operator, install what comes back")
    site_file = Path(party["site_file"]) if party["site_file"] else None
    return PartyHome(
        home, name, kit.kind, kit.organisation, kit.consortium, kit.host, kit.port, site_file, told.not_after, tuple(warnings)
    )


# --- all of it on one machine ------------------------------------------------------------------------------------


def rehearsal(
    config_file: Path, project: Path, parties: Mapping[str, tuple[Path, Path | None]], *, now: datetime, host: str = "localhost",
    port: int = PORT, charter: bytes | None = None,
) -> None:  # fmt: skip
    """Sets up a whole consortium on one machine: what operator and parties do, without the files between them.

    Whoever owns the machine owns every party, so this protects nothing; it is for trying and testing.

    Args:
        parties: name -> (its folder, its site file).
        charter: as in :func:`init`.

    Raises:
        ConfigError, StateError: as in :func:`init`, :func:`invite` and :func:`join`.
    """
    made = init(config_file, project, host=host, now=now, port=port, charter=charter)
    held = _charter_bytes(project)
    drafted: str | None = None
    members = {}
    for name, (home, site_file) in parties.items():
        home = home.resolve()
        owner = _owner(made, name, None, rehearsal=True)
        contents = _kit_files(made, name, owner, held)
        kit = Kit(made.consortium, name, _kind(name), owner, host, port, "", contents)
        if kit.kind == "site" and drafted is None:
            drafted = _draft(contents)
        key = credentials.new_key()
        certificate = credentials.issue(
            made.root, key.public_key(), name=name, organisation=owner, purpose="party", now=now, days=DAYS
        )
        own = _home_files(kit, home, _own_site_file(kit, site_file), credentials.pem(key), drafted)
        _write_tree(home, own | {f"{STARTUP}/client.crt": certificate})
        members[name] = _admitted(Member(owner, "admitted"), certificate, key_fingerprint(key.public_key()))
    _write_members(project, members)


# --- names, digests, times ---------------------------------------------------------------------------------------


def key_fingerprint(key: RSAPublicKey) -> str:
    """Returns the hex SHA-256 of a public key (RFC 5280's SubjectPublicKeyInfo, DER)."""
    return files.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))


def request_fingerprint(request: bytes) -> str:
    """Returns the fingerprint of the key in a ``PARTY.request``; nothing of it is verified but the request's own signature.

    Raises:
        ProtocolError: bad_request, wrong_name, no_possession.
    """
    told = _read_message(request, "fedmat/request/1", "bad_request", "a certificate request")
    names = [_text(told, k, "bad_request") for k in ("party", "organisation")]
    return key_fingerprint(credentials.check_request(_text(told, "request", "bad_request").encode(), *names))


def _kind(party: str) -> str:
    return party if party in PARTY_ROLES else "site"


def _bare(fingerprint: str) -> str:
    """A fingerprint as people write it, in groups and in capitals, as hex."""
    return re.sub(r"[\s:.-]", "", fingerprint).lower()


def _iso(when: datetime) -> str:
    return when.astimezone(UTC).isoformat(timespec="seconds")


def _date(when: datetime) -> str:
    return when.date().isoformat()


def _check_address(host: str, port: int) -> None:
    labels = host.split(".")
    fine = len(host) <= credentials.LONGEST_NAME and all(re.fullmatch(r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?", x) for x in labels)
    if fine and all(x.isdigit() for x in labels):
        try:
            ipaddress.IPv4Address(host)
        except ValueError:
            fine = False
    if not fine:
        raise ConfigError(
            f"'{host}' is no host name (lower case, at most {credentials.LONGEST_NAME} characters) or IPv4 address",
            fix="name the machine as every party's network knows it, e.g. fedmat.example.org",
        )
    if not 0 < port < 65536:
        raise ConfigError(f"{port} is no port", fix="use one from 1 to 65535; 8002 is usual")


def _consortium_files(path: Path, charter: bytes | None) -> tuple[ConsortiumConfig, dict[str, bytes]]:
    """A consortium file and its charter as they go into the project and every kit, byte for byte."""
    from fedmat import keys

    config = load_consortium(path)
    for member in config.members:
        if member.site in (*RESERVED, *PARTY_ROLES):
            raise ConfigError(
                f"{path}: no site can be called '{member.site}'", fix="that name is a role's or the transport's own"
            )
        for text in (member.site, member.organisation):
            if not 0 < len(text) <= credentials.LONGEST_NAME:
                raise ConfigError(
                    f"{path}: '{text}' is too long for a certificate: at most {credentials.LONGEST_NAME} characters",
                    fix="use a shorter name",
                )
    contents = {CONSORTIUM: path.read_bytes()}
    if charter is None and config.charter is not None:
        named = path.absolute().parent / config.charter
        keys.read_charter(named)  # refuses one that is missing or does not hold
        charter = named.read_bytes()
    if charter is not None:
        contents[CHARTER] = charter
        if _charter(charter).get("consortium") != config.name:
            raise ConfigError(
                f"{path}: its charter is not of {config.name}", fix="fedmat keys charter makes it from the consortium file"
            )
    return config, contents


def _charter(raw: bytes) -> dict[str, Any]:
    try:
        found = json.loads(raw)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ConfigError("the charter is not JSON", fix="fedmat keys check CHARTER tells what is wrong")
    return found


def _charter_bytes(project: Path) -> bytes | None:
    path = project / CHARTER
    return path.read_bytes() if path.is_file() else None


def _owner(project: Project, party: str, told: str | None, *, rehearsal: bool = False) -> str:
    """The organisation that runs a party: as the consortium file or the charter says, else as told."""
    known = {m.site: m.organisation for m in project.config.members}
    if party not in known and party not in PARTY_ROLES:
        raise ConfigError(
            f"{party} is no party of {project.consortium}",
            fix=f"name one of {', '.join([*sorted(known), *PARTY_ROLES])}, or add it to the consortium file (fedmat consortium update)",
        )
    if party in PARTY_ROLES:
        raw = _charter_bytes(project.folder)
        entries = _charter(raw).get("parties", []) if raw else []
        known = {e["name"]: e["organisation"] for e in entries if e["name"] in PARTY_ROLES}
        present = project.members.get(party)
        if present is not None:
            known.setdefault(party, present.organisation)
        if rehearsal:
            known.setdefault(party, f"rehearsal of the {party}")
    owner = known.get(party, told)
    if owner is None:
        raise ConfigError(f"who runs the {party} is in no charter", fix="say it: --organisation NAME")
    if told is not None and told != owner:
        raise ConfigError(
            f"{party} belongs to '{owner}', not to '{told}'", fix="leave --organisation out, or correct the consortium file"
        )
    if not 0 < len(owner) <= credentials.LONGEST_NAME:
        raise ConfigError(
            f"'{owner}' is no organisation for a certificate: at most {credentials.LONGEST_NAME} characters", fix="use a shorter name"
        )  # fmt: skip
    return owner


# --- the kit -----------------------------------------------------------------------------------------------------


def _kit_files(project: Project, party: str, owner: str, charter: bytes | None) -> dict[str, bytes]:
    """A kit's files with their signed list. None depends on where the party will keep them."""
    from fedmat.data.contract import CONTRACT_VERSION

    root = project.root
    contents = {
        CONSORTIUM: (project.folder / CONSORTIUM).read_bytes(),
        f"{STARTUP}/{ROOT}": root.certificate,
        **kit_settings.party_settings(project.consortium, project.host, project.port, party),
    }
    if charter is not None:
        contents[CHARTER] = charter
    body = {
        "schema": "fedmat/kit/1",
        "consortium": project.consortium,
        "party": party,
        "kind": _kind(party),
        "organisation": owner,
        "host": project.host,
        "port": project.port,
        "fedmat": __version__,
        "contract": CONTRACT_VERSION,
        "root": credentials.facts(root.certificate).fingerprint,
        "files": {name: files.sha256(data) for name, data in contents.items()},
    }
    signature = root.sign(_KIT_LABEL + files.canonical_json(body)).hex()
    return contents | {KIT: files.json_bytes({**body, "signature": signature})}


def _zip(contents: Mapping[str, bytes]) -> bytes:
    """The same kit gives the same bytes."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(contents):
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), contents[name], zipfile.ZIP_DEFLATED)
    return out.getvalue()


def _unzip(path: Path) -> dict[str, bytes]:
    """Reads only names that a kit has, each up to its limit; a name with a path to elsewhere is no such name."""
    if path.stat().st_size > sum(_KIT_LIMITS.values()):
        raise _bad_kit(path.name, "it is too large")
    contents: dict[str, bytes] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                limit = _KIT_LIMITS.get(info.filename)
                if limit is None or info.filename in contents:
                    raise _bad_kit(path.name, "a file is in it that does not belong there, or is there twice")
                with archive.open(info) as member:
                    data = member.read(limit + 1)
                if len(data) > limit or info.file_size > limit:
                    raise _bad_kit(path.name, f"{info.filename} is too large")
                contents[info.filename] = data
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError, OSError):
        raise _bad_kit(path.name, "it is no zip archive, or a part of one") from None
    return contents


def _verified(contents: Mapping[str, bytes], name: str, now: datetime | None) -> Kit:
    """A kit whose files are all there and as the root signed them; with ``now``, whose root counts."""
    try:
        told = json.loads(contents[KIT])
        signature, listed = bytes.fromhex(told.pop("signature")), dict(told["files"])
        root = contents[f"{STARTUP}/{ROOT}"]
        kit = Kit(
            told["consortium"], told["party"], told["kind"], told["organisation"], told["host"], told["port"], told["root"], contents,
            _version_notes(told),
        )  # fmt: skip
        body = files.canonical_json(told)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise _bad_kit(name, "a file of it is missing or malformed") from None
    if now is not None:
        credentials.check_root(root, now)
    credentials.verify_by_root(_KIT_LABEL + body, signature, root)
    _check_names(kit, told["schema"], name)
    changed = sorted(n for n in {*listed, *contents} - {KIT} if listed.get(n) != files.sha256(contents.get(n, b"")))
    if changed:
        raise _bad_kit(name, f"{', '.join(changed)} is not as it was signed")
    # The settings could start any program on the party's machine: who signed them is not enough.
    for path, ours in kit_settings.party_settings(kit.consortium, kit.host, kit.port, kit.party).items():
        if contents.get(path) != ours:
            raise ProtocolError(
                "bad_kit", f"{name}: {path} is not what fedmat {__version__} writes for a party, and the kit is of {told['fedmat']}",
                fix="use the operator's release of fedmat; if it is the same, use no such kit and telephone the operator",
            )  # fmt: skip
    return kit


def _check_names(kit: Kit, schema: str, name: str) -> None:
    """Refuses names that are none: they become paths and addresses here."""
    try:
        _check_address(kit.host, kit.port)
        fine = all(re.fullmatch(SLUG, n) and n not in RESERVED for n in (kit.consortium, kit.party))
    except (ConfigError, TypeError, AttributeError):
        fine = False
    root = credentials.facts(kit.files[f"{STARTUP}/{ROOT}"]).fingerprint
    if (
        not fine
        or kit.root != root
        or schema != "fedmat/kit/1"
        or kit.kind != _kind(kit.party)
        or not isinstance(kit.organisation, str)
    ):
        raise _bad_kit(name, "what it says of itself does not agree")


def _version_notes(told: Mapping[str, Any]) -> tuple[str, ...]:
    from fedmat.data.contract import CONTRACT_VERSION

    pairs = (("fedmat", told["fedmat"], __version__), ("the data contract", told["contract"], CONTRACT_VERSION))
    return tuple(
        f"the operator's version of {what} is {theirs}, here it is {ours}: install the same release before the first round"
        for what, theirs, ours in pairs
        if str(theirs).split(".")[:2] != ours.split(".")[:2]
    )


def _bad_kit(name: str, why: str) -> ProtocolError:
    return ProtocolError("bad_kit", f"{name}: {why}", fix="ask the operator for the kit again, and use it unchanged")


# --- a party's folder --------------------------------------------------------------------------------------------


def _home_files(kit: Kit, home: Path, site_file: Path | None, key: bytes, policy: str | None) -> dict[str, bytes]:
    contents = {
        **kit.files,
        PARTY: _party_json(kit, site_file),
        _PRIVACY: kit_settings.party_privacy(kit.kind, home),
        f"{STARTUP}/client.key": key,
    }
    if kit.kind == "site":
        contents[POLICY] = (policy or _draft(kit.files)).encode()
    return contents


def _join_again(kit: Kit, home: Path, site_file: Path | None, policy: str | None) -> None:
    contents = {**kit.files, PARTY: _party_json(kit, site_file), _PRIVACY: kit_settings.party_privacy(kit.kind, home)}
    if kit.kind == "site" and not (home / POLICY).exists():
        contents[POLICY] = (policy or _draft(kit.files)).encode()
    key = home / STARTUP / "client.key"
    if not key.is_file():
        files.write_atomic(key, credentials.pem(credentials.new_key()), private=True)
    own = credentials.read_key(key)
    for name, data in contents.items():
        files.write_atomic(home / name, data, private=True)
    if CHARTER not in contents:
        (home / CHARTER).unlink(missing_ok=True)
    if not (home / STARTUP / "client.crt").is_file():
        files.write_atomic(home / REQUEST.format(kit.party), _request(kit, own), private=True)


def _is_own(home: Path, kit: Kit) -> bool:
    """Tells whether a folder is this party's already; False: there is none, or it is empty."""
    if not home.exists() or (home.is_dir() and not any(home.iterdir())):
        return False
    if not home.is_dir() or not (home / PARTY).is_file():
        raise StateError(f"{home}: is there and not empty, and nothing was written", fix="name an empty folder with --home")
    party = _party(home)
    if (party["consortium"], party["party"]) != (kit.consortium, kit.party) or (
        (home / STARTUP / ROOT).is_file() and _own_root(home) != kit.files[f"{STARTUP}/{ROOT}"]
    ):
        raise StateError(
            f"{home}: is the folder of {party['party']} in {party['consortium']}, and the kit is for {kit.party} in {kit.consortium} or "
            "of another root; nothing was written",
            fix="name another folder with --home",
        )
    return True


def _own_site_file(kit: Kit, site_file: Path | None) -> Path | None:
    if kit.kind == "site":
        if site_file is None:
            raise ConfigError(f"{kit.party} is a site and needs its site file", fix="name it: --data SITE.yaml")
        found = load_site(site_file).site
        if found != kit.party:
            raise ConfigError(
                f"{site_file}: is of site '{found}', and the kit is for '{kit.party}'", fix="name its own site file"
            )
    elif site_file is not None and kit.kind != REFERENCE:
        raise ConfigError(f"the {kit.party} sees no records", fix="leave --data out")
    return site_file.absolute() if site_file else None


def _party_json(kit: Kit, site_file: Path | None) -> bytes:
    return files.json_bytes({
        "schema": "fedmat/party/1",
        "party": kit.party,
        "kind": kit.kind,
        "organisation": kit.organisation,
        "consortium": kit.consortium,
        "host": kit.host,
        "port": kit.port,
        "site_file": str(site_file) if site_file else None,
    })  # fmt: skip


def _party(home: Path) -> dict[str, Any]:
    path = home / PARTY
    if not path.is_file():
        raise StateError(f"{home}: no party's folder ({PARTY} is missing)", fix="fedmat site join KIT --home makes it")
    found = files.read_json(path)
    wanted = {"party", "kind", "organisation", "consortium", "host", "port", "site_file"}
    if not isinstance(found, dict) or not wanted <= set(found):
        raise StateError(f"{path}: damaged", fix="restore it, or join again with the kit")
    return found


def _own_kit(home: Path) -> Kit:
    """The kit a party joined with, read back from its folder and verified."""
    contents = {}
    for name, limit in _KIT_LIMITS.items():
        path = home / name
        if path.is_file():
            if path.stat().st_size > limit:
                raise StateError(f"{path}: too large", fix="join again with the kit")
            contents[name] = path.read_bytes()
    try:
        return _verified(contents, str(home), None)
    except ProtocolError as error:
        raise StateError(
            f"a file of the kit was edited, replaced or lost: {error.what.split(': ', 1)[1]}",
            fix=f"join again with the kit: fedmat site join KIT --home {home}; it keeps key, certificate and policy",
        ) from error


def _own_root(home: Path) -> bytes:
    path = home / STARTUP / ROOT
    if not path.is_file():
        raise StateError(f"{path}: no such file", fix="join again with the kit")
    return path.read_bytes()


def _credential(home: Path) -> Credential:
    return credentials.load(home / STARTUP / "client.crt", home / STARTUP / "client.key")


def _draft(contents: Mapping[str, bytes]) -> str:
    """A site's first policy, for the consortium and the charter it was invited with."""
    import tempfile

    from fedmat import keys, policy

    with tempfile.TemporaryDirectory() as folder:  # the readers name files
        for name in (CONSORTIUM, CHARTER):
            if name in contents:
                (Path(folder) / name).write_bytes(contents[name])
        charter = keys.read_charter(Path(folder) / CHARTER).sha256 if CHARTER in contents else ""
        return policy.draft(load_consortium(Path(folder) / CONSORTIUM), charter)


# --- messages between operator and party -------------------------------------------------------------------------


def _request(kit: Kit, key: RSAPrivateKey, old: Credential | None = None) -> bytes:
    """What a party sends to the operator: names and a request, signed by the key they are for and, in a renewal, the old one."""
    body: dict[str, Any] = {
        "schema": "fedmat/request/1",
        "consortium": kit.consortium,
        "party": kit.party,
        "organisation": kit.organisation,
        "root": kit.root,
        "request": credentials.request(key, kit.party, kit.organisation).decode(),
    }
    told = _REQUEST_LABEL + files.canonical_json(body)
    signed = {**body, "signature": credentials.sign(key, told).hex()}
    if old is not None:
        signed["vouched"] = {"certificate": old.certificate.decode(), "signature": old.sign(told).hex()}
    return files.json_bytes(signed)


def _check_request_signatures(told: dict[str, Any], key: RSAPublicKey, project: Project, party: str, now: datetime) -> bool:
    """Refuses a request that was changed; tells whether the party's present key, if it counts, signed it too."""
    body = {k: v for k, v in told.items() if k not in ("signature", "vouched")}
    data = _REQUEST_LABEL + files.canonical_json(body)
    credentials.verify_key(data, _hex(told.get("signature")), key, party)
    if "vouched" not in told:
        return False
    try:
        certificate, signature = told["vouched"]["certificate"].encode(), _hex(told["vouched"]["signature"])
    except (KeyError, TypeError, AttributeError):
        raise ProtocolError("bad_request", f"the request of {party} is malformed", fix="ask the party for it again") from None
    try:
        credentials.verify(data, signature, certificate, project.root.certificate, name=party, now=now, revoked=project.revoked)
    except ProtocolError as error:
        if error.reason in ("revoked", "expired_certificate", "not_yet_valid"):  # vouches for nothing, and harms nothing
            return False
        raise
    return True


def _certificate_message(project: Project, party: str, certificate: bytes) -> bytes:
    return files.json_bytes({
        "schema": "fedmat/certificate/1",
        "consortium": project.consortium,
        "party": party,
        "certificate": certificate.decode(),
        "root": project.root.certificate.decode(),
    })  # fmt: skip


def _read_message(raw: bytes, schema: str, reason: str, what: str) -> dict[str, Any]:
    try:
        found = json.loads(raw) if len(raw) <= _MESSAGE_LIMIT else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or found.get("schema") != schema:
        raise ProtocolError(reason, f"the file is not {what} of fedmat", fix="ask its sender for it again, unchanged")
    return found


def _text(told: Mapping[str, Any], key: str, reason: str) -> str:
    value = told.get(key)
    if not isinstance(value, str):
        raise ProtocolError(reason, f"'{key}' is missing or malformed in it", fix="ask its sender for it again, unchanged")
    return value


def _hex(value: object) -> bytes:
    try:
        return bytes.fromhex(value) if isinstance(value, str) else b""
    except ValueError:
        return b""


# --- the operator's files ----------------------------------------------------------------------------------------


def _admitted(member: Member, certificate: bytes, fingerprint: str) -> Member:
    told = credentials.facts(certificate)
    return Member(member.organisation, "admitted", told.serial, fingerprint, _iso(told.not_after))


def _write_members(project: Path, members: Mapping[str, Member]) -> None:
    files.write_atomic(project / MEMBERS, files.json_bytes({n: asdict(m) for n, m in members.items()}), private=True)


def _write_revoked(project: Path, serials: tuple[str, ...]) -> None:
    files.write_atomic(project / REVOKED, files.json_bytes({"serials": list(serials)}), private=True)


@contextmanager
def _locked(project: Path) -> Iterator[Project]:
    """The project, with nobody else changing it: two at once would lose a revocation."""
    read_project(project)
    with (project / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield read_project(project)


def _operator_credentials(project: Project, root: Credential, now: datetime, days: int) -> dict[str, bytes]:
    out = {}
    for folder, base, name, purpose, role in (
        ("server/startup", "server", project.host, "server", ""),
        ("admin/startup", "client", OPERATOR, "operator", OPERATOR_ROLE),
    ):
        key = credentials.new_key()
        out[f"{folder}/{base}.crt"] = credentials.issue(
            root, key.public_key(), name=name, organisation=project.consortium, purpose=purpose, now=now, days=days, role=role,  # type: ignore[arg-type]
        )  # fmt: skip
        out[f"{folder}/{base}.key"] = credentials.pem(key)
        out[f"{folder}/{ROOT}"] = root.certificate
    return out


def _operator_settings(project: Project) -> dict[str, bytes]:
    """The settings of the server and of the operator's kit; they name absolute paths, so a move is noticed."""
    made = {
        "server/startup/fed_server.json": kit_settings.fed_server(project),
        "server/local/resources.json": kit_settings.server_resources(project),
        "server/local/authorization.json": kit_settings.AUTHORIZATION,
        "server/local/log_config.json": kit_settings.LOGGING,
        "server/local/privacy.json": kit_settings.privacy_scope(()),
        "admin/startup/fed_admin.json": kit_settings.fed_admin(project),
        "admin/local/resources.json": kit_settings.ADMIN_RESOURCES,
    }
    return {name: files.json_bytes(value) for name, value in made.items()}


def _check_equal(path: Path, expected: bytes, fix: str) -> None:
    if not path.is_file():
        raise StateError(f"{path}: no such file", fix=fix)
    if path.read_bytes() != expected:
        raise StateError(f"{path}: was edited, or its folder was moved", fix=fix)


def _write_tree(folder: Path, contents: Mapping[str, bytes], folders: tuple[str, ...] = ()) -> None:
    """Writes a new folder that appears whole or not at all, for its owner alone.

    Raises:
        StateError: something is in its place already.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    staged = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.tmp")
    try:
        for name in {".", *folders, *(str(Path(n).parent) for n in contents)}:
            (staged / name).mkdir(parents=True, exist_ok=True)
        for made in (staged, *(p for p in staged.rglob("*") if p.is_dir())):
            made.chmod(0o700)
        for name, data in contents.items():
            descriptor = os.open(staged / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as handle:
                handle.write(data)
                if name.endswith(".key"):  # what cannot be had again
                    handle.flush()
                    os.fsync(handle.fileno())
        os.rename(staged, folder)  # takes the place of an empty folder, and of nothing else
    except OSError as error:
        shutil.rmtree(staged, ignore_errors=True)
        if folder.exists():
            raise StateError(f"{folder}: is there and not empty, and nothing was written", fix="name an empty folder") from None
        raise StateError(f"{folder}: cannot be written ({type(error).__name__})", fix="name a folder you own") from None
