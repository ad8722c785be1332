"""X.509 credentials: a consortium's own root, what it certifies, and signatures that such a certificate vouches for.

Knows: private keys, certificates, certificate requests, who may read a key file. Refuses to know: what is signed, who is a
member, where files lie, the clock (``now`` is an argument). A private key is made where it is used and is in no message.

These keys protect the way between organisations; what sites and roles seal from each other has keys of its own (fedmat.keys).
RSA with PSS is what the transport's own handshake signs with, so one certificate serves both.

References:
    RFC 5280 (certificates, section 4.2 for the extensions used here), RFC 2986 (certificate requests), RFC 8017, section 8.1
    (RSASSA-PSS). NIST SP 800-57, part 1, section 5.6: 2048 bits for keys that end before 2031, 3072 for a root that does not.
"""

from __future__ import annotations

import ipaddress
import os
import stat
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey, generate_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedmat.errors import ProtocolError, StateError

Purpose = Literal["party", "server", "operator"]
KEY_BITS, ROOT_BITS = 2048, 3072
LONGEST_NAME = 64  # RFC 5280, appendix A: ub-common-name and ub-organization-name
CLOCK_SLACK = timedelta(minutes=5)  # a certificate begins this much before it is signed: clocks differ a little
_PSS = padding.PSS(mgf=padding.MGF1(hashes.SHA256()), salt_length=padding.PSS.MAX_LENGTH)


@dataclass(frozen=True)
class Credential:
    """A private key and the certificate of its public half.

    Attributes:
        name: the certificate's common name.
        certificate: PEM.
        key: PEM, without a passphrase; never printed, never sent.
    """

    name: str
    certificate: bytes
    key: bytes = field(repr=False)

    def sign(self, data: bytes) -> bytes:
        """Returns an RSA-PSS signature with SHA-256 over ``data``."""
        return sign(self.private, data)

    @cached_property
    def private(self) -> RSAPrivateKey:
        """The key, parsed once; :func:`load` has checked its numbers, which takes twenty times as long as using it."""
        return _private(self.key, checked=True)

    @cached_property
    def parsed(self) -> x509.Certificate:
        """The certificate, parsed once."""
        return x509.load_pem_x509_certificate(self.certificate)


@dataclass(frozen=True)
class Facts:
    """What a certificate states.

    Attributes:
        name, organisation: subject's common name and organisation ("" if it states none).
        serial: hex, lower case, without leading zeros; what a list of revoked certificates holds.
        fingerprint: hex SHA-256 of the certificate (DER).
        not_before, not_after: when it counts, UTC.
    """

    name: str
    organisation: str
    serial: str
    fingerprint: str
    not_before: datetime
    not_after: datetime


# --- what is on disk ---------------------------------------------------------------------------------------------


def load(certificate: Path, key: Path) -> Credential:
    """Reads a private key and its certificate.

    Raises:
        StateError: one is missing or damaged, others than the owner may read the key, or they do not belong together.
    """
    for path in (certificate, key):
        if not path.is_file():
            raise StateError(f"{path}: no such file", fix="restore it, or ask the operator for a new certificate")
    private, raw = read_key(key), certificate.read_bytes()
    try:
        found, fits = Credential(facts(raw).name, raw, pem(private)), matches(raw, private)
    except ProtocolError:
        raise StateError(f"{certificate}: not a certificate", fix="restore it, or install it again") from None
    if not fits:
        raise StateError(
            f"{key}: not the key of {certificate.name} beside it", fix="restore the pair, or ask for a new certificate"
        )
    return found


def read_key(path: Path) -> RSAPrivateKey:
    """Reads a private key that only its owner may read.

    Raises:
        StateError: it is missing or damaged, or others may read it.
    """
    check_private(path)
    try:
        return _private(path.read_bytes())
    except ProtocolError:
        raise StateError(f"{path}: not a private key (RSA, PEM, no passphrase)", fix="restore it, or make a new key") from None


def check_private(path: Path) -> None:
    """Checks that nobody but its owner, who runs this process, may read or replace a private file or folder.

    Raises:
        StateError: others may; or it is somebody else's, a link, or missing.
    """
    try:
        state = path.lstat()
    except FileNotFoundError:
        raise StateError(f"{path}: no such file", fix="restore it, or make a new key") from None
    if stat.S_ISLNK(state.st_mode):
        raise StateError(f"{path}: a link, and a private key must be a file of its own", fix="put the file itself there")
    if stat.S_IMODE(state.st_mode) & 0o077:
        right = "700" if stat.S_ISDIR(state.st_mode) else "600"
        raise StateError(
            f"{path}: others than its owner may read it (mode {stat.S_IMODE(state.st_mode):o})",
            fix=f"chmod {right} {path}; if others did have access, take it as stolen and make a new key",
        )
    if state.st_uid != os.getuid():
        raise StateError(f"{path}: belongs to another user", fix="run as that user, or give it to this one (chown)")


# --- making them -------------------------------------------------------------------------------------------------


def new_key(bits: int = KEY_BITS) -> RSAPrivateKey:
    """Returns a fresh private key."""
    return generate_private_key(65537, bits)


def pem(key: RSAPrivateKey) -> bytes:
    """Returns a private key as it is kept: PKCS 8, without a passphrase, as a party has to start without a person."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )  # fmt: skip


def sign(key: RSAPrivateKey, data: bytes) -> bytes:
    """Returns an RSA-PSS signature with SHA-256 over ``data``."""
    return key.sign(data, _PSS, hashes.SHA256())


def new_root(name: str, now: datetime, days: int) -> Credential:
    """Returns a new root: a key and the certificate it signs for itself.

    Args:
        days: how long it counts; nothing it certifies counts longer.
    """
    private = new_key(ROOT_BITS)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    made = (
        _builder(subject, subject, private.public_key(), private.public_key(), _utc(now), _utc(now) + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signing=True, certifying=True), critical=True)
    )
    return Credential(name, _pem(made.sign(private, hashes.SHA256())), pem(private))


def request(key: RSAPrivateKey, name: str, organisation: str) -> bytes:
    """Returns a certificate request, PEM: these names for the public half of ``key``, signed with it."""
    subject = x509.Name(_subject(name, organisation))
    return (
        x509.CertificateSigningRequestBuilder()
        .subject_name(subject)
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )


def check_request(raw: bytes, name: str, organisation: str) -> RSAPublicKey:
    """Returns the public key of a request, if its maker holds the private one and asks for exactly these names.

    Raises:
        ProtocolError: bad_request (malformed, or of another kind of key), no_possession, wrong_name.
    """
    try:
        found = x509.load_pem_x509_csr(raw)
        key, holds = found.public_key(), found.is_signature_valid
    except (ValueError, UnsupportedAlgorithm, InvalidSignature):
        raise ProtocolError("bad_request", f"what {name} sent is no certificate request", fix=_ASK_AGAIN) from None
    if not isinstance(key, RSAPublicKey) or key.key_size < KEY_BITS:
        raise ProtocolError("bad_request", f"the key of {name} is not RSA with {KEY_BITS} bits or more", fix=_ASK_AGAIN)
    if not holds:
        raise ProtocolError("no_possession", f"the request of {name} is not signed with the key it is for", fix=_ASK_AGAIN)
    stated = _stated(found.subject)
    if stated != (name, organisation):
        raise ProtocolError(
            "wrong_name",
            f"the request is for {stated[0]!r} of {stated[1]!r}, expected {name!r} of {organisation!r}",
            fix="ask the party for the request that fits its invitation",
        )
    return key


def issue(
    root: Credential, key: RSAPublicKey, *, name: str, organisation: str, purpose: Purpose, now: datetime, days: int,
    hosts: Sequence[str] = (), role: str = "",
) -> bytes:  # fmt: skip
    """Returns a certificate, PEM, of ``key`` for these names, signed by ``root``.

    Args:
        purpose: a party's and the operator's certificates open connections, the server's also accepts them; so no party can
            pose as the server.
        days: how long it counts, at most as long as the root.
        hosts: of a server, the names or addresses it is reached by.
        role: of an operator, what the transport lets it do.

    Raises:
        StateError: the root has ended, or has not begun.
    """
    now, ends = _utc(now), root.parsed.not_valid_after_utc
    if not root.parsed.not_valid_before_utc <= now < ends:
        raise StateError(
            f"the root of {root.name} counts from {_day(root.parsed.not_valid_before_utc)} to {_day(ends)}, and now is {_day(now)}",
            fix="check the clock; when a root has ended, the consortium is set up anew",
        )
    uses = [ExtendedKeyUsageOID.CLIENT_AUTH] + ([ExtendedKeyUsageOID.SERVER_AUTH] if purpose == "server" else [])
    subject = x509.Name(_subject(name, organisation, role))
    made = (
        _builder(
            subject, root.parsed.subject, key, root.private.public_key(), now, min(now + timedelta(days=days), ends)
        )
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signing=True, certifying=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
        .add_extension(x509.SubjectAlternativeName([_alternative(h) for h in hosts or (name,)]), critical=False)
    )  # fmt: skip
    return _pem(made.sign(root.private, hashes.SHA256()))


# --- reading and checking them -----------------------------------------------------------------------------------


def facts(certificate: bytes) -> Facts:
    """Returns what a certificate states; nothing of it is verified.

    Raises:
        ProtocolError: bad_certificate.
    """
    found = _certificate(certificate)
    name, organisation = _stated(found.subject)
    return Facts(
        name, organisation, format(found.serial_number, "x"), found.fingerprint(hashes.SHA256()).hex(),
        found.not_valid_before_utc, found.not_valid_after_utc,
    )  # fmt: skip


def matches(certificate: bytes, key: RSAPrivateKey) -> bool:
    """Tells whether a certificate is of the public half of a private key."""
    return _certificate(certificate).public_key() == key.public_key()


def check_root(root: bytes, now: datetime) -> None:
    """Checks that a root certifies itself and counts now.

    Raises:
        ProtocolError: bad_certificate, expired_certificate, not_yet_valid.
    """
    found = _certificate(root)
    try:
        found.verify_directly_issued_by(found)
    except (ValueError, TypeError, InvalidSignature):
        raise ProtocolError("bad_certificate", "the root certificate is not signed by its own key", fix=_ASK_AGAIN) from None
    if not _certifies(found):
        raise ProtocolError("bad_certificate", "the root certificate is not one that may certify others", fix=_ASK_AGAIN)
    _check_time(found, "the root certificate", now)


def check_certificate(
    certificate: bytes, root: bytes, *, name: str, now: datetime, revoked: Collection[str] = ()
) -> Facts:  # fmt: skip
    """Returns a certificate's facts if ``root`` issued it to ``name`` and it counts now.

    Args:
        revoked: serial numbers as in :class:`Facts`.

    Raises:
        ProtocolError: bad_certificate (not issued by root, or one that may certify others), wrong_name, expired_certificate,
            not_yet_valid, revoked.
    """
    found, above = _certificate(certificate), _certificate(root)
    try:
        found.verify_directly_issued_by(above)
    except (ValueError, TypeError, InvalidSignature):
        raise ProtocolError(
            "bad_certificate", f"the certificate given for {name} was not issued by this consortium's root",
            fix="use the certificate and the root of one consortium",
        ) from None  # fmt: skip
    if not _certifies(above) or _certifies(found):
        raise ProtocolError("bad_certificate", f"the certificate given for {name} is of the wrong kind", fix=_ASK_AGAIN)
    told = facts(certificate)
    if told.name != name:
        raise ProtocolError(
            "wrong_name", f"a certificate of {told.name!r} was given for {name!r}", fix="use its own certificate"
        )
    _check_time(above, "the root certificate", now)
    _check_time(found, f"the certificate of {name}", now)
    if told.serial in revoked:
        raise ProtocolError(
            "revoked", f"the certificate of {name} (serial {told.serial}) was revoked", fix="ask the operator why; fedmat site renew"
        )  # fmt: skip
    return told


def verify(
    data: bytes, signature: bytes, certificate: bytes, root: bytes, *, name: str, now: datetime, revoked: Collection[str] = ()
) -> None:
    """Checks that ``name``, by a certificate of ``root`` that counts now, signed ``data``.

    Args:
        certificate, root: PEM.
        revoked: serial numbers, hex.

    Raises:
        ProtocolError: as in :func:`check_certificate`, or bad_signature.
    """
    check_certificate(certificate, root, name=name, now=now, revoked=revoked)
    _verify_with(certificate, data, signature, f"what {name} is said to have signed was changed, or signed with another key")


def verify_key(data: bytes, signature: bytes, key: RSAPublicKey, name: str) -> None:
    """Checks that the private half of ``key``, which no certificate vouches for yet, signed ``data``.

    Raises:
        ProtocolError: bad_signature.
    """
    _check_signature(data, signature, key, f"what {name} is said to have signed was changed, or signed with another key")


def verify_by_root(data: bytes, signature: bytes, root: bytes) -> None:
    """Checks that the root itself signed ``data``.

    Raises:
        ProtocolError: bad_certificate, bad_signature.
    """
    _verify_with(root, data, signature, "it was changed, or the root beside it did not sign it")


def _verify_with(certificate: bytes, data: bytes, signature: bytes, otherwise: str) -> None:
    key = _certificate(certificate).public_key()
    if not isinstance(key, RSAPublicKey):
        raise ProtocolError("bad_certificate", "the certificate's key is not RSA", fix=_ASK_AGAIN)
    _check_signature(data, signature, key, otherwise)


def _check_signature(data: bytes, signature: bytes, key: RSAPublicKey, otherwise: str) -> None:
    try:
        key.verify(signature, data, _PSS, hashes.SHA256())
    except InvalidSignature:
        raise ProtocolError("bad_signature", otherwise, fix=_ASK_AGAIN) from None


_ASK_AGAIN = "ask its sender for it again, unchanged"


def _certificate(raw: bytes) -> x509.Certificate:
    try:
        found = x509.load_pem_x509_certificate(raw)
        found.subject, found.extensions  # noqa: B018  parsed on demand: what is malformed shows here
    except (ValueError, x509.DuplicateExtension):
        raise ProtocolError("bad_certificate", "not a certificate (PEM)", fix=_ASK_AGAIN) from None
    return found


def _private(raw: bytes, *, checked: bool = False) -> RSAPrivateKey:
    try:
        found = serialization.load_pem_private_key(raw, None, unsafe_skip_rsa_key_validation=checked)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ProtocolError("bad_key", "not a private key (RSA, PEM, no passphrase)") from None
    if not isinstance(found, RSAPrivateKey):
        raise ProtocolError("bad_key", "the private key is not RSA")
    return found


def _certifies(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def _check_time(certificate: x509.Certificate, which: str, now: datetime) -> None:
    now = _utc(now)
    if now < certificate.not_valid_before_utc:
        raise ProtocolError(
            "not_yet_valid",
            f"{which} counts from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC, and this machine's clock says "
            f"{now:%Y-%m-%d %H:%M}",
            fix="check the clock of this machine",
        )
    if now > certificate.not_valid_after_utc:
        raise ProtocolError(
            "expired_certificate",
            f"{which} ended on {_day(certificate.not_valid_after_utc)}, and now is {_day(now)}",
            fix="fedmat site renew at the party, fedmat consortium renew at the operator; if the date is wrong, set the clock",
        )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: RSAPublicKey, signer: RSAPublicKey, now: datetime, ends: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SLACK)
        .not_valid_after(ends)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer), critical=False)
    )


def _usage(*, signing: bool, certifying: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=signing, key_cert_sign=certifying, crl_sign=certifying, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _subject(name: str, organisation: str, role: str = "") -> list[x509.NameAttribute[str]]:
    told = [x509.NameAttribute(NameOID.COMMON_NAME, name), x509.NameAttribute(NameOID.ORGANIZATION_NAME, organisation)]
    return told + ([x509.NameAttribute(NameOID.UNSTRUCTURED_NAME, role)] if role else [])


def _stated(subject: x509.Name) -> tuple[str, str]:
    first = [subject.get_attributes_for_oid(oid) for oid in (NameOID.COMMON_NAME, NameOID.ORGANIZATION_NAME)]
    name, organisation = (str(found[0].value) if len(found) == 1 else "" for found in first)
    return name, organisation


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _utc(now: datetime) -> datetime:
    if now.tzinfo is None:
        raise ValueError("a time without a time zone: use datetime.now(UTC)")
    return now.astimezone(UTC)


def _day(when: datetime) -> str:
    return when.date().isoformat()
