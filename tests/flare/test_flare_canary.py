"""Nothing raw leaves a site over FLARE: neither a record nor where it lies is in any file or log of the operator's.

Everything that other tests did on the stage before is searched, too.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

import pytest
import small
from flare_scene import PLANTED, Scene
from leaks import contents
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal

from fedmat import provision, wire
from fedmat.domain import AttestRequest, Dropout
from fedmat.federation import flare
from fedmat.federation.engine import Failure, unframe
from fedmat.party import Desk

SITE = "mill"
ASKED = wire.encode(AttestRequest("p" * 64))


@pytest.fixture(scope="module")
def searched(scene: Scene) -> Scene:
    """The stage after a whole run, registration apart."""
    scene.run(scene.order("canary"))
    return scene


def needles() -> dict[str, bytes]:
    """What is planted, in the encodings that the tools here write."""
    found: dict[str, bytes] = {}
    for formula, celsius, hardness in PLANTED:
        copper, _, iron = formula.removeprefix("Cu").partition("Fe")
        words = {formula, f"{celsius:.6g}", f"{celsius + 273.15:.8g}"[:9], f"{hardness:.8g}"[:9]}
        words |= {f"Fe{float(iron):g}Cu{float(copper):g}"} if iron else set()
        for word in words - {"25", "298.15"}:
            found |= {
                word: word.encode(),
                f"{word} in UTF-16": word.encode("utf-16-le"),
                f"{word} in hex": word.encode().hex().encode(),
            }
        for number in {celsius, celsius + 273.15, hardness} - {25.0, 298.15}:
            found |= {f"{number!r} as a double": struct.pack("<d", number), f"{number!r} reversed": struct.pack(">d", number)}
    return found


def hits(paths: Iterable[Path], wanted: Mapping[str, bytes]) -> set[tuple[str, str]]:
    """Which needle was found in which file."""
    return {(n, str(p)) for p in paths for content in contents(p) for n, needle in wanted.items() if needle in content}


def operators(scene: Scene) -> Iterator[Path]:
    """Every file below the operator's folder: orders, runs, the server's store and logs."""
    yield from (p for p in sorted(scene.stage.project.rglob("*")) if p.is_file() and not p.is_symlink())


def logs(scene: Scene) -> Iterator[Path]:
    """Every log and console of a party's FLARE client and desk: what its people send when they ask for help."""
    for party in scene.stage.parties:
        home = scene.stage.home(party)
        yield from (p for p in sorted([*(home / "flare").rglob("*"), *(home / "run").glob("*.log")]) if p.is_file())


def test_no_record_is_in_any_file_of_the_operators_nor_in_a_partys_logs(searched: Scene) -> None:
    assert sum(1 for _ in operators(searched)) > 20
    assert hits(operators(searched), needles()) == set()
    assert hits(logs(searched), needles()) == set()


def test_the_same_search_finds_them_at_the_site(searched: Scene) -> None:
    own = searched.stage.home(SITE) / "sites" / SITE
    files_ = [p for p in sorted(own.rglob("*")) if p.is_file() and not p.is_symlink()]
    files_.append(searched.source.parent / SITE / "lab.csv")
    found = {needle for needle, _ in hits(files_, needles())}
    accepted = PLANTED[:-1]
    assert found >= {formula for formula, *_ in PLANTED}
    assert found >= {f"{hardness!r} as a double" for *_, hardness in accepted}


def test_no_path_of_a_sites_machine_is_in_any_file_of_the_operators(searched: Scene) -> None:
    stage = searched.stage
    places = {str(stage.home(s)): str(stage.home(s)).encode() for s in searched.sites}
    places |= {str(searched.source.parent / s): str(searched.source.parent / s).encode() for s in searched.sites}
    assert hits(operators(searched), places) == set()


# --- what a site says of its own troubles ---------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A site that has joined and did nothing else."""
    consortium = small.build(tmp_path / "c")
    parties = {SITE: (tmp_path / "home", tmp_path / "c" / SITE / "site.yaml")}
    provision.rehearsal(consortium, tmp_path / "project", parties, now=datetime.now(UTC))
    return tmp_path / "home"


class Context:
    """What FLARE tells a component about where and who it is."""

    def __init__(self, home: Path) -> None:
        self._home = home

    def get_identity_name(self) -> str:
        return SITE

    def get_prop(self, _: str) -> Context:
        return self

    def get_root_dir(self) -> str:
        return str(self._home / "flare")


def _no_desk(home: Path) -> bytes | Failure:
    task = Shareable()
    task["request"] = ASKED
    reply = flare.Relay("", {}).execute("exchange", task, Context(home), Signal())
    return unframe(SITE, reply["reply"])


def _asked(home: Path) -> bytes | Failure:
    desk = Desk(home)
    try:
        return desk.answer((home / "consortium.yaml").read_bytes(), ASKED)
    finally:
        desk.close()


def _policy_is_gone(home: Path) -> bytes | Failure:
    (home / "policy.yaml").unlink()
    return _asked(home)


def _policy_is_wrong(home: Path) -> bytes | Failure:
    (home / "policy.yaml").write_text("plans: {rule: [mean]}\n")
    return _asked(home)


@pytest.mark.parametrize("trouble", [_no_desk, _policy_is_gone, _policy_is_wrong, _asked], ids=lambda f: f.__name__)
def test_what_a_site_says_of_its_troubles_names_no_path_of_its_machine(
    trouble: Callable[[Path], bytes | Failure], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last one: its data were never prepared."""
    monkeypatch.setattr(flare, "_DESK_S", 0.1)
    said = trouble(home)
    assert isinstance(said, Dropout)
    assert said.detail and str(home) not in said.detail and str(home.parent) not in said.detail
