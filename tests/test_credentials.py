"""Certificates: who may sign for whom, from when to when, and that a private key stays where it was made."""

from __future__ import annotations

import os
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmat import credentials
from fedmat.credentials import Credential, Purpose
from fedmat.errors import ProtocolError, StateError

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
YEAR = timedelta(days=365)
ROOT, OTHER_ROOT = credentials.new_root("grove", NOW, 3650), credentials.new_root("grove", NOW, 3650)
DATA = b"an update"


def certified(
    name: str, *, root: Credential = ROOT, days: int = 365, purpose: Purpose = "party", host: str = "", now: datetime = NOW
) -> Credential:
    """A new key and its certificate."""
    key = credentials.new_key()
    issued = credentials.issue(
        root, key.public_key(), name=name, organisation="Ash Ltd", purpose=purpose, now=now, days=days, hosts=(host,) if host else ()
    )  # fmt: skip
    return Credential(name, issued, credentials.pem(key))


ASH, BIRCH, FOREIGN = certified("ash"), certified("birch"), certified("ash", root=OTHER_ROOT)


def reason(call: Any, *args: Any, **kwargs: Any) -> str:
    """The one-word reason of the refusal."""
    with pytest.raises(ProtocolError) as caught:
        call(*args, **kwargs)
    return caught.value.reason


def refused(**changed: Any) -> str:
    """Why a signature of ash that is good but for what is changed does not count."""
    good: dict[str, Any] = {
        "data": DATA, "signature": ASH.sign(DATA), "certificate": ASH.certificate, "root": ROOT.certificate, "name": "ash", "now": NOW,
    }  # fmt: skip
    good.update(changed)
    return reason(
        credentials.verify, good.pop("data"), good.pop("signature"), good.pop("certificate"), good.pop("root"), **good
    )


# --- signatures --------------------------------------------------------------------------------------------------


def test_what_a_certified_key_signed_counts_from_the_first_second_to_the_last() -> None:
    told = credentials.facts(ASH.certificate)
    assert (told.name, told.organisation, told.not_after) == ("ash", "Ash Ltd", NOW + YEAR)
    for now in (told.not_before, NOW, told.not_after):
        credentials.verify(DATA, ASH.sign(DATA), ASH.certificate, ROOT.certificate, name="ash", now=now)


def test_a_signature_counts_for_nothing_else() -> None:
    told = credentials.facts(ASH.certificate)
    assert refused(data=b"another update") == "bad_signature"
    assert refused(signature=BIRCH.sign(DATA)) == "bad_signature"
    assert refused(signature=b"") == "bad_signature"
    assert refused(name="birch") == "wrong_name"
    assert refused(certificate=FOREIGN.certificate, signature=FOREIGN.sign(DATA)) == "bad_certificate"
    assert refused(root=OTHER_ROOT.certificate) == "bad_certificate"
    assert refused(certificate=b"no certificate") == "bad_certificate"
    assert refused(now=told.not_before - timedelta(seconds=1)) == "not_yet_valid"
    assert refused(now=told.not_after + timedelta(seconds=1)) == "expired_certificate"
    assert refused(revoked=["0", told.serial]) == "revoked"


def test_a_clock_that_is_behind_is_said_to_be_one() -> None:
    with pytest.raises(ProtocolError, match=r"check the clock"):
        credentials.check_certificate(ASH.certificate, ROOT.certificate, name="ash", now=NOW - timedelta(days=30))


def test_a_time_without_a_zone_is_no_time() -> None:
    with pytest.raises(ValueError, match="time zone"):
        credentials.check_certificate(ASH.certificate, ROOT.certificate, name="ash", now=datetime(2026, 11, 24))


@settings(max_examples=40, deadline=None)
@given(place=st.integers(0, 10_000), flip=st.integers(1, 255), what=st.sampled_from(["data", "signature"]))
def test_one_flipped_bit_is_detected(place: int, flip: int, what: str) -> None:
    raw = bytearray({"data": DATA, "signature": SIGNATURE}[what])
    raw[place % len(raw)] ^= flip
    assert refused(**{what: bytes(raw)}) == "bad_signature"


SIGNATURE = ASH.sign(DATA)


@settings(max_examples=40, deadline=None)
@given(place=st.integers(0, 10_000), flip=st.integers(1, 255))
def test_a_changed_certificate_is_none_of_the_root(place: int, flip: int) -> None:
    found = x509.load_pem_x509_certificate(ASH.certificate)
    raw = bytearray(found.public_bytes(serialization.Encoding.DER))
    raw[place % len(raw)] ^= flip
    body = ssl.DER_cert_to_PEM_cert(bytes(raw)).encode()
    assert refused(certificate=body) == "bad_certificate"


def test_no_party_can_certify_another() -> None:
    forged = credentials.new_key()
    issued = credentials.issue(
        Credential("ash", ASH.certificate, ASH.key), forged.public_key(), name="birch", organisation="Ash Ltd", purpose="party",
        now=NOW, days=1,
    )  # fmt: skip
    assert refused(certificate=issued, root=ASH.certificate, name="birch", signature=credentials.sign(forged, DATA)) == (
        "bad_certificate"
    )
    assert refused(certificate=issued, name="birch", signature=credentials.sign(forged, DATA)) == "bad_certificate"


def test_the_root_is_nobodys_certificate() -> None:
    assert refused(certificate=ROOT.certificate, signature=ROOT.sign(DATA), name="grove") == "bad_certificate"


def test_only_the_root_signs_as_the_root() -> None:
    credentials.verify_by_root(DATA, ROOT.sign(DATA), ROOT.certificate)
    assert reason(credentials.verify_by_root, DATA, OTHER_ROOT.sign(DATA), ROOT.certificate) == "bad_signature"
    credentials.check_root(ROOT.certificate, NOW)
    assert reason(credentials.check_root, ASH.certificate, NOW) == "bad_certificate"
    assert reason(credentials.check_root, ROOT.certificate, NOW + 11 * YEAR) == "expired_certificate"


def test_nothing_counts_longer_than_its_root() -> None:
    late = NOW + timedelta(days=3600)
    assert credentials.facts(certified("ash", now=late).certificate).not_after == NOW + timedelta(days=3650)
    for now in (NOW + timedelta(days=3651), NOW - timedelta(days=1)):
        with pytest.raises(StateError, match="check the clock"):
            certified("ash", now=now)


# --- connections -------------------------------------------------------------------------------------------------


def files_of(folder: Path, own: Credential) -> tuple[Path, Path]:
    """Writes a credential as two files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in (("x.crt", own.certificate), ("x.key", own.key)):
        (folder / name).write_bytes(data)
        (folder / name).chmod(0o600)
    return folder / "x.crt", folder / "x.key"


def handshake(folder: Path, server: Credential, client: Credential, *, host: str, root: Credential = ROOT) -> None:
    """A TLS handshake with certificates on both sides, in memory; raises ssl.SSLError where one refuses the other."""
    ends = []
    for side, own in (("server", server), ("client", client)):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if side == "server" else ssl.PROTOCOL_TLS_CLIENT)
        context.load_cert_chain(*files_of(folder / side, own))
        context.load_verify_locations(cadata=root.certificate.decode())
        context.verify_mode = ssl.CERT_REQUIRED
        ends.append((ssl.MemoryBIO(), ssl.MemoryBIO(), context, side))
    (a_in, a_out, a, _), (b_in, b_out, b, _) = ends
    here, there = a.wrap_bio(a_in, a_out, server_side=True), b.wrap_bio(b_in, b_out, server_hostname=host)
    for _ in range(8):
        for end in (there, here):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                pass
            b_in.write(a_out.read())
            a_in.write(b_out.read())
    here.do_handshake()
    there.do_handshake()


@pytest.fixture
def real_time(tmp_path: Path) -> tuple[Credential, Credential, Credential, Path]:
    """A root, a server and a party whose certificates count now: OpenSSL reads the machine's own clock."""
    now = datetime.now(UTC)
    root = credentials.new_root("grove", now, 10)
    server = certified("hub.example.org", root=root, purpose="server", host="hub.example.org", now=now, days=5)
    return root, server, certified("ash", root=root, now=now, days=5), tmp_path


def test_a_party_and_the_server_agree_on_a_connection(real_time: Any) -> None:
    root, server, party, folder = real_time
    handshake(folder, server, party, host="hub.example.org", root=root)


def test_a_party_cannot_pose_as_the_server(real_time: Any) -> None:
    root, server, party, folder = real_time
    with pytest.raises(ssl.SSLError):
        handshake(folder, party, party, host="ash", root=root)
    with pytest.raises(ssl.SSLError):
        handshake(folder, server, party, host="elsewhere.example.org", root=root)


def test_a_certificate_of_another_root_opens_no_connection(real_time: Any) -> None:
    root, server, _, folder = real_time
    foreign = certified("ash", root=credentials.new_root("grove", datetime.now(UTC), 10), now=datetime.now(UTC), days=5)
    with pytest.raises(ssl.SSLError):
        handshake(folder, server, foreign, host="hub.example.org", root=root)


def test_a_server_can_have_an_address_for_a_name() -> None:
    found = x509.load_pem_x509_certificate(certified("192.0.2.7", purpose="server", host="192.0.2.7").certificate)
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(a) for a in names.get_values_for_type(x509.IPAddress)] == ["192.0.2.7"]


@pytest.mark.slow
def test_the_transport_signs_and_verifies_as_we_do() -> None:
    from nvflare.lighter import utils as theirs

    key = serialization.load_pem_private_key(ASH.key, None)
    found = x509.load_pem_x509_certificate(ASH.certificate)
    theirs.verify_content(DATA, ASH.sign(DATA), found.public_key())
    credentials.verify(
        DATA, theirs.sign_content(DATA, key, return_str=False), ASH.certificate, ROOT.certificate, name="ash", now=NOW
    )
    theirs.verify_cert_chain(found, [], x509.load_pem_x509_certificate(ROOT.certificate), now=NOW)


# --- requests ----------------------------------------------------------------------------------------------------


def csr(name: str = "ash", organisation: str = "Ash Ltd", key: Any = None) -> bytes:
    """A request made by hand."""
    subject = x509.Name(
        [x509.NameAttribute(NameOID.COMMON_NAME, name), x509.NameAttribute(NameOID.ORGANIZATION_NAME, organisation)]
    )
    made = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key or BIRCH.private, hashes.SHA256())
    return made.public_bytes(serialization.Encoding.PEM)


def test_a_request_gives_the_key_it_is_for() -> None:
    key = credentials.new_key()
    assert credentials.check_request(credentials.request(key, "ash", "Ash Ltd"), "ash", "Ash Ltd") == key.public_key()


def test_a_request_for_another_name_or_of_a_weak_key_is_refused() -> None:
    assert reason(credentials.check_request, csr("birch"), "ash", "Ash Ltd") == "wrong_name"
    assert reason(credentials.check_request, csr(organisation="Ash GmbH"), "ash", "Ash Ltd") == "wrong_name"
    assert reason(credentials.check_request, b"nothing", "ash", "Ash Ltd") == "bad_request"
    weak, other = rsa.generate_private_key(65537, 1024), ec.generate_private_key(ec.SECP256R1())
    for key in (weak, other):
        assert reason(credentials.check_request, csr(key=key), "ash", "Ash Ltd") == "bad_request"


def test_a_request_for_a_key_its_maker_does_not_have_is_refused() -> None:
    whole = x509.load_pem_x509_csr(csr()).public_bytes(serialization.Encoding.DER)
    theirs = x509.load_pem_x509_csr(csr(key=ASH.private)).public_key()
    own = BIRCH.private.public_key()
    swap = [
        k.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        for k in (own, theirs)
        if isinstance(k, rsa.RSAPublicKey)
    ]
    assert whole.count(swap[0]) == 1
    stolen = ssl.DER_cert_to_PEM_cert(whole.replace(swap[0], swap[1])).replace("CERTIFICATE", "CERTIFICATE REQUEST")
    assert reason(credentials.check_request, stolen.encode(), "ash", "Ash Ltd") == "no_possession"


# --- on disk -----------------------------------------------------------------------------------------------------


def test_a_pair_is_read_back(tmp_path: Path) -> None:
    found = credentials.load(*files_of(tmp_path, ASH))
    assert found == ASH and found.private.public_key() == ASH.private.public_key()


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o620, 0o644, 0o666, 0o777])
def test_a_key_that_others_may_touch_is_refused(tmp_path: Path, mode: int) -> None:
    certificate, key = files_of(tmp_path, ASH)
    key.chmod(mode)
    with pytest.raises(StateError, match=r"others than its owner.*\n.*chmod 600"):
        credentials.load(certificate, key)


def test_a_pair_that_is_none_is_refused(tmp_path: Path) -> None:
    certificate, key = files_of(tmp_path, ASH)
    key.write_bytes(BIRCH.key)
    with pytest.raises(StateError, match=r"x\.key: not the key of x\.crt"):
        credentials.load(certificate, key)
    key.write_bytes(b"-----BEGIN")
    with pytest.raises(StateError, match=r"x\.key: not a private key"):
        credentials.load(certificate, key)
    key.unlink()
    with pytest.raises(StateError, match=r"x\.key: no such file"):
        credentials.load(certificate, key)
    key.symlink_to(files_of(tmp_path / "elsewhere", ASH)[1])
    with pytest.raises(StateError, match="a link"):
        credentials.load(certificate, key)
    key.unlink()
    files_of(tmp_path, ASH)
    certificate.write_bytes(b"nothing")
    with pytest.raises(StateError, match=r"x\.crt: not a certificate"):
        credentials.load(certificate, key)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")
def test_somebody_elses_key_is_refused(tmp_path: Path) -> None:
    certificate, key = files_of(tmp_path, ASH)
    os.chown(key, 12345, 12345)
    with pytest.raises(StateError, match="another user"):
        credentials.load(certificate, key)


def test_a_private_key_is_in_no_text() -> None:
    key = ASH.key.splitlines()[1].decode()
    assert key in ASH.key.decode() and key not in repr(ASH) and key not in str(ASH)
