"""Who is let in: certificates, kits, keys and clocks, at a server that runs."""

from __future__ import annotations

import shutil
import socket
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from flare_scene import Scene, wait_for
from flare_visitor import NAME, OWNER, STARTUP, Visitor

from fedmat import credentials, provision
from fedmat.errors import FedmatError, ProtocolError, ServiceError, StateError
from flows import parties

ENDED, AHEAD = (-timedelta(seconds=5), 0), (timedelta(days=2), 365)  # when a certificate begins, and days it counts


# --- at the party, before anything is started ------------------------------------------------------------------------


def _loose(v: Visitor) -> None:
    (v.home / STARTUP / "client.key").chmod(0o644)


def _edited(v: Visitor) -> None:
    path = v.home / STARTUP / "fed_client.json"
    path.write_text(path.read_text().replace('"mtls"', '"clear"'))


def _anothers(v: Visitor) -> None:
    """The certificate of another consortium, e.g. installed by copying files."""
    key = credentials.read_key(v.home / STARTUP / "client.key")
    root = credentials.new_root("elsewhere", datetime.now(UTC), 30)
    pem = credentials.issue(
        root, key.public_key(), name=NAME, organisation=OWNER, purpose="party", now=datetime.now(UTC), days=30
    )
    (v.home / STARTUP / "client.crt").write_bytes(pem)


REFUSED = {
    "expired": (lambda v: v.certify(*ENDED), ProtocolError, "expired_certificate", "fedmat site renew"),
    "not yet valid": (lambda v: v.certify(*AHEAD), ProtocolError, "not_yet_valid", "clock"),
    "another root": (_anothers, ProtocolError, "bad_certificate", ""),
    "loose key": (_loose, StateError, "client.key", "chmod"),
    "edited kit": (_edited, StateError, "edited", "join again"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_party_that_is_not_as_it_must_be_does_not_start_and_says_one_thing(visitor: Visitor, what: str) -> None:
    change, kind, says, way_out = REFUSED[what]
    change(visitor)
    said: list[str] = []
    with pytest.raises(kind, match=says) as refused:
        parties.serve_party(visitor.home, said.append)
    assert isinstance(refused.value, FedmatError) and way_out in refused.value.fix
    assert "\n" not in refused.value.what and said == []
    assert parties.processes(visitor.home) == {} and not (visitor.home / "run" / "desk.json").exists()


def test_a_kit_for_another_consortium_or_with_another_root_is_refused_at_the_party(visitor: Visitor, tmp_path: Path) -> None:
    now = datetime.now(UTC)
    provision.init(visitor.scene.stage.config_file, tmp_path / "other", host="localhost", now=now)
    kit = provision.read_kit(provision.invite(tmp_path / "other", NAME, now, organisation=OWNER), now)
    told = credentials.facts((visitor.project / "ca/ca.crt").read_bytes()).fingerprint
    with pytest.raises(ProtocolError, match="wrong_root"):
        provision.join(kit, tmp_path / "new", fingerprint=told)
    with pytest.raises(StateError, match="of another root"):
        provision.join(kit, visitor.home)


def test_a_server_whose_port_is_taken_says_which_and_does_not_start(scene: Scene) -> None:
    said: list[str] = []
    with pytest.raises(ServiceError, match=f"port {scene.stage.port} .*cannot be used") as refused:
        parties.serve_operator(scene.stage.project, said.append)
    assert refused.value.exit_code == 7 and "fedmat consortium init --port" in refused.value.fix
    assert said == []


# --- at the server, which trusts no check of a party's own -----------------------------------------------------------


def dial(scene: Scene, certificate: Path | None, key: Path | None) -> bool:
    """Whether the server speaks with whoever shows this certificate; it says why not in its own log alone."""
    context = ssl.create_default_context(cafile=str(scene.stage.project / "ca/ca.crt"))
    context.set_alpn_protocols(["h2"])
    if certificate and key:
        context.load_cert_chain(certificate, key)
    with (
        socket.create_connection(("localhost", scene.stage.port), timeout=10.0) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secured,
    ):
        return secured.recv(9) != b""


SHOWN = {
    "none at all": (lambda v: None, "PEER_DID_NOT_RETURN_A_CERTIFICATE"),
    "expired": (lambda v: v.certify(*ENDED), "certificate has expired"),
    "not yet valid": (lambda v: v.certify(*AHEAD), "certificate is not yet valid"),
    "of another root": (_anothers, "unable to get local issuer certificate"),
}


@pytest.mark.parametrize("what", SHOWN)
def test_a_certificate_that_does_not_count_gets_no_connection(visitor: Visitor, what: str) -> None:
    scene, startup = visitor.scene, visitor.home / STARTUP
    change, why = SHOWN[what]
    log = scene.stage.project / "server/console.log"
    assert dial(scene, startup / "client.crt", startup / "client.key")
    before = log.stat().st_size
    change(visitor)
    shown = None if what == "none at all" else startup / "client.crt"
    assert not dial(scene, shown, startup / "client.key")
    wait_for(lambda: why in log.read_bytes()[before:].decode(), 10.0, f"the server's log says {why}")


@pytest.mark.flare
def test_a_party_of_another_root_gets_no_connection(visitor: Visitor, tmp_path: Path) -> None:
    """Same names, same port, another operator."""
    stage = visitor.scene.stage
    provision.rehearsal(
        stage.config_file, tmp_path / "other", {NAME: (tmp_path / "foreign", None)}, now=datetime.now(UTC), port=stage.port
    )
    visitor.home = tmp_path / "foreign"
    visitor.start()
    assert "kit of this consortium" in visitor.trouble() or "kit is of another consortium" in visitor.trouble()
    assert not visitor.connected()


@pytest.mark.flare
def test_a_revoked_certificate_is_turned_away_and_a_new_one_is_let_in(visitor: Visitor) -> None:
    visitor.start()
    wait_for(visitor.connected, 60.0, "the visitor is let in")
    visitor.install(provision.renew(visitor.home, datetime.now(UTC)))  # renewed: the old one does not count any more
    visitor.stop()
    visitor.start()
    wait_for(visitor.connected, 60.0, "the renewed certificate is let in")

    provision.revoke(visitor.project, NAME)
    visitor.stop()
    with visitor.scene.session() as session:
        session.remove(NAME)
    log = visitor.home / "flare/console.log"
    log.unlink()
    visitor.start()
    assert "the server turned this party away: revoked" in visitor.trouble()
    assert not visitor.connected()
    visitor.stop()

    shutil.rmtree(visitor.home)
    visitor.join()  # invited again, with a new key
    visitor.start()
    wait_for(visitor.connected, 60.0, "the new key is let in")
