"""Every party's own keys, and the charter that tells everyone whose keys are whose.

Knows: Ed25519 keys for signatures, HPKE keys for sealed messages, the charter file, how a party replaces its keys. Refuses to
know: messages, rounds, TLS (a party's transport keys are others), the clock. Private keys lie in one folder of their owner,
readable by the owner alone; only public keys are in the charter.

A charter is agreed once, by its digest and by telephone. From then on each party renews its own keys: the old key signs the
new entry, the new key signs too, and the charter keeps every such rotation. Whoever knows the digest that was agreed can
rebuild the charter from it (:func:`verify_chain`); the operator who keeps the file cannot put in a key of its own.

References:
    RFC 8032 (Ed25519), RFC 9180 (HPKE), FIPS 203 and draft-ietf-hpke-pq (ML-KEM-768 with X25519). Both primitives come
    from the cryptography library.
    The Update Framework, specification section 5.3 (a root of trust is replaced by a chain that the old keys sign). RFC 4211,
    section 4 (proof of possession).
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any, Literal

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from pydantic import Field, ValidationError, model_validator

from fedmat import files
from fedmat.config import SLUG, ConsortiumConfig, Settings, parse_settings
from fedmat.envelopes import ROLES
from fedmat.errors import ConfigError, ProtocolError, StateError

Kem = Literal["x25519", "mlkem768-x25519"]
Kind = Literal["site", "aggregator", "auditor", "notary", "operator"]
SIGNING, SEALING = "signing.key", "sealing.key"
OLD = "{}-until-{}.key"  # a private key that a rotation replaced, kept until the charter has taken the new one
ENTRY, ROTATION = "{}.party.json", "{}.rotation.json"  # public; for the operator
ROTATION_DAYS = 30  # a rotation that is not in the charter by then counts no more, so that none can be kept for a later day
REHEARSAL_YEARS = 10


@dataclass(frozen=True)
class _Sealing:
    """A sealing key pair's raw bytes: X25519's 32, before them ML-KEM-768's where it is a hybrid."""

    kem: Any
    private_bytes: int
    public_bytes: int

    @property
    def suite(self) -> hpke.Suite:
        return hpke.Suite(self.kem, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)

    def private(self, raw: bytes) -> Any:
        if len(raw) != self.private_bytes:
            raise ValueError("a sealing key of a wrong length")
        elliptic = X25519PrivateKey.from_private_bytes(raw[-32:])
        return (
            elliptic
            if len(raw) == 32
            else hpke.MLKEM768X25519PrivateKey(MLKEM768PrivateKey.from_seed_bytes(raw[:-32]), elliptic)
        )

    def public(self, raw: bytes) -> Any:
        if len(raw) != self.public_bytes:
            raise ValueError("a sealing key of a wrong length")
        elliptic = X25519PublicKey.from_public_bytes(raw[-32:])
        return (
            elliptic
            if len(raw) == 32
            else hpke.MLKEM768X25519PublicKey(MLKEM768PublicKey.from_public_bytes(raw[:-32]), elliptic)
        )

    def raw_public(self, raw: bytes) -> bytes:
        """Returns the public key of a private one."""
        elliptic = X25519PrivateKey.from_private_bytes(raw[-32:]).public_key().public_bytes_raw()
        lattice = b"" if len(raw) == 32 else MLKEM768PrivateKey.from_seed_bytes(raw[:-32]).public_key().public_bytes_raw()
        return lattice + elliptic


_SEALING: dict[str, _Sealing] = {
    "x25519": _Sealing(hpke.KEM.X25519, 32, 32),
    "mlkem768-x25519": _Sealing(hpke.KEM.MLKEM768_X25519, 96, 1216),
}


class Party(Settings):
    """One party of the charter: a site, or the role an organisation runs."""

    name: str = Field(pattern=SLUG, description="the site's name; a role is called aggregator, auditor or notary")
    kind: Kind
    organisation: str
    signing: str = Field(pattern=r"^[0-9a-f]{64}$", description="Ed25519 public key, hex")
    sealing: str = Field(pattern=r"^[0-9a-f]+$", description="HPKE public key, hex")
    not_after: date = Field(description="last day on which these keys count")

    @property
    def sha256(self) -> str:
        """Digest of the entry in canonical form."""
        return files.sha256(files.canonical_json(self.model_dump(mode="json")))

    @property
    def kem(self) -> Kem:
        """How messages to this party are sealed, as its sealing key tells.

        Raises:
            ProtocolError: bad_key.
        """
        for kem, sealing in _SEALING.items():
            if len(self.sealing) == 2 * sealing.public_bytes:
                return kem  # type: ignore[return-value]
        raise ProtocolError("bad_key", f"the sealing key of {self.name} is of no known kind", fix="fedmat keys new makes one")


class Rotation(Settings):
    """A party's word that other keys are its own from now on, signed by the old key and by the new one."""

    replaces: Party = Field(description="the entry as it stands in the charter")
    entry: Party = Field(description="the entry that takes its place")
    made: date
    signature: str = Field(pattern=r"^[0-9a-f]{128}$", description="by the old signing key, hex")
    possession: str = Field(pattern=r"^[0-9a-f]{128}$", description="by the new signing key, hex")

    def verify(self) -> None:
        """Checks what can be checked without a charter and a clock.

        Raises:
            ProtocolError: bad_rotation (it changes more than keys, or changes none), expired_key (the old key had ended when
                it signed, or the new one had), bad_signature (the old key did not sign), no_possession (the new one did not).
        """
        old, new = self.replaces, self.entry
        if (old.name, old.kind, old.organisation) != (new.name, new.kind, new.organisation):
            raise ProtocolError(
                "bad_rotation", f"a rotation of {old.name} changes more than its keys", fix="agree on a new charter"
            )
        if new.signing == old.signing or new.sealing == old.sealing or new.kem != old.kem:
            raise ProtocolError("bad_rotation", f"{old.name} must replace both keys by others of the same kind")
        if self.made > min(old.not_after, new.not_after):
            raise ProtocolError(
                "expired_key",
                f"keys of {old.name} had ended when this rotation was made",
                fix="agree on a new charter: an ended key vouches for nothing",
            )
        told = _rotation_body(old, new, self.made)
        for party, signature, reason, which in (
            (old, self.signature, "bad_signature", "the key it replaces"),
            (new, self.possession, "no_possession", "the key it brings"),
        ):
            try:
                key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(party.signing))
                key.verify(bytes.fromhex(signature), _ROTATION_LABELS[reason] + told)
            except (InvalidSignature, ValueError):
                raise ProtocolError(reason, f"a rotation of {old.name} is not signed by {which}") from None


_ROTATION_LABELS = {"bad_signature": b"fedmat/keys/rotation/v1|", "no_possession": b"fedmat/keys/possession/v1|"}


def _rotation_body(old: Party, new: Party, made: date) -> bytes:
    """What both keys sign: the whole old entry, so that a rotation follows on exactly one state of the charter."""
    body = {"replaces": old.model_dump(mode="json"), "entry": new.model_dump(mode="json"), "made": made.isoformat()}
    return files.canonical_json(body)


class Charter(Settings):
    """Whose keys are whose, and which organisation runs which role."""

    consortium: str
    kem: Kem = Field("x25519", description="how messages are sealed; mlkem768-x25519 also withstands a later quantum computer")
    parties: tuple[Party, ...]
    # Left out of the file and its digest as long as no key was replaced.
    revision: int = Field(1, ge=1, exclude_if=lambda v: v == 1, description="one more with every rotation")
    previous_sha256: str = Field("", exclude_if=lambda v: v == "", description="digest of the revision before")
    rotations: tuple[Rotation, ...] = Field((), exclude_if=lambda v: not v, description="every rotation so far, oldest first")

    @model_validator(mode="after")
    def _roles_are_apart(self) -> Charter:
        names = [p.name for p in self.parties]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} stands in the charter twice")
        for p in self.parties:
            if (p.name, p.kind) == ("operator", "site"):
                raise ValueError("no site is called operator: that is who keeps the ledger")
            if (p.kind == "site") == (p.name in ROLES) or (p.kind != "site" and p.kind != p.name):
                raise ValueError(f"{p.name} cannot be of kind {p.kind}: a role is called by its kind, a site is not")
        owners = [p.organisation for p in self.parties if p.kind != "site"]
        if len(set(owners)) != len(owners):
            raise ValueError("one organisation holds two roles: any two roles together can read every update")
        return self

    @property
    def sha256(self) -> str:
        """Digest of the charter in canonical form."""
        return files.sha256(files.canonical_json(self.model_dump(mode="json")))

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites in alphabetical order."""
        return tuple(sorted(p.name for p in self.parties if p.kind == "site"))

    def party(self, name: str, today: str) -> Party:
        """Returns a party whose keys count on ``today`` (ISO date).

        Raises:
            ProtocolError: unknown_member or expired_key.
        """
        found = next((p for p in self.parties if p.name == name), None)
        if found is None:
            raise ProtocolError("unknown_member", f"{name} is not in the charter", fix="add it with fedmat keys charter")
        if today > found.not_after.isoformat():
            raise ProtocolError(
                "expired_key", f"the keys of {name} ended on {found.not_after}", fix=f"fedmat keys rotate at {name}"
            )
        return found

    def verify(self, name: str, signature: bytes, data: bytes, today: str) -> None:
        """Checks a party's signature.

        Raises:
            ProtocolError: unknown_member, expired_key or bad_signature.
        """
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(self.party(name, today).signing))
        try:
            key.verify(signature, data)
        except InvalidSignature:
            raise ProtocolError("bad_signature", f"a message of {name} is not signed with its key") from None

    def seal(self, name: str, data: bytes, context: bytes, today: str) -> bytes:
        """Returns ``data`` so that only ``name`` can read it, bound to ``context`` (HPKE base mode, info = context)."""
        sealing = _SEALING[self.kem]
        try:
            public = sealing.public(bytes.fromhex(self.party(name, today).sealing))
        except ValueError:
            raise ProtocolError("bad_key", f"the charter's sealing key of {name} is none of kind {self.kem}") from None
        return sealing.suite.encrypt(data, public, context)

    @property
    def seal_overhead(self) -> int:
        """Bytes a seal adds: the encapsulated key and the tag."""
        return int(_SEALING[self.kem].kem.enc_length()) + 16


@dataclass(frozen=True)
class PartyKeys:
    """A party's private keys; never printed, never sent."""

    name: str
    kem: Kem
    signing: Ed25519PrivateKey
    sealing: bytes

    def __repr__(self) -> str:
        return f"PartyKeys({self.name!r})"

    @classmethod
    def new(cls, name: str, kem: Kem = "x25519") -> PartyKeys:
        """Returns fresh keys from the operating system's entropy."""
        return cls(name, kem, Ed25519PrivateKey.generate(), os.urandom(_SEALING[kem].private_bytes))

    def sign(self, data: bytes) -> bytes:
        """Returns an Ed25519 signature, 64 bytes."""
        return self.signing.sign(data)

    def unseal(self, sealed: bytes, context: bytes) -> bytes:
        """Returns what was sealed to this party under ``context``.

        Raises:
            ProtocolError: bad_seal.
        """
        sealing = _SEALING[self.kem]
        try:
            return sealing.suite.decrypt(sealed, sealing.private(self.sealing), context)
        except (InvalidTag, ValueError):
            raise ProtocolError("bad_seal", f"a message sealed to {self.name} does not open") from None

    def secret(self, purpose: bytes) -> bytes:
        """Returns 32 bytes that only this party can compute and always computes the same, for one purpose.

        A role's random choices come from here, so that a role that is started again after a crash makes them again. (An
        Ed25519 signature is deterministic; signatures over this prefix are made for no other purpose and never sent.)
        """
        return hashlib.sha256(self.signing.sign(b"fedmat/own-secret/v1|" + purpose)).digest()

    def holds(self, entry: Party) -> bool:
        """Tells whether these are the keys of a charter's entry, both of them."""
        own = self.public(entry.kind, entry.organisation, entry.not_after)
        return (own.signing, own.sealing) == (entry.signing, entry.sealing)

    def public(self, kind: Kind, organisation: str, not_after: date) -> Party:
        """Returns the party's entry in the charter."""
        return Party(
            name=self.name,
            kind=kind,
            organisation=organisation,
            signing=self.signing.public_key().public_bytes_raw().hex(),
            sealing=_SEALING[self.kem].raw_public(self.sealing).hex(),
            not_after=not_after,
        )


# --- a party's folder --------------------------------------------------------------------------------------------


def save(keys: PartyKeys, folder: Path) -> None:
    """Writes a party's private keys, readable by their owner alone.

    Raises:
        StateError: there are keys already.
    """
    if (folder / SIGNING).exists():
        raise StateError(f"{folder}: keys are there already", fix="fedmat keys rotate replaces them")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.chmod(0o700)
    _write_private(folder / SEALING, _sealing_text(keys))
    _write_private(folder / SIGNING, _signing_text(keys))


def create(keys: PartyKeys, entry: Party, folder: Path) -> Path:
    """Writes a party's first keys and its public entry as a folder that appears whole or not at all.

    Returns:
        Path of the public entry, which goes to the operator.

    Raises:
        StateError: the folder is there and not empty; nothing was written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    staged = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.tmp")
    try:
        save(keys, staged)
        files.write_json(staged / ENTRY.format(entry.name), entry.model_dump(mode="json"))
        os.rename(staged, folder)  # fails if anything is in its place: of two that start at once, one wins
    except OSError as error:
        shutil.rmtree(staged, ignore_errors=True)
        if folder.exists():
            raise StateError(
                f"{folder}: is there already, and nothing was written",
                fix="keys lie in a folder of their own: name another one; fedmat keys rotate replaces keys",
            ) from None
        raise StateError(f"{folder}: cannot be written ({type(error).__name__})", fix="name a folder you own") from None
    return folder / ENTRY.format(entry.name)


def load(folder: Path, name: str) -> PartyKeys:
    """Reads a party's private keys.

    Raises:
        StateError: they are missing, damaged, or others than their owner may read them.
    """
    return _load(folder, name, SIGNING, SEALING)


def load_fitting(folder: Path, name: str, charter: Charter) -> PartyKeys:
    """Reads those keys of a folder that the charter knows: the present ones, or the old ones while a rotation is under way.

    Raises:
        StateError: as in :func:`load`, or neither are those of the charter.
        ProtocolError: unknown_member.
    """
    entry = next((p for p in charter.parties if p.name == name), None)
    if entry is None:
        raise ProtocolError("unknown_member", f"{name} is not in the charter", fix="add it with fedmat keys charter")
    found = load(folder, name)
    if not found.holds(entry) and _old(folder):
        found = _load_old(folder, name)
    if not found.holds(entry):
        raise StateError(
            f"{folder}: its keys are not those of {name} in the charter", fix="use the charter in force, or its keys"
        )
    return found


def read_entry(path: Path) -> Party:
    """Reads a party's public entry.

    Raises:
        ConfigError: it is missing or wrong.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such entry", fix="fedmat keys new writes it next to the party's keys")
    return parse_settings(Party, _json(path), path)


def entry_of(folder: Path) -> Party:
    """Reads the public entry in a party's folder; no private key is opened.

    Raises:
        StateError: there is none, or more than one.
    """
    there = sorted(folder.glob(ENTRY.format("*")))
    if len(there) != 1:
        raise StateError(
            f"{folder}: {len(there)} public entries, expected one",
            fix="copy the party's entry from the charter to NAME.party.json",
        )
    return read_entry(there[0])


def check_folder(folder: Path) -> None:
    """Checks that only its owner may look into a folder of keys.

    Raises:
        StateError: others may, or there is no such folder.
    """
    if not folder.is_dir():
        raise StateError(f"{folder}: no such folder of keys", fix="fedmat keys new makes it")
    state = folder.stat()
    if stat.S_IMODE(state.st_mode) & 0o077 or state.st_uid != os.getuid():
        raise StateError(f"{folder}: others than the owner may look into this folder", fix=f"chmod 700 {folder}")


# --- the charter -------------------------------------------------------------------------------------------------


def read_charter(path: Path) -> Charter:
    """Reads a charter.

    Raises:
        ConfigError: it is missing or wrong, e.g. one organisation holds two roles.
        ProtocolError: its keys do not follow from those that were agreed (see :func:`verify_chain`).
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no charter", fix="fedmat keys charter makes one from the parties' public keys")
    found = parse_settings(Charter, _json(path), path)
    verify_chain(found)
    return found


def charter(consortium: str, kem: Kem, parties: Sequence[Party]) -> Charter:
    """Returns the charter of these parties, sorted by name."""
    return Charter(consortium=consortium, kem=kem, parties=tuple(sorted(parties, key=lambda p: p.name)))


def agree(consortium: ConsortiumConfig, parties: Sequence[Party], today: date, roles: Sequence[str] = ROLES) -> Charter:
    """Returns the first charter of a consortium, if its parties' entries are all there and fit together.

    Args:
        roles: the roles that the consortium's plan needs.

    Raises:
        ConfigError: every problem, one a line.
    """
    problems: list[str] = []
    wanted = {m.site: m.organisation for m in consortium.members}
    names = [p.name for p in parties]
    problems += [f"no keys of site {s}" for s in sorted(wanted) if s not in names]
    problems += [f"nobody runs the {r}" for r in roles if r not in names]
    problems += [f"{n} has two entries" for n in sorted({n for n in names if names.count(n) > 1})]
    kinds: dict[str, Kem] = {}
    for p in parties:
        if p.kind == "site" and p.name not in wanted:
            problems.append(f"{p.name} is no member of {consortium.name}")
        elif p.kind == "site" and p.organisation != wanted[p.name]:
            problems.append(f"{p.name} belongs to '{p.organisation}', in the consortium file to '{wanted[p.name]}'")
        if today > p.not_after:
            problems.append(f"the keys of {p.name} ended on {p.not_after}")
        try:
            _SEALING[p.kem].public(bytes.fromhex(p.sealing))
            kinds[p.name] = p.kem
        except (ProtocolError, ValueError):
            problems.append(f"the sealing key of {p.name} is damaged")
    if len(set(kinds.values())) > 1:
        problems.append("the sealing keys differ in kind: " + ", ".join(f"{n} {k}" for n, k in kinds.items()))
    for what in ("signing", "sealing"):
        held = [getattr(p, what) for p in parties]
        problems += [
            f"{p.name} gives another party's {what} key as its own" for i, p in enumerate(parties) if held[i] in held[:i]
        ]
    if not problems:
        try:
            return charter(consortium.name, next(iter(kinds.values())), parties)
        except ValidationError as error:
            problems += [e["msg"].removeprefix("Value error, ") for e in error.errors(include_url=False, include_input=False)]
    raise ConfigError(
        f"no charter of {consortium.name} yet:\n  " + "\n  ".join(problems),
        fix="ask the parties named for a new PARTY.party.json (fedmat keys new), or correct the consortium file",
    )


# --- rotation ----------------------------------------------------------------------------------------------------


def rotate(old: PartyKeys, entry: Party, new: PartyKeys, not_after: date, today: date) -> Rotation:
    """Returns a party's word that ``new`` are its keys, after ``old`` with its ``entry`` in the charter.

    Args:
        not_after: last day of the new keys.
        today: day on which this is said.

    Raises:
        ProtocolError: as in :meth:`Rotation.verify`; bad_rotation if the entry is not of the old keys.
    """
    if not old.holds(entry):
        raise ProtocolError("bad_rotation", f"the public entry of {entry.name} is not of the keys beside it")
    fresh = new.public(entry.kind, entry.organisation, not_after)
    told = _rotation_body(entry, fresh, today)
    made = Rotation(
        replaces=entry,
        entry=fresh,
        made=today,
        signature=old.sign(_ROTATION_LABELS["bad_signature"] + told).hex(),
        possession=new.sign(_ROTATION_LABELS["no_possession"] + told).hex(),
    )
    made.verify()
    return made


def read_rotation(path: Path) -> Rotation:
    """Reads a rotation.

    Raises:
        ConfigError: it is missing or malformed.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such rotation", fix="fedmat keys rotate writes it")
    return parse_settings(Rotation, _json(path), path)


def apply(charter: Charter, rotation: Rotation, today: date) -> Charter:
    """Returns the charter's next revision.

    Raises:
        ProtocolError: expired_rotation (older than 30 days, or of a day to come), and as in :func:`verify_chain`.
    """
    name = rotation.entry.name
    if not rotation.made - timedelta(days=1) <= today <= rotation.made + timedelta(days=ROTATION_DAYS):  # a day: time zones
        raise ProtocolError(
            "expired_rotation",
            f"a rotation of {name} was made on {rotation.made} and counts for {ROTATION_DAYS} days",
            fix=f"at {name}: fedmat keys rotate --undo, then rotate again",
        )
    if today > min(rotation.replaces.not_after, rotation.entry.not_after):  # else whoever finds an ended key could date back
        raise ProtocolError(
            "expired_key",
            f"keys of {name} have ended, its old ones on {rotation.replaces.not_after}",
            fix="agree on a new charter: an ended key vouches for nothing",
        )
    return _follow(charter, rotation)


def verify_chain(charter: Charter) -> tuple[str, ...]:
    """Rebuilds a charter from the one that was agreed and checks every rotation since.

    Returns:
        Digests of all revisions, oldest first; the one that was compared by telephone is the first (or a later one, if
        people compared again).

    Raises:
        ProtocolError: unknown_member, replayed_rotation, out_of_order_rotation, reused_key, broken_chain (the charter is not
            what its rotations make of it), and as in :meth:`Rotation.verify`.
    """
    parties = {p.name: p for p in charter.parties}
    for step in reversed(charter.rotations):
        if parties.get(step.entry.name) is None:
            raise ProtocolError("unknown_member", f"{step.entry.name} is not in the charter, and a rotation is of it")
        parties[step.entry.name] = step.replaces
    told = tuple(parties[p.name] for p in charter.parties)
    try:
        state = Charter(consortium=charter.consortium, kem=charter.kem, parties=told)
    except ValidationError:
        raise _broken() from None
    digests = [state.sha256]
    for step in charter.rotations:
        state = _follow(state, step)
        digests.append(state.sha256)
    if state != charter:
        raise _broken()
    return tuple(digests)


def _follow(charter: Charter, rotation: Rotation) -> Charter:
    """The next revision, without a look at the clock."""
    name = rotation.entry.name
    present = next((p for p in charter.parties if p.name == name), None)
    if present is None:
        raise ProtocolError("unknown_member", f"{name} is not in the charter", fix="add it with fedmat keys charter")
    if any(r.entry == rotation.entry for r in charter.rotations):
        raise ProtocolError(
            "replayed_rotation", f"the charter took this rotation of {name} before", fix="nothing is to be done"
        )
    if present != rotation.replaces:
        raise ProtocolError(
            "out_of_order_rotation",
            f"a rotation of {name} follows on other keys than those in the charter",
            fix="apply the party's earlier rotation first, or use the charter in force",
        )
    rotation.verify()
    if rotation.entry.kem != charter.kem:
        raise ProtocolError("bad_key", f"the new sealing key of {name} is none of kind {charter.kem}")
    seen = [*charter.parties, *(r.replaces for r in charter.rotations)]
    for p in seen:  # keys that come back would let an old rotation count again; another party's are not one's own
        if rotation.entry.signing == p.signing or rotation.entry.sealing == p.sealing:
            raise ProtocolError("reused_key", f"the new keys of {name} stood in the charter before")
    parties = tuple(rotation.entry if p.name == name else p for p in charter.parties)
    return charter.model_copy(
        update={
            "parties": parties,
            "revision": charter.revision + 1,
            "previous_sha256": charter.sha256,
            "rotations": (*charter.rotations, rotation),
        }
    )


def _broken() -> ProtocolError:
    return ProtocolError(
        "broken_chain",
        "the charter is not what its rotations make of the one that was agreed",
        fix="use an unchanged copy; every party has one",
    )


def save_rotation(folder: Path, made: Rotation, new: PartyKeys) -> Path:
    """Puts new keys in the place of the present ones, which are kept under a dated name.

    After a crash in between the old pair is whole, at its place or under its dated name: :func:`undo_rotation` mends it.

    Returns:
        Path of the rotation, which goes to the operator.

    Raises:
        StateError: a rotation is under way already.
    """
    if _old(folder):
        raise StateError(
            f"{folder}: a rotation is under way", fix="end it with fedmat keys rotate --finish, or take it back with --undo"
        )
    name = made.entry.name
    kept = {OLD.format(Path(f).stem, made.made): (folder / f).read_bytes() for f in (SEALING, SIGNING)}
    files.write_together(folder, kept, private=True)
    files.write_together(
        folder,
        {
            ROTATION.format(name): files.json_bytes(made.model_dump(mode="json")),  # first: undoing needs it
            SEALING: _sealing_text(new),
            SIGNING: _signing_text(new),
            ENTRY.format(name): files.json_bytes(made.entry.model_dump(mode="json")),
        },
        private=True,
    )
    return folder / ROTATION.format(name)


def finish_rotation(folder: Path, name: str, charter: Charter) -> None:
    """Removes the old keys, once the charter holds the new ones.

    Raises:
        StateError: no rotation is under way, or the charter does not hold the new keys.
    """
    old = _under_way(folder)
    if not any(p.name == name and load(folder, name).holds(p) for p in charter.parties):
        raise StateError(
            f"the charter does not hold the new keys of {name}; the old ones stay",
            fix=f"send {ROTATION.format(name)} to the operator (fedmat keys charter --apply) and use the charter that comes back",
        )
    for path in (*old, folder / ROTATION.format(name)):
        path.unlink(missing_ok=True)


def undo_rotation(folder: Path, name: str) -> None:
    """Puts the old keys back; the new ones are lost.

    Raises:
        StateError: no rotation is under way, or the old keys are not whole.
    """
    old = _under_way(folder)
    before = _load_old(folder, name)
    if before.holds(entry_of(folder)):  # stopped before the new keys took their place
        entry = entry_of(folder)
    else:
        entry = read_rotation(folder / ROTATION.format(name)).replaces
        if not before.holds(entry):
            raise StateError(f"{folder}: the old keys are not those that were replaced", fix="restore the folder")
    back = {
        ENTRY.format(name): files.json_bytes(entry.model_dump(mode="json")),
        SEALING: _sealing_text(before),
        SIGNING: _signing_text(before),
    }
    files.write_together(folder, back, private=True)
    for path in (*old, folder / ROTATION.format(name)):
        path.unlink(missing_ok=True)


def rotation_under_way(folder: Path) -> bool:
    """Tells whether old keys are kept beside the present ones."""
    return bool(_old(folder))


# --- a rehearsal on one machine ----------------------------------------------------------------------------------


def rehearsal(
    consortium: str,
    sites: Sequence[str],
    organisations: Mapping[str, str],
    where: Callable[[str], Path],
    today: date,
    kem: Kem = "x25519",
    roles: Sequence[str] = ROLES,
) -> Charter:
    """Returns the charter of a rehearsal, in which one operator holds every party's keys; makes the keys that are missing.

    The same keys give the same charter on every later day, and several processes may ask at once.

    Args:
        organisations: by site. The roles belong to "Rehearsal aggregator" and so on.
        where: gives a party's folder of keys; nothing is written but those folders.
        today: day on which missing keys begin to count, for ten years.
        roles: those that somebody runs.

    Raises:
        StateError: a folder holds keys of another kind, or something else.
    """
    parties = []
    for name in (*sites, *roles):
        folder = where(name)
        kind: Any = name if name in ROLES else "site"
        organisation = f"Rehearsal {name}" if name in ROLES else organisations[name]
        path = folder / ENTRY.format(name)
        if not path.exists():
            until = years_later(today, REHEARSAL_YEARS)
            if (folder / SIGNING).exists():  # made otherwise: its entry is added
                files.write_json(path, load(folder, name).public(kind, organisation, until).model_dump(mode="json"))
            else:
                new = PartyKeys.new(name, kem)
                try:
                    create(new, new.public(kind, organisation, until), folder)
                except StateError:
                    if not path.exists():  # not another process that was faster
                        raise
        entry = read_entry(path)
        if entry.kem != kem:
            raise StateError(
                f"{folder}: keys of kind {entry.kem}, expected {kem}", fix="remove the folder, it is a rehearsal's"
            )
        parties.append(entry.model_copy(update={"name": name, "kind": kind, "organisation": organisation}))
    return charter(consortium, kem, parties)


def years_later(day: date, years: int) -> date:
    """Returns the same day some years on; of a 29 February the 28th where there is none."""
    try:
        return day.replace(year=day.year + years)
    except ValueError:  # 29 February
        return day.replace(year=day.year + years, day=28)


# --- bytes -------------------------------------------------------------------------------------------------------


def _signing_text(keys: PartyKeys) -> bytes:
    return f"ed25519 {keys.signing.private_bytes_raw().hex()}\n".encode()


def _sealing_text(keys: PartyKeys) -> bytes:
    return f"{keys.kem} {keys.sealing.hex()}\n".encode()


def _old(folder: Path) -> list[Path]:
    return sorted(folder.glob(OLD.format("*", "*")))


def _under_way(folder: Path) -> list[Path]:
    old = _old(folder)
    if not old:
        raise StateError(f"{folder}: no rotation is under way", fix="fedmat keys rotate begins one")
    return old


def _load_old(folder: Path, name: str) -> PartyKeys:
    files_ = {kind: [p for p in _old(folder) if p.name.startswith(Path(kind).stem)] for kind in (SIGNING, SEALING)}
    if any(len(found) != 1 for found in files_.values()):
        raise StateError(f"{folder}: the old keys of {name} are not whole", fix="restore the folder from its copy")
    return _load(folder, name, files_[SIGNING][0].name, files_[SEALING][0].name)


def _load(folder: Path, name: str, *pair: str) -> PartyKeys:
    texts = []
    for file in pair:
        path = folder / file
        try:
            mode = path.stat()
        except FileNotFoundError:
            raise StateError(f"{path}: {name} has no keys", fix=f"fedmat keys new {name}") from None
        if stat.S_IMODE(mode.st_mode) & 0o077 or mode.st_uid != os.getuid():
            raise StateError(
                f"{path}: others than the owner may read this key", fix=f"chmod 600 {path}, or rotate it if it was read"
            )
        texts.append(path.read_text(errors="replace").split())
    found = _parsed(name, *texts)
    if found is None:  # raised here, so that no exception has the words of a key file in its chain
        raise StateError(f"{folder}: damaged keys of {name}", fix="restore them, or make new ones and publish them")
    return found


def _parsed(name: str, signing: list[str], sealing: list[str]) -> PartyKeys | None:
    if len(signing) != 2 or len(sealing) != 2 or signing[0] != "ed25519" or sealing[0] not in _SEALING:
        return None
    try:
        secret, raw = bytes.fromhex(signing[1]), bytes.fromhex(sealing[1])
        _SEALING[sealing[0]].private(raw)
        return PartyKeys(name, sealing[0], Ed25519PrivateKey.from_private_bytes(secret), raw)  # type: ignore[arg-type]
    except ValueError:
        return None


def _json(path: Path) -> Any:
    try:
        return files.read_json(path)
    except StateError:
        raise ConfigError(f"{path}: not valid JSON", fix="use the file as fedmat keys wrote it") from None


def _write_private(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())
