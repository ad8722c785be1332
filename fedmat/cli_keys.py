"""The commands about keys: ``fedmat keys new | show | charter | rotate | check``.

Knows: what a party's key keeper and the consortium's operator type, and the date. Refuses to know: how keys are made, signed
with and verified (``fedmat.keys``). No private key is ever shown.
"""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fedmat.commands import Group, Json
from fedmat.errors import ConfigError, ProtocolError, StateError

if TYPE_CHECKING:
    from fedmat.keys import Charter, Party, Rotation

keys_app = typer.Typer(
    cls=Group, no_args_is_help=True, help="Keys of sites and roles, and the charter that says whose are whose."
)

SOON = 30  # days before the end of a key that count as soon
Folder = Annotated[Path, typer.Option(help="The party's folder of keys, readable by its owner alone.")]
Days = Annotated[int, typer.Option(min=1, max=3650, help="How many days from today the keys count.")]


@keys_app.command("new")
def keys_new(
    party: Annotated[
        str,
        typer.Argument(
            help="The site's name in the consortium file, or aggregator, auditor, notary; operator: who keeps the ledger."
        ),
    ],
    folder: Folder,
    organisation: Annotated[str, typer.Option(help="Who runs it. The three roles must be three organisations.")],
    kem: Annotated[
        Literal["x25519", "mlkem768-x25519"],
        typer.Option(help="How messages are sealed; the same for all. mlkem768-x25519 also withstands a quantum computer."),
    ] = "x25519",
    kind: Annotated[
        Literal["site", "aggregator", "auditor", "notary", "operator"] | None,
        typer.Option(help="What the party is.", show_default="the role of that name, else site"),
    ] = None,
    days: Days = 365,
    as_json: Json = False,
) -> None:
    """Make a party's keys, at the party.

    Writes the private keys and a public entry, PARTY.party.json, for the operator. Keys that are there are never replaced.
    The operator's own keys sign the ledger (docs/charter.md); they open no round.

    Example:  fedmat keys new acme-cells --folder keys --organisation "Acme Cells"
    """
    from fedmat import console, keys
    from fedmat.envelopes import ROLES

    named: tuple[keys.Kind, ...] = (*ROLES, "operator")
    is_kind = kind or next((k for k in named if k == party), "site")
    if (is_kind == "site") == (party in named) or is_kind not in ("site", party):
        raise ConfigError(f"{party} cannot be of kind {is_kind}", fix="a role is called by its kind, a site is not")
    made = keys.PartyKeys.new(party, kem)
    try:
        entry = made.public(is_kind, organisation, _until(days))
    except ValueError:
        raise ConfigError(
            f"'{party}' is no name of a party", fix="use lower case, digits and dashes, as in the consortium file"
        ) from None
    path = keys.create(made, entry, folder)
    if as_json:
        console.write_json({"party": _plain(entry), "entry": str(path), "folder": str(folder)})
        return
    console.show_where([
        ("private keys", f"{console.show_path(folder)} (they stay there)"),
        ("for the operator", console.show_path(path)),
        ("fingerprint", spoken(entry.sha256)),
        ("count until", str(entry.not_after)),
    ])  # fmt: skip


@keys_app.command("charter")
def keys_charter(
    paths: Annotated[
        list[Path], typer.Argument(metavar="CONSORTIUM PARTY.party.json...", help="With --apply: the charter alone.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="File to write.", show_default="charter.json; with --apply, the charter itself"),
    ] = None,
    rotation: Annotated[Path | None, typer.Option("--apply", help="Take a party's rotation into a charter.")] = None,
    as_json: Json = False,
) -> None:
    """Put everyone's public keys into the consortium's charter, or a party's new keys.

    Prints the charter's digest: every party compares it with every other by telephone before it uses the file.

    Example:  fedmat keys charter consortium.yaml elm.party.json oak.party.json notary.party.json -o charter.json
    """
    from fedmat import console, files, keys

    if rotation is not None:
        if len(paths) != 1:
            raise ConfigError(
                f"--apply takes one charter, found {len(paths)} files", fix="fedmat keys charter --apply ROTATION CHARTER"
            )
        before, step = keys.read_charter(paths[0]), keys.read_rotation(rotation)
        charter, out = keys.apply(before, step, _today()), out or paths[0]
        told = [("of", step.entry.name), ("its new fingerprint", f"{spoken(step.entry.sha256)} (compare with it by telephone)")]
    else:
        out = out or Path("charter.json")
        if out.exists():
            raise ConfigError(
                f"{out} is there already, and nothing was written",
                fix="name another file with -o; new keys of one party come in with --apply",
            )
        charter, told = _agreed(paths), []
    files.write_json(out, charter.model_dump(mode="json"))
    if as_json:
        console.write_json({"charter": str(out), **_summary(charter)})
        return
    _show_parties(charter.parties)
    where = [
        ("charter", console.show_path(out)),
        ("revision", str(charter.revision)),
        *told,
        ("digest", spoken(charter.sha256)),
    ]
    console.show_where(where)
    console.say("every party compares this digest with the others by telephone before it uses the file")


@keys_app.command("rotate")
def keys_rotate(
    party: Annotated[str, typer.Argument(help="The party's name.")],
    folder: Folder,
    days: Days = 365,
    finish: Annotated[
        Path | None, typer.Option(metavar="CHARTER", help="Remove the old keys, now that this charter holds the new ones.")
    ] = None,
    undo: Annotated[bool, typer.Option("--undo", help="Put the old keys back; the new ones are lost.")] = False,
    as_json: Json = False,
) -> None:
    """Replace a party's keys, at the party, between two runs.

    Writes new keys and PARTY.rotation.json for the operator, signed by the old and the new key. The old keys stay under a dated
    name until --finish removes them. After a theft do not rotate: the thief could too. See docs/keys.md.

    Example:  fedmat keys rotate acme-cells --folder keys
    """
    from fedmat import console, keys

    if finish is not None and undo:
        raise ConfigError("--finish and --undo exclude each other", fix="use one of them")
    if keys.entry_of(folder).name != party:
        raise ConfigError(f"{folder}: not the keys of {party}", fix="name the party and its own folder")
    if finish is not None or undo:
        if finish is not None:
            keys.finish_rotation(folder, party, keys.read_charter(finish))
        else:
            keys.undo_rotation(folder, party)
        entry = keys.entry_of(folder)
        if as_json:
            console.write_json({"party": _plain(entry), "folder": str(folder)})
        else:
            console.say(f"{party}: {'the old keys are removed' if finish else 'the old keys are back'}")
        return
    if keys.rotation_under_way(folder):
        raise StateError(
            f"{folder}: a rotation is under way", fix="end it with fedmat keys rotate --finish, or take it back with --undo"
        )
    old = keys.load(folder, party)
    new = keys.PartyKeys.new(party, old.kem)
    made = keys.rotate(old, keys.entry_of(folder), new, _until(days), _today())
    path = keys.save_rotation(folder, made, new)
    if as_json:
        console.write_json({"party": _plain(made.entry), "rotation": str(path), "folder": str(folder)})
        return
    console.show_where([
        ("for the operator", console.show_path(path)),
        ("new fingerprint", spoken(made.entry.sha256)),
        ("count until", str(made.entry.not_after)),
        ("then", f"fedmat keys rotate {party} --folder {console.show_path(folder)} --finish charter.json"),
    ])  # fmt: skip


@keys_app.command("show")
def keys_show(
    path: Annotated[
        Path, typer.Argument(metavar="FOLDER_OR_FILE", help="A folder of keys, an entry, a rotation or a charter.")
    ],
    as_json: Json = False,
) -> None:
    """Show public keys, fingerprints and how long they count.

    Of a folder only the public entry is read.

    Example:  fedmat keys show keys
    """
    from fedmat import console

    found = _read(path)
    if as_json:
        console.write_json({"parties": [_plain(p) for p in found]})
        return
    _show_parties(found)
    for p in found:
        console.show_where([
            (p.name, p.organisation),
            ("signing key", p.signing),
            ("sealing key", p.sealing if len(p.sealing) <= 64 else f"{p.sealing[:64]}... ({len(p.sealing) // 2} bytes)"),
        ])  # fmt: skip


@keys_app.command("check")
def keys_check(
    charter: Annotated[Path, typer.Argument(metavar="CHARTER", help="The consortium's charter.")],
    folder: Annotated[Path | None, typer.Option(help="A party's folder of keys: are they those of the charter?")] = None,
    as_json: Json = False,
) -> None:
    """Tell whether a charter holds, and whether a folder's keys are those in it.

    Verifies every rotation, the days left and who may read the files. Ends with 0 if all is well, 5 for a folder's keys or
    permissions, 6 for keys that have ended or a charter that is not what was agreed.

    Example:  fedmat keys check charter.json --folder keys
    """
    from fedmat import console, keys

    found = keys.read_charter(charter)
    mine, notes = None, []
    if folder is not None:
        keys.check_folder(folder)
        mine = keys.entry_of(folder).name
        own = keys.load_fitting(folder, mine, found)
        if keys.rotation_under_way(folder):
            taken = own.holds(keys.entry_of(folder))
            notes.append(
                f"{mine}: the charter has taken the new keys; remove the old ones with fedmat keys rotate --finish"
                if taken
                else f"{mine}: the charter still holds the old keys; they are used until it takes the new ones"
            )
    checked = [p for p in found.parties if mine is None or p.name == mine]
    notes += [f"{p.name}: {_left(p)} days left; fedmat keys rotate at {p.name}" for p in checked if 0 <= _left(p) < SOON]
    ended = [p for p in checked if _left(p) < 0]
    if as_json:
        console.write_json({**_summary(found), "folder_of": mine, "notes": notes, "ok": not ended})
    else:
        _show_parties(found.parties)
        for note in notes:
            console.say(f"note: {note}")
        where = [("revision", str(found.revision)), ("digest", spoken(found.sha256))]
        console.show_where(where + ([("folder", f"holds the keys of {mine} in this charter")] if mine else []))
    if ended:
        names = ", ".join(p.name for p in ended)
        raise ProtocolError(
            "expired_key", f"the keys of {names} have ended", fix="new keys and a new charter: an ended key vouches for nothing"
        )


def spoken(digest: str) -> str:
    """Returns a digest in groups of four, to be read aloud."""
    return " ".join(digest[i : i + 4] for i in range(0, len(digest), 4))


def _agreed(paths: list[Path]) -> Charter:
    from fedmat import keys
    from fedmat.config import load_consortium
    from fedmat.envelopes import ROLES

    config = load_consortium(paths[0])
    needed = {"none": (), "masking": (), "ckks": ("auditor",)}.get(
        config.plan.security.mode, ROLES
    )  # who is there in each kind of round
    return keys.agree(config, [keys.read_entry(p) for p in paths[1:]], _today(), needed)


def _read(path: Path) -> tuple[Party, ...]:
    from fedmat import files, keys

    if path.is_dir():
        return (keys.entry_of(path),)
    if not path.is_file():
        raise ConfigError(f"{path}: no such file", fix="name a folder of keys, an entry, a rotation or a charter")
    try:
        raw = files.read_json(path)
    except StateError:
        raise ConfigError(
            f"{path}: no public file of fedmat keys", fix="name the folder, an entry, a rotation or a charter"
        ) from None
    if isinstance(raw, dict) and "parties" in raw:
        return keys.read_charter(path).parties
    if isinstance(raw, dict) and "replaces" in raw:
        step: Rotation = keys.read_rotation(path)
        step.verify()
        return (step.entry,)
    return (keys.read_entry(path),)


def _plain(party: Party) -> dict[str, Any]:
    return {**party.model_dump(mode="json"), "kem": party.kem, "fingerprint": party.sha256, "days_left": _left(party)}


def _summary(charter: Charter) -> dict[str, Any]:
    from fedmat import keys

    return {
        "consortium": charter.consortium,
        "kem": charter.kem,
        "revision": charter.revision,
        "sha256": charter.sha256,
        "revisions": list(keys.verify_chain(charter)),
        "parties": [_plain(p) for p in charter.parties],
    }


def _show_parties(parties: tuple[Party, ...]) -> None:
    from fedmat import console

    rows = [(p.name, p.kind, p.organisation, p.kem, str(p.not_after), _left(p), p.sha256[:16]) for p in parties]
    columns = ("party", "kind", "organisation", "sealed with", "counts until", "days left", "fingerprint begins")
    console.show_rows("", columns, rows, right=("days left",))


def _left(party: Party) -> int:
    return (party.not_after - _today()).days


def _until(days: int) -> date:
    from datetime import timedelta

    return _today() + timedelta(days=days)


def _today() -> date:
    from datetime import UTC, datetime

    return datetime.now(UTC).date()
