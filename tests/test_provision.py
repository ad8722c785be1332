"""Setting up a consortium: what a kit, a request and a certificate prove, and that a party refuses to start on a doubt."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import small
import yaml
from cryptography.hazmat.primitives.asymmetric import rsa
from leaks import contents

from fedmat import credentials, files, keys, policy, provision
from fedmat.credentials import Credential
from fedmat.envelopes import ROLES
from fedmat.errors import ConfigError, FedmatError, ProtocolError, StateError

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
DAY = timedelta(days=1)
HOST = "hub.example.org"
_POOL: dict[int, list[rsa.RSAPrivateKey]] = {}


@pytest.fixture(autouse=True)
def keys_from_a_pool(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Making and checking keys takes longer than all the rest; within a test none is used twice."""
    if "slow" in request.keywords:
        return
    used = dict.fromkeys((credentials.KEY_BITS, credentials.ROOT_BITS), 0)

    def new_key(bits: int = credentials.KEY_BITS) -> rsa.RSAPrivateKey:
        pool = _POOL.setdefault(bits, [])
        if used[bits] == len(pool):
            pool.append(rsa.generate_private_key(65537, bits))
        used[bits] += 1
        return pool[used[bits] - 1]

    parse = credentials._private
    monkeypatch.setattr(credentials, "new_key", new_key)
    monkeypatch.setattr(credentials, "_private", lambda raw, *, checked=False: parse(raw, checked=True))


class Consortium:
    """An operator and parties, each with a folder; files between them are carried by the test."""

    def __init__(self, folder: Path, name: str = "a") -> None:
        self.folder = folder / name
        self.file = small.build(self.folder / "c")
        self.project = self.folder / "project"
        provision.init(self.file, self.project, host=HOST, now=NOW)

    def home(self, party: str) -> Path:
        """A party's folder."""
        return self.folder / party

    def site_file(self, party: str) -> Path | None:
        """A site's own data."""
        return self.folder / "c" / party / "site.yaml" if party in small.COMPANIES else None

    def kit(self, party: str) -> Path:
        """Invites a party."""
        return provision.invite(self.project, party, NOW, organisation="Office" if party in ROLES else None)

    def join(self, party: str, **more: Any) -> Path:
        """A party joins; returns its request."""
        kit = provision.read_kit(self.kit(party), NOW)
        return provision.join(kit, more.pop("home", self.home(party)), site_file=self.site_file(party), **more)

    def member(self, party: str) -> Path:
        """A party that is invited, joined and certified; returns its folder."""
        made = provision.admit(self.project, self.join(party).read_bytes(), NOW)
        provision.install(self.home(party), made.certificate.read_bytes(), NOW)
        return self.home(party)

    def state(self, party: str) -> str:
        """How the operator sees a party."""
        return provision.read_project(self.project).members[party].state


@pytest.fixture
def grove(tmp_path: Path) -> Consortium:
    """A consortium whose operator has begun."""
    return Consortium(tmp_path)


def reason(call: Any, *args: Any, **kwargs: Any) -> str:
    """The one-word reason of the refusal."""
    with pytest.raises(ProtocolError) as caught:
        call(*args, **kwargs)
    return caught.value.reason


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def edit(path: Path, **changes: Any) -> None:
    """Changes a JSON file's keys."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# --- the way of a good party -------------------------------------------------------------------------------------


def test_a_party_that_was_invited_and_certified_may_start(grove: Consortium) -> None:
    home = grove.member("forge")
    found = provision.check_home(home, NOW)
    assert (found.party, found.kind, found.organisation, found.warnings) == ("forge", "site", "Forge Ltd", ())
    assert (found.consortium, found.host, found.port, found.site_file) == ("small-alloys", HOST, 8002, grove.site_file("forge"))
    member = provision.check_project(grove.project, NOW).members["forge"]
    assert member.state == "admitted" and member.serial == credentials.facts(found.credential.certificate).serial
    assert member.not_after == found.not_after.isoformat()
    signature = found.credential.sign(b"x")
    credentials.verify(b"x", signature, found.credential.certificate, found.root, name="forge", now=NOW)
    assert not (home / "forge.request").exists()


def test_the_folders_are_those_of_the_contract(grove: Consortium) -> None:
    home = grove.member("forge")
    assert {
        "party.json", "consortium.yaml", "policy.yaml", "kit.json", "flare/startup/fed_client.json", "flare/startup/client.crt",
        "flare/startup/client.key", "flare/startup/rootCA.pem", "flare/local/resources.json", "flare/local/authorization.json",
        "flare/local/log_config.json", "flare/local/privacy.json",
    } == set(tree(home))  # fmt: skip
    assert {
        "project.json", "consortium.yaml", "members.json", "revoked.json", "ca/ca.key", "ca/ca.crt", "kits/forge.kit",
        "kits/forge.certificate", "server/startup/fed_server.json", "server/startup/server.crt", "server/startup/server.key",
        "server/startup/rootCA.pem", "server/local/resources.json", "server/local/authorization.json", "server/local/log_config.json",
        "server/local/privacy.json", "admin/startup/fed_admin.json", "admin/startup/client.crt", "admin/startup/client.key",
        "admin/startup/rootCA.pem", "admin/local/resources.json",
    } == set(tree(grove.project)) - {".lock"}  # fmt: skip
    assert (home / "consortium.yaml").read_bytes() == grove.file.read_bytes()


def test_everything_is_its_owners_alone(grove: Consortium) -> None:
    for folder in (grove.member("forge"), grove.project):
        for path in [folder, *folder.rglob("*")]:
            mode = stat.S_IMODE(path.stat().st_mode)
            assert mode & 0o077 == 0 or path.name == ".lock", path


def test_no_private_key_is_in_what_is_sent(grove: Consortium) -> None:
    request = grove.join("forge")
    sent = [grove.project / "kits/forge.kit", request]
    own = grove.home("forge") / "flare/startup/client.key"
    sent.append(provision.admit(grove.project, request.read_bytes(), NOW).certificate)
    secret = {p: p.read_bytes() for p in [own, *grove.project.rglob("*.key")]}
    assert len(secret) == 4
    held = [piece for p in sent for piece in contents(p)]
    for raw in secret.values():
        numbers = credentials._private(raw).private_numbers()
        prime = numbers.p.to_bytes(256, "big").lstrip(b"\0")
        lines = raw.split(b"\n")[2:-3]
        assert len(lines) > 10
        assert not any(prime in piece or line in piece for piece in held for line in lines)
    assert any(line in own.read_bytes() for line in secret[own].split(b"\n"))


def test_a_role_has_no_records_and_no_policy(grove: Consortium) -> None:
    found = provision.check_home(grove.member("notary"), NOW)
    assert (found.kind, found.site_file) == ("notary", None) and not (found.folder / "policy.yaml").exists()
    assert "OutboundFilter" not in (found.flare / "local/privacy.json").read_text()
    with pytest.raises(ConfigError, match="sees no records"):
        provision.join(provision.read_kit(grove.kit("auditor"), NOW), grove.home("auditor"), site_file=grove.site_file("mill"))


def test_everything_a_site_sends_goes_through_its_own_filter(grove: Consortium) -> None:
    home = grove.member("forge")
    scope = json.loads((home / "flare/local/privacy.json").read_text())
    own = {"path": "fedmat.federation.flare.OutboundFilter", "args": {"home": str(home)}}
    assert scope == {"scopes": [{"name": "fedmat", "task_result_filters": [own]}], "default_scope": "fedmat"}


def test_the_transports_unsafe_defaults_are_off(grove: Consortium) -> None:
    local = grove.member("forge") / "flare/local"
    party, server = (json.loads((p / "resources.json").read_text()) for p in (local, grove.project / "server/local"))
    for found in (party, server):
        assert found["class_allow_list"] == ["fedmat."] and found["class_list_enforcement_mode"] == "enforce"
        assert not {"log_receiver", "site_log_streamer"} & {c["id"] for c in found["components"]}
    assert party["allow_log_streaming"] is False
    stores = json.dumps(server)
    assert str(grove.project / "server/store/jobs") in stores and str(grove.project / "server/store/snapshots") in stores
    assert "/tmp/nvflare" not in stores and server["servers"][0]["heart_beat_timeout"] == 15
    doorkeeper = next(c for c in server["components"] if c["id"] == "doorkeeper")
    assert doorkeeper["args"] == {"revoked": str(grove.project / "revoked.json")}
    for folder in (local, grove.project / "server/local"):
        (rights,) = json.loads((folder / "authorization.json").read_text())["permissions"].values()
        assert [rights[k] for k in ("shell_commands", "byoc", "clone_job", "configure_site_log")] == ["none"] * 4
        loggers = json.loads((folder / "log_config.json").read_text())["loggers"]
        assert loggers["httpx"]["level"] == "WARNING" and loggers["root"] == {"level": "INFO", "handlers": ["logFileHandler"]}


def test_the_same_invitation_gives_the_same_kit(grove: Consortium, monkeypatch: pytest.MonkeyPatch) -> None:
    # Every signature has a salt of its own; what is signed is the same.
    monkeypatch.setattr(Credential, "sign", lambda self, data: b"s" * 384)
    assert grove.kit("forge").read_bytes() == grove.kit("forge").read_bytes()


# --- the kit -----------------------------------------------------------------------------------------------------


def repacked(kit: Path, change: Any) -> Path:
    """A kit whose files somebody on the way changed."""
    with zipfile.ZipFile(kit) as archive:
        held = {n: archive.read(n) for n in archive.namelist()}
    change(held)
    out = kit.with_name("changed.kit")
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in held.items():
            archive.writestr(name, data)
    return out


def resigned(kit: Path, root: Credential, change: Any) -> Path:
    """A kit that the holder of ``root`` made of another."""

    def again(held: dict[str, bytes]) -> None:
        told = json.loads(held["kit.json"])
        del told["signature"]
        held["flare/startup/rootCA.pem"] = root.certificate
        told["root"] = credentials.facts(root.certificate).fingerprint
        change(held, told)
        told["files"] = {n: files.sha256(d) for n, d in held.items() if n != "kit.json"}
        signature = root.sign(b"fedmat/kit/v1|" + files.canonical_json(told)).hex()
        held["kit.json"] = json.dumps({**told, "signature": signature}).encode()

    return repacked(kit, again)


def test_a_kit_that_was_changed_on_the_way_is_refused(grove: Consortium) -> None:
    kit = grove.kit("forge")
    with zipfile.ZipFile(kit) as archive:
        names = archive.namelist()
    assert "kit.json" in names and len(names) == 7
    for name in names:

        def add(held: dict[str, bytes], name: str = name) -> None:
            held[name] += b" "

        def drop(held: dict[str, bytes], name: str = name) -> None:
            del held[name]

        if name not in ("kit.json", "flare/startup/rootCA.pem"):  # a space more in these changes nothing
            with pytest.raises(ProtocolError, match=f"bad_kit: changed.kit: {name} is not as it was signed"):
                provision.read_kit(repacked(kit, add), NOW)
        assert reason(provision.read_kit, repacked(kit, drop), NOW) == "bad_kit"


@pytest.mark.parametrize("key", ["consortium", "party", "host", "port", "organisation", "root", "fedmat", "kind"])
def test_what_a_kit_says_of_itself_is_signed(grove: Consortium, key: str) -> None:
    def change(held: dict[str, bytes]) -> None:
        told = json.loads(held["kit.json"])
        told[key] = 1 if key == "port" else "birch"
        held["kit.json"] = json.dumps(told).encode()

    assert reason(provision.read_kit, repacked(grove.kit("forge"), change), NOW) == "bad_signature"


def test_a_kit_of_another_root_is_found_out_by_the_fingerprint_that_was_told(grove: Consortium) -> None:
    told = credentials.facts((grove.project / "ca/ca.crt").read_bytes()).fingerprint
    forged = resigned(grove.kit("forge"), credentials.new_root("small-alloys", NOW, 100), lambda held, told: None)
    kit = provision.read_kit(forged, NOW)  # whole in itself: only people can tell
    data = grove.site_file("forge")
    assert reason(provision.join, kit, grove.home("forge"), site_file=data, fingerprint=told) == "wrong_root"
    assert not grove.home("forge").exists()
    spoken = " ".join(told[i : i + 4] for i in range(0, 64, 4)).upper()
    grove.join("forge", fingerprint=spoken)


def test_a_kit_with_another_root_put_in_is_refused(grove: Consortium) -> None:
    other = credentials.new_root("small-alloys", NOW, 100)

    def swap(held: dict[str, bytes]) -> None:
        held["flare/startup/rootCA.pem"] = other.certificate

    assert reason(provision.read_kit, repacked(grove.kit("forge"), swap), NOW) == "bad_signature"


def test_even_the_operator_cannot_loosen_a_partys_settings(grove: Consortium) -> None:
    root = provision.read_project(grove.project).root

    def loosen(held: dict[str, bytes], told: dict[str, Any]) -> None:
        found = json.loads(held["flare/local/resources.json"])
        found["components"].append({"id": "x", "path": "subprocess.Popen", "args": {"args": ["true"]}})
        held["flare/local/resources.json"] = json.dumps(found).encode()

    with pytest.raises(ProtocolError, match=r"bad_kit: .*resources.json is not what fedmat"):
        provision.read_kit(resigned(grove.kit("forge"), root, loosen), NOW)


@pytest.mark.parametrize("name", ["../../forge", "server", "Forge", "", "a/b", 7, None])
def test_a_kit_cannot_name_a_path(grove: Consortium, name: Any) -> None:
    root = provision.read_project(grove.project).root
    forged = resigned(grove.kit("forge"), root, lambda held, told: told.update(party=name))
    assert reason(provision.read_kit, forged, NOW) == "bad_kit"


def test_a_kit_of_a_root_that_ended_or_has_not_begun_is_refused(grove: Consortium) -> None:
    kit = grove.kit("forge")
    assert reason(provision.read_kit, kit, NOW + 3651 * DAY) == "expired_certificate"
    with pytest.raises(ProtocolError, match=r"not_yet_valid.*\n.*check the clock"):
        provision.read_kit(kit, NOW - DAY)


def packed(entries: dict[str, bytes]) -> bytes:
    """A zip archive."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return out.getvalue()


def test_a_part_of_a_kit_is_refused(grove: Consortium) -> None:
    kit = grove.kit("forge")
    whole = kit.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        kit.write_bytes(whole[:length])
        assert reason(provision.read_kit, kit, NOW) == "bad_kit"
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        entry = archive.getinfo("consortium.yaml")
    broken = bytearray(whole)
    broken[entry.header_offset + 30 + len(entry.filename) + entry.compress_size // 2] ^= 0xFF  # inside its compressed bytes
    kit.write_bytes(bytes(broken))
    assert reason(provision.read_kit, kit, NOW) in ("bad_kit", "bad_signature")


@pytest.mark.parametrize(
    "name", ["../outside.json", "/etc/outside.json", "flare/startup/../../../outside.json", "flare/startup/client.key", "x\\y"]
)
def test_a_kit_with_a_way_out_of_its_folder_is_refused(grove: Consortium, tmp_path: Path, name: str) -> None:
    def put(held: dict[str, bytes]) -> None:
        held[name] = b"{}"

    before = tree(tmp_path).keys()
    forged = repacked(grove.kit("forge"), put)
    with pytest.raises(ProtocolError, match="does not belong there"):
        provision.read_kit(forged, NOW)
    assert tree(tmp_path).keys() - before <= {str(p.relative_to(tmp_path)) for p in (grove.project / "kits").iterdir()} | {
        "a/project/.lock"
    }


def test_a_kit_that_would_fill_the_disk_is_refused(tmp_path: Path) -> None:
    kit = tmp_path / "x.kit"
    kit.write_bytes(packed({"kit.json": bytes(60 << 20)}))
    assert kit.stat().st_size < 1 << 20  # 60 MB of zeros
    with pytest.raises(ProtocolError, match=r"kit.json is too large"):
        provision.read_kit(kit, NOW)
    kit.write_bytes(bytes(20 << 20))
    with pytest.raises(ProtocolError, match="it is too large"):
        provision.read_kit(kit, NOW)
    with pytest.raises(ConfigError, match="no such kit"):
        provision.read_kit(tmp_path / "y.kit", NOW)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_kit_with_two_files_of_one_name_is_refused(grove: Consortium) -> None:
    kit = grove.kit("forge")
    with zipfile.ZipFile(kit, "a") as archive:
        archive.writestr("consortium.yaml", b"name: other")
    assert reason(provision.read_kit, kit, NOW) == "bad_kit"


def test_another_release_is_said_before_the_first_round(grove: Consortium, monkeypatch: pytest.MonkeyPatch) -> None:
    kit = grove.kit("forge")
    assert provision.read_kit(kit, NOW).warnings == ()
    monkeypatch.setattr(provision, "__version__", "7.0.0")
    assert "fedmat is 0.1.0, here it is 7.0.0" in provision.read_kit(kit, NOW).warnings[0]


# --- joining -----------------------------------------------------------------------------------------------------


def test_a_folder_that_is_something_else_is_left_alone(grove: Consortium, tmp_path: Path) -> None:
    kit = provision.read_kit(grove.kit("forge"), NOW)
    home, data = grove.home("forge"), grove.site_file("forge")
    home.mkdir()
    (home / "thesis.txt").write_text("mine")
    with pytest.raises(StateError, match="not empty"):
        provision.join(kit, home, site_file=data)
    (home / "thesis.txt").unlink()
    provision.join(kit, home, site_file=data)  # an empty one will do

    other = Consortium(tmp_path, "b")
    for theirs, theirs_data in ((other.kit("forge"), data), (grove.kit("mill"), grove.site_file("mill"))):
        before = tree(home)
        with pytest.raises(StateError, match=r"the folder of forge in small-alloys.*nothing was written"):
            provision.join(provision.read_kit(theirs, NOW), home, site_file=theirs_data)
        assert tree(home) == before


def test_a_site_joins_with_its_own_data_only(grove: Consortium) -> None:
    kit = provision.read_kit(grove.kit("forge"), NOW)
    with pytest.raises(ConfigError, match="needs its site file"):
        provision.join(kit, grove.home("forge"))
    with pytest.raises(ConfigError, match="is of site 'mill', and the kit is for 'forge'"):
        provision.join(kit, grove.home("forge"), site_file=grove.site_file("mill"))
    assert not grove.home("forge").exists()


def test_joining_again_takes_the_new_files_and_keeps_what_is_the_partys_own(grove: Consortium) -> None:
    home = grove.member("forge")
    (home / "policy.yaml").write_text("mine: yes\n")
    before = tree(home)
    (home / "consortium.yaml").write_text("edited")
    with pytest.raises(StateError, match=r"consortium.yaml is not as it was signed"):
        provision.check_home(home, NOW)
    told = yaml.safe_load(grove.file.read_text())
    grove.file.write_text(yaml.safe_dump({**told, "title": "Three makers of alloys"}))
    assert provision.update(grove.file, grove.project) == ("foundry", "mill")
    grove.join("forge")
    after = tree(home)
    assert {n for n in after if after[n] != before.get(n)} == {"consortium.yaml", "kit.json"} and set(after) == set(before)
    provision.check_home(home, NOW)


def test_nothing_is_left_of_a_join_that_failed(grove: Consortium, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    kit = provision.read_kit(grove.kit("forge"), NOW)
    before = tree(grove.folder)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StateError, match="cannot be written"):
        provision.join(kit, grove.home("forge"), site_file=grove.site_file("forge"))
    assert tree(grove.folder) == before and not list(grove.folder.glob(".forge*"))


# --- requests ----------------------------------------------------------------------------------------------------


def test_a_request_of_somebody_who_was_not_invited_is_refused(grove: Consortium) -> None:
    request = grove.join("forge").read_bytes()
    held = json.loads((grove.project / "members.json").read_text())
    del held["forge"]
    (grove.project / "members.json").write_text(json.dumps(held))
    assert reason(provision.admit, grove.project, request, NOW) == "uninvited"


def test_a_request_for_another_consortium_is_refused(grove: Consortium, tmp_path: Path) -> None:
    other = Consortium(tmp_path, "b")
    other.kit("forge")
    assert reason(provision.admit, other.project, grove.join("forge").read_bytes(), NOW) == "wrong_consortium"


def asked(grove: Consortium, key: rsa.RSAPrivateKey | None = None, **changes: Any) -> bytes:
    """A request of forge that somebody wrote by hand, well signed by the key in it."""
    key = key or credentials.new_key()
    root = credentials.facts((grove.project / "ca/ca.crt").read_bytes()).fingerprint
    names = {"party": "forge", "organisation": "Forge Ltd", **changes.pop("inside", {})}
    body = {
        "schema": "fedmat/request/1", "consortium": "small-alloys", "root": root, "party": "forge", "organisation": "Forge Ltd",
        "request": credentials.request(key, names["party"], names["organisation"]).decode(), **changes,
    }  # fmt: skip
    return json.dumps(
        {**body, "signature": credentials.sign(key, b"fedmat/request/v1|" + files.canonical_json(body)).hex()}
    ).encode()


def test_a_request_whose_names_differ_is_refused(grove: Consortium) -> None:
    grove.kit("forge")
    grove.kit("mill")
    assert reason(provision.admit, grove.project, asked(grove, inside={"party": "mill"}), NOW) == "wrong_name"
    assert reason(provision.admit, grove.project, asked(grove, inside={"organisation": "Mill Ltd"}), NOW) == "wrong_name"
    assert reason(provision.admit, grove.project, asked(grove, organisation="Mill Ltd"), NOW) == "wrong_name"
    assert reason(provision.admit, grove.project, asked(grove, party="mill", organisation="Mill Ltd"), NOW) == "wrong_name"
    assert reason(provision.admit, grove.project, asked(grove, party="../x"), NOW) == "bad_request"
    assert grove.state("forge") == "invited" and not list((grove.project / "kits").glob("*.certificate"))


def test_a_request_that_is_none_is_refused(grove: Consortium) -> None:
    request = grove.join("forge").read_bytes()
    for raw in (
        b"",
        b"[]",
        b"{",
        request[:-20],
        b"[" * 100_000,
        bytes(1 << 20),
        json.dumps({"schema": "fedmat/request/1"}).encode(),
    ):
        assert reason(provision.admit, grove.project, raw, NOW) == "bad_request"
    for change in ({"signature": "00"}, {"signature": None}, {"more": "x"}):
        raw = json.dumps({**json.loads(request), **change}).encode()
        assert reason(provision.admit, grove.project, raw, NOW) == "bad_signature"


def test_another_key_than_the_one_told_by_telephone_is_refused(grove: Consortium) -> None:
    request = grove.join("forge").read_bytes()
    told = provision.request_fingerprint(request)
    intruder = asked(grove)
    assert reason(provision.admit, grove.project, intruder, NOW, fingerprint=told) == "wrong_key"
    assert grove.state("forge") == "invited"
    assert provision.admit(grove.project, request, NOW, fingerprint=told.upper()).fingerprint == told


def test_a_second_party_of_one_name_is_refused_unless_the_operator_says_so(grove: Consortium) -> None:
    home = grove.member("forge")
    first = provision.read_project(grove.project).members["forge"]
    intruder = asked(grove)
    assert reason(provision.admit, grove.project, intruder, NOW) == "already_admitted"
    assert provision.read_project(grove.project).members["forge"] == first
    made = provision.admit(grove.project, intruder, NOW, replace_key=True)
    found = provision.read_project(grove.project)
    assert made.replaced == first.serial and found.revoked == (first.serial,) and not made.vouched
    own = provision.check_home(home, NOW)  # the party cannot know
    revoked = reason(
        credentials.check_certificate, own.credential.certificate, own.root, name="forge", now=NOW, revoked=found.revoked
    )
    assert revoked == "revoked"


def test_asking_again_gives_the_same_certificate(grove: Consortium) -> None:
    request = grove.join("forge").read_bytes()
    first = provision.admit(grove.project, request, NOW)
    raw = first.certificate.read_bytes()
    again = provision.admit(grove.project, request, NOW + DAY)
    assert again == first and raw == again.certificate.read_bytes()
    assert reason(provision.admit, grove.project, request, NOW + 366 * DAY) == "already_admitted"  # it has ended


def test_no_two_parties_have_one_key(grove: Consortium) -> None:
    key = credentials.new_key()
    for party in ("forge", "mill"):
        grove.kit(party)
    provision.admit(grove.project, asked(grove, key), NOW)
    names = {"party": "mill", "organisation": "Mill Ltd"}
    theirs = asked(grove, key, inside=names, **names)
    assert reason(provision.admit, grove.project, theirs, NOW) == "reused_key"


# --- certificates ------------------------------------------------------------------------------------------------


def test_a_certificate_is_installed_only_where_it_belongs(grove: Consortium, tmp_path: Path) -> None:
    forge, mill = grove.join("forge"), grove.join("mill")
    ours = provision.admit(grove.project, forge.read_bytes(), NOW).certificate.read_bytes()
    theirs = provision.admit(grove.project, mill.read_bytes(), NOW).certificate.read_bytes()
    home = grove.home("forge")
    assert reason(provision.install, home, theirs, NOW) == "wrong_consortium"
    other = Consortium(tmp_path, "b")
    foreign = provision.admit(other.project, other.join("forge").read_bytes(), NOW).certificate.read_bytes()
    assert reason(provision.install, home, foreign, NOW) == "wrong_consortium"
    mixed = json.dumps({**json.loads(ours), "certificate": json.loads(theirs)["certificate"]}).encode()
    assert reason(provision.install, home, mixed, NOW) == "wrong_name"
    mixed = json.dumps({**json.loads(ours), "certificate": json.loads(foreign)["certificate"]}).encode()
    assert reason(provision.install, home, mixed, NOW) == "bad_certificate"
    for raw in (b"", b"{}", forge.read_bytes(), ours[:-9]):
        assert reason(provision.install, home, raw, NOW) == "bad_certificate"
    assert reason(provision.install, home, ours, NOW + 366 * DAY) == "expired_certificate"
    assert reason(provision.install, home, ours, NOW - DAY) == "not_yet_valid"
    with pytest.raises(StateError, match="no certificate yet"):
        provision.check_home(home, NOW)
    provision.install(home, ours, NOW)
    provision.check_home(home, NOW)


def test_a_certificate_of_a_key_that_is_elsewhere_is_refused(grove: Consortium) -> None:
    grove.join("forge")
    elsewhere = provision.admit(grove.project, asked(grove), NOW).certificate.read_bytes()
    assert reason(provision.install, grove.home("forge"), elsewhere, NOW) == "wrong_key"


# --- before a start ----------------------------------------------------------------------------------------------


def refused(home: Path, match: str, now: datetime = NOW) -> None:
    """A party's folder with which it may not start."""
    with pytest.raises(FedmatError, match=match) as caught:
        provision.check_home(home, now)
    assert caught.value.fix


def test_a_party_does_not_start_outside_the_days_of_its_certificate(grove: Consortium) -> None:
    home = grove.member("forge")
    refused(home, "expired_certificate: the certificate of forge ended on 2027-11-24", NOW + 366 * DAY)
    refused(home, r"not_yet_valid: .*this machine's clock says 2026-11-23", NOW - DAY)
    assert provision.check_home(home, NOW + 334 * DAY).warnings == ()
    (warning,) = provision.check_home(home, NOW + 336 * DAY).warnings
    assert warning.startswith("the certificate of forge ends on 2027-11-24: fedmat site renew")


@pytest.mark.parametrize("what", [".", "flare/startup", "flare/startup/client.key"])
def test_a_party_does_not_start_where_others_may_read_its_key(grove: Consortium, what: str) -> None:
    home = grove.member("forge")
    mode = stat.S_IMODE((home / what).stat().st_mode)
    for loose in (0o040, 0o004, 0o020, 0o001):
        (home / what).chmod(mode | loose)
        refused(home, "others than its owner")
    (home / what).chmod(mode)
    provision.check_home(home, NOW)


@pytest.mark.parametrize(
    "name",
    [
        "consortium.yaml", "kit.json", "flare/startup/fed_client.json", "flare/startup/rootCA.pem", "flare/local/resources.json",
        "flare/local/authorization.json", "flare/local/log_config.json", "flare/local/privacy.json", "party.json", "policy.yaml",
        "flare/startup/client.crt", "flare/startup/client.key",
    ],
)  # fmt: skip
def test_a_party_does_not_start_without_a_file(grove: Consortium, name: str) -> None:
    home = grove.member("forge")
    (home / name).unlink()
    refused(home, "lost|missing|no such file|no certificate yet")


def test_a_party_does_not_start_with_an_edited_kit(grove: Consortium) -> None:
    home = grove.member("forge")
    whole = tree(home)
    for name in (
        "flare/local/authorization.json",
        "flare/local/resources.json",
        "flare/startup/fed_client.json",
        "consortium.yaml",
    ):
        (home / name).write_bytes(whole[name] + b"\n")
        refused(home, f"{name} is not as it was signed")
        (home / name).write_bytes(whole[name])
    (home / "flare/local/privacy.json").write_text('{"scopes": [{"name": "fedmat"}], "default_scope": "fedmat"}')
    refused(home, r"privacy.json: was edited, or its folder was moved")
    (home / "flare/local/privacy.json").write_bytes(whole["flare/local/privacy.json"])
    edit(home / "kit.json", port=9)
    refused(home, "bad_signature|edited")
    (home / "kit.json").write_bytes(whole["kit.json"])
    edit(home / "party.json", kind="notary")
    refused(home, r"party.json: does not agree with the kit")
    (home / "party.json").write_bytes(whole["party.json"])
    (home / "policy.yaml").write_text("the site's own: yes\n")  # is the site's to change
    provision.check_home(home, NOW)


def test_a_party_does_not_start_with_a_key_or_certificate_of_another(grove: Consortium) -> None:
    forge, mill = grove.member("forge"), grove.member("mill")
    startup = Path("flare/startup")
    shutil.copy(mill / startup / "client.key", forge / startup / "client.key")
    refused(forge, r"client.key: not the key of client.crt")
    shutil.copy(mill / startup / "client.crt", forge / startup / "client.crt")
    refused(forge, "wrong_name")


def test_a_folder_that_was_moved_says_so_and_joining_again_mends_it(grove: Consortium, tmp_path: Path) -> None:
    home = grove.member("forge")
    home.rename(tmp_path / "moved")
    refused(tmp_path / "moved", "its folder was moved")
    grove.join("forge", home=tmp_path / "moved")
    assert provision.check_home(tmp_path / "moved", NOW).party == "forge"


def test_a_folder_is_the_same_through_a_link(grove: Consortium, tmp_path: Path) -> None:
    home = grove.member("forge")
    (tmp_path / "link").symlink_to(home)
    assert provision.check_home(tmp_path / "link", NOW).folder == home


# --- renewal and revocation --------------------------------------------------------------------------------------


def test_a_renewed_key_takes_over_when_its_certificate_is_installed(grove: Consortium) -> None:
    home = grove.member("forge")
    old = provision.check_home(home, NOW).credential
    later = NOW + 340 * DAY
    request = provision.renew(home, later)
    assert provision.renew(home, later) == request  # asking again does no harm
    found = provision.check_home(home, later)
    assert found.credential == old and any("not finished" in w for w in found.warnings)
    assert reason(provision.admit, grove.project, request.read_bytes(), later) == "already_admitted"
    made = provision.admit(grove.project, request.read_bytes(), later, replace_key=True)
    assert made.vouched and made.replaced == credentials.facts(old.certificate).serial
    provision.install(home, made.certificate.read_bytes(), later)
    found = provision.check_home(home, later)
    assert found.credential != old and found.warnings == () and found.not_after == later + 365 * DAY
    assert not (home / "renewal").exists() and not request.exists()


def test_an_ended_key_vouches_for_nothing(grove: Consortium) -> None:
    home = grove.member("forge")
    late = NOW + 400 * DAY
    request = provision.renew(home, late)
    assert not provision.admit(grove.project, request.read_bytes(), late, replace_key=True).vouched


def test_only_the_partys_own_key_vouches_for_its_new_one(grove: Consortium) -> None:
    home = grove.member("forge")
    mill = provision.check_home(grove.member("mill"), NOW).credential
    request = json.loads(provision.renew(home, NOW).read_text())
    body = {k: v for k, v in request.items() if k not in ("signature", "vouched")}
    told = b"fedmat/request/v1|" + files.canonical_json(body)
    request["vouched"] = {"certificate": mill.certificate.decode(), "signature": mill.sign(told).hex()}
    raw = json.dumps(request).encode()
    assert reason(provision.admit, grove.project, raw, NOW, replace_key=True) == "wrong_name"
    for vouched in ({}, "x", {"certificate": 1, "signature": 2}):
        raw = json.dumps({**request, "vouched": vouched}).encode()
        assert reason(provision.admit, grove.project, raw, NOW, replace_key=True) == "bad_request"


def test_a_crash_while_a_renewal_is_installed_is_mended_by_the_same_command(
    grove: Consortium, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = grove.member("forge")
    made = provision.admit(grove.project, provision.renew(home, NOW).read_bytes(), NOW, replace_key=True)
    replaced: list[Path] = []

    def crash(here: Path, there: Path) -> None:
        if replaced:
            raise OSError("power")
        replaced.append(there)
        rename(here, there)

    rename = os.replace
    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="power"):
        provision.install(home, made.certificate.read_bytes(), NOW)
    monkeypatch.undo()
    refused(home, "not the key of")
    provision.install(home, made.certificate.read_bytes(), NOW)
    provision.check_home(home, NOW)


def test_a_revoked_party_is_on_the_servers_list_and_comes_back_only_with_a_new_key(grove: Consortium, tmp_path: Path) -> None:
    home = grove.member("forge")
    serial = provision.read_project(grove.project).members["forge"].serial
    request = provision.renew(home, NOW).read_bytes()
    assert provision.revoke(grove.project, "forge") == serial
    assert json.loads((grove.project / "revoked.json").read_text()) == {"serials": [serial]}
    assert grove.state("forge") == "revoked" and provision.revoke(grove.project, "forge") == serial
    assert reason(provision.admit, grove.project, request, NOW) == "revoked"
    grove.kit("forge")
    assert grove.state("forge") == "invited"
    old = provision.check_home(home, NOW).credential
    assert reason(provision.admit, grove.project, asked(grove, old.private), NOW) == "revoked"
    fresh = grove.join("forge", home=tmp_path / "again")
    assert provision.admit(grove.project, fresh.read_bytes(), NOW).replaced is None
    assert provision.read_project(grove.project).revoked == (serial,)
    with pytest.raises(ConfigError, match="was not invited"):
        provision.revoke(grove.project, "mill")


# --- the operator ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["", "Hub", "hub:8002", "a b", "-a", "a..b", "999.1.1.1", "::1", "h" * 65, "http://hub"])
def test_a_host_is_a_name_or_an_address(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match="no host name"):
        provision.init(small.build(tmp_path / "c"), tmp_path / "p", host=host, now=NOW)
    assert not (tmp_path / "p").exists()


def test_a_project_is_made_once(grove: Consortium) -> None:
    before = tree(grove.project)
    with pytest.raises(StateError, match="not empty, and nothing was written"):
        provision.init(grove.file, grove.project, host=HOST, now=NOW)
    assert tree(grove.project) == before
    with pytest.raises(StateError, match="no project"):
        provision.read_project(grove.folder)
    (grove.project / "revoked.json").write_text("[]")
    with pytest.raises(StateError, match="damaged"):
        provision.read_project(grove.project)


def changed(path: Path, **changes: Any) -> Path:
    """A consortium file with other settings beside it."""
    out = path.with_name("changed.yaml")
    out.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))
    return out


def test_only_names_that_a_certificate_can_carry_are_taken(grove: Consortium) -> None:
    members = yaml.safe_load(grove.file.read_text())["members"]
    for site, owner in (("server", "X"), ("notary", "X"), ("forge", "X" * 65)):
        bad = changed(grove.file, members=[{**members[0], "site": site, "organisation": owner}])
        with pytest.raises(ConfigError, match="no site can be called|too long"):
            provision.init(bad, grove.folder / "p2", host=HOST, now=NOW)


def test_who_runs_a_party_is_known_or_said(grove: Consortium) -> None:
    with pytest.raises(ConfigError, match=r"say it: --organisation"):
        provision.invite(grove.project, "notary", NOW)
    with pytest.raises(ConfigError, match="belongs to 'Forge Ltd'"):
        provision.invite(grove.project, "forge", NOW, organisation="Mill Ltd")
    with pytest.raises(ConfigError, match="no party of small-alloys"):
        provision.invite(grove.project, "stranger", NOW)


def test_a_role_changes_hands_only_when_its_certificate_is_revoked(grove: Consortium) -> None:
    home = grove.member("notary")
    charter = {"consortium": "small-alloys", "parties": [{"name": "notary", "organisation": "Another office"}]}
    files.write_json(grove.project / "charter.json", charter)
    with pytest.raises(ConfigError, match="was admitted for 'Office'"):
        provision.invite(grove.project, "notary", NOW)
    serial = provision.revoke(grove.project, "notary")
    kit = provision.read_kit(provision.invite(grove.project, "notary", NOW), NOW)
    assert kit.organisation == "Another office" and provision.read_project(grove.project).revoked == (serial,)
    provision.join(kit, home)
    refused(home, "wrong_name: the certificate of notary is for another organisation")


def test_a_charter_travels_with_the_kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "draft", lambda config, charter_sha256: f"{config.name} {charter_sha256}")
    path = small.build(tmp_path / "c")
    owners = {m["site"]: m["organisation"] for m in yaml.safe_load(path.read_text())["members"]}
    people = [(s, "site", o) for s, o in owners.items()] + [(r, r, f"{r} office") for r in ROLES]
    entries = [keys.PartyKeys.new(n).public(k, o, (NOW + 99 * DAY).date()) for n, k, o in people]  # type: ignore[arg-type]
    made = keys.charter("small-alloys", "x25519", entries)
    files.write_json(path.parent / "agreed/charter.json", made.model_dump(mode="json"))
    named = changed(path, charter="agreed/charter.json")
    provision.init(named, tmp_path / "p", host=HOST, now=NOW)
    kit = provision.read_kit(provision.invite(tmp_path / "p", "notary", NOW), NOW)
    assert kit.organisation == "notary office" and json.loads(kit.files["charter.json"])["consortium"] == "small-alloys"
    site = provision.read_kit(provision.invite(tmp_path / "p", "forge", NOW), NOW)
    provision.join(site, tmp_path / "forge", site_file=path.parent / "forge/site.yaml")
    assert (tmp_path / "forge/policy.yaml").read_text() == f"small-alloys {made.sha256}"
    files.write_json(path.parent / "agreed/charter.json", {**made.model_dump(mode="json"), "consortium": "other"})
    with pytest.raises(ConfigError, match="not of small-alloys"):
        provision.init(named, tmp_path / "p2", host=HOST, now=NOW)


def test_the_server_does_not_start_on_a_doubt(grove: Consortium) -> None:
    assert provision.check_project(grove.project, NOW).warnings == ()
    for key in ("ca/ca.key", "server/startup/server.key", "admin/startup/client.key"):
        (grove.project / key).chmod(0o640)
        with pytest.raises(StateError, match="others than its owner"):
            provision.check_project(grove.project, NOW)
        (grove.project / key).chmod(0o600)
    for name in ("server/local/resources.json", "server/local/authorization.json", "server/startup/fed_server.json"):
        whole = (grove.project / name).read_bytes()
        (grove.project / name).write_bytes(whole + b" ")
        with pytest.raises(StateError, match=f"{name}: was edited"):
            provision.check_project(grove.project, NOW)
        (grove.project / name).write_bytes(whole)
    assert reason(provision.check_project, grove.project, NOW - DAY) == "not_yet_valid"
    assert reason(provision.check_project, grove.project, NOW + 366 * DAY) == "expired_certificate"
    (grove.project / "revoked.json").unlink()
    with pytest.raises(StateError, match=r"revoked.json: no such file"):
        provision.check_project(grove.project, NOW)


def test_the_server_runs_without_the_roots_key_and_nobody_is_admitted_without_it(grove: Consortium) -> None:
    request = grove.join("forge").read_bytes()
    (grove.project / "ca/ca.key").rename(grove.folder / "stick")
    assert provision.check_project(grove.project, NOW).warnings == ()
    for call in (
        lambda: provision.admit(grove.project, request, NOW),
        lambda: grove.kit("mill"),
        lambda: provision.renew_project(grove.project, NOW),
    ):
        with pytest.raises(StateError, match="the root's key is not here"):
            call()
    provision.revoke(grove.project, "forge")
    (grove.folder / "stick").rename(grove.project / "ca/ca.key")
    grove.kit("mill")


def test_what_ends_soon_is_said_and_renewed(grove: Consortium) -> None:
    home = grove.member("forge")
    late = NOW + 340 * DAY
    found = provision.check_project(grove.project, late)
    assert [w.split(" ends")[0] for w in found.warnings] == [
        "the server's certificate", "the operator's certificate", "the certificate of forge",
    ]  # fmt: skip
    provision.renew_project(grove.project, late)
    found = provision.check_project(grove.project, late)
    assert len(found.warnings) == 1 and len(found.revoked) == 2
    provision.check_home(home, late)  # notices nothing


def test_a_project_that_was_moved_says_so_and_renewing_mends_it(grove: Consortium) -> None:
    moved = grove.project.rename(grove.folder / "elsewhere")
    with pytest.raises(StateError, match="its folder was moved"):
        provision.check_project(moved, NOW)
    provision.renew_project(moved, NOW)
    assert provision.check_project(moved, NOW).folder == moved


def test_a_changed_consortium_file_keeps_who_was_invited(grove: Consortium, tmp_path: Path) -> None:
    grove.member("forge")
    told = yaml.safe_load(grove.file.read_text())
    fewer = [m for m in told["members"] if m["site"] != "forge"]
    with pytest.raises(ConfigError, match="forge was invited"):
        provision.update(changed(grove.file, members=fewer), grove.project)
    with pytest.raises(ConfigError, match="is the project of small-alloys"):
        provision.update(changed(grove.file, name="other"), grove.project)
    more = [*told["members"], {"site": "smelter", "organisation": "Smelter Ltd", "file": "smelter/site.yaml"}]
    assert "smelter" in provision.update(changed(grove.file, members=more), grove.project)
    provision.revoke(grove.project, "forge")
    provision.update(changed(grove.file, members=fewer), grove.project)


# --- all at once -------------------------------------------------------------------------------------------------


def rehearsed(folder: Path, port: int = 8002, now: datetime = NOW) -> dict[str, tuple[Path, Path | None]]:
    """A rehearsal's parties."""
    path = small.build(folder / "c")
    parties: dict[str, tuple[Path, Path | None]] = {s: (folder / s, folder / "c" / s / "site.yaml") for s in small.COMPANIES}
    parties |= {r: (folder / r, None) for r in (*ROLES, "reference")}
    provision.rehearsal(path, folder / "project", parties, now=now, port=port)
    return parties


def test_a_rehearsal_makes_what_the_parties_would_have_made(tmp_path: Path, grove: Consortium) -> None:
    parties = rehearsed(tmp_path)
    found = provision.check_project(tmp_path / "project", NOW)
    assert found.host == "localhost" and {m.state for m in found.members.values()} == {"admitted"}
    assert set(found.members) == set(parties)
    for home, _ in parties.values():
        provision.check_home(home, NOW)
    by_hand = grove.member("forge")
    assert set(tree(by_hand)) == set(tree(tmp_path / "forge"))
    assert tree(by_hand)["flare/local/resources.json"] == tree(tmp_path / "forge")["flare/local/resources.json"]
    with pytest.raises(StateError, match="not empty"):
        rehearsed(tmp_path)


@pytest.fixture
def network(tmp_path: Path) -> Iterator[tuple[Path, Any]]:
    """A rehearsal and a way to start its processes; all of them end with the test."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rehearsed(tmp_path, port, datetime.now(UTC))
    started: list[subprocess.Popen[bytes]] = []

    def start(kind: str, workspace: Path, *settings: str) -> None:
        module = f"nvflare.private.fed.app.{kind}.{kind}_train"
        words = [
            "-m",
            str(workspace),
            "-s",
            f"fed_{kind}.json",
            "--set",
            "secure_train=true",
            *settings,
            "config_folder=config",
        ]
        out = (tmp_path / f"{workspace.parent.name}.out").open("wb")
        started.append(
            subprocess.Popen(
                [sys.executable, "-u", "-m", module, *words], stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
        )
        out.close()

    yield tmp_path, start
    for process in started:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_the_server_lets_in_who_is_certified_and_nobody_else(network: tuple[Path, Any]) -> None:
    folder, start = network
    # Another operator's rehearsal with the same names and port: its party dials the same server.
    foreign = folder / "foreign"
    rehearsed(foreign, provision.read_project(folder / "project").port, datetime.now(UTC))
    provision.revoke(folder / "project", "mill")
    start("server", folder / "project/server", "org=small-alloys")
    start("client", foreign / "auditor/flare", "uid=auditor", "org=Auditor")
    for party in ("forge", "notary", "mill"):
        start("client", folder / party / "flare", f"uid={party}", f"org={party}")
    log, until = folder / "project/server/log.txt", time.monotonic() + 90
    said, awaited = "", ("New client forge", "New client notary", "turned away mill")
    while time.monotonic() < until and not all(text in said for text in awaited):
        time.sleep(0.5)
        said = log.read_text() if log.exists() else ""
    assert [text for text in awaited if text not in said] == []
    time.sleep(3)
    assert not any(f"New client {party}" in log.read_text() for party in ("mill", "auditor"))
    assert {p.name for p in (folder / "project/server/store").iterdir()} == {"jobs", "snapshots"}
    assert (folder / "forge/flare/log.txt").exists() and not list((folder / "forge/flare").glob("*log*.json"))
